"""Specs: the text of a format, and the format that a text stands for.

A spec is a stem, brackets for the block, then suffixes: ``e4m3[-1:32]+e8m0+rceil``. The stem names the element, and
some name a scale. After a stem without a scale, brackets add a float32 scale.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from ..nearest import listed, nearest_specs
from .block import WHOLE, Block, Channel, Rectangle, Runs, Slices
from .element import SIGNS, TOPS, Codebook, Element, Float, Integer, posit
from .errors import FormatError, require
from .float32 import shortest
from .format import FLOAT, Format
from .named import ALIASES, PRESETS, STEMS
from .scale import RULES, Absmax, Affine, PowerOfTwo, Scale, Static, TwoLevel

__all__ = ["own_runs", "parse", "text"]


@dataclass
class _Parts:
    """The parts of a spec, as far as it has been read."""

    kind: type[Element]
    of_element: dict[str, Any]
    scale: Scale | None = None
    block: Block = WHOLE
    overflow: str = "saturate"

    def format(self) -> Format:
        return Format(self.kind(**self.of_element), self.scale, self.block, self.overflow)


def _parts(format: Format) -> _Parts:
    of_element = {each.name: getattr(format.element, each.name) for each in fields(format.element)}  # type: ignore[arg-type]
    of_element.pop("bias", None)  # follows from the top
    return _Parts(type(format.element), of_element, format.scale, format.block)


def _integer(bits: str, point: int, sign: str, scale: Scale | None = None) -> _Parts:
    return _Parts(Integer, {"wl": int(bits), "point": point, "sign": sign}, scale)


# ---- stems, blocks and suffixes: a row each --------------------------------------------------------------------------

_INT = r"-?\d+"
_STEMS: tuple[tuple[str, Callable[..., _Parts]], ...] = (
    (rf"fixed({_INT})\.({_INT})", lambda bits, point: _integer(bits, int(point), "twos")),
    (rf"bfp({_INT})", lambda bits: _integer(bits, int(bits) - 2, "mag", PowerOfTwo())),
    (rf"int({_INT})", lambda bits: _integer(bits, 0, "sym", Absmax())),
    (rf"uint({_INT})", lambda bits: _integer(bits, 0, "unsigned", Absmax())),
    (
        rf"e({_INT})m({_INT})(fnuz)?",
        lambda exp, man, top: _Parts(Float, {"exp": int(exp), "man": int(man), "top": top or ""}),
    ),
    (r"posit(\d+)\.(\d+)", lambda bits, es: _parts(Format(posit(int(bits), int(es))))),
    (r"\{(.*)\}", lambda values: _Parts(Codebook, {"values": _values(values)})),
)


def _values(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise FormatError(f"a codebook is numbers between commas, unlike {{{text}}}; write {{-1,0,1}}") from None


def _stem(text: str) -> _Parts | None:
    text = ALIASES.get(text, text)
    require(
        text != str(FLOAT), "float rounds nothing, and has neither blocks nor suffixes; use e8m23 for float32's numbers"
    )
    if (named := STEMS.get(text) or PRESETS.get(text)) is not None:
        return _parts(named)
    for pattern, build in _STEMS:
        if match := re.fullmatch(pattern, text):
            return build(*match.groups())
    return None


_BLOCKS: tuple[tuple[str, Callable[[str], Block]], ...] = (
    (rf"(?:{_INT}(?:,{_INT})*)?", lambda s: Slices(tuple(map(int, filter(None, s.split(",")))))),
    (rf"{_INT}:{_INT}(?:,{_INT}:{_INT})*", lambda s: Runs(tuple(_pair(run, ":") for run in s.split(",")))),
    (rf"{_INT}x{_INT}", lambda s: Rectangle(*_pair(s, "x"))),
    (rf"c:{_INT}", lambda s: Channel(int(s[2:]))),
)


def _pair(text: str, separator: str) -> tuple[int, int]:
    first, second = map(int, text.split(separator))
    return first, second


def _block(text: str) -> Block | None:
    return next((build(text) for pattern, build in _BLOCKS if re.fullmatch(pattern, text)), None)


def _says(kind: type[Element], meaning: str, name: str) -> Callable[[_Parts, str, Any], None]:
    """A suffix that sets the field ``name`` of elements of a kind."""

    def apply(parts: _Parts, suffix: str, value: Any) -> None:
        message = f"+{suffix} is for {meaning}, and this is no {kind.__name__}; leave it out"
        require(issubclass(parts.kind, kind), message)
        parts.of_element[name] = value

    return apply


def _rule(parts: _Parts, suffix: str, value: str) -> None:
    if not isinstance(parts.scale, PowerOfTwo):
        raise FormatError(f"+{suffix} says how a power-of-two scale follows from a block; write +e8m0+{suffix} for one")
    parts.scale = replace(parts.scale, rule=value)


def _scale(parts: _Parts, suffix: str, value: Scale) -> None:
    parts.scale = value
    if isinstance(value, Affine) and parts.of_element.get("sign") == "sym":
        parts.of_element["sign"] = "twos"  # a zero point leaves no code out


def _overflow(parts: _Parts, suffix: str, value: str) -> None:
    parts.overflow = value


_NUMBER = r"(\d[\d.]*(?:e-?\d+)?)"
_SUFFIXES: tuple[tuple[str, Callable[[_Parts, str, Any], None], Callable[[str], Any]], ...] = (
    (f"({'|'.join(SIGNS)})", _says(Integer, "the sign of integers", "sign"), str),
    (f"({'|'.join(TOPS)})", _says(Float, "the highest codes of a float", "top"), str),
    (rf"bias({_INT})", _says(Float, "the exponent of a float", "bias"), int),
    (r"(flush)", _says(Float, "the subnormals of a float", "subnormals"), lambda text: False),
    (rf"exp({_INT})", _scale, lambda bits: PowerOfTwo(int(bits))),
    (rf"e({_INT})m0", _scale, lambda bits: PowerOfTwo(int(bits), biased=True)),
    (r"(e\d+m\d+(?:fnuz)?)", _scale, lambda stem: TwoLevel(_parts_of_stem(stem).format().element)),  # type: ignore[arg-type]
    (r"(asym)", _scale, lambda text: Affine()),
    (rf"scale{_NUMBER}", _scale, lambda number: Static(float(number))),
    (f"({'|'.join(RULES)})", _rule, str),
    (r"(inf)", _overflow, lambda text: "infinity"),
    (r"(tonan)", _overflow, lambda text: "nan"),
)


def _parts_of_stem(text: str) -> _Parts:
    parts = _stem(text)
    assert parts is not None
    return parts


# ---- text -> format --------------------------------------------------------------------------------------------------


def parse(spec: str | Format) -> Format:
    """The format that ``spec`` or a preset's name stands for; a format is returned as it is.

    Raises FormatError, with the nearest valid specs, if ``spec`` names no format.
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
    match = re.fullmatch(r"(\{[^}]*\}|[^\[+{]+)(?:\[([^\]]*)\])?((?:\+[^+]+)*)", spec)
    if match is None or (parts := _stem(match[1])) is None:
        return None
    if match[2] is not None:
        if (block := _block(match[2])) is None:
            return None
        parts.block = block
        parts.scale = parts.scale or Absmax()
    for suffix in match[3].split("+")[1:]:
        if not _apply(parts, suffix):
            return None
    return parts.format()


def _apply(parts: _Parts, suffix: str) -> bool:
    for pattern, apply, read in _SUFFIXES:
        if match := re.fullmatch(pattern, suffix):
            apply(parts, suffix, read(match[1]))
            return True
    return False


def _remedy(spec: str) -> str:
    """The remedy for an unknown ``spec``: the nearest valid specs, or else examples of specs."""

    def is_spec(text: str) -> bool:
        try:
            return _named(text) is not None
        except FormatError:  # a number in it is out of range
            return False

    if found := nearest_specs(spec, PRESETS, is_spec):
        return f"did you mean {listed(found)}?"
    return "specs look like bfp8[0], fixed8.6, e4m3, int8[0], mxfp8, nvfp4, bf16 or float (docs/formats.md)"


# ---- format -> text --------------------------------------------------------------------------------------------------


@cache
def text(format: Format) -> str:
    """The canonical spec: ``parse(text(f)) == f``."""
    stem = _stem_of(format)
    base = _parts_of_stem(stem)
    shares_anew = base.scale is None and format.scale is not None and format.scale.is_shared
    if shares_anew:
        base.scale = Absmax()
    block = str(format.block) if shares_anew or format.block != base.block else ""
    suffixes = [*_of_element(format, base), *_of_scale(format.scale, base.scale)]
    suffixes += {"saturate": [], "infinity": ["inf"], "nan": ["tonan"]}[format.overflow]
    return stem + block + "".join(f"+{suffix}" for suffix in suffixes)


@cache
def own_runs(format: Format) -> Channel | None:
    """``[c:32]`` for mxfp8: the runs of the stem without brackets; None if the block of ``format`` is another."""
    own = _parts_of_stem(_stem_of(format)).block
    return Channel(own.size) if isinstance(own, Runs) and own == format.block else None


def _stem_of(f: Format) -> str:
    named = (name for name, base in STEMS.items() if base.element == f.element and _like(base.scale, f.scale))
    if (name := next(named, None)) is not None:
        return name
    e = f.element
    if isinstance(e, Float):
        return f"e{e.exp}m{e.man}" + ("fnuz" if e.top == "fnuz" else "")
    if isinstance(e, Codebook):
        return (f.scale and _name_of(e)) or _codebook(e)
    assert isinstance(e, Integer)
    if isinstance(f.scale, PowerOfTwo) and not f.scale.biased and e.point == e.wl - 2:
        return f"bfp{e.wl}"
    if f.scale is not None and e.point == 0:
        return f"{'uint' if e.sign == 'unsigned' else 'int'}{e.wl}"
    return f"fixed{e.wl}.{e.point}"


def _like(a: Scale | None, b: Scale | None) -> bool:
    """Whether two scales are equal, the rule left aside."""
    if isinstance(a, PowerOfTwo) and isinstance(b, PowerOfTwo):
        return replace(a, rule=b.rule) == b
    return a == b


def _name_of(element: Codebook) -> str | None:
    return next((name for name, base in STEMS.items() if base.element == element), None)


@cache
def _codebook(element: Codebook) -> str:
    bits = element.bits
    if len(element.values) == 2**bits - 1 > 3:
        for es in range(4):
            if posit(bits, es) == element:
                return f"posit{bits}.{es}"
    return f"{{{','.join(map(shortest, element.values))}}}"


def _of_element(f: Format, base: _Parts) -> list[str]:
    e = f.element
    if isinstance(e, Integer):
        sign = base.of_element["sign"]
        sign = "twos" if sign == "sym" and isinstance(f.scale, Affine) else sign
        return [] if e.sign == sign else [e.sign]
    if isinstance(e, Float):
        plain = base.kind(**base.of_element)
        assert isinstance(plain, Float)
        return [
            *([e.top] if e.top != plain.top else []),
            *([f"bias{e.bias}"] if e.bias != e.default_bias else []),
            *(["flush"] if not e.subnormals else []),
        ]
    return []


def _of_scale(scale: Scale | None, base: Scale | None) -> list[str]:
    if isinstance(scale, PowerOfTwo):
        rule = [scale.rule] if scale.rule != "floor" else []
        bits = f"e{scale.bits}m0" if scale.biased else f"exp{scale.bits}"
        return rule if _like(base, scale) else [bits, *rule]
    if scale == base:
        return []
    if isinstance(scale, TwoLevel):
        return [str(scale.inner)]
    if isinstance(scale, Static):
        return [f"scale{shortest(scale.value)}"]
    assert isinstance(scale, Affine)
    return ["asym"]
