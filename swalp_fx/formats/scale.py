"""Scales: the factor of a block's elements, and how it follows from the block's largest finite magnitude."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .element import Element, Float
from .errors import require
from .float32 import LARGEST, SMALLEST, to_float32

__all__ = ["RULES", "Absmax", "Affine", "PowerOfTwo", "Scale", "Static", "TwoLevel"]


class Scale:
    """The factor of a block's elements: immutable, hashable."""

    is_shared = True  # whether each block has its own
    tensor_bits = 0  # stored bits of a second scale, which all blocks of a tensor share

    def stored_bits(self, element: Element) -> int:
        """Stored bits of a block's scale."""
        return 32

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest scale."""
        return SMALLEST, LARGEST


def _floor(element: Element) -> float:
    return 2.0


def _ceil(element: Element) -> float:
    return math.nextafter(1.0, 2.0)


def _even(element: Element) -> float:
    """From this significand on, rounding to the element's mantissa bits gives the next exponent."""
    step = 2.0 ** (math.floor(math.log2(element.min_normal)) - math.log2(element.min_subnormal))
    return 2.0 - 0.5 / step


def _rceil(element: Element) -> float:
    """Just above the significand of the largest number: a maximum up to there fits without the next exponent."""
    return math.nextafter(math.ldexp(element.reach, -element.max_exponent), 2.0)


# A scale is 2^(exponent of the block's maximum - max_exponent of the element). It is twice as much if the maximum's
# significand, 1 <= s < 2, is at or above the rule's threshold; a threshold of 2 is never met. Rule -> threshold:
# "floor" is OCP's: a maximum above the element's largest number saturates.
# "ceil" takes the next power of two.
# "even" first rounds the maximum to the element's mantissa bits, ties up.
# "rceil" takes the smallest power of two under which nothing saturates.
RULES: dict[str, Callable[[Element], float]] = {"floor": _floor, "ceil": _ceil, "even": _even, "rceil": _rceil}


@dataclass(frozen=True)
class PowerOfTwo(Scale):
    """2^e, with e stored in ``bits`` bits: in two's complement, or biased like E8M0.

    A biased exponent leaves the lowest e out. ``rule``, a word of RULES, says how e follows from the block's maximum.
    """

    bits: int = 8
    biased: bool = False
    rule: str = "floor"

    def __post_init__(self) -> None:
        require(
            isinstance(self.bits, int) and 2 <= self.bits <= 8,
            f"a power-of-two scale: {self.bits!r} exponent bits are out of range; use 2 to 8",
        )
        require(
            self.rule in RULES, f"a power-of-two scale: rule {self.rule!r} is unknown; use one of {', '.join(RULES)}"
        )

    def stored_bits(self, element: Element) -> int:
        return self.bits

    @property
    def bias(self) -> int:
        """The stored exponent minus e."""
        return 2 ** (self.bits - 1) - 1 if self.biased else 0

    @property
    def exponents(self) -> tuple[int, int]:
        """The lowest and the highest exponent."""
        half = 2 ** (self.bits - 1)
        return -half + self.biased, half - 1

    @property
    def range(self) -> tuple[float, float]:
        smallest, largest = self.exponents
        return 2.0**smallest, 2.0**largest


@dataclass(frozen=True)
class Absmax(Scale):
    """A float32: the block's largest magnitude divided by the element's.

    The scale, the quotient that is rounded and the product are computed in float32, or in float64 for a float64 tensor.
    """


@dataclass(frozen=True)
class Affine(Scale):
    """A float32, (max - min) / the integer's number of steps, and a zero point: the integer that stands for zero.

    The block's range is widened to include zero, so that zero stays zero.
    """

    def stored_bits(self, element: Element) -> int:
        return 32 + element.bits


@dataclass(frozen=True)
class Static(Scale):
    """A constant float32."""

    value: float
    is_shared = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", to_float32(self.value))
        require(
            SMALLEST <= self.value <= LARGEST,
            f"a static scale is a positive float32, not {self.value!r}; use {SMALLEST:.3g} to {LARGEST:.3g}",
        )

    def stored_bits(self, element: Element) -> int:
        return 0

    @property
    def range(self) -> tuple[float, float]:
        return self.value, self.value


@dataclass(frozen=True)
class TwoLevel(Scale):
    """A float for each block under one float32 for the tensor, as in NVIDIA's NVFP4.

    The tensor's scale is max|x| / largest element / largest ``inner``. A block's scale is its own max|x| / largest
    element / tensor's scale, rounded to the nearest ``inner`` and kept above zero.
    """

    inner: Float
    tensor_bits = 32

    def __post_init__(self) -> None:
        require(
            isinstance(self.inner, Float) and self.inner.exp < 8 and "+" not in str(self.inner),
            f"a two-level scale: {self.inner} is no plain float of fewer than 8 exponent bits; use e4m3",
        )

    def stored_bits(self, element: Element) -> int:
        return self.inner.bits
