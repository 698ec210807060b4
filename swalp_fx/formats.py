"""Number formats: frozen values with a canonical string, an element grid on a scale.

A format says which numbers exist; it never says how to round to them.
``parse(str(f)) == f`` holds for every format.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["FLOAT", "BlockFloat", "FixedPoint", "Float", "Format", "FormatError", "Identity", "parse"]

# A float32 significand has 24 bits: an integer grid of up to 24 bits is held exactly.
MAX_WORD_LENGTH = 24


class FormatError(ValueError):
    """A spec that names no format, or a parameter out of its range."""


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise FormatError(message)


def _check_word_length(name: str, wl: int) -> None:
    _require(
        isinstance(wl, int) and 2 <= wl <= MAX_WORD_LENGTH,
        f"{name}: word length {wl!r} is out of range; use 2 to {MAX_WORD_LENGTH} bits",
    )


class Format:
    """A set of representable numbers: immutable, hashable, printed as its spec."""

    @property
    def bits(self) -> float:
        """Stored bits per element, without what a block shares."""
        raise NotImplementedError


@dataclass(frozen=True)
class Identity(Format):
    """Every number the tensor's own dtype holds: nothing is rounded. Spec ``float``."""

    def __str__(self) -> str:
        return "float"

    @property
    def bits(self) -> float:
        return 32


FLOAT = Identity()


@dataclass(frozen=True)
class FixedPoint(Format):
    """``wl``-bit integers times 2^-fl, saturating. Spec ``fixed8.6``, ``fixed8.6+sym``.

    The range is [-2^(wl-fl-1), 2^(wl-fl-1) - 2^-fl] (SWALP, section 3.1).
    """

    wl: int  # word length in bits, sign included
    fl: int  # fractional bits: the step is 2^-fl
    symmetric: bool = False  # drop the lowest value, so that -x is representable with x

    def __post_init__(self) -> None:
        _check_word_length("fixed point", self.wl)
        _require(
            isinstance(self.fl, int) and -100 <= self.fl <= 100,
            f"fixed point: {self.fl!r} fractional bits are out of range; use -100 to 100",
        )

    def __str__(self) -> str:
        return f"fixed{self.wl}.{self.fl}" + ("+sym" if self.symmetric else "")

    @property
    def bits(self) -> float:
        return self.wl


@dataclass(frozen=True)
class BlockFloat(Format):
    """``wl``-bit integers times a power of two that a block shares. Spec ``bfp8``, ``bfp8[0]``.

    A block is the whole tensor, or one slice for each index of ``dims``. Its exponent is
    E = floor(log2 max|x|), clamped to ``exponent_bits`` bits of two's complement, and its
    step is 2^(E - (wl - 2)) (SWALP, section 5, "Block Floating Point"). A tensor of one
    dimension or none is one block, whatever ``dims`` says.
    """

    wl: int  # word length in bits, sign included
    dims: tuple[int, ...] | None = None  # None: the whole tensor is one block
    symmetric: bool = True  # sign and magnitude; False: two's complement (spec ``+twos``)
    exponent_bits: int = 8  # of the shared exponent (spec ``+exp5``)

    def __post_init__(self) -> None:
        _check_word_length("block floating point", self.wl)
        if self.dims is not None:
            dims = tuple(self.dims)
            object.__setattr__(self, "dims", dims)
            _require(
                bool(dims) and all(isinstance(d, int) for d in dims) and len(set(dims)) == len(dims),
                f"block floating point: dims {dims!r} must be distinct integers; leave them out for one block a tensor",
            )
        _require(
            isinstance(self.exponent_bits, int) and 2 <= self.exponent_bits <= 8,
            f"block floating point: {self.exponent_bits!r} exponent bits are out of range; use 2 to 8",
        )

    def __str__(self) -> str:
        dims = "" if self.dims is None else f"[{','.join(map(str, self.dims))}]"
        twos = "" if self.symmetric else "+twos"
        exponent = "" if self.exponent_bits == 8 else f"+exp{self.exponent_bits}"
        return f"bfp{self.wl}{dims}{twos}{exponent}"

    @property
    def bits(self) -> float:
        return self.wl


# What the highest exponent holds: IEEE 754 keeps it for infinities and NaNs; OCP's E4M3 gives
# up all of it but one NaN; OCP's 6- and 4-bit floats use every code for a number.
TOPS = ("ieee", "nan", "finite")
OCP_TOPS = {(4, 3): "nan", (3, 2): "finite", (2, 3): "finite", (2, 1): "finite"}


@dataclass(frozen=True)
class Float(Format):
    """A sign, ``exp`` exponent bits and ``man`` mantissa bits, gradual underflow. Spec ``e5m2``.

    The bias is 2^(exp-1) - 1, and finite values beyond the largest saturate to it. ``top`` says
    what the highest exponent holds; by default what OCP's 8-bit floating point and microscaling
    specifications say for E4M3, E3M2, E2M3 and E2M1, and IEEE 754's rule elsewhere.
    """

    exp: int  # exponent bits
    man: int  # mantissa bits, the hidden one not counted
    top: str = ""  # "ieee", "nan" or "finite" (spec ``+ieee`` ...); "" takes the default

    def __post_init__(self) -> None:
        _require(
            isinstance(self.exp, int) and 2 <= self.exp <= 8,
            f"float: {self.exp!r} exponent bits are out of range; use 2 to 8",
        )
        _require(
            isinstance(self.man, int) and 0 <= self.man <= 23,
            f"float: {self.man!r} mantissa bits are out of range; use 0 to 23",
        )
        if not self.top:
            object.__setattr__(self, "top", self._default_top)
        _require(self.top in TOPS, f"float: top {self.top!r} is unknown; use one of {', '.join(TOPS)}")
        _require(
            self.exp < 8 or self.top == "ieee",
            f"float: with 8 exponent bits top {self.top!r} goes beyond float32; use top 'ieee'",
        )

    @property
    def _default_top(self) -> str:
        return OCP_TOPS.get((self.exp, self.man), "ieee")

    def __str__(self) -> str:
        return f"e{self.exp}m{self.man}" + ("" if self.top == self._default_top else f"+{self.top}")

    @property
    def bits(self) -> float:
        return 1 + self.exp + self.man

    @property
    def bias(self) -> int:
        return 2 ** (self.exp - 1) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number; below it the step no longer shrinks."""
        return 1 - self.bias

    @property
    def max(self) -> float:
        """The largest finite value."""
        codes = 2**self.man  # in one binade
        last = 2**self.exp * codes - {"ieee": codes, "nan": 1, "finite": 0}[self.top] - 1
        exponent, mantissa = divmod(last, codes)
        return (1 + mantissa / codes) * 2.0 ** (exponent - self.bias)


# One row a family: the pattern of its specs, and the format a match stands for.
_INT = r"(-?\d+)"
_FAMILIES: tuple[tuple[str, str, Callable[[re.Match[str]], Format]], ...] = (
    ("float", r"float", lambda m: FLOAT),
    (
        "fixed<wl>.<fl>[+sym]",
        rf"fixed{_INT}\.{_INT}(\+sym)?",
        lambda m: FixedPoint(int(m[1]), int(m[2]), symmetric=bool(m[3])),
    ),
    (
        "bfp<wl>[<dim>,...][+twos][+exp<bits>]",
        rf"bfp{_INT}(?:\[({_INT}(?:,{_INT})*)\])?(\+twos)?(?:\+exp{_INT})?",
        lambda m: BlockFloat(
            int(m[1]),
            dims=tuple(map(int, m[2].split(","))) if m[2] else None,
            symmetric=not m[5],
            exponent_bits=int(m[6]) if m[6] else 8,
        ),
    ),
    (
        "e<exp>m<man>[+ieee|+nan|+finite]",
        rf"e{_INT}m{_INT}(?:\+({'|'.join(TOPS)}))?",
        lambda m: Float(int(m[1]), int(m[2]), top=m[3] or ""),
    ),
    ("bf16", r"bf16", lambda m: Float(8, 7)),
    ("fp16", r"fp16", lambda m: Float(5, 10)),
)


def parse(spec: str | Format) -> Format:
    """The format that ``spec`` names; a format is returned as it is.

    Raises FormatError, naming the spec and the families there are, if it names none.
    """
    if isinstance(spec, Format):
        return spec
    if not isinstance(spec, str):
        raise FormatError(f"a format spec must be a string or a format, not {type(spec).__name__} {spec!r}")
    for _, pattern, build in _FAMILIES:
        if match := re.fullmatch(pattern, spec.strip()):
            return build(match)
    families = ", ".join(name for name, _, _ in _FAMILIES)
    raise FormatError(f"unknown format spec {spec!r}; use one of {families}")
