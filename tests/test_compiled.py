"""Codes by the compiled op are those that tensors of quotients give, byte for byte, scales included."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from strategies import PRODUCTS
from tables import hard_values

from swalp_fx import encode, ops, parse
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
SPECS = INTEGERS + FLOATS + TABLES
ROUNDINGS = ["nearest", "stochastic", "stochastic8"]
KEY = torch.tensor(5)


def both(x, format, rounding):
    """From the compiled op, and from quotients: [(packed, scales), ...]."""
    drawing = rounding, KEY, 7
    return [compiled.codes_of(x, format, *drawing), _by_quotients(x, format, format.block.sizes(x.shape), *drawing)]


def assert_same(found, due):
    assert torch.equal(found[0], due[0]) and len(found[1]) == len(due[1])
    for mine, other in zip(found[1], due[1], strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("spec", SPECS)
def test_the_same_bytes(spec, rounding):
    for shape in [(50, 700), (7, 3, 5, 33), (64, 64)]:
        generator = torch.Generator().manual_seed(0)
        binades = torch.arange(-20.0, 12.0, 32 / shape[0]).view(-1, *[1] * (len(shape) - 1))
        x = torch.randn(shape, generator=generator) * 2.0**binades
        found, due = both(x, parse(spec), rounding)
        if found is None:
            assert rounding == "stochastic" and spec in ("uint8[0]", "int8[0]+asym")  # of more than 23 bits in all
        else:
            assert_same(found, due)


@pytest.mark.parametrize("spec", SPECS)
def test_the_same_bytes_of_hard_numbers(spec):
    for x in hard_values(spec, torch.float32, side=64):
        assert_same(*both(x.nan_to_num(0.0, 0.0, 0.0), parse(spec), "nearest"))


@hypothesis.settings(deadline=None, derandomize=True, max_examples=400)
@hypothesis.given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3), PRODUCTS, st.sampled_from(ROUNDINGS), st.integers(0, 2**32)
)
def test_the_same_bytes_in_every_format(shape, format, rounding, seed):
    generator = torch.Generator().manual_seed(seed)
    binades = torch.randint(-140, 120, shape, generator=generator)
    x = (torch.randn(shape, generator=generator) * torch.exp2(binades.float())).nan_to_num()
    try:
        found, due = both(x, format, rounding)
    except (ValueError, RuntimeError):  # the tensor has no such block, or an overflow has no code
        return
    if found is not None:
        assert_same(found, due)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("at", [(0, 0), (37, 511)])
@pytest.mark.parametrize("spec", ["e5m2", "e5m2[0]", "e5m2[-1:32]+e8m0", "e5m2[1]+e8m0", "posit8.1"])
def test_what_is_not_finite_is_left_to_the_other_way(spec, at, value):
    x, format = torch.zeros(40, 512), parse(spec)
    x[at] = value
    assert compiled.codes_of(x, format, "nearest", None, 0) is None


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_codes(threads, one_thread):
    x = torch.randn(257, 1000, generator=torch.Generator().manual_seed(0))
    due = {spec: encode(x, spec, "stochastic", key=1).hex() for spec in SPECS}
    torch.set_num_threads(threads)
    assert {spec: encode(x, spec, "stochastic", key=1).hex() for spec in due} == due


@pytest.mark.parametrize(
    "bits, nbytes, scales, message",
    [
        (9, 8, 2, "bits of a code = 9 is out of range; use 1 to 8"),
        (8, 7, 2, "packed must be 8 bytes, which the codes fill"),
        (4, 8, 2, "packed must be 4 bytes, which the codes fill"),
        (8, 8, 3, "scales must be 2 bytes, one a block"),
    ],
)
def test_room_of_another_size_is_refused(bits, nbytes, scales, message):
    room = [torch.zeros(n, dtype=torch.uint8) for n in (nbytes, scales, 0)]
    with pytest.raises(RuntimeError, match=f"quantize: {message}"):
        ops.write_codes(torch.ones(2, 4), parse("bfp8[0]"), "nearest", None, 0, [bits, False, True, 0, 0], *room)
    assert not any(each.any() for each in room)
