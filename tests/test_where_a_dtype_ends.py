"""Formats with numbers that a tensor's dtype would store as infinity: finite numbers stay finite, and on the grid."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from devices import DEVICES
from strategies import PRODUCTS
from tables import ALL_ROUNDINGS, assert_same_bits, every_half

from swalp_fx import FormatError, parse, quantize, reference
from swalp_fx.formats import PowerOfTwo

HALF, BF16, FLOAT = torch.float16, torch.bfloat16, torch.float32
MOST = torch.finfo(FLOAT).max

# spec, dtype, number, rounded to nearest
EXAMPLES = [
    ("fixed8.-10", HALF, 65504.0, 63 * 1024),
    ("fixed8.-10", HALF, -65504.0, -63 * 1024),
    ("fixed8.-20", HALF, 65504.0, 0.0),  # the only number that float16 holds
    ("bf16", HALF, 65504.0, 65280.0),
    ("bf16", HALF, 65296.0, 65280.0),
    ("e6m3", HALF, -65504.0, -61440.0),
    ("bfp8", HALF, 65504.0, 65024.0),  # sign and magnitude end there anyway
    ("bfp8+twos", HALF, -65504.0, -65024.0),
    ("mxfp8+ceil", HALF, 65504.0, 61440.0),
    ("mxfp4+rceil", HALF, 65504.0, 49152.0),
    ("mxint8+even", HALF, -65504.0, -63 * 1024),
    ("int8+scale1000", HALF, 65504.0, 64992.0),  # 65 * 1000, as float16 stores it
    ("{-70000,0,60000}", HALF, -65504.0, 0.0),
    ("{-70000,0,60000}", HALF, 65504.0, 60000.0),
    ("posit8.2", HALF, 65504.0, 2.0**15),
    ("bf16+inf", HALF, 65504.0, torch.inf),
    ("bf16+tonan", HALF, 65504.0, torch.nan),
    ("fp16+inf", HALF, 65504.0, 65504.0),
    ("int8", HALF, 65504.0, 65504.0),
    ("bfp8+twos", BF16, torch.finfo(BF16).min, -127 * 2.0**121),
    ("e8m3", BF16, torch.finfo(BF16).max, 15 * 2.0**124),
    ("mxfp8+ceil", FLOAT, MOST, 15 * 2.0**124),
    ("bfp8+twos", FLOAT, -MOST, -127 * 2.0**121),
    ("mxfp4+rceil", torch.float64, MOST, 2.0**128),  # float64 holds it
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec, dtype, number, due", EXAMPLES)
def test_the_last_number_is_one_that_the_dtype_holds(spec, dtype, number, due, device):
    x = torch.tensor([number, 0.0], dtype=dtype)
    due = torch.tensor([due, 0.0], dtype=dtype)
    for found in (quantize(x.to(device), spec).cpu(), reference.quantize(x, spec)):
        assert found.dtype == dtype
        torch.testing.assert_close(found, due, rtol=0, atol=0, equal_nan=True)


def test_the_ends_of_a_range_beside_a_zero_point():
    """255 steps from -65,504 to 65,504 are of 513.7; the lowest integer, -128, would be -65,760."""
    x = torch.tensor([-65504.0, 65504.0], dtype=HALF)
    step = torch.tensor(2 * 65504.0) / 255
    assert torch.equal(quantize(x, "int8[]+asym"), (torch.tensor([-127.0, 127.0]) * step).half())


@pytest.mark.parametrize(
    "spec", ["int8", "int16[0]", "int6[-1:2]", "e4m3[]", "nf4", "nvfp4", "int8[-1:2]+e4m3", "uint8"]
)
def test_the_largest_number_stays_finite_on_its_own_scale(spec):
    """127 times float32's quotient of the largest number by 127 is more than that number."""
    x = torch.tensor([[MOST, -MOST, 1.0, MOST]])
    found = quantize(x, spec)
    assert found.isfinite().all() and found[0, 0] > 0.999 * MOST
    assert_same_bits(found, reference.quantize(x, spec))


def is_exact(format):
    return format.scale is None or isinstance(format.scale, PowerOfTwo)


@hypothesis.settings(deadline=None, derandomize=True, max_examples=600)
@hypothesis.given(
    PRODUCTS.filter(lambda format: format.overflow == "saturate"),
    st.sampled_from(ALL_ROUNDINGS),
    st.sampled_from([HALF, BF16, FLOAT]),
    st.integers(0, 2**32),
)
def test_what_is_finite_stays_finite_and_next_to_its_number(format, rounding, dtype, seed):
    """Rounded as float64, or toward zero where the dtype does not hold that."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    near = torch.randint(-3, 1, (4, 12), generator=generator).double().exp2()
    x = (torch.rand(4, 12, generator=generator, dtype=torch.float64) * near * 2 - near) * info.max
    x[0, :2] = torch.tensor([info.max, info.min], dtype=torch.float64)
    x = x.to(dtype)
    try:
        found = quantize(x, format, rounding, key=1, stream=2)
    except (FormatError, RuntimeError):  # there is no such block in the tensor
        return
    assert found.isfinite().all()
    assert_same_bits(found, reference.quantize(x, format, rounding, key=1, stream=2))
    if is_exact(format):
        wide, toward_zero = (quantize(x.double(), format, r, key=1, stream=2) for r in (rounding, "toward_zero"))
        assert_same_bits(found, torch.where(wide.to(dtype).isfinite(), wide, toward_zero).to(dtype))


SPECS = [*dict.fromkeys(spec for spec, *_ in EXAMPLES if "{" not in spec), "int8[0]+asym", "bfp6[0]+twos"]


@pytest.mark.parametrize("rounding", ALL_ROUNDINGS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_every_number_of_a_half_type_is_as_the_oracle_has_it(spec, dtype, rounding):
    x = every_half(dtype)
    due = reference.quantize(x, spec, rounding, key=3, stream=1)
    assert_same_bits(quantize(x, spec, rounding, key=3, stream=1), due)
    if parse(spec).overflow == "saturate":
        assert due[x.isfinite()].isfinite().all()


@pytest.mark.parametrize("spec", ["int8", "bfp8[0]", "mxfp8", "nvfp4", "int8[0]+asym", "e4m3[0]"])
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_a_block_of_infinities_and_zeros_has_no_bounds(spec, dtype):
    x = torch.tensor([[torch.inf, -torch.inf, 0.0, -0.0]], dtype=dtype)
    assert_same_bits(quantize(x, spec), reference.quantize(x, spec))
    assert quantize(x, spec)[0, 0] > 1e4
