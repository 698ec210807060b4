"""Elements: the numbers that the code of a single value stands for, before any scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from .errors import FormatError, require
from .float32 import to_float32

__all__ = ["SIGNS", "TOPS", "Codebook", "Element", "Float", "Grid", "Integer", "Posit", "Top", "posit"]

# A float32 significand has 24 bits: an integer grid of up to 24 bits is held exactly.
MAX_WORD_LENGTH = 24
MAX_CODES = 256  # of a codebook


class Grid(NamedTuple):
    """Numbers between ``lowest`` and ``highest`` with a step of 2^(max(exponent, least) - man) in each binade.

    Integers have a single step: their ``least`` is their highest exponent.
    """

    man: int
    least: int
    lowest: float
    highest: float
    subnormals: bool = True  # False: below 2^least there is zero alone


class Element:
    """The numbers of one code: immutable, hashable, printed as its part of a spec."""

    @property
    def has_infinity(self) -> bool:
        return False

    @property
    def has_nan(self) -> bool:
        return False

    @property
    def bits(self) -> int:
        """Stored bits of one number."""
        raise NotImplementedError

    @property
    def codes(self) -> int:
        """How many codes stand for finite numbers; -0 and 0 count as two."""
        raise NotImplementedError

    def number(self, code: int) -> float:
        """The number of ``code``, an unsigned integer of ``bits`` bits.

        Raises FormatError for a code without a number.
        """
        raise NotImplementedError

    @property
    def min(self) -> float:
        """The lowest finite number."""
        raise NotImplementedError

    @property
    def max(self) -> float:
        """The largest finite number."""
        raise NotImplementedError

    @property
    def min_normal(self) -> float:
        """The smallest number with a full significand. Of integers: the largest power of two."""
        raise NotImplementedError

    @property
    def min_subnormal(self) -> float:
        """The smallest positive number: the step of an integer grid."""
        raise NotImplementedError

    @property
    def grid(self) -> Grid:
        """The numbers in the form that a compiled op takes. Integers and floats have one."""
        raise NotImplementedError

    @property
    def reach(self) -> float:
        """A block's scale brings its largest magnitude to this number."""
        return self.max

    @property
    def max_exponent(self) -> int:
        """floor(log2(reach)): the exponent of a block's maximum minus the exponent of its scale."""
        return math.frexp(self.reach)[1] - 1

    @property
    def fills_top_binade(self) -> bool:
        """Whether the numbers are symmetric about zero, and every significand occurs with the highest exponent."""
        return False


# Representation of the sign -> (lowest, highest, codes) of ``bits`` bits.
SIGNS = {
    "twos": lambda bits: (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2**bits),  # two's complement
    "sym": lambda bits: (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, 2**bits - 1),  # without its lowest number
    "mag": lambda bits: (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, 2**bits),  # sign and magnitude: 0 and -0
    "unsigned": lambda bits: (0, 2**bits - 1, 2**bits),
}


@dataclass(frozen=True)
class Integer(Element):
    """``wl``-bit integers times 2^-point, signed as ``sign``, a word of SIGNS, says."""

    wl: int  # word length in bits, the sign's included
    point: int = 0  # fractional bits
    sign: str = "sym"

    def __post_init__(self) -> None:
        require(
            isinstance(self.wl, int) and 2 <= self.wl <= MAX_WORD_LENGTH,
            f"integers: word length {self.wl!r} is out of range; use 2 to {MAX_WORD_LENGTH} bits",
        )
        require(
            isinstance(self.point, int) and -100 <= self.point <= 100,
            f"integers: {self.point!r} fractional bits are out of range; use -100 to 100",
        )
        require(self.sign in SIGNS, f"integers: sign {self.sign!r} is unknown; use one of {', '.join(SIGNS)}")

    def __str__(self) -> str:
        return f"{self.wl}-bit integers"

    @property
    def bounds(self) -> tuple[int, int]:
        """The lowest and the highest integer."""
        return SIGNS[self.sign](self.wl)[:2]

    @property
    def bits(self) -> int:
        return self.wl

    @property
    def codes(self) -> int:
        return SIGNS[self.sign](self.wl)[2]

    @property
    def has_sign_bit(self) -> bool:
        """Whether a code is a sign and a magnitude. If not, it is two's complement, or has no sign."""
        return self.sign == "mag"

    def number(self, code: int) -> float:
        if self.sign == "unsigned":
            return code * self.min_subnormal
        sign, rest = divmod(code, 2 ** (self.wl - 1))
        if self.has_sign_bit:
            return math.copysign(rest, -sign) * self.min_subnormal
        return (rest - sign * 2 ** (self.wl - 1)) * self.min_subnormal

    @property
    def min(self) -> float:
        return self.bounds[0] * self.min_subnormal

    @property
    def max(self) -> float:
        return self.bounds[1] * self.min_subnormal

    @property
    def min_normal(self) -> float:
        return 2.0**self.max_exponent

    @property
    def min_subnormal(self) -> float:
        return 2.0**-self.point

    @property
    def grid(self) -> Grid:
        man = self.wl - 1
        return Grid(man, man - self.point, self.min, self.max)

    @property
    def fills_top_binade(self) -> bool:
        return self.min == -self.max


class Top(NamedTuple):
    """How a float uses its highest codes."""

    binade: bool  # no finite number has the highest exponent
    codes: int  # how many codes below that are no finite numbers either
    has_infinity: bool
    has_nan: bool
    bias: int  # added to 2^(exp-1) - 1 for the default bias
    signed_zero: bool  # False: the code of -0 is the NaN


# IEEE 754 keeps the highest exponent for infinities and NaNs. OCP's E4M3 uses it for numbers, except one code for NaN.
# OCP's 6- and 4-bit floats use every code for a number. The last two have one NaN, in place of -0: Graphcore and AMD's
# (fnuz in torch), and IEEE P3109's. P3109 has infinities too.
TOPS = {
    "ieee": Top(True, 0, True, True, 0, True),
    "nan": Top(False, 1, False, True, 0, True),
    "finite": Top(False, 0, False, False, 0, True),
    "fnuz": Top(False, 0, False, True, 1, False),
    "p3109": Top(False, 1, True, True, 1, False),
}
# OCP's 8-bit Floating Point and Microscaling (MX) Specifications v1.0. The default of other sizes is IEEE 754's.
OCP_TOPS = {(4, 3): "nan", (3, 2): "finite", (2, 3): "finite", (2, 1): "finite"}


@dataclass(frozen=True)
class Float(Element):
    """A sign, ``exp`` exponent bits and ``man`` mantissa bits.

    ``top``, a word of TOPS, names the use of the highest codes. The default is OCP's for floats of that size, or else
    IEEE 754's. The default bias is 2^(exp-1) - 1, or one more.
    """

    exp: int
    man: int  # the hidden bit not counted
    top: str = ""
    bias: int = None  # type: ignore[assignment]  # None takes the default
    subnormals: bool = True  # False: below min_normal there is zero alone

    def __post_init__(self) -> None:
        require(
            isinstance(self.exp, int) and 2 <= self.exp <= 8,
            f"float: {self.exp!r} exponent bits are out of range; use 2 to 8",
        )
        require(
            isinstance(self.man, int) and 0 <= self.man <= 23,
            f"float: {self.man!r} mantissa bits are out of range; use 0 to 23",
        )
        if not self.top:
            object.__setattr__(self, "top", self.default_top)
        require(self.top in TOPS, f"float: top {self.top!r} is unknown; use one of {', '.join(TOPS)}")
        if self.bias is None:
            object.__setattr__(self, "bias", self.default_bias)
        self._check_range()

    def _check_range(self) -> None:
        require(
            isinstance(self.bias, int) and (-100 <= self.bias <= 80 or self.bias == self.default_bias),
            f"float: bias {self.bias!r} is out of range; use -100 to 80",
        )
        require(
            self.exp < 8 or (self.top, self.bias) == ("ieee", 127),
            f"float: with 8 exponent bits top {self.top!r} goes beyond float32; use top 'ieee'",
        )
        require(
            self.max <= 2.0**101 or self.exp == 8,
            f"float: with bias {self.bias} the largest number goes beyond 2^101; use a bias of "
            f"{self.bias + self.max_exponent - 100} or more",
        )

    @property
    def default_top(self) -> str:
        return OCP_TOPS.get((self.exp, self.man), "ieee")

    @property
    def default_bias(self) -> int:
        return 2 ** (self.exp - 1) - 1 + TOPS[self.top].bias

    @property
    def bits(self) -> int:
        return 1 + self.exp + self.man

    @property
    def has_infinity(self) -> bool:
        return TOPS[self.top].has_infinity

    @property
    def has_nan(self) -> bool:
        return TOPS[self.top].has_nan

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number; below it the step no longer shrinks."""
        return 1 - self.bias

    @property
    def min_normal(self) -> float:
        return 2.0**self.min_exponent

    @property
    def min_subnormal(self) -> float:
        return 2.0 ** (self.min_exponent - self.man) if self.subnormals else self.min_normal

    @property
    def largest_code(self) -> int:
        """The code of ``max``: exponent field, then mantissa field."""
        top, binade = TOPS[self.top], 2**self.man
        return (2**self.exp - top.binade) * binade - top.codes - 1

    @property
    def has_signed_zero(self) -> bool:
        return TOPS[self.top].signed_zero

    @property
    def infinity_code(self) -> int | None:
        """The code of +infinity, the next after ``largest_code``."""
        return self.largest_code + 1 if self.has_infinity else None

    @property
    def nan_code(self) -> int | None:
        """The code that a NaN gets; in IEEE 754 the quiet NaN. Without mantissa bits there is no room for it."""
        if not self.has_nan or (self.top == "ieee" and self.man == 0):
            return None
        if not self.has_signed_zero:
            return 2 ** (self.bits - 1)
        return self.largest_code + 1 + (2 ** (self.man - 1) if self.has_infinity else 0)

    def number(self, code: int) -> float:
        sign, magnitude = divmod(code, 2 ** (self.bits - 1))
        if sign and not magnitude and not self.has_signed_zero:
            return math.nan
        if magnitude > self.largest_code:
            return math.copysign(math.inf, -sign) if magnitude == self.infinity_code else math.nan
        exponent, mantissa = divmod(magnitude, 2**self.man)
        # If there are no subnormals, their codes are read as zeros.
        significand = 2**self.man + mantissa if exponent else mantissa * self.subnormals
        return math.copysign(math.ldexp(significand, max(exponent, 1) - self.bias - self.man), -sign)

    @property
    def codes(self) -> int:
        flushed = 0 if self.subnormals else 2**self.man - 1
        return 2 * (self.largest_code + 1 - flushed) - (not TOPS[self.top].signed_zero)

    @property
    def min(self) -> float:
        return -self.max

    @property
    def max(self) -> float:
        exponent, mantissa = divmod(self.largest_code, 2**self.man)
        return math.ldexp(1 + mantissa / 2**self.man, exponent - self.bias)

    @property
    def grid(self) -> Grid:
        return Grid(self.man, self.min_exponent, self.min, self.max, self.subnormals)

    @property
    def fills_top_binade(self) -> bool:
        return self.max == (2 - 2.0**-self.man) * 2.0**self.max_exponent

    def __str__(self) -> str:
        stem = f"e{self.exp}m{self.man}" + ("fnuz" if self.top == "fnuz" else "")
        top = "" if self.top in (self.default_top, "fnuz") else f"+{self.top}"
        bias = "" if self.bias == self.default_bias else f"+bias{self.bias}"
        return stem + top + bias + ("" if self.subnormals else "+flush")


@dataclass(frozen=True)
class Codebook(Element):
    """The numbers of ``values``, each rounded to float32, in ascending order: 2 to 256 of them."""

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        values = tuple(to_float32(value) for value in self.values)
        require(
            2 <= len(values) <= MAX_CODES and all(map(math.isfinite, values)),
            f"a codebook has 2 to {MAX_CODES} finite numbers, not {len(values)}: {values[:4]!r}",
        )
        require(
            all(a < b for a, b in pairwise(values)),
            f"the numbers of a codebook ascend, each a float32 of its own, unlike {values[:4]!r}; sort them",
        )
        require(
            all(value == 0 or 2.0**-100 <= abs(value) <= 2.0**100 for value in values),
            "the numbers of a codebook lie within 2^-100 and 2^100, or are zero; scale them",
        )
        object.__setattr__(self, "values", tuple(value + 0.0 for value in values))  # one zero, which is +0

    def __str__(self) -> str:
        return f"a codebook of {len(self.values)} numbers"

    @cached_property
    def first(self) -> int:
        """The index that counts as even in a tie: zero's, or the lowest number's if there is no zero."""
        return self.values.index(0.0) if 0.0 in self.values else 0

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()

    @property
    def codes(self) -> int:
        return len(self.values)

    @property
    def first_code(self) -> int:
        """The code of the lowest number. Codes count up from it, modulo 2^bits."""
        return 0

    def number(self, code: int) -> float:
        index = (code - self.first_code) % 2**self.bits
        if index >= len(self.values):
            raise FormatError(f"code {code:#x} stands for no number of {self}")
        return self.values[index]

    @property
    def min(self) -> float:
        return self.values[0]

    @property
    def max(self) -> float:
        return self.values[-1]

    @property
    def min_subnormal(self) -> float:
        return min(abs(value) for value in self.values if value)

    @property
    def min_normal(self) -> float:
        return self.min_subnormal

    @property
    def reach(self) -> float:
        return max(-self.min, self.max)


class Posit(Codebook):
    """A codebook with codes in two's complement: zero has code 0, and NaR is left out."""

    @property
    def first_code(self) -> int:
        return 2**self.bits - self.first


def posit(bits: int, es: int) -> Posit:
    """The posits of ``bits`` bits, ``es`` of them exponent bits (Gustafson and Yonemoto, 2017); NaR is left out."""
    require(3 <= bits <= 8, f"posit: {bits} bits are out of range; use 3 to 8")
    require(0 <= es <= 3, f"posit: {es} exponent bits are out of range; use 0 to 3")
    positive = [_posit(code, bits, es) for code in range(1, 2 ** (bits - 1))]
    return Posit((*(-value for value in reversed(positive)), 0.0, *positive))


def _posit(code: int, bits: int, es: int) -> float:
    """The value of a positive code: regime (a run of equal bits, then the opposite one), exponent, fraction."""
    body = format(code, f"0{bits - 1}b")
    run = len(body) - len(body.lstrip(body[0]))
    regime = run - 1 if body[0] == "1" else -run
    rest = body[run + 1 :]
    exponent = int((rest[:es] + "0" * es)[:es] or "0", 2)
    fraction = rest[es:]
    significand = 1 + Fraction(int(fraction or "0", 2), 2 ** len(fraction))
    return float(significand * Fraction(2) ** (regime * 2**es + exponent))
