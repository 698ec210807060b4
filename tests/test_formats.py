"""Formats: specs that round-trip, the numbers that define them, and errors."""

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
from swalp_fx import FLOAT, Format, FormatError, formats, parse, quantize, reference
from swalp_fx.formats import (
    PRESETS,
    Absmax,
    Affine,
    Channel,
    Codebook,
    Float,
    Integer,
    PowerOfTwo,
    Rectangle,
    Runs,
    Slices,
    Static,
    TwoLevel,
    named,
)
from swalp_fx.nearest import listed

E8M0 = PowerOfTwo(biased=True)
E4M3, E2M1 = Float(4, 3), Float(2, 1)


def runs(axis, size):
    return Runs(((axis, size),))


# The canonical spec, and the value it stands for.
SPECS = [
    ("float", FLOAT),
    # integers
    ("fixed8.6", Format(Integer(8, 6, "twos"))),
    ("fixed8.6+sym", Format(Integer(8, 6, "sym"))),
    ("fixed16.-4", Format(Integer(16, -4, "twos"))),
    ("fixed24.100", Format(Integer(24, 100, "twos"))),
    ("fixed8.8+unsigned", Format(Integer(8, 8, "unsigned"))),
    ("fixed8.6[0]", Format(Integer(8, 6, "twos"), Absmax(), Slices((0,)))),
    ("fixed8.6[-1:32]+e8m0", Format(Integer(8, 6, "twos"), E8M0, runs(-1, 32))),
    ("bfp8", Format(Integer(8, 6, "mag"), PowerOfTwo())),
    ("bfp8[0]", Format(Integer(8, 6, "mag"), PowerOfTwo(), Slices((0,)))),
    ("bfp8[0,1]", Format(Integer(8, 6, "mag"), PowerOfTwo(), Slices((0, 1)))),
    ("bfp8[-1]", Format(Integer(8, 6, "mag"), PowerOfTwo(), Slices((-1,)))),
    ("bfp8+twos", Format(Integer(8, 6, "twos"), PowerOfTwo())),
    ("bfp8[1]+twos+exp5", Format(Integer(8, 6, "twos"), PowerOfTwo(5), Slices((1,)))),
    ("bfp8+exp2", Format(Integer(8, 6, "mag"), PowerOfTwo(2))),
    ("bfp8+ceil", Format(Integer(8, 6, "mag"), PowerOfTwo(rule="ceil"))),
    ("int8", Format(Integer(8), Absmax())),
    ("int4[-1:128]", Format(Integer(4), Absmax(), runs(-1, 128))),
    ("int8+scale0.05", Format(Integer(8), Static(0.05))),
    ("int8+asym", Format(Integer(8, sign="twos"), Affine())),
    ("uint8", Format(Integer(8, sign="unsigned"), Absmax())),
    ("uint4[0]+asym", Format(Integer(4, sign="unsigned"), Affine(), Slices((0,)))),
    ("int4[-1:16]+e4m3", Format(Integer(4), TwoLevel(E4M3), runs(-1, 16))),
    # floats
    ("e5m2", Format(Float(5, 2))),
    ("e4m3", Format(E4M3)),
    ("e4m3+ieee", Format(Float(4, 3, top="ieee"))),
    ("e5m2+finite", Format(Float(5, 2, top="finite"))),
    ("e4m3fnuz", Format(Float(4, 3, top="fnuz"))),
    ("e5m2fnuz", Format(Float(5, 2, top="fnuz", bias=16))),
    ("e4m3+p3109", Format(Float(4, 3, top="p3109", bias=8))),
    ("e4m3+bias11", Format(Float(4, 3, bias=11))),
    ("e4m3+flush", Format(Float(4, 3, subnormals=False))),
    ("e4m3[0]+ieee+bias-3+flush", Format(Float(4, 3, "ieee", -3, False), Absmax(), Slices((0,)))),
    ("e8m7", Format(Float(8, 7))),
    ("e5m10", Format(Float(5, 10))),
    ("e2m0", Format(Float(2, 0))),
    ("e8m23", Format(Float(8, 23))),
    ("e5m10+inf", Format(Float(5, 10), overflow="infinity")),
    ("e4m3+tonan", Format(E4M3, overflow="nan")),
    ("e4m3[]", Format(E4M3, Absmax())),
    ("e4m3[0]", Format(E4M3, Absmax(), Slices((0,)))),
    ("e4m3[1x128]", Format(E4M3, Absmax(), Rectangle(1, 128))),
    ("e4m3[128x128]", Format(E4M3, Absmax(), Rectangle(128, 128))),
    ("e4m3[0:128,1:128]", Format(E4M3, Absmax(), Runs(((0, 128), (1, 128))))),
    ("e4m3[c:32]", Format(E4M3, Absmax(), Channel(32))),
    ("e4m3[]+exp5", Format(E4M3, PowerOfTwo(5))),
    ("e3m4[-1:32]+e8m0+ceil", Format(Float(3, 4), PowerOfTwo(biased=True, rule="ceil"), runs(-1, 32))),
    ("e5m2[-1:16]+e5m2", Format(Float(5, 2), TwoLevel(Float(5, 2)), runs(-1, 16))),
    # named
    ("mxfp8", Format(E4M3, E8M0, runs(-1, 32))),
    ("mxfp8+rceil", Format(E4M3, PowerOfTwo(biased=True, rule="rceil"), runs(-1, 32))),
    ("mxfp8+even", Format(E4M3, PowerOfTwo(biased=True, rule="even"), runs(-1, 32))),
    ("mxfp8_e5m2+inf", Format(Float(5, 2), E8M0, runs(-1, 32), "infinity")),
    ("mxfp4[0:8]", Format(E2M1, E8M0, runs(0, 8))),
    ("mxfp4[32x32]", Format(E2M1, E8M0, Rectangle(32, 32))),
    ("mxfp6_e3m2[0,1]", Format(Float(3, 2), E8M0, Slices((0, 1)))),
    ("mxint8[]", Format(Integer(8, 6, "sym"), E8M0)),
    ("nvfp4", Format(E2M1, TwoLevel(E4M3), runs(-1, 16))),
    ("nvfp4[]", Format(E2M1, TwoLevel(E4M3))),
    ("nvfp4[-2:16]", Format(E2M1, TwoLevel(E4M3), runs(-2, 16))),
    # codebooks
    ("nf4", Format(named.NORMAL_FLOAT_4, Absmax(), runs(-1, 64))),
    ("nf4[0]+e8m0", Format(named.NORMAL_FLOAT_4, E8M0, Slices((0,)))),
    ("posit8.1", Format(formats.posit(8, 1))),
    ("posit6.0[-1:32]", Format(formats.posit(6, 0), Absmax(), runs(-1, 32))),
    ("{-1,0,1}", Format(Codebook((-1, 0, 1)))),
    ("{-1,-0.1,0.1,1e10}[0]", Format(Codebook((-1, -0.1, 0.1, 1e10)), Absmax(), Slices((0,)))),
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
        ("e4m3fn", "e4m3"),
        ("float8_e4m3fn", "e4m3"),
        ("float8_e5m2", "e5m2"),
        ("float8_e4m3fnuz", "e4m3fnuz"),
        ("e4m3+fnuz", "e4m3fnuz"),
        ("fp16+inf", "e5m10+inf"),
        ("bf16[0]", "e8m7[0]"),
        ("bfp8[]", "bfp8"),
        ("fixed8.0[0]+sym", "int8[0]"),
        ("e4m3[-1:32]+e8m0", "mxfp8"),
        ("e2m1[-1:16]+e4m3", "nvfp4"),
        ("nf4[-1:64]", "nf4"),
        ("int8+asym+twos", "int8+asym"),
        ("mxfp8+floor", "mxfp8"),
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
    assert Slices([0, 1]) == Slices((0, 1)) and Runs([[-1, 32]]) == runs(-1, 32)


# ---- the numbers of a float ----------------------------------------------------------------------

# OCP's 8-bit floating point and microscaling specifications, tables of parameters: max, exponent of the min normal.
OCP = [("e4m3", 448, -6), ("e5m2", 57344, -14), ("e3m2", 28, -2), ("e2m3", 7.5, 0), ("e2m1", 6, 0)]


@pytest.mark.parametrize("spec, maximum, min_exponent", OCP)
def test_ocp(spec, maximum, min_exponent):
    assert (parse(spec).max, parse(spec).element.min_exponent) == (maximum, min_exponent)


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
    element = parse(spec).element
    assert (element.bits, element.bias, element.max) == (info.k, info.bias, info.max)
    assert (element.min_normal, element.min_subnormal) == (info.smallest_normal, info.smallest_subnormal)
    assert (element.has_infinity, element.has_nan) == (info.num_infs > 0, info.num_nans > 0)
    assert element.codes == 2**info.k - info.num_infs - info.num_nans


@pytest.mark.parametrize("spec, dtype", [("fp16", torch.float16), ("bf16", torch.bfloat16), ("e8m23", torch.float32)])
def test_torch_agrees(spec, dtype):
    format, info = parse(spec), torch.finfo(dtype)
    assert (format.bits, format.max, format.min_normal, 2.0**-format.element.man) == (
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

LARGEST = torch.finfo(torch.float32).max
# spec: element bits, scale bits, bits per element, finite codes, min, max, min normal, min subnormal, scales.
FACTS = {
    "fixed8.6": (8, 0, 8, 256, -2, 127 / 64, 1, 1 / 64, (1, 1)),
    "fixed8.6+sym": (8, 0, 8, 255, -127 / 64, 127 / 64, 1, 1 / 64, (1, 1)),
    "fixed8.8+unsigned": (8, 0, 8, 256, 0, 255 / 256, 0.5, 1 / 256, (1, 1)),
    "fixed4.-3": (4, 0, 4, 16, -64, 56, 32, 8, (1, 1)),
    "bfp8": (8, 8, 8, 256, -127 / 64, 127 / 64, 1, 1 / 64, (2.0**-128, 2.0**127)),
    "bfp8[0]+twos": (8, 8, 8, 256, -2, 127 / 64, 1, 1 / 64, (2.0**-128, 2.0**127)),
    "bfp4[-1:16]+exp5": (4, 5, 4 + 5 / 16, 16, -1.75, 1.75, 1, 0.25, (2.0**-16, 2.0**15)),
    "int8": (8, 32, 8, 255, -127, 127, 64, 1, (2.0**-149, LARGEST)),
    "int4[-1:128]": (4, 32, 4.25, 15, -7, 7, 4, 1, (2.0**-149, LARGEST)),
    "uint4[-1:128]+asym": (4, 36, 4 + 36 / 128, 16, 0, 15, 8, 1, (2.0**-149, LARGEST)),
    "int8+scale0.5": (8, 0, 8, 255, -127, 127, 64, 1, (0.5, 0.5)),
    "e4m3fnuz": (8, 0, 8, 255, -240, 240, 2**-7, 2**-10, (1, 1)),
    "e4m3+p3109": (8, 0, 8, 253, -224, 224, 2**-7, 2**-10, (1, 1)),
    "e4m3+bias11": (8, 0, 8, 254, -28, 28, 2**-10, 2**-13, (1, 1)),
    "e4m3+flush": (8, 0, 8, 240, -448, 448, 2**-6, 2**-6, (1, 1)),
    "e4m3[128x128]": (8, 32, 8 + 2**-9, 254, -448, 448, 2**-6, 2**-9, (2.0**-149, LARGEST)),
    "nf4": (
        4,
        32,
        4.5,
        16,
        -1,
        1,
        0.07958029955625534,
        0.07958029955625534,
        (2.0**-149, LARGEST),
    ),
    "posit8.1": (8, 0, 8, 255, -4096, 4096, 2**-12, 2**-12, (1, 1)),
    "{-1,0,1}": (2, 0, 2, 3, -1, 1, 1, 1, (1, 1)),
    "e4m3": (8, 0, 8, 254, -448, 448, 2**-6, 2**-9, (1, 1)),
    "e2m1": (4, 0, 4, 16, -6, 6, 1, 0.5, (1, 1)),
    "mxfp8": (8, 8, 8.25, 254, -448, 448, 2**-6, 2**-9, (2.0**-127, 2.0**127)),
    "mxfp4": (4, 8, 4.25, 16, -6, 6, 1, 0.5, (2.0**-127, 2.0**127)),
    "mxint8": (8, 8, 8.25, 255, -127 / 64, 127 / 64, 1, 1 / 64, (2.0**-127, 2.0**127)),
    "nvfp4": (4, 8, 4.5, 16, -6, 6, 1, 0.5, (2.0**-149, LARGEST)),
}
NAMES = ("element_bits", "scale_bits", "bits", "codes", "min", "max", "min_normal", "min_subnormal", "scales")


@pytest.mark.parametrize("spec", FACTS)
def test_facts(spec):
    assert tuple(getattr(parse(spec), name) for name in NAMES) == FACTS[spec]


def test_float_has_the_facts_of_float32():
    for name in NAMES:
        assert getattr(FLOAT, name) == getattr(Format(Float(8, 23)), name)


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
        "e4m3fnuz",
        "e4m3+bias3",
        "mxfp4",
        "mxint8",
    ],
)
def test_facts_are_those_of_what_rounding_gives(spec):
    """For every finite bfloat16, which holds each number of these formats, in a block with scale 1."""
    format = parse(spec)
    x = every_half(torch.bfloat16).flatten().double()
    # A power-of-two scale is 1 for a maximum in the element's highest binade, and an integer's for its largest value.
    reach = format.max if spec == "int6" else 2.0 ** math.floor(math.log2(format.max)) * 1.999
    values = reference.quantize(x[x.isfinite()].clamp(-reach, reach), dataclasses.replace(format, block=Slices()))
    values = values.unique()
    assert (values.min(), values.max()) == (format.min, format.max)
    signed_zero = (isinstance(format.element, Float) and "fnuz" not in spec) or spec == "bfp6"
    assert format.codes == values.numel() + signed_zero
    positive = values[values >= 0]
    steps, binades = positive.diff(), torch.exp2(positive[:-1].log2().floor())
    normal = positive[:-1] >= format.min_normal
    assert (steps[~normal] == format.min_subnormal).all()
    assert (steps[normal] / binades[normal] == format.min_subnormal / format.min_normal).all()


# ---- named formats -------------------------------------------------------------------------------


def test_without_mantissa_bits_ties_go_up():
    x = torch.tensor([0.75, 1.5, 3.0, -3.0, 2.9])
    assert quantize(x, "e5m0").tolist() == [1.0, 2.0, 4.0, -4.0, 2.0]


def test_every_constant_is_a_preset():
    constants = {name.lower(): value for name, value in vars(formats).items() if isinstance(value, formats.Format)}
    assert constants == PRESETS and len(PRESETS) > 20
    assert {name.upper() for name in PRESETS} < set(formats.__all__)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_parsed_by_its_name(name):
    assert parse(name) is PRESETS[name] is getattr(formats, name.upper())
    assert parse(str(PRESETS[name])) == PRESETS[name]


def test_every_microscaling_format_is_named():
    assert {name for name, format in named.STEMS.items() if format.scale == named.E8M0} < {*PRESETS}


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


# ---- errors --------------------------------------------------------------------------------------

REFUSED = [
    ("bfp1", "integers: word length 1 is out of range; use 2 to 24 bits"),
    ("bfp25", "integers: word length 25 is out of range; use 2 to 24 bits"),
    ("bfp8[0,0]", r"dims \(0, 0\) must be distinct integers"),
    ("bfp8+exp1", "1 exponent bits are out of range; use 2 to 8"),
    ("bfp8+exp9", "9 exponent bits are out of range; use 2 to 8"),
    ("fixed1.0", "integers: word length 1 is out of range; use 2 to 24 bits"),
    ("fixed8.101", "integers: 101 fractional bits are out of range; use -100 to 100"),
    ("fixed8.-101", "integers: -101 fractional bits are out of range; use -100 to 100"),
    ("e1m2", "float: 1 exponent bits are out of range; use 2 to 8"),
    ("e9m2", "float: 9 exponent bits are out of range; use 2 to 8"),
    ("e5m24", "float: 24 mantissa bits are out of range; use 0 to 23"),
    ("e8m7+finite", "with 8 exponent bits top 'finite' goes beyond float32; use top 'ieee'"),
    ("bfp", "unknown format spec 'bfp'; did you mean bfp8"),
    ("bfp8[0", r"did you mean bfp8\[0\]"),
    ("bfp8+", "did you mean bfp8"),
    ("bfp8.5", "did you mean bfp8"),
    ("fixed8", r"did you mean fixed8\.6"),
    ("e5m2+none", "did you mean e5m2"),
    ("BFP8", "did you mean bfp8"),
    ("", r"unknown format spec ''; specs look like bfp8\[0\], fixed8.6, e4m3, int8\[0\], mxfp8"),
    ("gzip", "unknown format spec 'gzip'; specs look like"),
    # parts that do not go together
    ("float[0]", "float rounds nothing, and has neither blocks nor suffixes; use e8m23"),
    ("e4m3+sym", r"\+sym is for the sign of integers, and this is no Integer; leave it out"),
    ("int8+bias3", r"\+bias3 is for the exponent of a float, and this is no Float"),
    ("posit8.1+ieee", r"\+ieee is for the highest codes of a float"),
    ("e4m3[0]+ceil", r"\+ceil says how a power-of-two scale follows from a block; write \+e8m0\+ceil for one"),
    ("e4m3+inf", r"there is no infinity in e4m3 to overflow to; use e5m2\+inf"),
    ("e2m1+tonan", r"there is no NaN in e2m1 to overflow to; use e4m3\+tonan"),
    ("int8+inf", "there is no infinity in 8-bit integers to overflow to"),
    ("nf4+tonan", "there is no NaN in a codebook of 16 numbers to overflow to"),
    ("int8[0]+scale0.1", r"\[0\] says who shares a scale, and there is none to share; leave the brackets out"),
    ("int8+scale0", "a static scale is a positive float32, not 0.0"),
    ("e4m3+asym", r"only integers with all their codes have a zero point, unlike e4m3; use int8\+asym"),
    ("{-8,8}+scale8190", "the number nearest to zero is 65520, and float16 ends at 65504; use a smaller scale"),
    ("{1e6,2e6}", r"the number nearest to zero is 1e\+06, and float16 ends at 65504"),
    ("int20", "scaled integer: word length 20 is out of range; use 2 to 16 bits"),
    ("e4m3+bias-99", r"with bias -99 the largest number goes beyond 2\^101; use a bias of -85 or more"),
    ("e4m3+bias128", "bias 128 is out of range; use -100 to 80"),
    ("e4m3[0x8]", "blocks: size 0 is out of range; use 1 or more"),
    ("e4m3[-1:16,-1:16]", "must be pairs of an axis and a size, of distinct axes"),
    ("posit9.1", "posit: 9 bits are out of range; use 3 to 8"),
    ("{1,0}", "the numbers of a codebook ascend"),
    ("{0,1e-40}", r"lie within 2\^-100 and 2\^100, or are zero"),
    ("{0}", "a codebook has 2 to 256 finite numbers, not 1"),
    ("{a,b}", r"a codebook is numbers between commas, unlike \{a,b\}; write \{-1,0,1\}"),
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
        ("torch.float8_e4m3fn", ["e4m3"]),
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
        (lambda: Integer(8.0), "word length 8.0 is out of range"),
        (lambda: Integer(8, sign="plus"), "sign 'plus' is unknown; use one of twos, sym, mag, unsigned"),
        (lambda: Integer(8, 1.5), "1.5 fractional bits"),
        (lambda: Slices(("0",)), "must be distinct integers"),
        (lambda: Runs(()), "must be pairs of an axis and a size"),
        (lambda: PowerOfTwo(rule="round"), "rule 'round' is unknown; use one of floor, ceil, even, rceil"),
        (lambda: TwoLevel(Float(8, 7)), "e8m7 is no plain float of fewer than 8 exponent bits; use e4m3"),
        (lambda: Format(E4M3, overflow="wrap"), "overflow 'wrap' is unknown; use one of saturate, infinity, nan"),
        (lambda: Float(5, 2, top="inf"), "top 'inf' is unknown; use one of ieee, nan, finite"),
    ],
)
def test_refusals_of_values(build, message):
    with pytest.raises(FormatError, match=message):
        build()


def test_format_errors_are_value_errors():
    assert issubclass(FormatError, ValueError)


def test_a_new_name_is_the_line_that_the_page_shows():
    """The first change of CONTRIBUTING.md, made to a copy of formats/named.py."""
    page = Path(__file__).parent.parent.joinpath("CONTRIBUTING.md").read_text()
    removed, imported, _, before, line = page.split("```diff\n")[1].split("```")[0].splitlines()
    source = Path(named.__file__).read_text()
    for old, new in ((removed[1:], imported[1:]), (before[1:], f"{before[1:]}\n{line[1:]}")):
        assert source.count(f"{old}\n") == 1
        source = source.replace(f"{old}\n", f"{new}\n")
    changed = {"__name__": named.__name__, "__package__": named.__package__}
    exec(source, changed)
    new = changed["PRESETS"]["mxfp8_2d"]
    assert str(new) == "mxfp8[32x32]" and parse(str(new)) == new
    assert '`parse("mxfp8_2d")`' in page and "`mxfp8[32x32]`" in page
