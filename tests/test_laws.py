"""Laws that every format and rounding keeps, on values that hypothesis picks to break them.

A law's strategy names the formats that keep it. A power-of-two scale keeps every law, except that two's complement is
not idempotent. A real scale (``int8``, ``nvfp4``) rounds its quotients and products once more, so a result may lie
beside its neighbours, and a second pass finds another scale.
"""

import dataclasses
import math

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from strategies import (
    BLOCK_FLOATS,
    ENDING_AT_ZERO,
    EVERY_FORMAT,
    FIXED,
    FLOATS,
    GRIDS_ON_POWERS_OF_TWO,
    MICROSCALING,
    NVFP4,
    POWER_OF_TWO_SCALE,
    PRODUCTS,
    SCALED_INTEGERS,
    TWOS_COMPLEMENT,
)
from tables import ALL_ROUNDINGS, assert_same_bits

from swalp_fx import FLOAT, fingerprints, parse, quantize, reference
from swalp_fx.formats import Integer, Runs, Slices
from swalp_fx.recipe import ROUNDINGS

# Examples follow from each test's name, so that a failure repeats on any machine.
law = hypothesis.settings(deadline=None, derandomize=True, max_examples=300)

ELEMENTWISE = FIXED | FLOATS
IDEMPOTENT = ELEMENTWISE | BLOCK_FLOATS | MICROSCALING
SHARED_SCALE = BLOCK_FLOATS | TWOS_COMPLEMENT | MICROSCALING | SCALED_INTEGERS | NVFP4

roundings = st.sampled_from([*ROUNDINGS, "stochastic1", "stochastic8"])
directed = st.sampled_from([rounding for rounding in ROUNDINGS if rounding != "stochastic"])
keys = st.integers(-(2**63), 2**63 - 1)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Numbers of one scale, where a block's elements see each other, and numbers of every scale.
tensors = st.one_of(
    st.lists(finite, min_size=1, max_size=40),
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=40),
    st.lists(st.integers(-64, 64).map(lambda i: i / 16), min_size=1, max_size=40),
).map(torch.tensor)
with_infinities = st.tuples(tensors, st.integers(0, 9)).map(
    lambda drawn: torch.cat([drawn[0], torch.tensor([math.inf, -math.inf, math.nan, -0.0, 0.0])[: drawn[1]]])
)
# A real scale must not underflow: of these, no maximum does after all divisions.
moderate = tensors.map(lambda x: torch.where(x.abs() < 2.0**-100, 0.0, x.clamp(-(2.0**100), 2.0**100)))


def with_one_block(format):
    """The format with the whole tensor as a block, for laws about the elements of one block."""
    return dataclasses.replace(format, block=Slices())


examples = st.tuples(tensors, POWER_OF_TWO_SCALE) | st.tuples(moderate, SCALED_INTEGERS | NVFP4)


@law
@hypothesis.given(examples, roundings, keys)
def test_a_result_is_one_of_two_neighbours(example, rounding, key):
    x, format = example
    below, above = quantize(x, format, "down").double(), quantize(x, format, "up").double()
    result = quantize(x, format, rounding, key=key).double()
    assert ((result == below) | (result == above)).all()
    assert (below <= above).all()


@hypothesis.settings(law, max_examples=1000)
@hypothesis.given(with_infinities, PRODUCTS, st.sampled_from(ALL_ROUNDINGS), keys, dtypes)
def test_the_op_follows_the_oracle(x, format, rounding, key, dtype):
    x = x.to(dtype)
    format = fitting(format, x.shape)
    due = reference.quantize(x, format, rounding, key=key, stream=3)
    assert_same_bits(quantize(x, format, rounding, key=key, stream=3), due, x)


# The quotient by a scale that the large ones set underflows.
tiny = st.sampled_from([1e-45, 1e-40, 1e-32, 1e-9, 0.0]) | st.floats(0.0, 2.0**-100, width=32)
large = st.sampled_from([1.0, 1e15, 1e30, 3e38])
signed = st.tuples(tiny | large, st.sampled_from([1.0, -1.0])).map(math.prod)
beside_large = st.lists(signed, min_size=1, max_size=12).map(torch.tensor)


def ends_of(x, format):
    """The lowest and the largest number that the element has on the scale of each block of ``x``."""
    scale = reference.scale_of(x, format)
    lowest = reference.lowest_of_blocks(x, scale, format)
    if lowest is None:
        return format.element.min * scale, format.element.max * scale
    first, last = format.element.bounds
    return lowest * scale, (lowest + (last - first)) * scale


@hypothesis.settings(law, max_examples=1000)
@hypothesis.given(beside_large, ENDING_AT_ZERO | PRODUCTS, st.sampled_from(ALL_ROUNDINGS), keys, dtypes)
def test_no_result_leaves_the_range_of_its_element(x, format, rounding, key, dtype):
    x = x.to(dtype).nan_to_num()
    format = fitting(format, x.shape)
    due = reference.quantize(x, format, rounding, key=key, stream=3)
    lowest, largest = (end.to(dtype) for end in ends_of(x.to(torch.promote_types(dtype, torch.float32)), format))
    overflows = due.isinf() | due.isnan() if format.overflow != "saturate" else torch.tensor(False)
    assert ((lowest <= due) & (due <= largest) | overflows).all()
    assert_same_bits(quantize(x, format, rounding, key=key, stream=3), due, x)


@law
@hypothesis.given(tensors, POWER_OF_TWO_SCALE)
def test_the_neighbours_enclose_what_they_are_of(x, format):
    below, above = quantize(x, format, "down").double(), quantize(x, format, "up").double()
    inside = below < above
    assert (below <= x)[inside].all() and (above >= x)[inside].all()
    # Where the two are one, x is that number, or lies beyond the format's last.
    beyond = (below == above) & (below != x)
    assert (below.abs() <= x.abs())[beyond].all()


@law
@hypothesis.given(tensors, ELEMENTWISE, keys)
def test_nothing_lies_between_the_neighbours(x, format, key):
    below, above = quantize(x.double(), format, "down"), quantize(x.double(), format, "up")
    middle = (below + above) / 2
    for rounding in ROUNDINGS:
        result = quantize(middle, format, rounding, key=key)
        assert ((result == below) | (result == above)).all()


@law
@hypothesis.given(tensors, IDEMPOTENT, roundings, keys)
def test_idempotent(x, format, rounding, key):
    once = quantize(x, format, rounding, key=key)
    for again in (rounding, *ROUNDINGS):
        assert_same_bits(quantize(once, format, again, key=key + 1), once, once)


@law
@hypothesis.given(tensors, EVERY_FORMAT, st.sampled_from(ALL_ROUNDINGS), keys, dtypes)
def test_rounded_numbers_are_kept_where_a_format_says_so(x, format, rounding, key, dtype):
    """In the dtype that they were rounded in, and in a narrower one, as a parameter beside a master has."""
    hypothesis.assume(fingerprints.keeps_rounded(format, dtype))
    format = fitting(format, x.shape)
    for wide in (dtype, torch.promote_types(dtype, torch.float32)):
        once = quantize(x.to(wide), format, rounding, key=key).to(dtype)
        for again in ROUNDINGS if once.isfinite().all() else ():
            assert_same_bits(quantize(once, format, again, key=key + 1), once, once)


@law
@hypothesis.given(
    tensors, POWER_OF_TWO_SCALE | GRIDS_ON_POWERS_OF_TWO, roundings, keys, dtypes, st.integers(0, 2**40 - 1)
)
def test_subsets_are_kept(x, format, rounding, key, dtype, chosen):
    """Of a block, with zeros in place of the others, and alone."""
    hypothesis.assume(format.keeps_subsets)
    is_left = torch.tensor([bool(chosen >> i & 1) for i in range(len(x))])
    masked = torch.where(is_left, quantize(x.to(dtype), format, rounding, key=key), 0)
    whole = with_one_block(format)
    alone = quantize(x.to(dtype), whole, rounding, key=key)[is_left]
    for left, blocks in ((masked, format), (alone, whole)):
        for again in (rounding, *ROUNDINGS):
            assert_same_bits(quantize(left, blocks, again, key=key + 1), left, left)


@pytest.mark.parametrize(
    ("format", "numbers"),
    [
        ("mxfp8", [2.0, 1.875 / 64]),  # alone, 1.875 is beyond E4M3's largest, 1.75 of its binade
        ("bfp4+twos", [-1.99, 0.25]),
        ("int8", [1.0, 0.3, 0.17]),
        ("nvfp4", [6.0, 4.0, 3.0]),
    ],
)
def test_other_formats_do_not_keep_subsets(format, numbers):
    once = quantize(torch.tensor(numbers), format)
    left = once.clone()
    left[0] = 0
    assert not parse(format).keeps_subsets
    assert not all(torch.equal(quantize(x, format), x) for x in (once, left))


def test_twos_complement_blocks_are_not_idempotent():
    """-2^(E+1), which only two's complement has, raises the exponent of a second pass."""
    once = quantize(torch.tensor([-1.99, 0.25]), "bfp4+twos")
    assert once.tolist() == [-2.0, 0.25]
    assert quantize(once, "bfp4+twos").tolist() == [-2.0, 0.0]


EVERY = frozenset(("nearest", "stochastic", "toward_zero", "down", "up", "nearest_away", "nearest_up"))
DIRECTED, NONE = frozenset(("toward_zero", "down", "up")), frozenset()
# Format -> the roundings that change what they gave. docs/formats.md has them by kind.
CHANGED_TWICE = {
    **dict.fromkeys(("fixed8.6", "e4m3", "e5m2", "bf16", "posit8.1"), NONE),
    **dict.fromkeys(("bfp8[0]", "bfp4[-1:16]", "mxfp8", "mxfp8_e5m2", "mxfp6_e3m2", "mxfp4", "mxint8"), NONE),
    **dict.fromkeys(("mxfp8+ceil", "mxfp8+rceil", "mxfp4+even", "e2m1[-1:16]"), NONE),
    "mxfp8+even": DIRECTED | {"stochastic"},
    "bfp4[0]+twos": EVERY - {"toward_zero", "up"},
    "bfp8[0]+twos": EVERY - {"toward_zero", "up"},
    **dict.fromkeys(("int8", "int8[0]", "int4[-1:32]", "e4m3[0]", "nf4", "posit8.1[0]"), DIRECTED),
    **dict.fromkeys(("nvfp4", "uint8[0]", "int8[0]+asym"), EVERY),
}


@pytest.mark.parametrize("format", CHANGED_TWICE)
def test_which_roundings_change_what_they_gave(format):
    generator = torch.Generator().manual_seed(0)
    x, sizes = (torch.randn(shape, generator=generator) for shape in ((64, 64), (64, 1)))
    given = [x, x * (sizes * 3).exp(), x.exp(), (x * 4).round() / 4 - 0.5]
    changed = set()
    for rounding in EVERY:
        once = [quantize(each, format, rounding, key=1) for each in given]
        if not all(torch.equal(quantize(each, format, rounding, key=2), each) for each in once):
            changed.add(rounding)
    assert changed == CHANGED_TWICE[format]
    assert not (changed and parse(format).keeps_rounded())


@law
@hypothesis.given(moderate, SCALED_INTEGERS)
def test_a_second_pass_over_scaled_integers_keeps_the_integers(x, format):
    """Their scale may come out one place off, and with it each result."""
    once = quantize(x, format)
    torch.testing.assert_close(quantize(once, format), once, rtol=2.0**-22, atol=0.0)


def test_nvfp4_is_not_idempotent():
    """A block far below the tensor's maximum has a coarse scale, which a second pass may halve under its elements."""
    x = torch.zeros(2, 16)
    x[0, 0], x[1, 0] = 6 * 448, 6 * 1.6 * 2.0**-9
    once = quantize(x, "nvfp4")
    assert once[1, 0] == 4 * 2 * 2.0**-9
    assert quantize(once, "nvfp4")[1, 0] == 6 * 2.0**-9


@law
@hypothesis.given(examples, directed)
def test_monotone(example, rounding):
    x, format = example
    result = quantize(x, with_one_block(format), rounding)
    order = x.argsort()
    assert (result[order].diff() >= 0).all()


@law
@hypothesis.given(examples, roundings, keys)
def test_the_sign_is_kept(example, rounding, key):
    x, format = example
    x = torch.cat([x, torch.tensor([0.0, -0.0])])
    assert torch.equal(quantize(x, format, rounding, key=key).signbit(), x.signbit())


@law
@hypothesis.given(tensors, POWER_OF_TWO_SCALE)
def test_nearest_is_nearest(x, format):
    """Of the two neighbours, in exact (float64) distances; equal distances may go either way."""
    x = x.double()
    below, above = (quantize(x, format, rounding) for rounding in ("down", "up"))
    nearest = torch.minimum((x - below).abs(), (above - x).abs())
    for rounding in ("nearest", "nearest_away", "nearest_up"):
        assert ((quantize(x, format, rounding) - x).abs() == nearest).all()


@law
@hypothesis.given(st.tuples(tensors, IDEMPOTENT) | st.tuples(moderate, SCALED_INTEGERS | NVFP4), keys)
def test_negation(example, key):
    """A symmetric format treats -x as x: rounding one down is rounding the other up."""
    x, format = example
    if format.scale is None and isinstance(format.element, Integer):
        format = dataclasses.replace(format, element=dataclasses.replace(format.element, sign="sym"))
    for rounding in ("nearest", "stochastic", "toward_zero", "nearest_away"):
        assert_same_bits(quantize(-x, format, rounding, key=key), -quantize(x, format, rounding, key=key))
    assert_same_bits(quantize(-x, format, "down"), -quantize(x, format, "up"))


@law
@hypothesis.given(examples, roundings, keys, st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 39))
def test_a_nan_or_infinity_leaves_the_others_as_they_were(example, rounding, key, value, place):
    x, format = example
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
        assert (result[place] > 0) == (value > 0)
        # If no finite number sets the scale, it is the largest, and its largest number may be beyond float32.
        if format.max * format.scales[1] <= FLOAT.max:
            assert result[place].isinf() == format.keeps_infinity


def fitting(format, shape):
    """``format``, its dims brought to those that a tensor of ``shape`` has."""
    if isinstance(format.block, Slices):
        return dataclasses.replace(format, block=Slices(tuple({d % len(shape) for d in format.block.dims})))
    return format


@law
@hypothesis.given(st.integers(1, 4), st.integers(1, 70), st.integers(0, 2**32), EVERY_FORMAT, roundings, keys)
def test_layout_is_no_matter(rows, columns, seed, format, rounding, key):
    """Transposed, sliced or expanded, a tensor gives the same as its contiguous copy."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator) * torch.exp2(4 * torch.randn(rows, 1, generator=generator))
    format = fitting(format, x.shape)
    due = quantize(x, format, rounding, key=key)
    assert_same_bits(quantize(x.t().contiguous().t(), format, rounding, key=key), due)
    assert_same_bits(quantize(x.repeat_interleave(2, 1)[:, ::2], format, rounding, key=key), due)
    expanded = x[:, :1].expand(rows, columns)
    due = quantize(expanded.contiguous(), format, rounding, key=key)
    assert_same_bits(quantize(expanded, format, rounding, key=key), due)


@law
@hypothesis.given(
    st.tuples(st.integers(1, 70), st.integers(1, 70)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(0, 2**32),
    PRODUCTS.filter(lambda format: format.scale_bits),
    roundings,
    keys,
)
def test_rectangles_follow_the_oracle_in_any_layout(shape, size, seed, format, rounding, key):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(12 * torch.randn(shape[0], 1, generator=generator))
    x.view(-1)[::11], x.view(-1)[3::17], x.view(-1)[::7] = math.inf, math.nan, 0.0
    format = dataclasses.replace(format, block=Runs(((0, size[0]), (1, size[1]))))
    due = reference.quantize(x, format, rounding, key=key)
    assert_same_bits(quantize(x, format, rounding, key=key), due, x)
    assert_same_bits(quantize(x.t().contiguous().t(), format, rounding, key=key), due, x)


@law
@hypothesis.given(st.tuples(*[st.integers(1, 5)] * 4), EVERY_FORMAT, roundings, keys)
def test_channels_last_is_no_matter(shape, format, rounding, key):
    x = torch.linspace(-3, 3, math.prod(shape)).reshape(shape)
    format = fitting(format, x.shape)
    due = quantize(x, format, rounding, key=key)
    result = quantize(x.contiguous(memory_format=torch.channels_last), format, rounding, key=key)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(result, due)


@law
@hypothesis.given(tensors.map(lambda x: x[0]), EVERY_FORMAT, roundings, keys)
def test_a_tensor_without_dimensions_is_one_element(x, format, rounding, key):
    assert_same_bits(quantize(x, format, rounding, key=key), quantize(x[None], format, rounding, key=key)[0])
    assert quantize(x[None][:0], format, rounding, key=key).shape == (0,)


@law
@hypothesis.given(moderate, SHARED_SCALE, roundings, keys)
def test_a_power_of_two_scales_a_block_and_its_result(x, format, rounding, key):
    hypothesis.assume(format.scale.stored_bits(format.element) >= 8)
    x = x.double().clamp(-(2.0**50), 2.0**50)
    x[x.abs() < 2.0**-50] = 0.0
    assert_same_bits(quantize(x * 2.0**30, format, rounding, key=key), quantize(x, format, rounding, key=key) * 2.0**30)


@law
@hypothesis.given(examples, roundings, keys, st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_types_are_computed_in_float32_and_stored_once(example, rounding, key, dtype):
    x, format = example
    x = x.to(dtype)
    exact = quantize(x.float(), format, rounding, key=key)
    due = exact.to(dtype)
    within = due.isfinite() | ~exact.isfinite()  # test_where_a_dtype_ends.py has the others
    assert_same_bits(quantize(x, format, rounding, key=key)[within], due[within])


@law
@hypothesis.given(tensors, POWER_OF_TWO_SCALE, roundings, keys)
def test_float32_and_float64_agree(x, format, rounding, key):
    due = quantize(x.double(), format, rounding, key=key).float()
    assert_same_bits(quantize(x, format, rounding, key=key), due)


# ---- unbiased ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec, due", [("mxfp4", 6.0), ("mxfp4+ceil", 7.9), ("mxfp4+rceil", 7.9)])
def test_what_is_clipped_before_the_draw_is_biased(spec, due):
    """A block's maximum under the rule floor, which may be beyond the largest number."""
    x = torch.full((100_000, 1), 7.9)
    assert quantize(x, spec, "stochastic", key=5).mean().item() == pytest.approx(due, abs=0.02)


DRAWS = 1_000_000


@pytest.mark.parametrize(
    "spec",
    [
        *("fixed8.6", "e4m3", "e5m2", "bf16", "bfp8", "bfp8[0]", "bfp4[-1:8]", "bfp4+twos", "int8", "int4[-1:8]"),
        *("mxfp8", "mxfp8_e5m2[0]", "mxfp6_e3m2", "mxfp6_e2m3[]", "mxfp4", "mxint8", "nvfp4"),
    ],
)
@pytest.mark.parametrize("value", [0.3, -0.7123, 1.01, -1.5001, 2.0**-8 / 3])
def test_stochastic_rounding_is_unbiased(spec, value):
    """The mean of a million draws lies within 4 standard errors of x, and both neighbours occur."""
    x = torch.full((DRAWS // 7 + 1, 8), value)
    x[:, 0] = 2.5  # the maximum of each block, where there are blocks
    exact = x[0, 1].double().item()
    result = quantize(x, spec, "stochastic", key=2024, stream=7)[:, 1:].double()
    below, above = (quantize(x, spec, rounding)[0, 1].double().item() for rounding in ("down", "up"))
    step = above - below
    p = (exact - below) / step
    # 16 random bits leave a bias of at most 2^-17 of a step, and a real scale's quotient and product their roundings.
    bound = 4 * step * math.sqrt(p * (1 - p) / DRAWS) + step * 2.0**-17 + abs(exact) * 2.0**-23
    assert abs(result.mean().item() - exact) <= bound
    assert sorted(result.unique().tolist()) == [below, above]


@pytest.mark.parametrize("bits", [1, 4, 8, 24])
def test_few_random_bits_are_biased_by_half_of_their_last(bits):
    x = torch.full((1000, 1000), 5.3, dtype=torch.float64)
    mean = quantize(x, "fixed8.0", f"stochastic{bits}", key=1).mean().item()
    p = round(0.3 * 2**bits) / 2**bits
    assert abs(mean - (5 + p)) <= 4 * math.sqrt(p * (1 - p) / DRAWS)


def test_neighbouring_draws_are_independent():
    """The covariance of the errors of two elements that are 1, 2, 16, 64 or 1000 places apart."""
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
