"""Number formats: frozen values with a canonical string, an element grid on a scale.

A format says which numbers exist; it never says how to round to them.
``parse(str(f)) == f`` holds for every format. Named formats are constants, ``E4M3`` or ``MXFP8``,
and ``PRESETS`` has them by the names that ``parse`` takes. docs/formats.md is their table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .nearest import listed, nearest_specs

__all__ = [
    "BF16",
    "BFP8",
    "E2M1",
    "E2M3",
    "E3M2",
    "E4M3",
    "E5M2",
    "FLOAT",
    "FP16",
    "INT4",
    "INT8",
    "MSFP12",
    "MSFP16",
    "MXFP4",
    "MXFP6_E2M3",
    "MXFP6_E3M2",
    "MXFP8",
    "MXFP8_E5M2",
    "MXINT8",
    "NVFP4",
    "PRESETS",
    "TF32",
    "BlockFloat",
    "FixedPoint",
    "Float",
    "Format",
    "FormatError",
    "Identity",
    "Microscaling",
    "Nvfp4",
    "ScaledInteger",
    "parse",
]

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
    """A set of representable numbers: immutable, hashable, printed as its spec.

    Its facts are those of an element on a scale of 1, as in OCP's tables; every number is an element times its block's
    scale, which lies within ``scales``. What is an element on a scale says which one in ``_element``; the elements
    themselves, integers and floats, state each fact.
    """

    @property
    def _element(self) -> Format:
        raise NotImplementedError

    @property
    def element_bits(self) -> int:
        """Stored bits of an element by itself."""
        return self._element.element_bits

    @property
    def scale_bits(self) -> int:
        """Stored bits of the scale that a block shares; none where there is none to share."""
        return 0

    @property
    def bits(self) -> float:
        """Stored bits per element, with its part of a tile's scale; what a tensor or a slice shares is left out."""
        return self.element_bits

    @property
    def codes(self) -> int:
        """How many of an element's codes stand for finite numbers; with sign and magnitude, -0 and 0 are two."""
        return self._element.codes

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self._element.max

    @property
    def min(self) -> float:
        """The lowest finite value: -max, or one step below it in two's complement."""
        return self._element.min

    @property
    def min_normal(self) -> float:
        """The smallest value from which on the significand has all its bits: of integers, the upper half's first."""
        return self._element.min_normal

    @property
    def min_subnormal(self) -> float:
        """The smallest positive value: the step of an integer grid."""
        return self._element.min_subnormal

    @property
    def scales(self) -> tuple[float, float]:
        """The smallest and the largest scale; 1 and 1 where there is none to share."""
        return 1.0, 1.0

    @property
    def keeps_subsets(self) -> bool:
        """Whether every rounding keeps numbers that have been rounded, by themselves or where others of their block
        have become zero: what is left of a block is on the grid of its own scale."""
        return False


@dataclass(frozen=True)
class Identity(Format):
    """Every number the tensor's own dtype holds: nothing is rounded. Spec ``float``, with the facts of float32."""

    def __str__(self) -> str:
        return "float"

    @property
    def _element(self) -> Format:
        return Float(8, 23)


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
    def element_bits(self) -> int:
        return self.wl

    @property
    def codes(self) -> int:
        return 2**self.wl - self.symmetric

    @property
    def max(self) -> float:
        return (2 ** (self.wl - 1) - 1) * self.min_subnormal

    @property
    def min(self) -> float:
        return -self.max if self.symmetric else -self.max - self.min_subnormal

    @property
    def keeps_subsets(self) -> bool:
        return True

    @property
    def min_normal(self) -> float:
        return 2.0 ** (self.wl - 2 - self.fl)

    @property
    def min_subnormal(self) -> float:
        return 2.0**-self.fl


def _check_blocks(name: str, dims: tuple[int, ...] | None, tile: tuple[int, int] | None) -> None:
    _require(dims is None or tile is None, f"{name}: dims {dims!r} and tile {tile!r} exclude each other; use one")
    if dims is not None:
        _require(
            bool(dims) and all(isinstance(d, int) for d in dims) and len(set(dims)) == len(dims),
            f"{name}: dims {dims!r} must be distinct integers; leave them out for one block a tensor",
        )
    if tile is not None:
        _require(
            len(tile) == 2 and all(isinstance(n, int) for n in tile) and tile[1] >= 1,
            f"{name}: tile {tile!r} must be an axis and a size of 1 or more",
        )


@dataclass(frozen=True)
class _Blocked(Format):
    """Which elements share a scale: one slice for each index of ``dims`` (spec ``[0,1]``), runs of ``tile[1]``
    elements along the axis ``tile[0]``, of which the last may be short (spec ``[-1:32]``), or the whole tensor
    (``[]`` in the spec of a format that has a tile by itself).

    A tensor of one dimension or none has no slices: it is one block, whatever ``dims`` says.
    """

    dims: tuple[int, ...] | None = field(default=None, kw_only=True)
    tile: tuple[int, int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("dims", "tile"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
        _check_blocks(type(self).__name__, self.dims, self.tile)

    @property
    def _blocks(self) -> str:
        if self.dims is not None:
            return f"[{','.join(map(str, self.dims))}]"
        if self.tile == type(self).tile:
            return ""
        return "[]" if self.tile is None else f"[{self.tile[0]}:{self.tile[1]}]"

    @property
    def bits(self) -> float:
        return self.element_bits + (self.scale_bits / self.tile[1] if self.tile else 0)


@dataclass(frozen=True)
class BlockFloat(_Blocked):
    """``wl``-bit integers times a power of two that a block shares. Spec ``bfp8``, ``bfp8[0]``, ``bfp8[-1:16]``.

    A block's exponent is E = floor(log2 max|x|), clamped to ``exponent_bits`` bits of two's complement, and its
    step is 2^(E - (wl - 2)) (SWALP, section 5, "Block Floating Point").
    """

    wl: int  # word length in bits, sign included
    symmetric: bool = field(default=True, kw_only=True)  # sign and magnitude; False: two's complement (``+twos``)
    exponent_bits: int = field(default=8, kw_only=True)  # of the shared exponent (spec ``+exp5``)

    def __post_init__(self) -> None:
        _check_word_length("block floating point", self.wl)
        super().__post_init__()
        _require(
            isinstance(self.exponent_bits, int) and 2 <= self.exponent_bits <= 8,
            f"block floating point: {self.exponent_bits!r} exponent bits are out of range; use 2 to 8",
        )

    def __str__(self) -> str:
        twos = "" if self.symmetric else "+twos"
        exponent = "" if self.exponent_bits == 8 else f"+exp{self.exponent_bits}"
        return f"bfp{self.wl}{self._blocks}{twos}{exponent}"

    @property
    def _element(self) -> Format:
        return FixedPoint(self.wl, self.wl - 2, self.symmetric)  # in [-2, 2): the block's exponent is that of its scale

    @property
    def codes(self) -> int:
        return 2**self.wl  # sign and magnitude has two zeros, two's complement one number below -max

    @property
    def keeps_subsets(self) -> bool:
        return self.symmetric  # two's complement holds -2^(E+1), whose own exponent is E + 1

    @property
    def scale_bits(self) -> int:
        return self.exponent_bits

    @property
    def scales(self) -> tuple[float, float]:
        half = 2 ** (self.exponent_bits - 1)
        return 2.0**-half, 2.0 ** (half - 1)

    @property
    def exponent_bounds(self) -> tuple[int, int]:
        """Lowest and highest shared exponent: ``exponent_bits`` bits of two's complement."""
        half = 2 ** (self.exponent_bits - 1)
        return -half, half - 1


@dataclass(frozen=True)
class ScaledInteger(_Blocked):
    """Symmetric ``wl``-bit integers times a float32 scale, max|x| / (2^(wl-1) - 1). Spec ``int8``, ``int8[0]``.

    The scale is computed in float32 (float64 for float64), and so are the quotient that is rounded and the product.
    """

    wl: int  # word length in bits, sign included

    def __post_init__(self) -> None:
        _require(
            isinstance(self.wl, int) and 2 <= self.wl <= 16,
            f"scaled integer: word length {self.wl!r} is out of range; use 2 to 16 bits",
        )
        super().__post_init__()

    def __str__(self) -> str:
        return f"int{self.wl}{self._blocks}"

    @property
    def _element(self) -> Format:
        return FixedPoint(self.wl, 0, symmetric=True)

    @property
    def scale_bits(self) -> int:
        return 32

    @property
    def scales(self) -> tuple[float, float]:
        return FLOAT.min_subnormal, FLOAT.max


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
    def element_bits(self) -> int:
        return 1 + self.exp + self.man

    @property
    def keeps_subsets(self) -> bool:
        return True

    @property
    def bias(self) -> int:
        return 2 ** (self.exp - 1) - 1

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number; below it the step no longer shrinks."""
        return 1 - self.bias

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest finite value."""
        return math.frexp(self.max)[1] - 1

    @property
    def min_normal(self) -> float:
        return 2.0**self.min_exponent

    @property
    def min_subnormal(self) -> float:
        return 2.0 ** (self.min_exponent - self.man)

    @property
    def _largest(self) -> int:
        """The code of ``max``: exponent field, then mantissa field."""
        binade = 2**self.man
        return 2**self.exp * binade - {"ieee": binade, "nan": 1, "finite": 0}[self.top] - 1

    @property
    def codes(self) -> int:
        return 2 * (self._largest + 1)

    @property
    def min(self) -> float:
        return -self.max

    @property
    def max(self) -> float:
        exponent, mantissa = divmod(self._largest, 2**self.man)
        return (1 + mantissa / 2**self.man) * 2.0 ** (exponent - self.bias)


FP16 = Float(5, 10)  # IEEE 754 binary16
BF16 = Float(8, 7)  # the upper half of a float32
TF32 = Float(8, 10)  # what NVIDIA's tensor cores read of a float32
E5M2 = Float(5, 2)  # OCP 8-bit Floating Point Specification v1.0, as is the next
E4M3 = Float(4, 3)
E3M2 = Float(3, 2)  # OCP Microscaling Formats (MX) Specification v1.0, as are the next two
E2M3 = Float(2, 3)
E2M1 = Float(2, 1)
BFP8 = BlockFloat(8)  # the "big block" of the SWALP paper, 8 bits
MSFP12 = BlockFloat(4, tile=(-1, 16))  # Microsoft Floating Point (Rouhani et al., NeurIPS 2020), as is the next
MSFP16 = BlockFloat(8, tile=(-1, 16))
INT8 = ScaledInteger(8)
INT4 = ScaledInteger(4)

# OCP Microscaling Formats (MX) Specification v1.0, section 5: spec -> element.
MX_ELEMENTS: dict[str, Format] = {
    "mxfp8": E4M3,
    "mxfp8_e5m2": E5M2,
    "mxfp6_e3m2": E3M2,
    "mxfp6_e2m3": E2M3,
    "mxfp4": E2M1,
    "mxint8": FixedPoint(8, 6, symmetric=True),
}


@dataclass(frozen=True)
class Microscaling(_Blocked):
    """OCP's MX formats: small elements on an E8M0 scale for each 32 along the last axis. Spec ``mxfp8``, ``mxfp4``.

    The scale is 2^(floor(log2 max|x|) - max exponent of the element), within 2^-127 to 2^127; elements saturate
    (specification v1.0, section 6.3).
    """

    element: Format
    tile: tuple[int, int] | None = field(default=(-1, 32), kw_only=True)

    def __post_init__(self) -> None:
        _require(
            self.element in MX_ELEMENTS.values(),
            f"microscaling: element {self.element} is none of OCP's; use one of {', '.join(map(str, MX_ELEMENTS))}",
        )
        super().__post_init__()

    def __str__(self) -> str:
        name = next(name for name, element in MX_ELEMENTS.items() if element == self.element)
        return name + self._blocks

    @property
    def max_exponent(self) -> int:
        """Of the element: what separates the block's exponent from its scale's."""
        return self.element.max_exponent if isinstance(self.element, Float) else 0

    @property
    def _element(self) -> Format:
        return self.element

    @property
    def keeps_subsets(self) -> bool:
        return self.element != E4M3  # its highest binade ends at 1.75, so that 1.875 needs a larger number beside it

    @property
    def scale_bits(self) -> int:
        return 8

    @property
    def scales(self) -> tuple[float, float]:
        return 2.0**-127, 2.0**127  # E8M0

    @property
    def exponent_bounds(self) -> tuple[int, int]:
        """Lowest and highest exponent of the scale: E8M0's 2^-127 to 2^127."""
        return -127, 127


@dataclass(frozen=True)
class Nvfp4(_Blocked):
    """NVIDIA's NVFP4: E2M1 on an E4M3 scale for each 16, on one float32 scale for the tensor. Spec ``nvfp4``.

    The tensor's scale is max|x| / (6 * 448), a block's is its max|x| / 6 over that, rounded to nearest E4M3 and
    kept at 2^-9 or more; both as in ScaledInteger.
    """

    tile: tuple[int, int] | None = field(default=(-1, 16), kw_only=True)

    def __str__(self) -> str:
        return f"nvfp4{self._blocks}"

    @property
    def _element(self) -> Format:
        return E2M1

    @property
    def scale_bits(self) -> int:
        return E4M3.element_bits

    @property
    def scales(self) -> tuple[float, float]:
        """Of the block's scale and the tensor's together, in float32."""
        return FLOAT.min_subnormal, FLOAT.max


MXFP8 = Microscaling(E4M3)
MXFP8_E5M2 = Microscaling(E5M2)
MXFP6_E3M2 = Microscaling(E3M2)
MXFP6_E2M3 = Microscaling(E2M3)
MXFP4 = Microscaling(E2M1)
MXINT8 = Microscaling(MX_ELEMENTS["mxint8"])
NVFP4 = Nvfp4()

# Name -> format: every constant of this module, in lower case. A name that is not the format's spec is another for it.
PRESETS: dict[str, Format] = {
    name.lower(): value for name, value in tuple(globals().items()) if isinstance(value, Format)
}

# One row a family: under its specs their pattern, and the format a match stands for.
_INT = r"(-?\d+)"
_BLOCKS = r"(?:\[(?P<dims>-?\d+(?:,-?\d+)*)\]|\[(?P<axis>-?\d+):(?P<size>-?\d+)\])?"
_TILED = rf"(?:(?P<whole>\[\])|{_BLOCKS})"


def _blocks(m: re.Match[str]) -> dict[str, Any]:
    if m["dims"]:
        return {"dims": tuple(map(int, m["dims"].split(",")))}
    return {"tile": (int(m["axis"]), int(m["size"]))} if m["axis"] else {}


_FAMILIES: tuple[tuple[str, Callable[[re.Match[str]], Format]], ...] = (
    (  # fixed<wl>.<fl>[+sym]
        rf"fixed{_INT}\.{_INT}(\+sym)?",
        lambda m: FixedPoint(int(m[1]), int(m[2]), symmetric=bool(m[3])),
    ),
    (  # bfp<wl>[<dim>,... or <axis>:<size>][+twos][+exp<bits>]
        rf"bfp(?P<wl>-?\d+){_BLOCKS}(?P<twos>\+twos)?(?:\+exp(?P<exp>-?\d+))?",
        lambda m: BlockFloat(int(m["wl"]), symmetric=not m["twos"], exponent_bits=int(m["exp"] or 8), **_blocks(m)),
    ),
    (  # e<exp>m<man>[+ieee|+nan|+finite]
        rf"e{_INT}m{_INT}(?:\+({'|'.join(TOPS)}))?",
        lambda m: Float(int(m[1]), int(m[2]), top=m[3] or ""),
    ),
    (  # int<wl>[<dim>,... or <axis>:<size>]
        rf"int(?P<wl>-?\d+){_BLOCKS}",
        lambda m: ScaledInteger(int(m["wl"]), **_blocks(m)),
    ),
    (  # mxfp8[<axis>:<size>], mxfp4[] and their like
        rf"(?P<name>{'|'.join(MX_ELEMENTS)}){_TILED}",
        lambda m: Microscaling(MX_ELEMENTS[m["name"]], **_tile_unless(m)),
    ),
    # nvfp4[<axis>:<size>]
    (rf"nvfp4{_TILED}", lambda m: Nvfp4(**_tile_unless(m))),
)


def _tile_unless(m: re.Match[str]) -> dict[str, Any]:
    """Blocks of a format that has a tile by default, which dims or the whole tensor replace."""
    return {"tile": None, **_blocks(m)} if m["dims"] or m["whole"] else _blocks(m)


def parse(spec: str | Format) -> Format:
    """The format that ``spec`` or a preset's name stands for; a format is returned as it is.

    Raises FormatError, naming the spec and the nearest that there are, if it names none.
    """
    if isinstance(spec, Format):
        return spec
    if not isinstance(spec, str):
        raise FormatError(f"a format spec must be a string or a format, not {type(spec).__name__} {spec!r}")
    if (format := _named(spec.strip())) is not None:
        return format
    raise FormatError(f"unknown format spec {spec!r}; {_remedy(spec)}")


def _named(spec: str) -> Format | None:
    if (preset := PRESETS.get(spec)) is not None:
        return preset
    for pattern, build in _FAMILIES:
        if match := re.fullmatch(pattern, spec):
            return build(match)
    return None


def _remedy(spec: str) -> str:
    """What ``spec``, which names no format, may have meant; if nothing is like it, what specs look like."""

    def is_spec(text: str) -> bool:
        try:
            return _named(text) is not None
        except FormatError:  # its numbers are out of range
            return False

    if found := nearest_specs(spec, PRESETS, is_spec):
        return f"did you mean {listed(found)}?"
    return "specs look like bfp8[0], fixed8.6, e4m3, int8[0], mxfp8, nvfp4, bf16 or float (docs/formats.md)"
