"""Shared by the tests of numbers: one row a format, and values that are hard to round."""

import functools
import math

import pytest
import torch

from swalp_fx import parse, reference
from swalp_fx.formats import Float, Integer, PowerOfTwo, Slices
from swalp_fx.recipe import ROUNDINGS, parse_rounding

FORMATS = [
    "fixed8.6",
    "fixed8.6+sym",
    "fixed2.0",
    "fixed16.-4",
    "fixed24.100",
    "fixed24.-100",
    "bfp8",
    "bfp8[0]",
    "bfp8[0,1]",
    "bfp8[-1]",
    "bfp8[1]+twos",
    "bfp4+twos",
    "bfp2[0]",
    "bfp24",
    "bfp6[0]+exp5",
    "bfp3+exp2",
    "e4m3",
    "e5m2",
    "e3m2",
    "e2m3",
    "e2m1",
    "e4m3+ieee",
    "e4m3+finite",
    "e5m2+finite",
    "e5m2+nan",
    "fp16",
    "bf16",
    "e8m23",
    "e8m0",
    "e2m0+nan",
    "e6m9",
    "bfp8[-1:16]",
    "bfp4[0:100]+twos",
    "mxfp8",
    "mxfp8_e5m2",
    "mxfp6_e3m2",
    "mxfp6_e2m3",
    "mxfp4",
    "mxint8[0:32]",
    "int8",
    "int8[0]",
    "int4[-1:48]",
    "int16[1]",
    "nvfp4",
    "nvfp4[0:7]",
]


def crossed(rows, columns):
    """Every pair, for a test's parameters. The first row has all columns, and each other row one; the rest is slow."""
    columns = list(columns)
    return [
        pytest.param(row, column, marks=[pytest.mark.slow] if i > 0 and i % len(columns) != j else [])
        for i, row in enumerate(rows)
        for j, column in enumerate(columns)
    ]


REAL_SCALE = [spec for spec in FORMATS if not isinstance(parse(spec).scale, PowerOfTwo | None)]
ALL_ROUNDINGS = [*ROUNDINGS, "stochastic1", "stochastic8", "stochastic24"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
}

SIDE = 512  # of each tensor of hard values: four of them hold 2^20
KEY, STREAM = -0x123456789ABCDEF, 2**40 + 7


def assert_same_bits(actual, expected, x=None):
    """Equal dtype, shape and bits, any NaN being equal to any other."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert actual.device == expected.device
    integer = INTEGERS[expected.dtype]
    same = actual.contiguous().view(integer) == expected.contiguous().view(integer)
    wrong = ~(same | (actual.isnan() & expected.isnan()))
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        origin = "" if x is None else f"x = {x[at].item()!r} "
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} differ, the first at {at}: {origin}"
            f"gives {actual[at].item()!r} where {expected[at].item()!r} is due"
        )


@functools.cache
def _all_draws(bits):
    return reference.random_draws(KEY, STREAM, SIDE * SIDE, bits)


def draws(rounding, n=SIDE * SIDE):
    """The draws of the first ``n`` elements under KEY and STREAM, at most as many as a hard tensor has."""
    return _all_draws(parse_rounding(rounding)[1])[:n]


def every_half(dtype):
    """All 65,536 bit patterns of bfloat16 or float16."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(256, 256)


def random_bits(dtype, side, generator):
    """Random patterns: every binade alike, subnormals, infinities and NaNs among them."""
    low, high = torch.iinfo(INTEGERS[dtype]).min, torch.iinfo(INTEGERS[dtype]).max
    return torch.randint(low, high, (side, side), generator=generator).to(INTEGERS[dtype]).view(dtype)


def exponents(format, side, generator):
    """Powers of two, one a row, over the binades that ``format`` rounds."""
    element = format.element
    if format.scale is None and isinstance(element, Integer):
        low, high = -element.point - 4, element.wl - element.point + 2
    elif format.scale is None and isinstance(element, Float):
        low, high = element.min_exponent - element.man - 3, math.frexp(format.max)[1] + 2
    elif isinstance(format.scale, PowerOfTwo) and isinstance(element, Integer) and isinstance(format.block, Slices):
        low, high = -152, 128
    else:
        top = int(torch.randint(-145, 128, (), generator=generator))
        low, high = top - math.ceil(format.bits) - 2, top + 1
    return torch.randint(low, high, (side, 1), generator=generator)


@functools.lru_cache(maxsize=8)
def hard_values(spec, dtype, side=SIDE, seed=0):
    """Four tensors [side, side] of ``dtype``; they are shared, so do not write to them.

    Random bits; values over the format's binades; values near its own; values near the midpoints
    between its own: on them, and one place below and above."""
    format = parse(spec)
    generator = torch.Generator().manual_seed(seed)
    scale = torch.exp2(exponents(format, side, generator).double())
    spread = (torch.randn(side, side, generator=generator, dtype=torch.float64) * scale).to(dtype)
    below = reference.quantize(spread.double(), format, "down")
    above = reference.quantize(spread.double(), format, "up")
    integer = INTEGERS[dtype]
    nudge = torch.randint(-1, 2, (side, side), generator=generator).to(integer)
    near = [(v.to(dtype).view(integer) + nudge).view(dtype) for v in (below, (below + above) / 2)]
    return [random_bits(dtype, side, generator), spread, *near]
