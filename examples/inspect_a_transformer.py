"""A recipe with a format for each role and exceptions by name, the graph that it makes, and a report.

python examples/inspect_a_transformer.py
"""

import torch
from torch import nn

import swalp_fx

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(d_model=64, nhead=4, dim_feedforward=128, batch_first=True)
x = torch.randn(2, 16, 64)

# FP8 as NVIDIA's and AMD's units have it: e4m3 forward, e5m2 backward, one scale for 32 numbers; softmax in bfloat16.
recipe = "W=mxfp8 A=mxfp8 E=mxfp8_e5m2~stochastic rounding=nearest rules=[*attn_probabilities A=bf16]"
layer, _ = swalp_fx.convert(layer, recipe=recipe, example_inputs=(x,))

layer.print_readable()
report = swalp_fx.report(layer, x)
print(report)
print(f"{report.layers[0].name} takes {report.layers[0].bits:,} bits")
