"""Laws that every format and rounding keeps, on values that hypothesis picks to break them."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tables import assert_same_bits

from swalp_fx import BlockFloat, FixedPoint, Float, parse, quantize
from swalp_fx.formats import TOPS
from swalp_fx.recipe import ROUNDINGS

# Examples follow from each test's name, so that a failure repeats on any machine.
law = hypothesis.settings(deadline=None, derandomize=True, max_examples=200)

word_lengths = st.integers(2, 24)
elementwise = st.one_of(
    st.builds(FixedPoint, word_lengths, st.integers(-100, 100), st.booleans()),
    st.builds(Float, st.integers(2, 7), st.integers(0, 23), st.sampled_from(TOPS)),
    st.builds(Float, st.just(8), st.integers(0, 23)),
)
symmetric_block = st.builds(BlockFloat, word_lengths, exponent_bits=st.integers(2, 8))
formats = elementwise | symmetric_block | st.builds(BlockFloat, word_lengths, symmetric=st.just(False))
roundings = st.sampled_from([*ROUNDINGS, "stochastic1", "stochastic8"])
keys = st.integers(-(2**63), 2**63 - 1)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Numbers of one scale, where a block's elements see each other, and numbers of every scale.
tensors = st.one_of(
    st.lists(finite, min_size=1, max_size=20),
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=20),
    st.lists(st.integers(-64, 64).map(lambda i: i / 16), min_size=1, max_size=20),
).map(torch.tensor)


@law
@hypothesis.given(tensors, formats, roundings, keys)
def test_a_result_is_one_of_two_neighbours(x, format, rounding, key):
    below, above = quantize(x, format, "down").double(), quantize(x, format, "up").double()
    result = quantize(x, format, rounding, key=key).double()
    assert ((result == below) | (result == above)).all()
    inside = below < above
    assert (below <= x)[inside].all() and (above >= x)[inside].all()
    # Where the two are one, x is that number, or lies beyond the format's last.
    beyond = (below == above) & (below != x)
    assert (below.abs() <= x.abs())[beyond].all()


@law
@hypothesis.given(tensors, elementwise, keys)
def test_nothing_lies_between_the_neighbours(x, format, key):
    below, above = quantize(x.double(), format, "down"), quantize(x.double(), format, "up")
    middle = (below + above) / 2
    for rounding in ROUNDINGS:
        result = quantize(middle, format, rounding, key=key)
        assert ((result == below) | (result == above)).all()


@law
@hypothesis.given(tensors, elementwise | symmetric_block, roundings, keys)
def test_idempotent(x, format, rounding, key):
    once = quantize(x, format, rounding, key=key)
    for again in (rounding, *ROUNDINGS):
        assert_same_bits(quantize(once, format, again, key=key + 1), once, once)


def test_twos_complement_blocks_are_not_idempotent():
    """-2^(E+1), which only two's complement has, raises the exponent of a second pass."""
    once = quantize(torch.tensor([-1.99, 0.25]), "bfp4+twos")
    assert once.tolist() == [-2.0, 0.25]
    assert quantize(once, "bfp4+twos").tolist() == [-2.0, 0.0]


@law
@hypothesis.given(tensors, formats, st.sampled_from([r for r in ROUNDINGS if r != "stochastic"]))
def test_monotone(x, format, rounding):
    result = quantize(x, format, rounding)
    order = x.argsort()
    assert (result[order].diff() >= 0).all()


@law
@hypothesis.given(tensors, formats, roundings, keys)
def test_the_sign_is_kept(x, format, rounding, key):
    x = torch.cat([x, torch.tensor([0.0, -0.0])])
    assert torch.equal(quantize(x, format, rounding, key=key).signbit(), x.signbit())


@law
@hypothesis.given(tensors, formats)
def test_nearest_is_nearest(x, format):
    """Of the two neighbours, in exact (float64) distances; equal distances may go either way."""
    x = x.double()
    below, above = (quantize(x, format, rounding) for rounding in ("down", "up"))
    nearest = torch.minimum((x - below).abs(), (above - x).abs())
    for rounding in ("nearest", "nearest_away"):
        assert ((quantize(x, format, rounding) - x).abs() == nearest).all()


@law
@hypothesis.given(tensors, elementwise | symmetric_block, keys)
def test_negation(x, format, key):
    """A symmetric format treats -x as x, and what is down for one is up for the other."""
    if isinstance(format, FixedPoint):
        format = FixedPoint(format.wl, format.fl, symmetric=True)
    for rounding in ("nearest", "stochastic", "toward_zero", "nearest_away"):
        assert_same_bits(quantize(-x, format, rounding, key=key), -quantize(x, format, rounding, key=key))
    assert_same_bits(quantize(-x, format, "down"), -quantize(x, format, "up"))


@law
@hypothesis.given(
    tensors, formats, roundings, keys, st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 19)
)
def test_a_nan_or_infinity_leaves_the_others_as_they_were(x, format, rounding, key, value, place):
    place %= x.numel()
    without, having = x.clone(), x.clone()
    without[place], having[place] = 0.0, value
    others = torch.arange(x.numel()) != place
    result = quantize(having, format, rounding, key=key)
    # Zero has no say in a block's exponent either.
    assert_same_bits(result[others], quantize(without, format, rounding, key=key)[others])
    if math.isnan(value):
        assert result[place].isnan()
    else:
        kept = isinstance(format, Float) and format.top == "ieee"
        assert result[place].isinf() == kept
        assert (result[place] > 0) == (value > 0)


@law
@hypothesis.given(
    st.integers(1, 4), st.integers(1, 70), st.sampled_from([(0,), (1,), (0, 1), None]), roundings, keys, st.randoms()
)
def test_layout_is_no_matter(rows, columns, dims, rounding, key, random):
    x = torch.tensor([[random.gauss(0, 2.0**row) for _ in range(columns)] for row in range(rows)])
    format = BlockFloat(5, dims=dims)
    due = quantize(x, format, rounding, key=key)
    assert_same_bits(quantize(x.t().contiguous().t(), format, rounding, key=key), due)
    assert_same_bits(quantize(x.repeat_interleave(2, 1)[:, ::2], format, rounding, key=key), due)
    assert_same_bits(
        quantize(x[None, ..., None], BlockFloat(5, dims=dims and tuple(d + 1 for d in dims)), rounding, key=key)[
            0, ..., 0
        ],
        due,
    )


@law
@hypothesis.given(tensors, formats, roundings, keys)
def test_a_power_of_two_scales_a_block_and_its_result(x, format, rounding, key):
    hypothesis.assume(isinstance(format, BlockFloat) and format.exponent_bits == 8)
    x = x.double().clamp(-(2.0**60), 2.0**60)
    x[x.abs() < 2.0**-60] = 0.0
    assert_same_bits(quantize(x * 2.0**50, format, rounding, key=key), quantize(x, format, rounding, key=key) * 2.0**50)


@law
@hypothesis.given(tensors, formats, roundings, keys, st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_types_are_computed_exactly_and_stored_once(x, format, rounding, key, dtype):
    x = x.to(dtype)
    due = quantize(x.double(), format, rounding, key=key).to(dtype)
    assert_same_bits(quantize(x, format, rounding, key=key), due)


@law
@hypothesis.given(tensors, formats, roundings, keys)
def test_float32_and_float64_agree(x, format, rounding, key):
    due = quantize(x.double(), format, rounding, key=key).float()
    assert_same_bits(quantize(x, format, rounding, key=key), due)


# ---- unbiased ------------------------------------------------------------------------------------

DRAWS = 1_000_000


@pytest.mark.parametrize("spec", ["fixed8.6", "bfp8", "bfp4+twos", "e4m3", "e5m2", "bf16"])
@pytest.mark.parametrize("value", [0.3, -0.7123, 1.01, -1.5001, 2.0**-8 / 3])
def test_stochastic_rounding_is_unbiased(spec, value):
    """The mean of a million draws lies within 4 standard errors of x, and both neighbours occur."""
    x = torch.full((1000, 1000), value)
    exact = x[0, 0].double().item()
    result = quantize(x, spec, "stochastic", key=2024, stream=7).double()
    below, above = (quantize(x[:1, :1], spec, rounding).double().item() for rounding in ("down", "up"))
    step = above - below
    p = (exact - below) / step
    # 16 random bits leave a bias of at most 2^-17 of a step.
    bound = 4 * step * math.sqrt(p * (1 - p) / DRAWS) + step * 2.0**-17
    assert abs(result.mean().item() - exact) <= bound
    assert sorted(result.unique().tolist()) == [below, above]


@pytest.mark.parametrize("bits", [1, 4, 8, 24])
def test_few_random_bits_are_biased_by_half_of_their_last(bits):
    x = torch.full((1000, 1000), 5.3, dtype=torch.float64)
    mean = quantize(x, "fixed8.0", f"stochastic{bits}", key=1).mean().item()
    p = round(0.3 * 2**bits) / 2**bits
    assert abs(mean - (5 + p)) <= 4 * math.sqrt(p * (1 - p) / DRAWS)


def test_neighbouring_draws_are_independent():
    """Covariance of an element's error with that of one 1, 2, 16, 64 or 1000 places on."""
    x = torch.full((DRAWS,), 0.5)
    error = quantize(x, "fixed8.0", "stochastic", key=5) - 0.5
    for lag in (1, 2, 15, 16, 17, 64, 1000):
        covariance = (error[lag:] * error[:-lag]).double().mean().item()
        assert abs(covariance) < 4 * 0.25 / math.sqrt(DRAWS - lag)


def test_representable_values_never_move():
    codes = torch.arange(-127, 128) / 64.0
    for spec in ("fixed8.6", "bfp8"):
        for key in range(20):
            assert torch.equal(quantize(codes, parse(spec), "stochastic", key=key), codes)
