"""The oracle against itself (one number, and tensors), against worked values, and against others' work."""

import dataclasses
import math

import gfloat
import gfloat.formats
import hypothesis
import hypothesis.strategies as st
import ml_dtypes
import numpy
import pytest
import torch
from judges import GFLOAT_ROUNDINGS
from strategies import GRIDS_ON_POWERS_OF_TWO
from tables import ALL_ROUNDINGS, FORMATS, REAL_SCALE, assert_same_bits, crossed, draws, every_half, hard_values

from swalp_fx import Format, FormatError, RecipeError, parse
from swalp_fx.formats import Integer, PowerOfTwo, Runs, Slices, named
from swalp_fx.recipe import parse_rounding
from swalp_fx.reference import quantize, quantize_number, random_draws

# ---- the law for one number, and the same for tensors --------------------------------------------


# Formats with a power-of-two scale for 64 elements.
ONE_BLOCK = [spec for spec in FORMATS if spec not in REAL_SCALE and parse(spec).block.size is None]
ONE_BLOCK += [f"{spec}[0:64]" for spec, format in named.STEMS.items() if format.scale == named.E8M0]


@pytest.mark.parametrize(("spec", "rounding"), crossed(ONE_BLOCK, ALL_ROUNDINGS))
def test_tensors_follow_the_law_for_one_number(spec, rounding):
    for dtype in (torch.float32, torch.float64):
        for x in (tensor.flatten() for tensor in hard_values(spec, dtype, side=8)):
            maximum = max((abs(v) for v in x.tolist() if math.isfinite(v)), default=0.0)
            law = [
                quantize_number(v, spec, rounding, draw=draw, maximum=maximum)
                for v, draw in zip(x.tolist(), draws(rounding, 64).tolist(), strict=True)
            ]
            result = quantize(x, spec, rounding, draws=draws(rounding, 64))
            assert_same_bits(result, torch.tensor(law, dtype=torch.float64).to(dtype), x)


@hypothesis.settings(deadline=None, derandomize=True, max_examples=500)
@hypothesis.given(
    st.lists(st.floats(width=32), min_size=1, max_size=12)
    | st.lists(st.floats(-9, 9, width=32), min_size=1, max_size=12),
    GRIDS_ON_POWERS_OF_TWO,
    st.sampled_from(ALL_ROUNDINGS),
    st.randoms(use_true_random=False),
)
def test_every_grid_on_a_power_of_two_follows_the_law_for_one_number(values, format, rounding, random):
    given = torch.tensor([random.randrange(2 ** parse_rounding(rounding)[1]) for _ in values])
    maximum = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    law = [
        quantize_number(v, format, rounding, draw=draw, maximum=maximum)
        for v, draw in zip(values, given.tolist(), strict=True)
    ]
    x = torch.tensor(values, dtype=torch.float64)
    assert_same_bits(quantize(x, format, rounding, draws=given), torch.tensor(law, dtype=torch.float64), x)


# ---- worked values -------------------------------------------------------------------------------

# The block of a value on a shared scale holds 1.97 too: of bfp, exponent 0, and step 2^-(wl-2).
EXAMPLES = [
    # spec, rounding, x, result
    ("fixed8.6", "nearest", 0.3, 19 / 64),
    ("fixed8.6", "nearest", 2.5 / 64, 2 / 64),
    ("fixed8.6", "nearest", 3.5 / 64, 4 / 64),
    ("fixed8.6", "nearest_away", 2.5 / 64, 3 / 64),
    ("fixed8.6", "nearest_away", -2.5 / 64, -3 / 64),
    ("fixed8.6", "nearest_up", 2.5 / 64, 3 / 64),
    ("fixed8.6", "nearest_up", -2.5 / 64, -2 / 64),
    ("fixed8.6", "nearest", 5.0, 127 / 64),
    ("fixed8.6", "nearest", -5.0, -2.0),
    ("fixed8.6+sym", "nearest", -5.0, -127 / 64),
    ("fixed8.6", "nearest", math.inf, 127 / 64),
    ("fixed8.6", "nearest", -math.inf, -2.0),
    ("fixed8.6", "up", 1e-40, 1 / 64),
    ("fixed8.6", "up", -1e-40, -0.0),
    ("fixed8.6", "down", -1e-40, -1 / 64),
    ("fixed8.6", "down", 1e-40, 0.0),
    ("fixed8.6", "toward_zero", -0.99 / 64, -0.0),
    ("fixed8.-2", "nearest", 6.0, 8.0),
    ("fixed8.-2", "nearest", 2.0, 0.0),
    ("bfp4", "nearest", -1.97, -1.75),  # QPyTorch's value
    ("bfp4+twos", "nearest", -1.97, -2.0),  # the SWALP authors'
    ("bfp4", "nearest", 0.125, 0.0),
    ("bfp4", "nearest", -0.375, -0.5),
    ("bfp4", "nearest_away", 0.125, 0.25),
    ("bfp4", "nearest_up", 0.125, 0.25),  # QPyTorch's values
    ("bfp4", "nearest_up", -0.375, -0.25),
    ("e4m3", "nearest", 460.0, 448.0),
    ("e4m3", "nearest", math.inf, 448.0),
    ("e4m3", "nearest", 2**-10, 0.0),  # half of the smallest subnormal: a tie
    ("e4m3", "nearest", 3 * 2**-10, 2 * 2**-9),
    ("e4m3", "nearest", 2**-10 * 1.001, 2**-9),
    ("e5m2", "nearest", 60000.0, 57344.0),
    ("e5m2", "nearest", -math.inf, -math.inf),
    ("e5m2", "up", 1e-30, 2**-16),
    ("e5m2+finite", "nearest", math.inf, 114688.0),
    ("e3m2", "nearest", 1e9, 28.0),
    ("e2m3", "nearest", -1e9, -7.5),
    ("e2m1", "nearest", 2.5, 2.0),
    ("e2m1", "nearest", 3.5, 4.0),
    ("e2m1", "nearest", 5.0, 4.0),
    ("e2m1", "nearest", 0.25, 0.0),
    ("fp16", "nearest", 65519.0, 65504.0),
    ("fp16", "nearest", 65520.0, 65504.0),
    ("fp16+inf", "nearest", 65519.0, 65504.0),
    ("fp16+inf", "nearest", 65520.0, math.inf),
    ("fp16+inf", "toward_zero", 1e9, 65504.0),
    ("fp16+inf", "down", -65505.0, -math.inf),
    ("e4m3+tonan", "nearest", 464.0, 448.0),
    ("e4m3+tonan", "nearest_away", 464.0, math.nan),
    ("e4m3+tonan", "nearest", -math.inf, math.nan),
    ("e4m3fnuz", "nearest", 1e9, 240.0),
    ("e4m3+bias11", "nearest", 2**-14, 0.0),
    ("e4m3+bias11", "nearest", 1.001 * 2**-14, 2**-13),
    ("e4m3+flush", "nearest", 2**-7, 0.0),
    ("e4m3+flush", "nearest", 1.001 * 2**-7, 2**-6),
    ("e4m3+flush", "up", 1e-30, 2**-6),
    ("fixed8.8+unsigned", "nearest", 0.75, 0.75),
    ("fixed8.8+unsigned", "nearest", -0.75, -0.0),
    ("fixed8.8+unsigned", "nearest", 2.0, 255 / 256),
    ("bfp4+ceil", "nearest", 0.375, 0.5),  # 1.97 takes the exponent 1
    ("bfp4+even", "nearest", 0.375, 0.5),  # and has it once it is rounded to 3 bits
    ("bfp4+rceil", "nearest", 0.375, 0.5),  # and saturates on 1.75
    ("bf16", "nearest", 1 + 2**-8, 1.0),
    ("bf16", "nearest", 1 + 3 * 2**-8, 1 + 2**-6),
]


@pytest.mark.parametrize("spec, rounding, x, result", EXAMPLES)
def test_worked_values(spec, rounding, x, result):
    assert repr(quantize_number(x, spec, rounding, maximum=1.97)) == repr(float(result))
    block = torch.tensor([1.97, x], dtype=torch.float64)
    assert repr(quantize(block, spec, rounding)[1].item()) == repr(float(result))


@pytest.mark.parametrize("spec", FORMATS)
def test_nan_stays_alone(spec):
    x = torch.tensor([[1.5, math.nan], [0.25, -0.75]])
    result = quantize(x, spec)
    assert result.isnan().tolist() == [[False, True], [False, False]]
    without = quantize(torch.tensor([[1.5, 0.0], [0.25, -0.75]]), spec)
    assert_same_bits(result.nan_to_num(0.0), without)


@pytest.mark.parametrize("exponent", [3, -5, 127, -100])
def test_the_shared_exponent_comes_from_the_bits(exponent):
    """2^3 (1 - 2^-24) has exponent 2, though its float32 logarithm is 3."""
    x = torch.tensor([1 - 2**-24, 0.0]) * 2.0**exponent
    assert quantize(x, "bfp4")[0] == 7 / 8 * 2.0**exponent


@pytest.mark.parametrize("bits", [2, 3, 5, 8])
def test_the_shared_exponent_is_clamped(bits):
    """To two's complement: 3 bits hold exponents -4 to 3, and a block beyond them saturates or loses its step."""
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for exponent in (lowest - 1, lowest, lowest + 1, highest - 1, highest, highest + 1):
        step = 2.0 ** (min(max(exponent, lowest), highest) - 2)
        x = torch.tensor([1.9, 0.3], dtype=torch.float64) * 2.0**exponent
        due = (x / step).round().clamp(max=7) * step
        assert_same_bits(quantize(x, f"bfp4+exp{bits}"), due)
        assert quantize_number(x[1].item(), f"bfp4+exp{bits}", maximum=x[0].item()) == due[1]


def test_blocks_without_an_exponent():
    x = torch.tensor([[0.0, -0.0], [math.inf, -0.0], [math.inf, 1.0], [math.nan, -math.inf]])
    top = 127 * 2.0**121
    result = quantize(x, "bfp8[0]")
    expected = torch.tensor([[0.0, -0.0], [top, -0.0], [127 / 64, 1.0], [math.nan, -top]])
    assert_same_bits(result, expected)


@pytest.mark.parametrize(
    "dims, blocks",
    [(None, 1), ((0,), 2), ((1,), 3), ((0, 1), 6), ((-1,), 4), ((0, -1), 8), ((0, 1, 2), 24), ((-3,), 2)],
)
def test_blocks_are_slices_of_dims(dims, blocks):
    """Each element is scaled by its own power of two; only blocks of equal maximum may share a step."""
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(0, 240, 10).reshape(
        2, 3, 4
    )
    kept = [] if dims is None else [d % 3 for d in dims]
    result = quantize(x, Format(Integer(6, 4, "mag"), PowerOfTwo(), Slices(dims or ())))
    seen = set()
    for index in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        here = tuple(i if d in kept else slice(None) for d, i in enumerate(index))
        seen.add(str(here))
        assert_same_bits(result[here], quantize(x[here].reshape(-1), "bfp6").reshape(x[here].shape))
    assert len(seen) == blocks


@pytest.mark.parametrize("spec", ["bfp6[-1:4]", "bfp6[0:4]", "mxfp4[1:4]", "int4[-1:4]"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 10])
def test_the_last_run_of_an_axis_may_be_short(spec, length):
    """A run is rounded as a tensor of its own, and so are the elements that are left over."""
    format = parse(spec)
    axis = format.block.runs[0][0] % 2
    shape = (length, 3) if axis == 0 else (3, length)
    binades = torch.arange(length * 3).reshape(shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(length)) * 2.0**binades
    alone = dataclasses.replace(format, block=Slices())
    due = torch.empty_like(x)
    for line, result in zip(x.unbind(1 - axis), due.unbind(1 - axis), strict=True):
        for run, rounded in zip(line.split(4), result.split(4), strict=True):
            rounded.copy_(quantize(run, alone))
    assert_same_bits(quantize(x, spec), due)


def test_one_dimension_is_one_block():
    x = torch.tensor([1.97, 0.3])
    assert_same_bits(quantize(x, "bfp4[0]"), quantize(x, "bfp4"))
    assert quantize(torch.tensor(0.3), "bfp4[1]") == 0.3125


# ---- stochastic rounding, draw by draw -----------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_stochastic_goes_up_as_often_as_it_should(bits, sign):
    """Of all draws of ``bits`` bits, frac 2^bits of them, to the nearest even, round away from zero."""
    every = torch.arange(2**bits)
    for frac in (0.0, 2.0**-bits, 1.5 * 2.0**-bits, 0.5, 0.71, 1 - 2.0**-bits, 1 - 2.0**-30, 2.0**-30):
        x = torch.full((2**bits,), sign * (5 + frac), dtype=torch.float64)
        result = quantize(x, "fixed8.0", f"stochastic{bits}", draws=every)
        away = round(frac * 2**bits)
        assert ((result.abs() == 6).sum(), (result.abs() == 5).sum()) == (away, 2**bits - away)


def test_sixteen_bits_are_the_default():
    x = torch.full((4,), 5 + 2.0**-16, dtype=torch.float64)
    draws = torch.tensor([2**16 - 1, 2**16 - 2, 1, 0])
    assert quantize(x, "fixed8.0", "stochastic", draws=draws).tolist() == [6.0, 5.0, 5.0, 5.0]
    assert quantize(x, "fixed8.0", "stochastic16", draws=draws).tolist() == [6.0, 5.0, 5.0, 5.0]
    assert quantize(x, "fixed8.0", "stochastic17", draws=2 * draws).tolist() == [6.0, 5.0, 5.0, 5.0]


def test_draws_go_by_row_major_index():
    x = torch.rand(6, 70, dtype=torch.float64)
    straight = quantize(x, "fixed8.2", "stochastic", key=3, stream=4)
    turned = quantize(x.t().contiguous().t(), "fixed8.2", "stochastic", key=3, stream=4)
    assert_same_bits(straight, turned)
    assert_same_bits(straight, quantize(x, "fixed8.2", "stochastic", draws=random_draws(3, 4, 420)))


# ---- others' work --------------------------------------------------------------------------------

GFLOAT = {
    "e4m3": gfloat.formats.format_info_ocp_e4m3,
    "e5m2": gfloat.formats.format_info_ocp_e5m2,
    "e3m2": gfloat.formats.format_info_ocp_e3m2,
    "e2m3": gfloat.formats.format_info_ocp_e2m3,
    "e2m1": gfloat.formats.format_info_ocp_e2m1,
    "fp16": gfloat.formats.format_info_binary16,
    "bf16": gfloat.formats.format_info_bfloat16,
}


@pytest.mark.parametrize("rounding", GFLOAT_ROUNDINGS)
@pytest.mark.parametrize("spec", GFLOAT)
def test_gfloat_agrees(spec, rounding):
    x = torch.cat(hard_values(spec, torch.float32)).flatten()
    x = x[x.isfinite()][:: 1 if rounding == "nearest" else 16]
    ours, random = {}, {}
    if rounding.startswith("stochastic"):
        ours = {"draws": draws(rounding).repeat(4)[: x.numel()]}
        random = {"srbits": ours["draws"].numpy(), "srnumbits": int(rounding.removeprefix("stochastic") or 16)}
    theirs = gfloat.round_ndarray(GFLOAT[spec], x.double().numpy(), GFLOAT_ROUNDINGS[rounding], sat=True, **random)
    assert_same_bits(quantize(x, spec, rounding, **ours), torch.from_numpy(theirs).float(), x)


CASTS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e4m3+ieee": ml_dtypes.float8_e4m3,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m4": ml_dtypes.float8_e3m4,
    "bf16": ml_dtypes.bfloat16,
    "fp16": numpy.float16,
    "e4m3 ": torch.float8_e4m3fn,
    "e5m2 ": torch.float8_e5m2,
    "bf16 ": torch.bfloat16,
    "fp16 ": torch.float16,
    "e8m23": torch.float32,
}


@pytest.mark.parametrize("spec", CASTS)
def test_casts_agree_in_their_finite_range(spec):
    """ml_dtypes' and torch's own casts overflow where ours saturate, and agree below that."""
    dtype = CASTS[spec]
    format = parse(spec)
    x = torch.cat(hard_values(format, torch.float32)).flatten()
    if format == parse("e8m23"):
        x = torch.cat(hard_values(format, torch.float64)).flatten()
    x = x[x.abs() <= format.max]
    if isinstance(dtype, torch.dtype):
        theirs = x.to(dtype).to(x.dtype)
    else:
        theirs = torch.from_numpy(x.numpy().astype(dtype).astype(numpy.float32))
    assert x.numel() > 2**19
    assert_same_bits(quantize(x, format), theirs, x)


def blocks_of_every_scale(size, blocks=60):
    """[blocks, size] float32, a power of two a row, with zeros, a row of zeros, ties, and one maximum far above."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randn(blocks, size, generator=generator)
    x[::3] = (x[::3] * 4).round() / 4
    x *= torch.exp2(torch.randint(-60, 60, (blocks, 1), generator=generator).float())
    x[1] = 0.0
    x[:, 3] = 0.0
    x[5, 0] *= 1000
    return x


GFLOAT_BLOCKS = {
    "mxfp8": gfloat.formats.format_info_mxfp8_e4m3,
    "mxfp8_e5m2": gfloat.formats.format_info_mxfp8_e5m2,
    "mxfp6_e3m2": gfloat.formats.format_info_mxfp6_e3m2,
    "mxfp6_e2m3": gfloat.formats.format_info_mxfp6_e2m3,
    "mxfp4": gfloat.formats.format_info_mxfp4_e2m1,
    "mxint8": gfloat.formats.format_info_mxint8,
}


@pytest.mark.parametrize("rounding", ["nearest", "toward_zero", "down", "up", "nearest_away"])
@pytest.mark.parametrize("spec", GFLOAT_BLOCKS)
def test_gfloat_agrees_on_blocks(spec, rounding):
    info, mode = GFLOAT_BLOCKS[spec], GFLOAT_ROUNDINGS[rounding]
    x = blocks_of_every_scale(info.k)
    theirs = [gfloat.quantize_block(info, row, gfloat.compute_scale_amax, mode) for row in x.double().numpy()]
    due = torch.from_numpy(numpy.stack(theirs)).float()
    if spec == "mxint8":  # gfloat's integers have -2, which ours leave out
        lowest = due == -torch.exp2(torch.frexp(x.abs().amax(1, keepdim=True)).exponent.float())
        due = torch.where(lowest & (due != 0), due * 127 / 128, due)
    ours = quantize(x, spec, rounding)
    assert torch.equal(ours, due)  # gfloat's integers have no -0


@pytest.mark.parametrize("spec", GFLOAT_BLOCKS)
def test_formats_know_what_gfloat_knows(spec):
    """Of a block format: its element's and its scale's bits, and 32 elements a block."""
    info, format = GFLOAT_BLOCKS[spec], parse(spec)
    assert (format.element_bits, format.scale_bits) == (info.element_bits, info.scale_bits)
    assert format.block == Runs(((-1, info.k),))
    assert format.bits == info.block_size_bytes * 8 / info.k
    assert format.max == info.etype.max and format.min_subnormal == info.etype.smallest
    assert format.scales == (info.stype.smallest, info.stype.max)


def test_nvfp4_is_made_of_two_casts():
    """ml_dtypes' E4M3 of the blocks' maxima, and its E2M1 of the quotients."""
    generator = torch.Generator().manual_seed(0)
    # Over the 12 binades from the tensor's maximum down, past which E4M3 has no scale for a block.
    x = (torch.randn(60, 64, generator=generator) * torch.exp2(-12 * torch.rand(60, 1, generator=generator))).numpy()
    outer = numpy.abs(x).max() / numpy.float32(6 * 448)
    blocks = x.reshape(60, 4, 16)
    inner = (numpy.abs(blocks).max(2, keepdims=True) / numpy.float32(6) / outer).astype(ml_dtypes.float8_e4m3fn)
    scale = numpy.maximum(inner.astype(numpy.float32), numpy.float32(2.0**-9)) * outer
    quotient = numpy.clip(blocks / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(numpy.float32)
    due = torch.from_numpy((quotient * scale).reshape(60, 64))
    x = torch.from_numpy(x)
    assert_same_bits(quantize(x, "nvfp4"), due, x)
    assert quantize(x, "nvfp4").unique().numel() > 100


@pytest.mark.parametrize("wl", [2, 4, 8, 16])
def test_scaled_integers_divide_and_round(wl):
    x = blocks_of_every_scale(32)
    most = 2 ** (wl - 1) - 1
    scale = x.abs().amax(1, keepdim=True) / most
    due = torch.where(scale > 0, (x / scale).round().clamp(-most, most) * scale, x)
    assert_same_bits(quantize(x, f"int{wl}[0]"), due, x)


@pytest.mark.parametrize("spec", ["fp16", "bf16"])
def test_a_dtype_holds_its_own_format(spec):
    x = every_half({"fp16": torch.float16, "bf16": torch.bfloat16}[spec])
    for rounding in ALL_ROUNDINGS:
        assert_same_bits(quantize(x, spec, rounding, draws=draws(rounding, x.numel())), x)


# ---- errors --------------------------------------------------------------------------------------


def test_refusals():
    x = torch.ones(2, 2)
    with pytest.raises(RecipeError, match="unknown rounding 'nearst'"):
        quantize(x, "bfp8", "nearst")
    with pytest.raises(RecipeError, match="unknown rounding 'stochastic25'"):
        quantize(x, "bfp8", "stochastic25")
    with pytest.raises(FormatError, match="block dimension 2 does not exist in a tensor of 2 dimensions"):
        quantize(x, "bfp8[2]")
    with pytest.raises(ValueError, match="needs a key or draws"):
        quantize(x, "bfp8", "stochastic")
