"""Formats: specs that round-trip, the numbers that define them, and what is refused."""

import dataclasses
import math
import pickle
from pathlib import Path

import gfloat.formats
import hypothesis
import pytest
import torch
from strategies import EVERY_FORMAT
from tables import FORMATS, every_half

import formats as formats_tool
from swalp_fx import (
    FLOAT,
    BlockFloat,
    FixedPoint,
    Float,
    FormatError,
    Microscaling,
    Nvfp4,
    ScaledInteger,
    formats,
    parse,
    reference,
)
from swalp_fx.formats import E2M1, E4M3, MX_ELEMENTS, PRESETS
from swalp_fx.nearest import listed

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
    ("mxfp8", Microscaling(E4M3)),
    ("mxfp4[0:8]", Microscaling(E2M1, tile=(0, 8))),
    ("mxfp6_e3m2[0,1]", Microscaling(Float(3, 2), dims=(0, 1), tile=None)),
    ("mxint8[]", Microscaling(MX_ELEMENTS["mxint8"], tile=None)),
    ("nvfp4", Nvfp4()),
    ("nvfp4[]", Nvfp4(tile=None)),
    ("nvfp4[-2:16]", Nvfp4(tile=(-2, 16))),
    ("int8", ScaledInteger(8)),
    ("int4[-1:128]", ScaledInteger(4, tile=(-1, 128))),
]


@pytest.mark.parametrize("spec, format", SPECS)
def test_specs(spec, format):
    assert parse(spec) == format
    assert str(format) == spec


@hypothesis.settings(derandomize=True, deadline=None, max_examples=500)
@hypothesis.given(EVERY_FORMAT)
def test_every_format_is_what_its_spec_parses_to(format):
    assert parse(str(format)) == format
    assert str(parse(str(format))) == str(format)


@pytest.mark.parametrize("spec", [*FORMATS, *PRESETS])
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


# ---- the facts of every format -------------------------------------------------------------------

# spec: element bits, scale bits, bits per element, finite codes, min, max, min normal, min subnormal, scales.
FACTS = {
    "fixed8.6": (8, 0, 8, 256, -2, 127 / 64, 1, 1 / 64, (1, 1)),
    "fixed8.6+sym": (8, 0, 8, 255, -127 / 64, 127 / 64, 1, 1 / 64, (1, 1)),
    "fixed4.-3": (4, 0, 4, 16, -64, 56, 32, 8, (1, 1)),
    "bfp8": (8, 8, 8, 256, -127 / 64, 127 / 64, 1, 1 / 64, (2.0**-128, 2.0**127)),
    "bfp8[0]+twos": (8, 8, 8, 256, -2, 127 / 64, 1, 1 / 64, (2.0**-128, 2.0**127)),
    "bfp4[-1:16]+exp5": (4, 5, 4 + 5 / 16, 16, -1.75, 1.75, 1, 0.25, (2.0**-16, 2.0**15)),
    "int8": (8, 32, 8, 255, -127, 127, 64, 1, (2.0**-149, torch.finfo(torch.float32).max)),
    "int4[-1:128]": (4, 32, 4.25, 15, -7, 7, 4, 1, (2.0**-149, torch.finfo(torch.float32).max)),
    "e4m3": (8, 0, 8, 254, -448, 448, 2**-6, 2**-9, (1, 1)),
    "e2m1": (4, 0, 4, 16, -6, 6, 1, 0.5, (1, 1)),
    "mxfp8": (8, 8, 8.25, 254, -448, 448, 2**-6, 2**-9, (2.0**-127, 2.0**127)),
    "mxfp4": (4, 8, 4.25, 16, -6, 6, 1, 0.5, (2.0**-127, 2.0**127)),
    "mxint8": (8, 8, 8.25, 255, -127 / 64, 127 / 64, 1, 1 / 64, (2.0**-127, 2.0**127)),
    "nvfp4": (4, 8, 4.5, 16, -6, 6, 1, 0.5, (2.0**-149, torch.finfo(torch.float32).max)),
}
NAMES = ("element_bits", "scale_bits", "bits", "codes", "min", "max", "min_normal", "min_subnormal", "scales")


@pytest.mark.parametrize("spec", FACTS)
def test_facts(spec):
    assert tuple(getattr(parse(spec), name) for name in NAMES) == FACTS[spec]


def test_float_has_the_facts_of_float32():
    for name in NAMES:
        assert getattr(FLOAT, name) == getattr(Float(8, 23), name)


@pytest.mark.parametrize(
    "spec",
    [
        "fixed6.4",
        "fixed6.4+sym",
        "bfp6",
        "bfp6+twos",
        "int6",
        "e4m3",
        "e5m2",
        "e3m2",
        "e2m1",
        "e4m3+ieee",
        "mxfp4",
        "mxint8",
    ],
)
def test_facts_are_those_of_what_rounding_gives(spec):
    """Of every finite bfloat16, which holds each number of these formats, in a block whose scale is 1."""
    format = parse(spec)
    x = every_half(torch.bfloat16).flatten().double()
    # A power-of-two scale is 1 for a maximum in the element's highest binade, and an integer's for its largest value.
    reach = format.max if spec == "int6" else 2.0 ** math.floor(math.log2(format.max)) * 1.999
    values = reference.quantize(x[x.isfinite()].clamp(-reach, reach), dataclasses.replace(format, **one_block(format)))
    values = values.unique()
    assert (values.min(), values.max()) == (format.min, format.max)
    signed_zero = not isinstance(format._element if hasattr(format, "tile") else format, FixedPoint) or spec == "bfp6"
    assert format.codes == values.numel() + signed_zero
    positive = values[values >= 0]
    steps, binades = positive.diff(), torch.exp2(positive[:-1].log2().floor())
    normal = positive[:-1] >= format.min_normal
    assert (steps[~normal] == format.min_subnormal).all()
    assert (steps[normal] / binades[normal] == format.min_subnormal / format.min_normal).all()


def one_block(format):
    """What makes the whole tensor one block, where the format has blocks."""
    return {"tile": None} if hasattr(format, "tile") else {}


# ---- named formats -------------------------------------------------------------------------------


def test_every_constant_is_a_preset():
    constants = {name.lower(): value for name, value in vars(formats).items() if isinstance(value, formats.Format)}
    assert constants == PRESETS and len(PRESETS) > 20
    assert {name.upper() for name in PRESETS} < set(formats.__all__)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_parsed_by_its_name(name):
    assert parse(name) is PRESETS[name] is getattr(formats, name.upper())
    assert parse(str(PRESETS[name])) == PRESETS[name]


def test_every_microscaling_format_is_named():
    assert {*MX_ELEMENTS} < {*PRESETS}


DOCUMENT = Path(__file__).parent.parent / "docs" / "formats.md"


def test_the_documents_table_is_what_the_tool_prints(capsys):
    formats_tool.main([])
    assert capsys.readouterr().out in DOCUMENT.read_text()


def test_the_tool_prints_the_facts_of_any_format(capsys):
    formats_tool.main(["bfp8[0]+twos+exp5", "fixed16.-4"])
    rows = capsys.readouterr().out.splitlines()
    assert "5 bits per slice" in rows[2] and "-2 to 1.984375" in rows[2] and "2^-16 to 2^15" in rows[2]
    assert "-524288 to 524272" in rows[3]
    with pytest.raises(SystemExit) as stop:
        formats_tool.main(["bfp"])
    assert stop.value.code == 2 and "formats.py: error: unknown format spec 'bfp'" in capsys.readouterr().err


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
    ("bfp", "unknown format spec 'bfp'; did you mean bfp8"),
    ("bfp8[]", "did you mean bfp8"),
    ("bfp8[0", r"did you mean bfp8\[0\]"),
    ("bfp8+", "did you mean bfp8"),
    ("bfp8.5", "did you mean bfp8"),
    ("fixed8", r"did you mean fixed8\.6"),
    ("e5m2+none", "did you mean e5m2"),
    ("BFP8", "did you mean bfp8"),
    ("", r"unknown format spec ''; specs look like bfp8\[0\], fixed8.6, e4m3, int8\[0\], mxfp8"),
    ("gzip", "unknown format spec 'gzip'; specs look like"),
    (8, "a format spec must be a string or a format, not int 8"),
    (None, "a format spec must be a string or a format, not NoneType None"),
]


@pytest.mark.parametrize("spec, message", REFUSED)
def test_refusals_of_specs(spec, message):
    with pytest.raises(FormatError, match=message) as error:
        parse(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("bpf8[0]", ["bfp8[0]"]),
        ("bfp8(0)", ["bfp8[0]"]),
        ("int8 [0]", ["int8[0]"]),
        ("bfp8[0, 1]", ["bfp8[0,1]"]),
        ("fixed(8,6)", ["fixed8.6"]),
        ("mxpf8[-1:16]", ["mxfp8[-1:16]", "mxfp4[-1:16]"]),
        ("fp8", ["e4m3", "e5m2", "mxfp8"]),
        ("float8_e4m3fn", ["e4m3"]),
        ("torch.float8_e5m2", ["e5m2"]),
        ("float4_e2m1fn", ["e2m1"]),
        ("mxfp8e4m3", ["mxfp8"]),
        ("mxfp8e5m2[-1:16]", ["mxfp8_e5m2[-1:16]"]),
        ("bfloat16", ["bf16"]),
        ("torch.float32", ["float"]),
        ("None", ["float"]),
        ("bfp88x", ["bfp8"]),  # bfp88 is out of range
    ],
)
def test_a_spec_that_names_no_format_is_answered_with_the_nearest(word, meant):
    with pytest.raises(FormatError) as error:
        parse(word)
    assert str(error.value) == f"unknown format spec {word!r}; did you mean {listed(meant)}?"
    assert all(parse(spec) for spec in meant)


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
