"""The oracle: the definition of every format and rounding, slow and plain.

``quantize_number`` defines the rounding of one number in exact rational arithmetic. ``quantize`` defines it again for
tensors. On a power-of-two scale it computes in float64, and every step is exact: clamping, remainders, and products by
powers of two. Nothing here uses the compiled op, which must give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from .formats import (
    FLOAT,
    WHOLE,
    Absmax,
    Affine,
    Block,
    Codebook,
    Element,
    Float,
    Format,
    FormatError,
    Integer,
    PowerOfTwo,
    Runs,
    Scale,
    Slices,
    Static,
    TwoLevel,
    parse,
)
from .formats.scale import RULES
from .random import COUNTERS, MASK, MULTIPLIERS, ROUNDS, WEYL, draws_per_word
from .recipe import RANDOM_BITS, parse_rounding

__all__ = [
    "bounds_of",
    "divided",
    "lowest_beside",
    "lowest_of_blocks",
    "power_of_two",
    "product_of_levels",
    "quantize",
    "quantize_number",
    "random_draws",
    "scale_of",
    "two_levels",
    "with_sign_of",
]


FLOAT32_MAX = torch.finfo(torch.float32).max
# Overflow -> the result for infinities and for numbers that round beyond the largest.
BEYOND = {"infinity": math.inf, "nan": math.nan}
DIRECTED = ("toward_zero", "down", "up")  # these may round a number beyond the largest to the largest


# ---- one number ---------------------------------------------------------------------------------


def quantize_number(
    x: float, format: str | Format, rounding: str = "nearest", *, draw: int = 0, maximum: float | None = None
) -> float:
    """``x`` rounded: clamped to the format's range, then rounded to a multiple of the format's step.

    The element is an integer or a float, without a scale or on a power of two. ``quantize`` defines the others.

    draw: the random integer that stochastic rounding adds, below 2^(its random bits).

    maximum: the largest finite magnitude in x's block. None: x is alone in its block.
    """
    format = parse(format)
    if format == FLOAT or math.isnan(x) or (math.isinf(x) and format.keeps_infinity):
        return x
    if math.isinf(x) and format.overflow == "nan":
        return math.nan
    if isinstance(format.element, Codebook) or not (format.scale is None or isinstance(format.scale, PowerOfTwo)):
        raise FormatError(f"{format} has no power-of-two scale to state a number's grid by; quantize a tensor")
    scale = _power_of_two_of_number(x, format, maximum)
    name, bits = parse_rounding(rounding)
    lo, hi, step = (
        scale * each for each in _grid_of_number(Fraction(x) / scale if math.isfinite(x) else x, format.element)
    )
    room = _room(format, name) * step
    clamped = lo - room if x < lo - room else hi + room if x > hi + room else Fraction(x)
    magnitude = step * _round_magnitude(abs(clamped) / step, x < 0, name, bits, draw)
    if magnitude > hi and room:
        return math.copysign(BEYOND[format.overflow], x)
    return math.copysign(float(magnitude), x)


def _room(format: Format, name: str) -> Fraction:
    """How many steps beyond the largest number a value is clamped, so that it can overflow; 0 if it saturates."""
    if format.overflow == "saturate":
        return Fraction(0)
    return Fraction(1, 2) if name in DIRECTED else Fraction(1)


def _floor_log2(magnitude: Fraction) -> int:
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= magnitude else exponent - 1


def _power_of_two_of_number(x: float, format: Format, maximum: float | None) -> Fraction:
    """The scale of a block with the largest finite magnitude ``maximum``; None: of a block with x alone."""
    scale = format.scale
    if not isinstance(scale, PowerOfTwo):
        return Fraction(1)
    smallest, largest = scale.exponents
    of_block = Fraction((0.0 if math.isinf(x) else abs(x)) if maximum is None else maximum)
    if of_block == 0:  # a block of zeros or infinities has no exponent: any scale will do
        return Fraction(2) ** largest
    exponent = _floor_log2(of_block)
    next_one = of_block / Fraction(2) ** exponent >= Fraction(RULES[scale.rule](format.element))
    return Fraction(2) ** min(max(exponent + next_one - format.element.max_exponent, smallest), largest)


def _grid_of_number(y: Fraction | float, element: Element) -> tuple[Fraction, Fraction, Fraction]:
    """Lowest number, largest number and step of the grid on which y is rounded."""
    two, lowest, highest = Fraction(2), Fraction(element.min), Fraction(element.max)
    if isinstance(element, Integer):
        return lowest, highest, two**-element.point
    assert isinstance(element, Float)
    magnitude = highest if isinstance(y, float) else min(abs(y), highest)
    if magnitude < element.min_normal:
        return lowest, highest, Fraction(element.min_subnormal)
    return lowest, highest, two ** (_floor_log2(magnitude) - element.man)


def _round_magnitude(y: Fraction, negative: bool, name: str, bits: int, draw: int) -> int:
    """``y`` >= 0 rounded to one of the two integers beside it; the number itself is -y if ``negative``."""
    whole = math.floor(y)
    rest = y - whole
    half = Fraction(1, 2)
    away = {
        "nearest": rest > half or (rest == half and whole % 2 == 1),
        "stochastic": round(rest * 2**bits) + draw >= 2**bits,
        "toward_zero": False,
        "down": rest > 0 and negative,
        "up": rest > 0 and not negative,
        "nearest_away": rest >= half,
        "nearest_up": rest > half or (rest == half and not negative),
    }
    return whole + away[name]


# ---- tensors ------------------------------------------------------------------------------------


@dataclass
class _How:
    """A rounding, and its random ``draws`` in the tensor's shape; None if it draws none."""

    name: str
    bits: int
    draws: Tensor | None


def quantize(
    x: Tensor,
    format: str | Format,
    rounding: str = "nearest",
    *,
    key: int | Tensor | None = None,
    stream: int = 0,
    draws: Tensor | None = None,
) -> Tensor:
    """``x`` rounded to ``format``: computed exactly, then stored in x's dtype by rounding to nearest even.

    The format ends where x's dtype does: a number that would be stored as an infinity counts as beyond the largest.

    x: any floating dtype, shape and layout.

    key, stream: they determine the draws of stochastic rounding.

    draws: the draws themselves, in place of key and stream: an int64 below 2^(random bits) for each element of x, in
        row-major order.
    """
    format = parse(format)
    name, bits = parse_rounding(rounding)
    if format == FLOAT or x.numel() == 0:
        return x.clone()
    if name == "stochastic" and draws is None:
        if key is None:
            raise ValueError("stochastic rounding needs a key or draws; pass one of them")
        draws = random_draws(key, stream, x.numel(), bits)
    how = _How(name, bits, None if draws is None else draws.reshape(x.shape))
    computed = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    scale = scale_of(computed, format)
    lowest = lowest_of_blocks(computed, scale, format)
    q = _rounded(computed, scale, lowest, format, how)
    exact = scale.to(q.dtype)
    for sign, last, beyond in bounds_of(scale, lowest, format, x.dtype):
        q = torch.where((sign * q > sign * last * exact) & ~_is_empty(computed, format), beyond * exact, q)
    if format.keeps_infinity or format.overflow == "nan":
        q = torch.where(computed.isinf(), computed * (1.0 if format.keeps_infinity else math.nan), q)
    return torch.where(computed.isnan(), computed, q).to(x.dtype)


def _rounded(x: Tensor, scale: Tensor, lowest: Tensor | None, format: Format, how: _How) -> Tensor:
    """``x`` rounded on ``scale``. lowest: the lowest integer of each block, if the scale has a zero point."""
    if (format.scale is None or isinstance(format.scale, PowerOfTwo)) and not isinstance(format.element, Codebook):
        return _on_grid(x.double(), scale.double(), format, how)
    return _on_element(divided(x, scale), x, lowest, format, how) * scale


def _on_element(y: Tensor, x: Tensor, lowest: Tensor | None, format: Format, how: _How) -> Tensor:
    """The quotients ``y`` of ``x`` rounded to numbers of the element, in the compute type."""
    if isinstance(format.element, Codebook):
        return _on_table(with_sign_of(x, y, 2.0**-126), x, format.element, how)
    v = with_sign_of(x, y.double(), 2.0**-200)
    if lowest is not None:
        return _beside_zero_point(v, lowest, format, how).to(y.dtype)
    return _on_grid(v, torch.ones((), dtype=torch.float64), format, how).to(y.dtype)


def bounds_of(
    scale: Tensor, lowest: Tensor | None, format: Format, dtype: torch.dtype
) -> tuple[tuple[int, Tensor, Tensor | float], ...]:
    """Where the element's numbers on ``scale`` end in a tensor of ``dtype``, which would hold others as infinities.

    For each side: (its sign, the last number, the result for those beyond). The result is the last number, or the
    infinity or NaN of the format's overflow. None for float64: it holds every product of an element and a scale.
    """
    if dtype == torch.float64:
        return ()
    most = _most(dtype).to(scale.device).expand_as(scale)
    toward_zero = _How("toward_zero", 0, None)
    saturating = Format(format.element, format.scale, format.block)
    bounds = []
    for sign in (1, -1):
        # A quotient may be rounded up, to a number that is beyond after all.
        last, before = (
            _on_element(divided(sign * each, scale), sign * each, lowest, saturating, toward_zero)
            for each in (most, most * (1 - 2**-23))
        )
        last = torch.where(sign * last * scale > most, before, last)
        bounds.append((sign, last, last if format.overflow == "saturate" else sign * BEYOND[format.overflow]))
    return tuple(bounds)


def _is_empty(x: Tensor, format: Format) -> Tensor:
    """Whether a block is of zeros, infinities and NaNs alone: its scale is the largest, and has no bounds."""
    if format.scale is None or isinstance(format.scale, Static):
        return torch.tensor(False)
    return _block_maximum(x.abs(), WHOLE if isinstance(format.scale, TwoLevel) else format.block) == 0


def _most(dtype: torch.dtype) -> Tensor:
    """The largest float32 that ``dtype`` does not store as an infinity: within half a last place of its largest."""
    largest = torch.tensor(torch.finfo(dtype).max)
    if dtype == torch.float32:
        return largest
    half_a_place = torch.exp2(torch.log2(largest).floor()) * torch.finfo(dtype).eps / 2
    return torch.nextafter(largest + half_a_place, torch.zeros(()))


def divided(x: Tensor, by: Tensor | float) -> Tensor:
    """x / by, each quotient rounded once, on every device."""
    # If ``by`` is a Python number or a CPU scalar, PyTorch on CUDA multiplies by 1 / by: two roundings. A tensor on
    # CUDA is divided as in IEEE 754. The other operations here are exact, or rounded once, on any device.
    return x / torch.as_tensor(by, dtype=x.dtype, device=x.device)


def with_sign_of(x: Tensor, y: Tensor, least: float) -> Tensor:
    """The quotients ``y`` of ``x``. Where one has underflowed it is ``least`` with the sign of x.

    Directed roundings need that sign. ``least`` is below half of the element's smallest number: to nearest it is zero.
    """
    return torch.where((y == 0) & (x != 0), torch.copysign(torch.full_like(y, least), x), y)


# ---- scales: one for each block, in a shape that broadcasts to the tensor's ------------------------


def _unscaled(x: Tensor, format: Format) -> Tensor:
    return torch.ones((), dtype=x.dtype)


def _power_of_two_scale(x: Tensor, format: Format) -> Tensor:
    scale = format.scale
    assert isinstance(scale, PowerOfTwo)
    smallest, largest = scale.exponents
    maximum = _block_maximum(x.abs(), format.block).double()
    exponent = _exponent(maximum)
    significand = torch.frexp(maximum).mantissa * 2
    exponent = exponent + (significand >= RULES[scale.rule](format.element)) - format.element.max_exponent
    return power_of_two(torch.where(maximum > 0, exponent, largest).clamp(smallest, largest)).to(x.dtype)


def _absmax_scale(x: Tensor, format: Format) -> Tensor:
    return _finite(_real_scale(_block_maximum(x.abs(), format.block), format.element.reach), format.element.reach)


def _static_scale(x: Tensor, format: Format) -> Tensor:
    assert isinstance(format.scale, Static)
    return torch.tensor(format.scale.value, dtype=x.dtype)


def _affine_scale(x: Tensor, format: Format) -> Tensor:
    assert isinstance(format.element, Integer)
    lowest, highest = format.element.bounds
    return _real_scale(_block_maximum(x, format.block) + _block_maximum(-x, format.block), highest - lowest)


def two_levels(x: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """(the float of each block, the float32 of the tensor): a two-level scale is their product."""
    assert isinstance(format.scale, TwoLevel)
    maximum, inner = _block_maximum(x.abs(), format.block), format.scale.inner
    outer = _real_scale(maximum.amax(), format.element.reach * inner.max)
    wanted = divided(divided(maximum, format.element.reach), outer)
    return quantize(wanted, Format(inner)).clamp(min=inner.min_subnormal), outer


def product_of_levels(of_block: Tensor, outer: Tensor, format: Format) -> Tensor:
    scale = of_block * outer
    # The product may underflow if the tensor's maximum is tiny, and 0 / 0 is no zero.
    info = torch.finfo(scale.dtype)
    return torch.where(scale > 0, _finite(scale, format.element.reach), info.smallest_normal * info.eps)


def _two_level_scale(x: Tensor, format: Format) -> Tensor:
    return product_of_levels(*two_levels(x, format), format)


_SCALES: dict[type[Scale] | type[None], Callable[[Tensor, Format], Tensor]] = {
    type(None): _unscaled,
    PowerOfTwo: _power_of_two_scale,
    Absmax: _absmax_scale,
    Static: _static_scale,
    Affine: _affine_scale,
    TwoLevel: _two_level_scale,
}


def scale_of(x: Tensor, format: Format) -> Tensor:
    """The scale of each block of ``x``, as float32 or float64, in a shape that broadcasts to x's."""
    return _SCALES[type(format.scale)](x, format)


def _real_scale(maximum: Tensor, largest: float) -> Tensor:
    """maximum / largest in float32, kept finite. For a maximum of 0: as large as possible."""
    scale = divided(maximum, largest).float().clamp(max=FLOAT32_MAX).to(maximum.dtype)
    most = torch.tensor(FLOAT32_MAX, dtype=torch.float32) / max(largest, 1.0)
    return torch.where(scale > 0, scale, most.to(maximum.dtype))


def _finite(scale: Tensor, largest: float) -> Tensor:
    """The scale, or the number below it, on which the ``largest`` element is finite: scales are rounded, maybe up."""
    return torch.where((scale * largest).isfinite(), scale, torch.nextafter(scale, torch.zeros_like(scale)))


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent in float64."""
    # Made from the bits of float64, since torch.ldexp computes its power in float32.
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _exponent(magnitude: Tensor) -> Tensor:
    """floor(log2), exact for subnormals too; meaningless for zero."""
    return torch.frexp(magnitude).exponent.to(torch.int64) - 1


def _block_maximum(values: Tensor, block: Block) -> Tensor:
    """The largest of zero and the finite values in each element's block, in a shape that broadcasts to theirs."""
    values = torch.where(values.isfinite(), values, 0.0).clamp(min=0.0)
    rank = values.dim()
    here = block.alone()
    here.check(rank)
    if isinstance(here, Runs) and rank > 0:
        for axis, size in here.runs:
            tiles = values.split(size, axis)
            values = torch.cat([tile.amax(axis, keepdim=True).expand_as(tile) for tile in tiles], axis)
        return values
    dims = here.dims if isinstance(here, Slices) else ()
    if not dims or rank < 2:
        return values.amax()
    kept = {d % rank for d in dims}
    spanned = [d for d in range(rank) if d not in kept]
    return values.amax(spanned, keepdim=True) if spanned else values


# ---- elements -----------------------------------------------------------------------------------


def _on_grid(v: Tensor, scale: Tensor, format: Format, how: _How) -> Tensor:
    """``v``, a float64, rounded exactly to a number of the element times a power of two."""
    lo, hi, step = (
        each * scale for each in _grid(v / scale, format.element)
    )  # if v / scale underflows, the step is the smallest
    room = float(_room(format, how.name)) * step
    clamped = torch.minimum(torch.maximum(v, lo - room), hi + room)
    q = _round(clamped, v, step, how)
    if format.overflow == "saturate":
        return q
    return torch.where(q.abs() > hi, torch.copysign(torch.tensor(BEYOND[format.overflow], dtype=q.dtype), v), q)


def _grid(v: Tensor, element: Element) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest number, largest number and step, each in a shape that broadcasts to v's."""
    lo, hi = (torch.tensor(each, dtype=torch.float64) for each in (element.min, element.max))
    if isinstance(element, Integer):
        return lo, hi, power_of_two(torch.tensor(-element.point))
    assert isinstance(element, Float)
    # Numbers beyond the largest have the step of the largest.
    magnitude = torch.minimum(v.abs(), hi).nan_to_num()
    step = power_of_two(
        torch.where(magnitude > 0, _exponent(magnitude), 0).clamp(min=element.min_exponent) - element.man
    )
    return lo, hi, torch.where(magnitude < element.min_normal, element.min_subnormal, step)


def _round(clamped: Tensor, v: Tensor, step: Tensor, how: _How) -> Tensor:
    """``clamped`` rounded to a multiple of ``step``, with the sign of ``v``."""
    magnitude = clamped.abs()
    rest = torch.fmod(magnitude, step)
    below = magnitude - rest
    odd = torch.fmod(below, 2 * step) != 0
    return torch.copysign(torch.where(_goes_away(rest, step, odd, v, how), below + step, below), v)


def _goes_away(rest: Tensor, step: Tensor, odd: Tensor, v: Tensor, how: _How) -> Tensor:
    """Whether a magnitude goes to the number above. It is ``rest`` above the one below; these are ``step`` apart."""
    if how.name == "nearest":
        return (rest > step / 2) | ((rest == step / 2) & odd)
    if how.name == "stochastic":
        assert how.draws is not None
        return (rest / step * 2**how.bits).round() + how.draws >= 2**how.bits
    if how.name == "toward_zero":
        return torch.zeros_like(v, dtype=torch.bool)
    if how.name == "down":
        return (rest > 0) & (v < 0)
    if how.name == "up":
        return (rest > 0) & (v > 0)
    if how.name == "nearest_away":
        return rest >= step / 2
    return (rest > step / 2) | ((rest == step / 2) & (v > 0))


def lowest_beside(minimum: Tensor, scale: Tensor, format: Format) -> Tensor:
    """The lowest integer of a block with a zero point; ``minimum``: the block's lowest number, or zero."""
    assert isinstance(format.element, Integer)
    first, last = format.element.bounds
    return divided(minimum, scale).round().clamp(min=first - last)


def lowest_of_blocks(x: Tensor, scale: Tensor, format: Format) -> Tensor | None:
    """``lowest_beside`` of each block of ``x``; None without a zero point."""
    if not isinstance(format.scale, Affine):
        return None
    return lowest_beside(-_block_maximum(-x, format.block), scale, format)


def _beside_zero_point(v: Tensor, lowest: Tensor, format: Format, how: _How) -> Tensor:
    """``v``, a float64, rounded to integers, of which ``lowest`` is the first."""
    assert isinstance(format.element, Integer)
    first, last = format.element.bounds
    lowest = lowest.double()
    clamped = torch.minimum(torch.maximum(v, lowest), lowest + (last - first))
    return _round(clamped, v, torch.ones((), dtype=torch.float64), how)


def _on_table(y: Tensor, x: Tensor, element: Codebook, how: _How) -> Tensor:
    """``y`` rounded to a number of the table, in the compute type; zero has the sign of x.

    The nearest number is found exactly. A tie goes to the number that is an even count away from zero. Stochastic
    rounding divides two differences, each rounded to the compute type.
    """
    table = torch.tensor(element.values, dtype=y.dtype, device=y.device)
    clamped = y.clamp(element.min, element.max).nan_to_num()
    index = torch.searchsorted(table, clamped.contiguous(), right=True).clamp(1, len(table) - 1) - 1
    low, high = table[index], table[index + 1]
    negative = torch.signbit(x)
    if how.name == "stochastic":
        near, far = torch.where(negative, high, low), torch.where(negative, low, high)
        away = _goes_away((clamped - near).abs(), high - low, negative, clamped, how)
        q = torch.where(away, far, near)
    else:
        q = torch.where(
            _goes_up(clamped.double(), low.double(), high.double(), index - element.first, negative, how), high, low
        )
    return torch.where(q == 0, torch.copysign(q, x), q)


def _goes_up(v: Tensor, low: Tensor, high: Tensor, index: Tensor, negative: Tensor, how: _How) -> Tensor:
    """Whether ``v``, in float64, rounds to ``high``. index: how many numbers ``low`` is above zero."""
    middle = (low + high) / 2
    of_tie: dict[str, Any] = {"nearest": index % 2 != 0, "nearest_away": ~negative, "nearest_up": True}
    if how.name in of_tie:
        return (v > middle) | ((v == middle) & of_tie[how.name]) | (v == high)
    towards_high = {"toward_zero": negative, "down": torch.zeros_like(negative), "up": torch.ones_like(negative)}[
        how.name
    ]
    return ((v > low) & towards_high) | (v == high)


# ---- random draws -------------------------------------------------------------------------------


def philox(key: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """``random.philox`` for a tensor of counters: four int64 tensors of 32-bit words."""
    k0, k1 = key & MASK, (key >> 32) & MASK
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, so all 64 bits are kept; the mask undoes the shift's sign.
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK
        c2, c3 = ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def random_draws(key: int | Tensor, stream: int, n: int, bits: int = RANDOM_BITS) -> Tensor:
    """``random.draw(key, stream, i, bits)`` for i = 0 ... n - 1: int64 of shape [n]."""
    per_word = draws_per_word(bits)
    index = torch.arange(n)
    block, within = index // (4 * per_word * COUNTERS), index % (4 * per_word * COUNTERS)
    row, lane = within // COUNTERS, within % COUNTERS
    counter = block * COUNTERS + lane
    low, high = (torch.full_like(index, stream >> shift & MASK) for shift in (0, 32))
    words = torch.stack(philox(int(key), (counter & MASK, counter >> 32, low, high)))
    word = words.gather(0, (row // per_word)[None])[0]
    if per_word == 1:
        return word >> (32 - bits)
    return (word >> 16 * (row % 2) & 0xFFFF) >> (16 - bits)
