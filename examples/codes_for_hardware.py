"""What hardware stores: the codes and the scales of a tensor, bit for bit what training computed with.

python examples/codes_for_hardware.py
"""

import torch

import swalp_fx

torch.manual_seed(0)
weight = torch.randn(4, 8)
for spec in ("bfp8[0]", "mxfp4[-1:8]", "int8[0]", "e4m3"):
    codes = swalp_fx.encode(weight, spec, "stochastic", key=7)
    scales = ", ".join(str(each.flatten().tolist()) for each in codes.scales) or "none"
    print(f"{spec:12} {codes.nbytes:3} bytes  first row {codes.integers[0].tolist()}  scales {scales}")
    # The same random bits: what the codes stand for is what quantize gives.
    assert torch.equal(swalp_fx.decode(codes), swalp_fx.quantize(weight, spec, "stochastic", key=7))
