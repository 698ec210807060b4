"""The oracle: what every format and rounding means, slowly and plainly.

``quantize_number`` states the law for one number in exact rational arithmetic; ``quantize`` states
it again for tensors, in float64, where every step below is exact: clamping, remainders and
products by powers of two. Nothing here knows the compiled ops, which must give the same bits.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from .formats import (
    BlockFloat,
    FixedPoint,
    Float,
    Format,
    FormatError,
    Identity,
    Microscaling,
    Nvfp4,
    ScaledInteger,
    parse,
)
from .random import COUNTERS, MASK, MULTIPLIERS, ROUNDS, WEYL, draws_per_word
from .recipe import RANDOM_BITS, parse_rounding

__all__ = ["quantize", "quantize_number", "random_draws"]


FLOAT32_MAX = torch.finfo(torch.float32).max


def integer_bounds(format: FixedPoint | BlockFloat) -> tuple[int, int]:
    """Lowest and highest integer of ``wl`` bits: two's complement, or without its lowest value."""
    half = 2 ** (format.wl - 1)
    return -half + format.symmetric, half - 1


# ---- one number ---------------------------------------------------------------------------------


def quantize_number(
    x: float, format: str | Format, rounding: str = "nearest", *, draw: int = 0, maximum: float | None = None
) -> float:
    """The number ``x`` becomes: clamped to the format's range, then rounded to a multiple of its step.

    draw: the random integer that stochastic rounding adds, below 2^(its random bits).
    maximum: the largest finite magnitude in x's block, for BlockFloat; x alone in its block if None.
    """
    format = parse(format)
    if isinstance(format, Identity) or math.isnan(x):
        return x
    if math.isinf(x) and isinstance(format, Float) and format.top == "ieee":
        return x
    lo, hi, step = _grid_of_number(x, format, maximum)
    clamped = lo if x < lo else hi if x > hi else Fraction(x)
    magnitude = step * _round_magnitude(abs(clamped) / step, x < 0, rounding, draw)
    return math.copysign(float(magnitude), x)


def _floor_log2(magnitude: float) -> int:
    return math.frexp(magnitude)[1] - 1  # frexp gives a fraction in [1/2, 1)


def _shared_exponent(x: float, format: BlockFloat | Microscaling, maximum: float | None) -> int:
    """Of the block whose largest finite magnitude is ``maximum``, or of x alone."""
    smallest, largest = format.exponent_bounds
    if maximum is None:
        maximum = 0.0 if math.isinf(x) else abs(x)
    if maximum == 0:  # a block that is zero, or nothing but infinities, has no exponent: any one serves
        return largest
    offset = format.max_exponent if isinstance(format, Microscaling) else 0
    return min(max(_floor_log2(maximum) - offset, smallest), largest)


def _grid_of_number(x: float, format: Format, maximum: float | None) -> tuple[Fraction, Fraction, Fraction]:
    """Lowest value, highest value and step of the grid on which x is rounded."""
    two = Fraction(2)
    if isinstance(format, FixedPoint):
        step = two**-format.fl
        lowest, highest = integer_bounds(format)
        return lowest * step, highest * step, step
    if isinstance(format, BlockFloat):
        step = two ** (_shared_exponent(x, format, maximum) - (format.wl - 2))
        lowest, highest = integer_bounds(format)
        return lowest * step, highest * step, step
    if isinstance(format, Microscaling):
        scale = two ** _shared_exponent(x, format, maximum)
        lo, hi, step = _grid_of_number(x / float(scale), format.element, None)
        return lo * scale, hi * scale, step * scale
    if isinstance(format, Float):
        magnitude = min(abs(x), format.max)
        exponent = max(_floor_log2(magnitude), format.min_exponent) if magnitude > 0 else format.min_exponent
        return -Fraction(format.max), Fraction(format.max), two ** (exponent - format.man)
    raise FormatError(f"{format} has no power-of-two scale to state a number's grid by; quantize a tensor")


def _round_magnitude(y: Fraction, negative: bool, rounding: str, draw: int) -> int:
    """One of the two integers beside ``y`` >= 0, which stands for -y if ``negative``."""
    name, bits = parse_rounding(rounding)
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

    x: any floating dtype, shape and layout.
    key, stream: say what stochastic rounding draws; or ``draws`` gives it, an int64 below
    2^(random bits) for each element of x, in row-major order.
    """
    format = parse(format)
    name, bits = parse_rounding(rounding)
    if isinstance(format, Identity) or x.numel() == 0:
        return x.clone()
    if name == "stochastic" and draws is None:
        if key is None:
            raise ValueError("stochastic rounding needs a key or draws; pass one of them")
        draws = random_draws(key, stream, x.numel(), bits)
    if isinstance(format, ScaledInteger | Nvfp4):
        return _on_real_scale(x.detach(), format, rounding, draws)
    v = x.detach().to(torch.float64)
    lo, hi, step = _grid(v, format)
    clamped = torch.minimum(torch.maximum(v, lo), hi)
    q = _round(clamped, v, step, name, bits, None if draws is None else draws.reshape(v.shape))
    keep = v.isnan()
    if isinstance(format, Float) and format.top == "ieee":
        keep |= v.isinf()
    return torch.where(keep, v, q).to(x.dtype)


def _on_real_scale(x: Tensor, format: ScaledInteger | Nvfp4, rounding: str, draws: Tensor | None) -> Tensor:
    """Formats whose scale is no power of two: quotient, element and product, each rounded to the compute type."""
    computed = x.to(torch.promote_types(x.dtype, torch.float32))
    maximum = _block_maximum(torch.where(computed.isfinite(), computed.abs(), 0.0), format)
    if isinstance(format, ScaledInteger):
        element: Format = FixedPoint(format.wl, 0, symmetric=True)
        scale = _real_scale(maximum, 2 ** (format.wl - 1) - 1)
    else:
        element, block = Float(2, 1), Float(4, 3)
        outer = _real_scale(maximum.amax(), element.max * block.max)
        inner = quantize(maximum / element.max / outer, block)
        scale = inner.clamp(min=block.min_subnormal) * outer
        # The product may underflow where the tensor's own maximum nearly does, and zero over zero is no zero.
        info = torch.finfo(scale.dtype)
        scale = torch.where(scale > 0, scale, info.smallest_normal * info.eps)
    quotient = computed / scale
    # One that underflows is far below every step, but no zero: directed roundings still see its sign.
    tiny = torch.tensor(torch.finfo(computed.dtype).tiny, dtype=computed.dtype)
    quotient = torch.where((quotient == 0) & (computed != 0), torch.copysign(tiny, computed), quotient)
    q = quantize(quotient.double(), element, rounding, draws=draws).to(computed.dtype)
    return (q * scale).to(x.dtype)


def _real_scale(maximum: Tensor, largest: float) -> Tensor:
    """maximum / largest in float32, but finite, and as large as can be where nothing sets it."""
    scale = (maximum / largest).float().clamp(max=FLOAT32_MAX).to(maximum.dtype)
    return torch.where(scale > 0, scale, torch.tensor(FLOAT32_MAX, dtype=maximum.dtype) / largest)


def _power_of_two(exponent: Tensor) -> Tensor:
    # From the bits of float64: torch.ldexp computes its power in float32.
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def _exponent(magnitude: Tensor) -> Tensor:
    """floor(log2), which frexp gives exactly for subnormals too; meaningless for zero."""
    return torch.frexp(magnitude).exponent.to(torch.int64) - 1


def _grid(v: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest value, highest value and step, each of a shape that broadcasts to v's."""
    if isinstance(format, FixedPoint):
        step = _power_of_two(torch.tensor(-format.fl))
        lowest, highest = integer_bounds(format)
        return lowest * step, highest * step, step
    if isinstance(format, BlockFloat):
        smallest, largest = format.exponent_bounds
        maximum = _block_maximum(torch.where(v.isfinite(), v.abs(), 0.0), format)
        exponent = torch.where(maximum > 0, _exponent(maximum).clamp(smallest, largest), largest)
        step = _power_of_two(exponent - (format.wl - 2))
        lowest, highest = integer_bounds(format)
        return lowest * step, highest * step, step
    if isinstance(format, Microscaling):
        smallest, largest = format.exponent_bounds
        maximum = _block_maximum(torch.where(v.isfinite(), v.abs(), 0.0), format)
        exponent = torch.where(maximum > 0, _exponent(maximum) - format.max_exponent, largest).clamp(smallest, largest)
        scale = _power_of_two(exponent)
        lo, hi, step = _grid(v / scale, format.element)  # where the quotient underflows, the step is the least anyhow
        return lo * scale, hi * scale, step * scale
    if isinstance(format, Float):
        hi = torch.tensor(format.max, dtype=torch.float64)
        magnitude = torch.minimum(v.abs(), hi).nan_to_num()
        exponent = torch.where(magnitude > 0, _exponent(magnitude), format.min_exponent).clamp(min=format.min_exponent)
        return -hi, hi, _power_of_two(exponent - format.man)
    raise FormatError(f"no law is stated for {format!r}; add its grid to swalp_fx/reference.py")


def _block_maximum(magnitude: Tensor, format: BlockFloat | Microscaling | ScaledInteger | Nvfp4) -> Tensor:
    """Maximum over the block of each element, of a shape that broadcasts to the tensor's."""
    rank = magnitude.dim()
    for d in format.tile[:1] if format.tile else format.dims or ():
        if not -rank <= d < rank and rank > (0 if format.tile else 1):
            raise FormatError(f"block dimension {d} does not exist in a tensor of {rank} dimensions")
    if format.tile is not None and rank > 0:
        axis, size = format.tile
        tiles = magnitude.split(size, axis)
        return torch.cat([tile.amax(axis, keepdim=True).expand_as(tile) for tile in tiles], axis)
    if format.dims is None or rank < 2:
        return magnitude.amax()
    kept = {d % rank for d in format.dims}
    spanned = [d for d in range(rank) if d not in kept]
    return magnitude.amax(spanned, keepdim=True) if spanned else magnitude


def _round(clamped: Tensor, v: Tensor, step: Tensor, name: str, bits: int, draws: Tensor | None) -> Tensor:
    """A multiple of ``step`` beside ``clamped``, with the sign of ``v``."""
    magnitude = clamped.abs()
    rest = torch.fmod(magnitude, step)
    below = magnitude - rest
    if name == "nearest":
        odd = torch.fmod(below, 2 * step) != 0
        away = (rest > step / 2) | ((rest == step / 2) & odd)
    elif name == "stochastic":
        assert draws is not None
        away = (rest / step * 2**bits).round() + draws >= 2**bits
    elif name == "toward_zero":
        away = torch.zeros_like(v, dtype=torch.bool)
    elif name == "down":
        away = (rest > 0) & (v < 0)
    elif name == "up":
        away = (rest > 0) & (v > 0)
    elif name == "nearest_away":
        away = rest >= step / 2
    else:
        away = (rest > step / 2) | ((rest == step / 2) & (v > 0))
    return torch.copysign(torch.where(away, below + step, below), v)


# ---- random draws -------------------------------------------------------------------------------


def philox(key: int, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    """``random.philox`` for a tensor of counters: four int64 tensors of 32-bit words."""
    k0, k1 = key & MASK, (key >> 32) & MASK
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # int64 products wrap modulo 2^64, which keeps all 64 bits; the mask undoes the shift's sign.
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
