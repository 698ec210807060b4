"""A format: an element, a scale that a block shares, and the overflow of numbers beyond the largest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .block import WHOLE, Block
from .element import Codebook, Element, Float, Integer
from .errors import FormatError
from .scale import Affine, PowerOfTwo, Scale

__all__ = ["FLOAT", "OVERFLOWS", "Format"]

OVERFLOWS = ("saturate", "infinity", "nan")
MAX_INTEGER_BITS = 16  # on a real scale: the quotient has 24 bits in float32
HALF_OVERFLOWS = 65520.0  # the least number that float16 rounds to infinity


@dataclass(frozen=True, repr=False)
class Format:
    """A set of representable numbers: immutable, hashable, printed as its spec.

    ``quantize(x) = scale * element(x / scale)``. Without a scale the numbers are the element's own.

    An infinity becomes NaN if ``overflow`` is "nan". Otherwise it stays one if the element has infinities, and
    saturates if not.

    ``max``, ``min`` and the like are given for a scale of 1, as in OCP's tables. A number is an element times the scale
    of its block. ``scales`` is the range of scales.
    """

    element: Element
    scale: Scale | None = None
    block: Block = WHOLE
    overflow: str = "saturate"  # of a number that rounds beyond the largest; or "infinity", "nan": as an IEEE 754 cast

    def __post_init__(self) -> None:
        for unfit in _UNFIT:
            if message := unfit(self):
                raise FormatError(message)

    def __str__(self) -> str:
        from .grammar import text  # it imports the named formats, and they import this module

        return text(self)

    def __repr__(self) -> str:
        return f"parse({str(self)!r})"

    @property
    def element_bits(self) -> int:
        """Stored bits of an element by itself."""
        return self.element.bits

    @property
    def scale_bits(self) -> int:
        """Stored bits of the scale that a block shares; 0 without a scale."""
        return self.scale.stored_bits(self.element) if self.scale else 0

    @property
    def bits(self) -> float:
        """Stored bits an element, with its part of a tile's scale. The scale of a tensor or a slice is left out."""
        return self.element_bits + (self.scale_bits / self.block.size if self.block.size else 0)

    def stored_bits(self, shape: Sequence[int]) -> int:
        """Stored bits of a tensor of ``shape``: of its elements and of all its scales.

        Raises FormatError if the block does not fit ``shape``.
        """
        values = math.prod(shape)
        scales = math.prod(self.block.counts(shape)) if self.scale and values else 0
        of_tensor = self.scale.tensor_bits if self.scale and values else 0
        return self.element_bits * values + self.scale_bits * scales + of_tensor

    @property
    def codes(self) -> int:
        """How many of an element's codes stand for finite numbers; -0 and 0 count as two."""
        return self.element.codes

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self.element.max

    @property
    def min(self) -> float:
        """The lowest finite value: -max, or one step below it in two's complement."""
        return self.element.min

    @property
    def min_normal(self) -> float:
        """The smallest value with a full significand. Of integers: the largest power of two."""
        return self.element.min_normal

    @property
    def min_subnormal(self) -> float:
        """The smallest positive value: the step of an integer grid."""
        return self.element.min_subnormal

    @property
    def scales(self) -> tuple[float, float]:
        """The smallest and the largest scale; 1 and 1 without a scale."""
        return self.scale.range if self.scale else (1.0, 1.0)

    def of_tensor(self, rank: int, axis: int) -> Format:
        """The format of a tensor of ``rank`` axes with the contraction axis ``axis``.

        The runs of a stem without brackets, such as ``mxfp8``, lie along that axis.
        """
        from .grammar import own_runs

        runs = own_runs(self) if rank > 1 else None
        block = (runs or self.block).of_tensor(rank, axis)
        return self if block == self.block else replace(self, block=block)

    @property
    def keeps_infinity(self) -> bool:
        """Whether an infinity stays one."""
        return self.overflow == "infinity" or (self.overflow == "saturate" and self.element.has_infinity)

    def keeps_rounded(self, digits: int = 24) -> bool:
        """Whether every rounding is known to leave the finite numbers that any rounding gave as they are.

        digits: of a significand in the tensor's dtype, which stores them; a narrow one may store a neighbour.
        Other formats may find another scale in a rounded block: one that is no power of two, or whose largest number
        became smaller, or larger, than its scale stands for.
        """
        own = 24 if isinstance(self.element, Codebook) else self.element.grid.man + 1
        if digits < own:
            return False
        if self.scale is None or self.keeps_subsets:
            return True
        if self.overflow != "saturate" or isinstance(self.element, Codebook) or not isinstance(self.scale, PowerOfTwo):
            return False
        return self.scale.rule in ("floor", "rceil") and self.min == -self.max

    @property
    def keeps_subsets(self) -> bool:
        """Whether any rounding leaves rounded numbers as they are, even after others of their block became zero.

        The numbers left in a block must be on the grid of its new scale. A smaller maximum has a smaller power of two
        for its scale, and so a finer grid. The grid reaches that maximum under the rule "rceil", or if the highest
        binade has every significand. E4M3's highest binade ends at 1.75. Under "ceil" an infinity saturates to a number
        that has a larger scale.

        A half dtype may store a neighbour of a codebook's number. It may also store a number beyond the largest: this
        one is kept only if it saturates.
        """
        if self.overflow != "saturate" or isinstance(self.element, Codebook):
            return False
        if self.scale is None:
            return True
        if not isinstance(self.scale, PowerOfTwo):
            return False
        if self.scale.rule == "rceil":
            return self.min == -self.max
        return self.scale.rule != "ceil" and self.element.fills_top_binade


def _lone_block(f: Format) -> str | None:
    if f.scale is not None and f.scale.is_shared:
        return None
    shared = f.block != WHOLE
    return f"{f.block} says who shares a scale, and there is none to share; leave the brackets out" if shared else None


def _overflow(f: Format) -> str | None:
    if f.overflow not in OVERFLOWS:
        return f"overflow {f.overflow!r} is unknown; use one of {', '.join(OVERFLOWS)}"
    if f.overflow == "infinity" and not f.element.has_infinity:
        return f"there is no infinity in {f.element} to overflow to; use e5m2+inf or another float that has one"
    if f.overflow == "nan" and not f.element.has_nan:
        return f"there is no NaN in {f.element} to overflow to; use e4m3+tonan or another float that has one"
    return None


def _integer_on_real(f: Format) -> str | None:
    is_real = isinstance(f.scale, Scale) and not isinstance(f.scale, PowerOfTwo)
    if is_real and isinstance(f.element, Integer) and f.element.wl > MAX_INTEGER_BITS:
        return f"scaled integer: word length {f.element.wl!r} is out of range; use 2 to {MAX_INTEGER_BITS} bits"
    return None


def _zero_point(f: Format) -> str | None:
    if isinstance(f.scale, Affine) and not (isinstance(f.element, Integer) and f.element.sign in ("twos", "unsigned")):
        return f"only integers with all their codes have a zero point, unlike {f.element}; use int8+asym"
    return None


def _beyond_half(f: Format) -> str | None:
    """Only a codebook can lack a zero. A tensor of float16 would then have nothing to saturate to."""
    if not isinstance(f.element, Codebook):
        return None
    nearest = min(map(abs, f.element.values)) * f.scales[0]
    beyond = f"the number nearest to zero is {nearest:.6g}, and float16 ends at 65504; use a smaller scale"
    return beyond if nearest >= HALF_OVERFLOWS else None


# Each gives the sentence that refuses parts which do not go together.
_UNFIT = (_lone_block, _overflow, _integer_on_real, _zero_point, _beyond_half)


@dataclass(frozen=True, repr=False)
class Native(Format):
    """Every number that the tensor's own dtype holds: nothing is rounded. Spec ``float``, with float32's properties."""

    def __str__(self) -> str:
        return "float"


FLOAT = Native(Float(8, 23))
