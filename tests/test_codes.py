"""Codes: their values, their layout in memory, and that they stand for the numbers of ``quantize``."""

import itertools
import math
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import pytest
import torch
from devices import DEVICES
from strategies import ELEMENTS, ENDING_AT_ZERO, PRODUCTS, SCALES, valid
from tables import ALL_ROUNDINGS, FORMATS, assert_same_bits, every_half, hard_values

import swalp_fx
import vectors
from swalp_fx import Format, FormatError, decode, encode, parse, quantize
from swalp_fx.codes.codecs import code_of, number_of, pack, packed_size, unpack
from swalp_fx.formats import Codebook, Integer, Rectangle, Runs

# ---- the law: decoded numbers are the rounded ones -----------------------------------------------

AREAS = st.builds(Rectangle, st.integers(1, 5), st.integers(1, 5)) | st.permutations([0, 1, -1]).map(
    lambda axes: Runs(((axes[0], 2), (axes[1], 3)))
)
ON_AREAS = valid(Format, ELEMENTS, SCALES, AREAS)
shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)
keys = st.integers(-(2**63), 2**63 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


def has_signed_zero(format):
    element = format.element
    if isinstance(element, Integer):
        return element.has_sign_bit
    return not isinstance(element, Codebook) and element.has_signed_zero


def assert_stands_for(codes, due):
    """Decoded they are the same numbers, and have the sign of zero where the format has one."""
    found = decode(codes)
    assert found.dtype == due.dtype and found.shape == due.shape and found.device == due.device
    torch.testing.assert_close(found, due, rtol=0, atol=0, equal_nan=True)
    if has_signed_zero(codes.format):
        assert torch.equal(found.signbit() & (found == 0), due.signbit() & (due == 0))


def numbers_of_many_binades(shape, seed):
    """Float64, a third of them zeros, or near one another, or from the least to the largest that float32 has."""
    generator = torch.Generator().manual_seed(seed)
    reach = (0, 3, 140)[seed % 3]
    binades = torch.randint(-reach, reach + 1, shape, generator=generator)
    is_zero = torch.rand(shape, generator=generator) < 0.3
    numbers = torch.randn(shape, generator=generator, dtype=torch.float64) * torch.exp2(binades.double())
    return numbers.where(~is_zero, torch.copysign(torch.zeros(()), numbers))


@hypothesis.settings(deadline=None, derandomize=True, max_examples=600)
@hypothesis.given(
    shapes, PRODUCTS | ON_AREAS | ENDING_AT_ZERO, st.sampled_from(ALL_ROUNDINGS), keys, dtypes, st.integers(0, 2**32)
)
def test_codes_of_any_format_stand_for_what_quantize_gives(shape, format, rounding, key, dtype, seed):
    x = numbers_of_many_binades(shape, seed).to(dtype).nan_to_num()
    try:
        due = quantize(x, format, rounding, key=key, stream=3)
    except (FormatError, RuntimeError):  # there is no such block in the tensor
        with pytest.raises((FormatError, RuntimeError)):
            encode(x, format, rounding, key=key, stream=3)
        return
    if due.isnan().any() and getattr(format.element, "nan_code", None) is None:
        return
    codes = encode(x, format, rounding, key=key, stream=3)
    assert_stands_for(codes, due)
    assert len(codes.packed) == packed_size(x.numel(), format.element_bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("least", [5e-324, 2.0**-149, 1e-32, 1e-9, 1e-3])
@pytest.mark.parametrize(
    "spec, rounding, sign",
    [
        *itertools.product(["uint8", "uint4", "uint8[0]", "uint4[-1:2]", "uint8[]+scale1e30"], ["down"], [1]),
        *itertools.product(["int8[]+asym", "uint4[-1:2]+asym"], ["down"], [1]),
        *itertools.product(["int8[]+asym", "uint4[-1:2]+asym"], ["up"], [-1]),
    ],
)
def test_a_range_that_ends_at_zero_ends_there_for_the_least_quotients(spec, rounding, sign, least, dtype):
    """A directed rounding would go on to a number that is none of the format's, and its code to another's."""
    for large in (1.0, 1e30):
        x = torch.tensor([sign * large, -sign * least, sign * large / 2, -0.0], dtype=dtype)
        once = quantize(x, spec, rounding)
        assert once[1] == 0 and (once * sign >= 0).all()
        assert_stands_for(encode(x, spec, rounding), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", FORMATS)
def test_hard_numbers(spec, dtype):
    for x in hard_values(spec, dtype, side=64):
        x = x.nan_to_num(0.0, 0.0, 0.0)
        assert_stands_for(encode(x, spec), quantize(x, spec))
        assert_stands_for(
            encode(x, spec, "stochastic", key=1, stream=2), quantize(x, spec, "stochastic", key=1, stream=2)
        )


# Scales of every kind, on blocks of every kind: real ones are quotients, which each device has to round alike.
ON_DEVICES = ["fixed6.3", "posit8.1", "bfp8[0]", "mxfp4+rceil", "mxint8[0:32]", "e4m3[0]", "e4m3[]", "e4m3[16x16]"]
ON_DEVICES += ["int8[0]", "int8[]+scale0.3", "int8[0]+asym", "int8[-1:16]+asym", "uint4[0,1]+asym", "nf4[-1:64]"]
ON_DEVICES += ["posit8.1[0]", "nvfp4", "int8[-1:8]+e4m3", "e5m2[1]"]


def as_bytes(codes):
    """The scales' dtypes, and every byte that is stored."""
    scales = [(each.dtype, each.shape, bytes(each.flatten().view(torch.uint8).tolist()).hex()) for each in codes.scales]
    return codes.hex(), scales


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spec", ON_DEVICES)
def test_codes_are_the_same_on_every_device(spec, dtype, device):
    normal = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    ties = (torch.arange(-128, 128).view(16, 16) + 0.5) * 0.3
    for x in [
        normal.to(dtype),
        ties.to(dtype),
        *(each.nan_to_num(0.0, 0.0, 0.0) for each in hard_values(spec, dtype, side=64)),
    ]:
        codes, there = encode(x, spec), encode(x.to(device), spec)
        assert all(each.device.type == device for each in (there.packed, *there.scales, decode(there)))
        assert as_bytes(there) == as_bytes(codes)
        assert_same_bits(decode(there).cpu(), decode(codes))


@pytest.mark.parametrize("device", DEVICES)
def test_codes_in_compiled_code_are_the_same(device):
    x = torch.randn(40, 96, generator=torch.Generator().manual_seed(0)).to(device)

    @torch.compile
    def there_and_back(x):
        codes = encode(x * 2, "int8[0]+asym")
        return codes, decode(codes) + 1

    codes, y = there_and_back(x)
    due = encode(x * 2, "int8[0]+asym")
    assert as_bytes(codes) == as_bytes(due) and torch.equal(y, decode(due) + 1)


# ---- the codes of elements -----------------------------------------------------------------------

SMALL = ["fixed5.2", "fixed5.2+sym", "fixed5.2+mag", "fixed5.-3+unsigned", "e4m3", "e4m3+ieee", "e4m3+finite"]
SMALL += ["e4m3fnuz", "e4m3+p3109", "e5m2", "e5m2fnuz", "e3m2", "e2m3", "e2m1", "e2m3+flush", "e5m0", "e2m0+nan"]
SMALL += ["e4m3+bias12", "fp16", "bf16", "e7m8", "posit8.1", "posit5.2", "{-1,0,1}", "{-4,-1,2,3.5,8}"]


def same(a, b):
    """Alike, the sign of zero included."""
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


def stands_for(element, code):
    try:
        return element.number(code)
    except FormatError:
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", SMALL)
def test_every_code_of_an_element_is_read_and_written(spec, dtype):
    format = parse(spec)
    element = format.element
    codes = {code: number for code in range(2**element.bits) if (number := stands_for(element, code)) is not None}
    numbers = number_of(torch.tensor(list(codes)), element, dtype)
    assert all(map(same, numbers.tolist(), codes.values()))
    written = code_of(numbers[~numbers.isnan()], element).tolist()
    one_of_several = (
        {0} if not getattr(element, "subnormals", True) else set()
    )  # zeros, which without subnormals are many
    for code, again in zip((code for code, number in codes.items() if not math.isnan(number)), written, strict=True):
        assert again == code or element.number(code) in one_of_several


@pytest.mark.parametrize("spec", SMALL)
def test_an_element_has_a_code_for_each_of_its_numbers(spec):
    element = parse(spec).element
    numbers = [number for code in range(2**element.bits) if (number := stands_for(element, code)) is not None]
    finite = {(number, math.copysign(1, number)) for number in numbers if math.isfinite(number)}
    if getattr(element, "sign", "") == "sym":
        finite -= {(element.min - element.min_subnormal, -1.0)}  # two's complement's lowest number, which it leaves out
    assert len(finite) == element.codes
    assert min(finite)[0] == element.min and max(finite)[0] == element.max
    assert (math.inf in numbers) == element.has_infinity
    assert any(map(math.isnan, numbers)) == (element.has_nan and spec != "e5m0")


FLOAT8 = {
    "e4m3+tonan": torch.float8_e4m3fn,
    "e5m2+inf": torch.float8_e5m2,
    "e4m3fnuz+tonan": torch.float8_e4m3fnuz,
    "e5m2fnuz+tonan": torch.float8_e5m2fnuz,
}


@pytest.mark.parametrize("spec, dtype", list(FLOAT8.items()))
def test_float8_codes_are_the_bytes_of_torch(spec, dtype):
    x = every_half(torch.bfloat16).float()
    x = x[x.abs() <= parse(spec).max]
    assert torch.equal(encode(x, spec).packed, x.to(dtype).view(torch.uint8))
    assert encode(torch.tensor([math.nan]), spec).hex() in {"e4m3+tonan": "7f", "e5m2+inf": "7e"}.get(spec, "80")


@pytest.mark.parametrize(
    "spec, dtype",
    [
        ("e4m3+ieee+inf", ml_dtypes.float8_e4m3),
        ("e3m4+inf", ml_dtypes.float8_e3m4),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e2m1", ml_dtypes.float4_e2m1fn),
    ],
)
def test_small_float_codes_are_the_bytes_of_ml_dtypes(spec, dtype):
    x = torch.linspace(-parse(spec).max, parse(spec).max, 4001)
    theirs = torch.from_numpy(x.numpy().astype(dtype).view("uint8").astype("int64"))
    assert torch.equal(encode(x, spec).integers, theirs)


@pytest.mark.parametrize("spec, dtype", [("fp16+inf", torch.float16), ("bf16+inf", torch.bfloat16)])
def test_half_type_codes_are_their_memory(spec, dtype):
    x = every_half(dtype)
    x = x[~x.isnan()]
    assert torch.equal(encode(x, spec).packed, x.view(torch.uint8))


def test_int8_codes_are_plain_integers():
    x = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    codes = encode(x, "int8[0]")
    (scale,) = codes.scales
    assert torch.equal(scale, x.abs().amax(1, keepdim=True) / 127)
    assert torch.equal(codes.packed.view(torch.int8).view(4, 100).float(), (x / scale).round())


# spec, numbers, their codes in hexadecimal, byte after byte, scales
EXAMPLES = [
    ("fixed8.6", [1.0, -1.0, 1.984375, -2.0], "40c07f80", []),
    ("fixed4.2", [0.25, -0.25, 1.75], "f107", []),  # the first in the low half
    ("bfp8[0]", [1.0, -0.5, -0.0], "40a080", [0]),  # sign and magnitude; 2^0 is the scale
    ("bfp4+twos", [8.0, -4.0], "e4", [3]),
    ("uint8[]", [0.0, 255.0, 3.0], "00ff03", [1.0]),
    ("int4[]+asym", [0.0, 15.0], "78", [1.0, 8]),  # zero has the code -8
    ("mxfp4", [6.0, -0.5, 1.5], "9703", [127]),
    ("mxfp8", [2.0, 448.0], "407e", [127]),
    ("mxint8", [1.0, -1.984375], "4081", [127]),
    ("bfp8+e5m0", [1.0], "40", [15]),
    ("nvfp4", [6.0 * 448, -6.0], "87", None),
    ("nf4", [-1.0, 0.0, 1.0, 0.5626170039176941], "70df", [1.0]),
    ("posit8.1", [0.0, 1.0, -1.0, 4096.0, -4096.0], "0040c07f81", []),
    ("{-1,0,1}", [1.0, 0.0, -1.0, 1.0], "86", []),
    ("e3m2", [28.0, -28.0, 0.0625, 1.0], "df1f30", []),  # four codes in three bytes
    ("fp16", [1.0, -2.0], "003c00c0", []),
]


@pytest.mark.parametrize("spec, numbers, hex, scales", EXAMPLES)
def test_worked_codes(spec, numbers, hex, scales):
    codes = encode(torch.tensor(numbers), spec)
    assert codes.hex() == hex
    if scales is not None:
        assert [each.item() for each in codes.scales] == scales


def test_scales_are_those_of_ocp_and_nvidia():
    x = torch.tensor([[1.0] * 32, [-100.0] * 32, [0.0] * 32])
    (exponents,) = encode(x, "mxfp8").scales
    assert exponents.dtype == torch.uint8 and exponents.tolist() == [[127 - 8], [127 + 6 - 8], [254]]
    inner, outer = encode(x, "nvfp4").scales
    assert outer.dtype == torch.float32 and outer.item() == torch.tensor(100.0).div(6 * 448).item()
    due = (torch.tensor([1.0, 100.0]) / 6 / outer).to(torch.float8_e4m3fn).view(torch.uint8)
    assert inner.dtype == torch.uint8 and torch.equal(inner[:2, 0], due) and inner.shape == (3, 2)


# ---- packing -------------------------------------------------------------------------------------


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(st.integers(1, 32), st.integers(0, 40), st.integers(0, 2**32))
def test_packed_codes_are_one_little_endian_number(bits, count, seed):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, bits)
    number = sum(code << bits * i for i, code in enumerate(codes.tolist()))
    assert bytes(packed.tolist()) == number.to_bytes(packed_size(count, bits), "little")
    assert torch.equal(unpack(packed, count, bits), codes)


def test_codes_are_in_row_major_order_whatever_the_layout():
    x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    for like in (x.to(memory_format=torch.channels_last), x.transpose(0, 3).contiguous().transpose(0, 3)):
        codes, due = (encode(each, "bfp8[0]", "stochastic", key=1) for each in (like, x))
        assert codes.hex() == due.hex() and torch.equal(codes.integers, due.integers) and decode(codes).is_contiguous()


@pytest.mark.parametrize(
    "spec, shape, nbytes",
    [
        ("e4m3", (10, 10), 100),
        ("fixed4.2", (3,), 2),
        ("bfp8[0]", (16, 100), 1600 + 16),
        ("int4[-1:32]", (2, 64), 64 + 4 * 4),
        ("mxfp4", (2, 40), 40 + 4),
        ("nvfp4", (4, 16), 32 + 4 + 4),
        ("int8[0]+asym", (4, 16), 64 + 4 * 5),
        ("e8m23", (3, 3), 36),
        ("bfp8", (0, 3), 0),
    ],
)
def test_bytes(spec, shape, nbytes):
    codes = encode(torch.randn(shape), spec)
    held = sum(each.untyped_storage().nbytes() for each in (codes.packed, *codes.scales))
    assert nbytes <= held <= nbytes + 8  # they are no views of larger memory, which a file would hold too
    assert codes.nbytes == nbytes and f"{nbytes} bytes" in repr(codes).replace(",", "")
    assert len(codes.hex()) == 2 * len(codes.packed)
    assert -(-swalp_fx.parse(spec).stored_bits(shape) // 8) == nbytes


# ---- the page ------------------------------------------------------------------------------------

PAGE = (Path(__file__).parent.parent / "docs" / "codes.md").read_text()


def test_the_page_prints_what_it_says(capsys, tmp_path, monkeypatch):
    first, packed = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    printed, lines = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(first, "docs/codes.md", "exec"), names)
    assert capsys.readouterr().out == printed
    exec(compile(packed, "docs/codes.md", "exec"), names)
    torch.save(names["lp"].state_dict(), "plain.pt")
    (percent,) = re.findall(r"has (\d+) % of the bytes", PAGE)
    assert round(100 * Path("packed.pt").stat().st_size / Path("plain.pt").stat().st_size) == int(percent)
    vectors.main(["mxfp4", "--rounding", "stochastic", "--n", "4"])
    assert capsys.readouterr().out == lines


# ---- randomness, gradients, refusals -------------------------------------------------------------


def test_a_key_is_drawn_where_none_is_given():
    x = torch.rand(1000)
    torch.manual_seed(0)
    first, second = encode(x, "fixed4.3", "stochastic"), encode(x, "fixed4.3", "stochastic")
    torch.manual_seed(0)
    assert torch.equal(decode(first), quantize(x, "fixed4.3", "stochastic")) and first.hex() != second.hex()


def test_codes_have_no_gradient():
    assert not decode(encode(torch.ones(3, requires_grad=True), "bfp8")).requires_grad


@pytest.mark.parametrize("spec", ["e5m2", "bf16", "e5m2+p3109", "e5m2[]", "e5m2[-1:2]+e8m0"])
def test_infinity_and_nan_have_codes_where_the_format_has_them(spec):
    x = torch.tensor([math.inf, -math.inf, math.nan, 1.0])
    assert torch.equal(decode(encode(x, spec)).nan_to_num(7.0), x.nan_to_num(7.0))


def test_what_overflows_has_its_code():
    assert encode(torch.tensor([1e9, -1e9, 2.0]), "e5m2+inf").hex() == "7cfc40"
    assert encode(torch.tensor([1e9, -math.inf, 2.0]), "e4m3+tonan").hex() == "7f7f40"


@pytest.mark.parametrize(
    "spec, value",
    [
        *itertools.product(["fixed8.6", "bfp8[0]", "int8", "uint8+asym", "nf4", "mxfp4"], [math.inf, math.nan]),
        *[("e4m3", math.inf), ("mxfp8", -math.inf), ("e5m0", math.nan), ("posit8.1", math.nan)],
    ],
)
def test_what_has_no_code_is_refused_by_name(spec, value):
    with pytest.raises(ValueError, match=rf"encode: x is {value} at \[1, 0\], and .* has no code for that; replace"):
        encode(torch.tensor([[1.0, 2.0], [value, 4.0]]), spec)


@pytest.mark.parametrize(
    "x, spec, error, message",
    [
        (torch.ones(2), "float", FormatError, "float rounds nothing, and has no codes"),
        (torch.ones(2), "bfp8[c:32]", FormatError, r"name it: \[-1:32\]"),
        (torch.ones(2, 2), "bfp8[2]", FormatError, "block dimension 2 does not exist in a tensor of 2 dimensions"),
        (torch.ones(2), "e4m3[2x2]", FormatError, "a block of 2 axes, and the tensor has 1"),
        (torch.ones(2).long(), "bfp8", TypeError, "encode takes a floating-point tensor, not torch.int64"),
        ([1.0], "bfp8", TypeError, "encode takes a tensor, not list"),
        (torch.ones(2).to_sparse(), "bfp8", TypeError, "encode takes a dense tensor"),
    ],
)
def test_refusals(x, spec, error, message):
    with pytest.raises(error, match=message):
        encode(x, spec)


def test_a_code_without_a_number_is_refused():
    codes = encode(torch.tensor([1.0, 0.0, -1.0]), "{-1,0,1}")
    with pytest.raises(ValueError, match="goes beyond its last number"):
        decode(swalp_fx.Codes(codes.packed | 3, codes.scales, codes.format, codes.shape, codes.dtype))
