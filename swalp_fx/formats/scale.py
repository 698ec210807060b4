"""Scales: what multiplies the elements of a block, and how it follows from the block's largest finite magnitude."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .element import Element, Float
from .errors import require
from .float32 import LARGEST, SMALLEST, to_float32

__all__ = ["RULES", "Absmax", "Affine", "PowerOfTwo", "Scale", "Static", "TwoLevel"]


class Scale:
    """What multiplies the elements of a block: immutable, hashable."""

    is_exact = False  # whether it is a power of two, under which a number of the grid stays one
    is_shared = True  # whether it is a block's
    tensor_bits = 0  # stored bits of what all blocks of a tensor share besides

    def stored_bits(self, element: Element) -> int:
        """Of a block's scale."""
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
    """From where on a magnitude, rounded to the mantissa bits of the element, has the next exponent."""
    step = 2.0 ** (math.floor(math.log2(element.min_normal)) - math.log2(element.min_subnormal))
    return 2.0 - 0.5 / step


def _rceil(element: Element) -> float:
    """Beyond the significand of the largest number, which then still lies within the scaled range."""
    return math.nextafter(math.ldexp(element.reach, -element.max_exponent), 2.0)


# A scale is 2^(exponent of the block's maximum - that of the element's largest number), and twice as much from some
# significand of the maximum on: rule -> that significand, from 1 to 2, of which 2 is none. "floor" is OCP's, and a
# maximum between may saturate; "ceil" takes the next power of two; "even" rounds the maximum first, to the element's
# bits, ties up; "rceil" is the smallest power of two under which nothing saturates.
RULES: dict[str, Callable[[Element], float]] = {"floor": _floor, "ceil": _ceil, "even": _even, "rceil": _rceil}


@dataclass(frozen=True)
class PowerOfTwo(Scale):
    """2^e, e being stored in ``bits`` bits: two's complement, or, if ``biased``, as E8M0 is, whose lowest is missing.

    How e follows from the block's largest magnitude is the ``rule``, a word of RULES.
    """

    bits: int = 8
    biased: bool = False
    rule: str = "floor"
    is_exact = True

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
        """What a stored exponent is above e."""
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
    """A float32: the block's largest magnitude over the element's.

    It is computed in float32 (float64 for float64), and so are the quotient that is rounded and the product.
    """


@dataclass(frozen=True)
class Affine(Scale):
    """A float32, (max - min) over the number of steps of an integer, and an integer that stands for zero.

    The block's range includes zero, so that zero stays zero.
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

    The tensor's scale is max|x| over the largest element and the largest ``inner``. A block's is its max|x| over the
    largest element, over the tensor's scale, rounded to nearest ``inner`` and kept above zero.
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
