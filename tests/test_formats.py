"""Formats: specs that round-trip, the numbers that define them, and what is refused."""

import dataclasses
import pickle

import gfloat.formats
import pytest
import torch
from tables import FORMATS

from swalp_fx import FLOAT, BlockFloat, FixedPoint, Float, FormatError, parse

# The canonical spec, and the value it stands for.
SPECS = [
    ("float", FLOAT),
    ("fixed8.6", FixedPoint(8, 6)),
    ("fixed8.6+sym", FixedPoint(8, 6, symmetric=True)),
    ("fixed16.-4", FixedPoint(16, -4)),
    ("fixed24.100", FixedPoint(24, 100)),
    ("bfp8", BlockFloat(8)),
    ("bfp8[0]", BlockFloat(8, dims=(0,))),
    ("bfp8[0,1]", BlockFloat(8, dims=(0, 1))),
    ("bfp8[-1]", BlockFloat(8, dims=(-1,))),
    ("bfp8+twos", BlockFloat(8, symmetric=False)),
    ("bfp8[1]+twos+exp5", BlockFloat(8, dims=(1,), symmetric=False, exponent_bits=5)),
    ("bfp8+exp2", BlockFloat(8, exponent_bits=2)),
    ("e5m2", Float(5, 2)),
    ("e4m3", Float(4, 3)),
    ("e4m3+ieee", Float(4, 3, top="ieee")),
    ("e5m2+finite", Float(5, 2, top="finite")),
    ("e8m7", Float(8, 7)),
    ("e5m10", Float(5, 10)),
    ("e2m0", Float(2, 0)),
    ("e8m23", Float(8, 23)),
]


@pytest.mark.parametrize("spec, format", SPECS)
def test_specs(spec, format):
    assert parse(spec) == format
    assert str(format) == spec


@pytest.mark.parametrize("spec", FORMATS)
def test_round_trip(spec):
    format = parse(spec)
    assert parse(str(format)) == format
    assert parse(format) is format
    assert pickle.loads(pickle.dumps(format)) == format
    assert hash(format) == hash(parse(str(format)))


@pytest.mark.parametrize(
    "spec, canonical",
    [
        ("bf16", "e8m7"),
        ("fp16", "e5m10"),
        (" bfp8 ", "bfp8"),
        ("bfp8+exp8", "bfp8"),
        ("e4m3+nan", "e4m3"),
        ("e5m2+ieee", "e5m2"),
        ("e2m1+finite", "e2m1"),
    ],
)
def test_other_spellings(spec, canonical):
    assert str(parse(spec)) == canonical


def test_formats_are_frozen():
    for spec in ("float", *FORMATS):
        format = parse(spec)
        for name in [field.name for field in dataclasses.fields(format)] or ["wl"]:
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(format, name, 3)


def test_dims_may_be_any_sequence():
    assert BlockFloat(8, dims=[0, 1]) == BlockFloat(8, dims=(0, 1))


# ---- the numbers of a float ----------------------------------------------------------------------

# OCP's 8-bit floating point and microscaling specifications, tables of parameters: max, exponent of the min normal.
OCP = [("e4m3", 448, -6), ("e5m2", 57344, -14), ("e3m2", 28, -2), ("e2m3", 7.5, 0), ("e2m1", 6, 0)]


@pytest.mark.parametrize("spec, maximum, min_exponent", OCP)
def test_ocp(spec, maximum, min_exponent):
    assert (parse(spec).max, parse(spec).min_exponent) == (maximum, min_exponent)


@pytest.mark.parametrize(
    "spec, info",
    [
        ("fp16", gfloat.formats.format_info_binary16),
        ("bf16", gfloat.formats.format_info_bfloat16),
        ("e8m23", gfloat.formats.format_info_binary32),
        ("e5m2", gfloat.formats.format_info_ocp_e5m2),
        ("e4m3", gfloat.formats.format_info_ocp_e4m3),
        ("e3m2", gfloat.formats.format_info_ocp_e3m2),
        ("e2m3", gfloat.formats.format_info_ocp_e2m3),
        ("e2m1", gfloat.formats.format_info_ocp_e2m1),
    ],
)
def test_gfloat_agrees(spec, info):
    format = parse(spec)
    assert (format.bits, format.bias, format.max) == (info.k, info.bias, info.max)
    assert 2.0**format.min_exponent == info.smallest_normal
    assert 2.0 ** (format.min_exponent - format.man) == info.smallest_subnormal
    assert (format.top == "ieee") == (info.num_infs > 0)


@pytest.mark.parametrize("spec, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16), ("e8m23", torch.float32)])
def test_torch_agrees(spec, dtype):
    format, info = parse(spec), torch.finfo(dtype)
    assert (format.bits, format.max, 2.0**format.min_exponent, 2.0**-format.man) == (
        info.bits,
        info.max,
        info.smallest_normal,
        info.eps,
    )


@pytest.mark.parametrize("exp", range(2, 9))
@pytest.mark.parametrize("man", [0, 1, 2, 3, 10, 23])
def test_what_the_highest_exponent_holds(exp, man):
    """ "finite" has the whole binade that "ieee" gives up, and "nan" all of it but one code."""
    top_binade = 2.0 ** (2 ** (exp - 1)) if exp < 8 else 0.0
    step = top_binade * 2.0**-man
    ieee = Float(exp, man, top="ieee").max
    assert ieee == (2 - 2.0**-man) * 2.0 ** (2 ** (exp - 1) - 1)
    if exp < 8:
        assert Float(exp, man, top="finite").max == 2 * top_binade - step
        assert Float(exp, man, top="nan").max == (2 * top_binade - 2 * step if man else ieee)


@pytest.mark.parametrize("spec, bits", [("float", 32), ("fixed8.6", 8), ("bfp6[0]", 6), ("e4m3", 8), ("bf16", 16)])
def test_bits(spec, bits):
    assert parse(spec).bits == bits


# ---- what is refused -----------------------------------------------------------------------------

REFUSED = [
    ("bfp1", "block floating point: word length 1 is out of range; use 2 to 24 bits"),
    ("bfp25", "block floating point: word length 25 is out of range; use 2 to 24 bits"),
    ("bfp8[0,0]", r"dims \(0, 0\) must be distinct integers"),
    ("bfp8+exp1", "1 exponent bits are out of range; use 2 to 8"),
    ("bfp8+exp9", "9 exponent bits are out of range; use 2 to 8"),
    ("fixed1.0", "fixed point: word length 1 is out of range; use 2 to 24 bits"),
    ("fixed8.101", "fixed point: 101 fractional bits are out of range; use -100 to 100"),
    ("fixed8.-101", "fixed point: -101 fractional bits are out of range; use -100 to 100"),
    ("e1m2", "float: 1 exponent bits are out of range; use 2 to 8"),
    ("e9m2", "float: 9 exponent bits are out of range; use 2 to 8"),
    ("e5m24", "float: 24 mantissa bits are out of range; use 0 to 23"),
    ("e8m7+finite", "with 8 exponent bits top 'finite' goes beyond float32; use top 'ieee'"),
    ("bfp", "unknown format spec 'bfp'; use one of float, fixed<wl>"),
    ("bfp8[]", "unknown format spec"),
    ("bfp8[0", "unknown format spec"),
    ("bfp8+", "unknown format spec"),
    ("bfp8.5", "unknown format spec"),
    ("fixed8", "unknown format spec"),
    ("e5m2+none", "unknown format spec"),
    ("BFP8", "unknown format spec"),
    ("", "unknown format spec ''"),
    (8, "a format spec must be a string or a format, not int 8"),
    (None, "a format spec must be a string or a format, not NoneType None"),
]


@pytest.mark.parametrize("spec, message", REFUSED)
def test_refusals_of_specs(spec, message):
    with pytest.raises(FormatError, match=message) as error:
        parse(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: BlockFloat(8.0), "word length 8.0 is out of range"),
        (lambda: BlockFloat(8, dims=()), r"dims \(\) must be distinct integers"),
        (lambda: BlockFloat(8, dims=("0",)), "must be distinct integers"),
        (lambda: FixedPoint(8, 1.5), "1.5 fractional bits"),
        (lambda: Float(5, 2, top="inf"), "top 'inf' is unknown; use one of ieee, nan, finite"),
    ],
)
def test_refusals_of_values(build, message):
    with pytest.raises(FormatError, match=message):
        build()


def test_format_errors_are_value_errors():
    assert issubclass(FormatError, ValueError)
