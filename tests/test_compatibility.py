"""Other people's formulas, restated, against the formats and roundings that docs/compatibility.md gives for them."""

import importlib.util

import pytest
import torch
from tables import assert_same_bits, hard_values

import compare_qtorch
from swalp_fx import Format, parse, quantize
from swalp_fx.formats import Float, Integer

# ---- the SWALP authors' code ---------------------------------------------------------------------


def bfp(wl, dims):
    return f"bfp{wl}[{','.join(map(str, dims or ()))}]"


def swalp_block(x, wl, spanned):
    """Their block_quantize under nearest, in the tensor's own arithmetic: two's complement, ties to even."""
    exponent = x.abs().amax(spanned, keepdim=True).log2().floor().clamp(-128, 127)
    return (x * 2.0 ** (wl - 2 - exponent)).round().clamp(-(2 ** (wl - 1)), 2 ** (wl - 1) - 1) * 2.0 ** (
        exponent - (wl - 2)
    )


def rows_of_every_scale(dtype, generator):
    """[64, 8, 50], each of the 64 near a power of two of its own, with values on, beside and halfway between steps."""
    scale = 2.0 ** torch.randint(-90, 90, (64, 1, 1), generator=generator).to(dtype)
    x = torch.randn(64, 8, 50, generator=generator, dtype=dtype).clamp(-1.9, 1.9)
    x[:, :, 10:30] = (x[:, :, 10:30] * 64).round() / 128  # steps of the formats below, and their halves
    x[::2, :, 0] = 2.0**-16 - 2.0  # becomes the lowest value, which only two's complement has
    x[1::2, :, 0] = 2.0 - 2.0**-16
    return x * scale


# Their small_block="None", and block_dim="B" and "BC".
@pytest.mark.parametrize("dims, spanned", [(None, (0, 1, 2)), ((0,), (1, 2)), ((0, 1), (2,))])
@pytest.mark.parametrize("wl", [2, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_twos_complement_is_the_swalp_authors_formula(dtype, wl, dims, spanned):
    x = rows_of_every_scale(dtype, torch.Generator().manual_seed(wl))
    result = quantize(x, f"{bfp(wl, dims)}+twos")
    assert_same_bits(result, swalp_block(x, wl, spanned), x)
    if dims is not None:
        assert torch.equal(result[::2, :, 0], x[::2, :, 0] * 2 / (2 - 2.0**-16))
        assert not torch.equal(result, quantize(x, bfp(wl, dims)))


def test_where_the_swalp_authors_formula_goes_wrong():
    """float32's log2 of 2^3 (1 - 2^-24) is 3, and a block of zeros divides by zero."""
    below_eight = torch.tensor([[8 * (1 - 2**-24), 0.3]])
    assert swalp_block(below_eight, 4, (1,))[0, 0] == 8.0
    assert quantize(below_eight, "bfp4[0]+twos")[0, 0] == 7.0
    assert swalp_block(torch.zeros(1, 3), 8, (1,)).isnan().all()
    assert torch.equal(quantize(torch.zeros(1, 3), "bfp8[0]+twos"), torch.zeros(1, 3))


# ---- QPyTorch ------------------------------------------------------------------------------------
#
# Each law in float64, where its sums are exact. tools/compare_qtorch.py counts the errors of QPyTorch's float32 sums.
# Their zeros have the sign of the last sum, ours have x's sign: both are made +0 here.


def qpytorch_fixed(x, wl, fl, symmetric):
    """Ties to even, saturating; ``symmetric`` gives up the lowest value."""
    highest = 2 ** (wl - 1) - 1
    return (x * 2.0**fl).round().clamp(-highest if symmetric else -highest - 1, highest) * 2.0**-fl


def qpytorch_block(x, wl, spanned):
    """Shifted into one binade, where adding half a step and truncating sends ties up; then clipped symmetrically."""
    power = 2.0 ** (torch.frexp(x.abs().amax(spanned, keepdim=True)).exponent - 1).double()
    step = power * 2.0 ** (2 - wl)
    shifted = ((x + 6 * power) / step + 0.5).floor() * step
    return (shifted - 6 * power).clamp(step - 2 * power, 2 * power - step)


def qpytorch_float(x, exp, man):
    """Ties away from zero, gradual underflow, and numbers, not infinities, in the highest exponent."""
    lowest, highest = 2 - 2 ** (exp - 1), 2 ** (exp - 1)
    step = 2.0 ** ((torch.frexp(x).exponent - 1).clamp(min=lowest) - man).double()
    magnitude = (x.abs() / step + 0.5).floor() * step
    return magnitude.clamp(max=(2 - 2.0**-man) * 2.0**highest).copysign(x)


def assert_same_but_for_zeros(actual, expected, x):
    assert_same_bits(actual + 0.0, expected + 0.0, x)


def finite(spec):
    return [torch.where(x.isfinite(), x, 0.0).double() for x in hard_values(spec, torch.float32, side=128)]


@pytest.mark.parametrize("wl, fl", [(8, 6), (4, 2), (16, 10), (24, 12), (2, 1)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_fixed_point_is_qpytorchs(wl, fl, symmetric):
    format = Format(Integer(wl, fl, "sym" if symmetric else "twos"))
    for x in finite(format):
        assert_same_but_for_zeros(quantize(x, format), qpytorch_fixed(x, wl, fl, symmetric), x)


@pytest.mark.parametrize("dims, spanned", [(None, (0, 1)), ((0,), (1,)), ((1,), (0,))])
@pytest.mark.parametrize("wl", [2, 4, 6, 8, 16])
def test_block_floating_point_under_nearest_up_is_qpytorchs(wl, dims, spanned):
    format = parse(bfp(wl, dims))
    for x in finite(parse(f"bfp{wl}[0]"))[1:]:  # of the first, random bits, no sum with 6 * 2^127 is exact
        x = x * (x.abs().amax(1, keepdim=True) >= 2.0**-120)
        assert_same_but_for_zeros(quantize(x, format, "nearest_up"), qpytorch_block(x, wl, spanned).nan_to_num(), x)


@pytest.mark.parametrize("exp, man", [(5, 2), (4, 3), (3, 2), (2, 1), (2, 3), (5, 10), (6, 9), (7, 0)])
def test_floats_under_nearest_away_are_qpytorchs(exp, man):
    format = Format(Float(exp, man, "finite"))
    for x in finite(format):
        assert_same_but_for_zeros(quantize(x, format, "nearest_away"), qpytorch_float(x, exp, man), x)


def test_where_the_two_block_floating_points_part():
    x = torch.tensor([1.97, -1.97, 0.125, -0.375])
    assert quantize(x, "bfp4+twos").tolist() == [1.75, -2.0, 0.0, -0.5]  # SWALP
    assert quantize(x, "bfp4", "nearest_up").tolist() == [1.75, -1.75, 0.25, -0.25]  # QPyTorch
    assert quantize(x, "bfp4").tolist() == [1.75, -1.75, 0.0, -0.5]  # ours by default


HAS_QTORCH = importlib.util.find_spec("qtorch") is not None


@pytest.mark.slow
@pytest.mark.skipif(not HAS_QTORCH, reason="qtorch is not installed")
def test_qpytorch_itself_differs_only_where_it_is_said_to():
    from qtorch import quant

    _, without_reason = compare_qtorch.table(quant)
    assert without_reason == 0


@pytest.mark.skipif(HAS_QTORCH, reason="qtorch is installed")
def test_the_comparison_says_what_it_lacks(capsys):
    with pytest.raises(SystemExit) as stop:
        compare_qtorch.main([])
    assert stop.value.code == 2
    assert "(No module named 'qtorch'); pip install qtorch ninja setuptools" in capsys.readouterr().err


@pytest.mark.parametrize("case", compare_qtorch.CASES, ids=lambda case: case.call)
def test_the_comparison_excuses_no_result_that_is_off_by_steps(case):
    x = torch.tensor([[1.0, 0.40625, 0.71, -0.3]]) * case.format.min_normal
    ours = case.ours(x)
    theirs = ours + 4 * case.format.min_subnormal
    assert not sum(compare_qtorch.reasons(case, x, theirs, ours).values()).any()
