"""The oracle against others' work: PyTorch's own casts, ml_dtypes, gfloat and torchao, and definitions from papers.

The extra `test` names them. torchao, which is plain Python on the CPU, may be left out: its tests are then skipped.
"""

import dataclasses
import itertools
import math

import gfloat
import gfloat.formats
import ml_dtypes
import numpy
import pytest
import torch
from judges import GFLOAT_ROUNDINGS
from tables import assert_same_bits, draws, hard_values

from swalp_fx import parse
from swalp_fx.formats import Float, posit
from swalp_fx.recipe import parse_rounding
from swalp_fx.reference import quantize

# ---- casts: beyond the largest number too, and infinities ----------------------------------------

CASTS = {
    "e5m2+inf": (torch.float8_e5m2, ml_dtypes.float8_e5m2),
    "e4m3+tonan": (ml_dtypes.float8_e4m3fn,),  # torch's saturates, in some versions
    "e4m3+ieee+inf": (ml_dtypes.float8_e4m3,),
    "e4m3fnuz+tonan": (torch.float8_e4m3fnuz, ml_dtypes.float8_e4m3fnuz),
    "e5m2fnuz+tonan": (torch.float8_e5m2fnuz, ml_dtypes.float8_e5m2fnuz),
    "e4m3+fnuz+bias11+tonan": (ml_dtypes.float8_e4m3b11fnuz,),
    "e3m4+inf": (ml_dtypes.float8_e3m4,),
    "fp16+inf": (torch.float16, numpy.float16),
    "bf16+inf": (torch.bfloat16, ml_dtypes.bfloat16),
}


@pytest.mark.parametrize("spec, dtype", [(spec, dtype) for spec, dtypes in CASTS.items() for dtype in dtypes])
def test_overflow_is_that_of_a_cast(spec, dtype):
    """As numbers: a format without -0 has 0 for it."""
    x = torch.cat(hard_values(spec, torch.float32, side=256)).flatten()
    x = torch.cat([x, torch.tensor([math.inf, -math.inf, math.nan])])
    if isinstance(dtype, torch.dtype):
        theirs = x.to(dtype).float()
    else:
        with numpy.errstate(over="ignore"):
            theirs = torch.from_numpy(x.numpy().astype(dtype).astype(numpy.float32))
    ours = quantize(x, spec)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert ours.isinf().any() or ours.isnan().sum() > x.isnan().sum()


# ---- gfloat: biases, P3109, no subnormals, overflow under every rounding -------------------------


def info_of(format):
    """Our float as gfloat describes it."""
    element = format.element
    top = element.top
    return gfloat.FormatInfo(
        name=str(format),
        k=element.bits,
        precision=element.man + 1,
        bias=element.bias,
        is_signed=True,
        domain=gfloat.Domain.Extended if element.has_infinity else gfloat.Domain.Finite,
        has_nz=top in ("ieee", "nan", "finite"),
        num_high_nans={"ieee": 2**element.man - 1, "nan": 1}.get(top, 0),
        has_subnormals=element.subnormals,
        is_twos_complement=False,
    )


GFLOAT = ["e4m3+bias11", "e5m2+bias3", "e4m3fnuz", "e4m3+p3109", "e5m2+p3109", "e2m3+p3109", "e3m2+nan+bias-2"]


@pytest.mark.parametrize("rounding", GFLOAT_ROUNDINGS)
@pytest.mark.parametrize("spec", GFLOAT)
def test_gfloat_agrees(spec, rounding):
    format = parse(spec)
    info = info_of(format)
    assert (info.max, info.smallest_normal, info.smallest_subnormal) == (
        format.max,
        format.min_normal,
        format.min_subnormal,
    )
    x = torch.cat(hard_values(spec, torch.float32, side=64)).flatten()
    x = x[x.isfinite()]
    ours, random = {}, {}
    if rounding.startswith("stochastic"):
        ours = {"draws": draws(rounding).repeat(4)[: x.numel()]}
        random = {"srbits": ours["draws"].numpy(), "srnumbits": parse_rounding(rounding)[1]}
    theirs = gfloat.round_ndarray(info, x.double().numpy(), GFLOAT_ROUNDINGS[rounding], sat=True, **random)
    assert torch.equal(quantize(x, spec, rounding, **ours), torch.from_numpy(theirs).float())


@pytest.mark.parametrize("rounding", [name for name in GFLOAT_ROUNDINGS if not name.startswith("stochastic")])
@pytest.mark.parametrize("spec", ["e5m2+inf", "e4m3+tonan", "fp16+inf", "e4m3+p3109+inf"])
def test_overflow_depends_on_the_rounding_as_in_ieee_754(spec, rounding):
    format = parse(spec)
    top = format.max
    step = top - float(quantize(torch.tensor(top * (1 - 2.0**-20), dtype=torch.float64), spec, "down"))
    x = torch.tensor([top + k * step / 8 for k in range(-8, 20)] + [top * 4], dtype=torch.float64)
    x = torch.cat([x, -x])
    info = info_of(dataclasses.replace(format, overflow="saturate"))
    theirs = gfloat.round_ndarray(info, x.numpy(), GFLOAT_ROUNDINGS[rounding], sat=False)
    torch.testing.assert_close(quantize(x, spec, rounding), torch.from_numpy(theirs), rtol=0, atol=0, equal_nan=True)


def test_without_subnormals_there_is_zero_alone_below_the_normal_numbers():
    x = torch.linspace(-3, 3, 4097, dtype=torch.float64) * 2.0**-6
    with_them, without = quantize(x, "e4m3"), quantize(x, "e4m3+flush")
    normal = x.abs() >= 2.0**-6
    assert torch.equal(with_them[normal], without[normal])
    assert torch.equal(without[~normal], torch.where(x.abs() > 2.0**-7, x.sign() * 2.0**-6, 0)[~normal])


# ---- torchao: scales -----------------------------------------------------------------------------


def rows_of_every_scale(columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, columns, generator=generator)
    x[::3] = (x[::3] * 4).round() / 4
    x *= torch.exp2(torch.randint(-30, 30, (96, 1), generator=generator).float())
    x[:, ::32] = torch.exp2(torch.randint(-30, 30, (96, columns // 32), generator=generator).float())
    return x


MX = {"mxfp8": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("rule", ["floor", "ceil", "even", "rceil"])
@pytest.mark.parametrize("spec", MX)
def test_torchao_agrees_on_power_of_two_scales(spec, rule):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    x = rows_of_every_scale(128)
    scales, data = mx.to_mx(x, MX[spec], 32, mx.ScaleCalculationMode(rule))
    exponents = scales.view(torch.uint8).double() - 127
    theirs = data.double().view(96, 4, 32) * torch.exp2(exponents).view(96, 4, 1)
    assert torch.equal(quantize(x, f"{spec}+{rule}").double(), theirs.view(96, 128))


@pytest.mark.parametrize("block", [(1, 128), (128, 128), (16, 32), (96, 256)])
def test_scaled_fp8_is_a_cast_of_quotients(block):
    """DeepSeek-V3's and TransformerEngine's recipe: one float32 scale a rectangle, its largest magnitude over 448."""
    rows, columns = block
    x = rows_of_every_scale(256)
    due = torch.empty_like(x)
    for i, j in itertools.product(range(0, 96, rows), range(0, 256, columns)):
        tile = x[i : i + rows, j : j + columns]
        scale = tile.abs().max() / 448
        due[i : i + rows, j : j + columns] = (tile / scale).to(torch.float8_e4m3fn).float() * scale
    assert_same_bits(quantize(x, f"e4m3[{rows}x{columns}]"), due, x)


def test_torchs_own_affine_quantization_agrees():
    """Its zero point is an integer code, and its range includes zero."""
    x = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)) + 1.5
    for spec, low, high in (("uint8+asym", 0, 255), ("int8+asym", -128, 127)):
        scale = (x.max() - x.min().clamp(max=0)) / 255
        zero = low - int((x.min().clamp(max=0) / scale).round())
        theirs = torch.fake_quantize_per_tensor_affine(x, float(scale), zero, low, high)
        torch.testing.assert_close(quantize(x, spec), theirs, rtol=1e-6, atol=1e-6)
        positive = x.abs()
        assert quantize(positive, spec).unique().numel() > 150
        assert quantize(torch.cat([positive.flatten(), torch.zeros(1)]), spec)[-1] == 0


# ---- codebooks, restated -------------------------------------------------------------------------


def posit_of(code, bits, es):
    """The value of a positive posit's code, by its definition, digit by digit."""
    digits = [code >> i & 1 for i in reversed(range(bits - 1))]
    run = next((i for i, d in enumerate(digits) if d != digits[0]), len(digits))
    k = run - 1 if digits[0] else -run
    rest = digits[run + 1 :]
    exponent = sum(d << es - 1 - i for i, d in enumerate(rest[:es]))
    fraction = sum(d / 2 ** (i + 1) for i, d in enumerate(rest[es:]))
    return 2.0 ** (k * 2**es + exponent) * (1 + fraction)


@pytest.mark.parametrize("bits, es", [(8, 1), (8, 0), (8, 2), (6, 1), (4, 3), (3, 0)])
def test_posits(bits, es):
    positive = sorted(posit_of(code, bits, es) for code in range(1, 2 ** (bits - 1)))
    table = torch.tensor([-v for v in reversed(positive)] + [0.0, *positive], dtype=torch.float64)
    assert posit(bits, es).values == tuple(table.tolist())
    assert_same_bits(quantize(table, f"posit{bits}.{es}"), table)
    middles = (table[1:] + table[:-1]) / 2
    even = torch.arange(1 - 2 ** (bits - 1), 2 ** (bits - 1))[:-1] % 2 == 0  # by code, which is the index from zero's
    assert torch.equal(quantize(middles, f"posit{bits}.{es}"), torch.where(even, table[:-1], table[1:]))


def test_nf4_is_made_of_quantiles_of_a_normal_distribution():
    """QLoRA, appendix E: 8 above zero, 7 below; the largest are 1 and -1."""
    positive = torch.special.ndtri(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64))[:-1]
    negative = -torch.special.ndtri(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64))[:-1]
    values = torch.cat([negative, torch.zeros(1), positive]).sort().values / positive.max()
    torch.testing.assert_close(torch.tensor(parse("nf4").element.values).double(), values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nf4_takes_the_nearest_of_its_numbers_on_the_scale_of_64(dtype):
    x = rows_of_every_scale(128).to(dtype)
    table = torch.tensor(parse("nf4").element.values, dtype=dtype)
    blocks = x.view(96, 2, 64)
    scale = blocks.abs().amax(-1, keepdim=True).float().to(dtype)
    nearest = ((blocks / scale).double().unsqueeze(-1) - table.double()).abs().argmin(-1)
    assert torch.equal(quantize(x, "nf4"), (table[nearest] * scale).view(96, 128))


def test_a_power_of_two_table_is_logarithmic_quantization():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    result = quantize(x, "{0,0.0625,0.125,0.25,0.5,1}", "down")
    assert torch.equal(result, torch.where(x < 2.0**-4, 0.0, torch.exp2(x.log2().floor())))


# ---- an element on a scale is the same element ---------------------------------------------------


@pytest.mark.parametrize("spec", ["e5m2", "e3m4", "e4m3fnuz", "e2m3+flush", "posit6.1", "{-3,-1,0,2,3}"])
def test_a_scale_multiplies_the_elements(spec):
    """A static power of two, where quotient and product are exact."""
    x = torch.cat(hard_values("e4m3", torch.float64, side=64)).flatten()
    x = x[x.abs() < 2.0**100]
    for rounding in ("nearest", "up", "toward_zero"):
        assert torch.equal(quantize(x, f"{spec}+scale0.25", rounding), quantize(4 * x, spec, rounding) / 4)


def test_floats_are_tables_of_their_numbers():
    numbers = quantize(torch.linspace(-8, 8, 4001, dtype=torch.float64), "e2m1").unique()
    table = ",".join(f"{v:g}" for v in numbers.tolist())
    x = torch.cat(hard_values("e2m1", torch.float64, side=64)).flatten()
    x = x[x.isfinite()]
    assert isinstance(parse("e2m1").element, Float)
    for rounding in ("nearest", "nearest_away", "nearest_up", "up", "down", "toward_zero"):
        assert torch.equal(quantize(x, f"{{{table}}}", rounding), quantize(x, "e2m1", rounding))
