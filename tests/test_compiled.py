"""Codes by the compiled op are those that tensors of quotients give, byte for byte, scales included."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from strategies import PRODUCTS
from tables import ALL_ROUNDINGS, crossed, every_half, hard_values

from swalp_fx import decode, encode, ops, parse, quantize
from swalp_fx.codes import compiled
from swalp_fx.codes.codes import _by_quotients

INTEGERS = [
    "fixed8.6",
    "fixed8.-100",
    "fixed5.2+mag",
    "fixed5.2+sym",
    "fixed5.-3+unsigned",
    "bfp8",
    "bfp8[0]",
    "bfp8[1]",
]
INTEGERS += ["bfp8[0,1]", "bfp4[-1:16]", "bfp6[0:7]", "bfp3+exp2", "bfp8[-1:16]+twos", "mxint8", "int8", "int8[0]"]
INTEGERS += ["int4[-1:128]", "uint8[0]", "int8[0]+asym", "uint4[-1:7]+asym", "int8[]+scale0.3", "int8[0]+e4m3"]
FLOATS = ["e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "e4m3+p3109", "e3m2", "e2m1", "e2m0+nan", "e4m3+bias60"]
FLOATS += [
    "mxfp8",
    "mxfp8+rceil",
    "mxfp8_e5m2",
    "mxfp6_e3m2",
    "mxfp6_e2m3",
    "mxfp4",
    "e4m3[0]",
    "e4m3[128x128]",
    "nvfp4",
]
FLOATS += ["e2m1[0:7,1:3]+e4m3"]
TABLES = ["nf4", "nf4+e8m0", "posit8.1", "posit8.1[0]", "{-1,0,1}"]
WIDE = ["fixed16.8", "fixed9.3+mag", "fixed13.3+unsigned", "bfp12[0]", "bfp12[1]", "bfp16[-1:16]", "bfp12[0]+twos"]
WIDE += ["int16[0]", "int10[-1:7]", "int12[0]+asym", "uint16[]+asym", "int12+scale0.3", "fp16", "bf16", "e5m8"]
WIDE += ["e6m6[0]", "e5m10[-1:32]+e8m0", "e4m8[-1:16]+e4m3", "e8m7[0]"]
OVERFLOWS = ["e5m2+inf", "e4m3+tonan", "e4m3fnuz+tonan", "mxfp8_e5m2+inf", "e4m3[0]+tonan", "fp16+inf", "bf16+tonan"]
FLUSHING = ["e4m3+flush", "e2m3+flush", "e3m2+flush+scale0.5", "e5m10+flush+inf", "e8m7+flush", "e4m3[0]+flush"]
SPECS = INTEGERS + FLOATS + TABLES + WIDE + OVERFLOWS + FLUSHING
KEY = torch.tensor(5)


def both(x, format, rounding):
    """From the compiled op, and from quotients: [(packed, scales), ...]."""
    given = x.float(), x.dtype, format, rounding, KEY, 7
    return [compiled.codes_of(*given), _by_quotients(*given)]


def assert_same(found, due):
    assert torch.equal(found[0], due[0]) and len(found[1]) == len(due[1])
    for mine, other in zip(found[1], due[1], strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


@pytest.mark.parametrize(("spec", "rounding"), crossed(SPECS, ALL_ROUNDINGS))
def test_the_same_bytes(spec, rounding):
    for shape in [(50, 700), (7, 3, 5, 33), (64, 64)]:
        generator = torch.Generator().manual_seed(0)
        binades = torch.arange(-20.0, 12.0, 32 / shape[0]).view(-1, *[1] * (len(shape) - 1))
        x = torch.randn(shape, generator=generator) * 2.0**binades
        assert_same(*both(x, parse(spec), rounding))


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_bytes_of_hard_numbers(spec):
    for x in hard_values(spec, torch.float32, side=64):
        assert_same(*both(x.nan_to_num(0.0, 0.0, 0.0), parse(spec), "nearest"))


# Formats with numbers that one of the half types stores as infinity, or that float32 does.
BEYOND = [
    "fixed8.-10",
    "fixed16.-10",
    "bfp8[0]+twos",
    "bfp12[1]+twos",
    "mxfp8+ceil",
    "mxfp4+rceil",
    "mxint8+even",
    "bf16",
]
BEYOND += [
    "bf16+inf",
    "e6m3",
    "e6m3+tonan",
    "int8+scale1000",
    "uint8+scale300",
    "int8[0]+asym",
    "int8[0]",
    "e4m3+scale200",
]
BEYOND += ["{-70000,-2,0,60000}", "posit8.2", "nvfp4", "e5m2[-1:32]+e8m0+inf"]


@pytest.mark.parametrize("rounding", ["nearest", "up", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("spec", BEYOND)
def test_the_same_bytes_where_a_dtype_ends(spec, dtype, rounding):
    x = every_half(dtype) if dtype != torch.float32 else every_half(torch.bfloat16).float() * 1.0039
    x = x[x.isfinite()]
    x = torch.cat([x, torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).min], dtype=dtype)])
    x = x[: len(x) // 32 * 32].view(-1, 32)
    assert_same(*both(x, parse(spec), rounding))
    found, due = decode(encode(x, spec, rounding, key=KEY, stream=7)), quantize(x, spec, rounding, key=KEY, stream=7)
    torch.testing.assert_close(found, due, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rounding", ALL_ROUNDINGS)
@pytest.mark.parametrize("spec", ["e8m0+scale366", "e8m7+scale366", "int8+scale366"])
def test_the_same_bytes_where_a_quotient_underflows(spec, rounding):
    x = torch.tensor([1e-45, 2.56e-43]).repeat(5, 50) * torch.tensor([1.0, -1.0]).repeat_interleave(50)
    assert_same(*both(x, parse(spec), rounding))


@hypothesis.settings(deadline=None, derandomize=True, max_examples=400)
@hypothesis.given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3),
    PRODUCTS,
    st.sampled_from(ALL_ROUNDINGS),
    st.integers(0, 2**32),
)
def test_the_same_bytes_in_every_format(shape, format, rounding, seed):
    generator = torch.Generator().manual_seed(seed)
    binades = torch.randint(-140, 120, shape, generator=generator)
    x = (torch.randn(shape, generator=generator) * torch.exp2(binades.float())).nan_to_num()
    try:
        found, due = both(x, format, rounding)
    except (ValueError, RuntimeError):  # the tensor has no such block, or an overflow has no code
        return
    assert (found is None) == (format.element_bits > 16)
    if found is not None:
        assert_same(found, due)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("at", [(0, 0), (37, 511)])
@pytest.mark.parametrize("spec", ["e5m2", "e5m2[0]", "e5m2[-1:32]+e8m0", "e5m2[1]+e8m0", "posit8.1"])
def test_what_is_not_finite_is_left_to_the_other_way(spec, at, value):
    x, format = torch.zeros(40, 512), parse(spec)
    x[at] = value
    assert compiled.codes_of(x, x.dtype, format, "nearest", None, 0) is None


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_codes(threads, one_thread):
    x = torch.randn(257, 1000, generator=torch.Generator().manual_seed(0))
    due = {spec: encode(x, spec, "stochastic", key=1).hex() for spec in SPECS}
    torch.set_num_threads(threads)
    assert {spec: encode(x, spec, "stochastic", key=1).hex() for spec in due} == due


def test_what_is_no_coding_is_refused():
    x, room = torch.ones(2, 4), torch.zeros(8, dtype=torch.uint8)
    for coding, message in [
        ((17, False, True, 0, 0, 0, 0, 0), "bits of a code = 17 is out of range; use 1 to 16"),
        ((8, False, True, 0, 0, 0, 0, 3), "dtype of a code = 3 is out of range; use 0 to 2"),
        ((8, False, True), "coding has 3 numbers; give it 8"),
    ]:
        with pytest.raises(RuntimeError, match=f"quantize: {message}"):
            ops.write_codes(x, parse("bfp8[0]"), "nearest", None, 0, coding, room, room, room)
    assert not room.any()
