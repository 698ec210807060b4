"""Names that an unknown word may have meant: the second half of an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable

__all__ = ["did_you_mean", "listed", "nearest", "nearest_specs"]

ALIKE = 0.6  # difflib's own measure and bound of likeness: twice the letters in common, over all letters


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """``"did you mean nearest?"``: up to three of ``known``, the most alike first; ``otherwise`` if none is alike."""
    found = nearest(word, known)
    return f"did you mean {listed(found)}?" if found else otherwise


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """Up to three of ``known`` with a spelling like ``word``'s, upper or lower case, the most alike first."""
    return _most_alike((_likeness(word, each), each) for each in known)


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio()


def _most_alike(scored: Iterable[tuple[float, str]]) -> list[str]:
    alike = sorted((-score, i, each) for i, (score, each) in enumerate(scored) if score >= ALIKE)
    return [each for _, _, each in alike[:3]]


def listed(words: list[str]) -> str:
    """``"a, b or c"``."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


# Spelling of others -> spelling of this package; the lines are applied one after another.
_SPELLINGS = (
    (r"\s+|^torch\.", ""),
    (r"^(fixed|posit)\((\d+),(\d+)\)", r"\1\2.\3"),
    (r"\(([^)]*)\)?$|\[([^\]]*)$", r"[\1\2]"),  # bfp8(0), bfp8[0
    (r"^(?:float|fp)\d+_?(e\d+m\d+)", r"\1"),  # float8_e4m3fn
    (r"^(e\d+m\d+)(?:fn|fnuz|fnu)(?![a-z])", r"\1"),
    (r"^(mxfp\d)(e\d+m\d+)", r"\1_\2"),
)
# Name elsewhere -> the nearest specs of this package.
_OTHER_NAMES = {
    **dict.fromkeys(("fp32", "float32", "fp64", "float64", "single", "double", "full", "none"), ("float",)),
    **dict.fromkeys(("float16", "half"), ("fp16",)),
    "bfloat16": ("bf16",),
    **dict.fromkeys(("fp8", "float8"), ("e4m3", "e5m2", "mxfp8")),
    **dict.fromkeys(("fp6", "float6"), ("e3m2", "e2m3", "mxfp6_e3m2")),
    **dict.fromkeys(("fp4", "float4"), ("e2m1", "mxfp4", "nvfp4")),
    "mxfp8_e4m3": ("mxfp8",),
    "mxfp6": ("mxfp6_e3m2", "mxfp6_e2m3"),
    "mxfp4_e2m1": ("mxfp4",),
    "mxint": ("mxint8",),
}
# One example a family; its numbers replace those that a word leaves out.
_EXAMPLES = ("bfp8", "fixed8.6", "e4m3", "int8")


def nearest_specs(word: str, names: Iterable[str], is_spec: Callable[[str], bool]) -> list[str]:
    """Up to three specs that ``word`` may have meant: ``bfp8[0]`` for ``bpf8(0)``, ``e4m3`` for ``float8_e4m3fn``.

    names: the named formats. is_spec: whether a text is a spec.
    """
    spelt = word.lower()
    for pattern, replacement in _SPELLINGS:
        spelt = re.sub(pattern, replacement, spelt)
    stem, rest = re.fullmatch(r"([^\[+]*)(.*)", spelt, re.DOTALL).groups()  # type: ignore[union-attr]
    candidates = [stem, *_OTHER_NAMES.get(stem, ())]
    if not any(map(is_spec, candidates)):
        by_name = ((_likeness(stem, name), name) for name in names)
        by_form = ((_likeness(_form(stem), _form(each)), _with_numbers_of(stem, each)) for each in _EXAMPLES)
        candidates = _most_alike((*by_form, *by_name))
    found = (next(filter(is_spec, (each + rest, each)), None) for each in candidates)
    return list(dict.fromkeys(filter(None, found)))[:3]


def _form(spec: str) -> str:
    """``e#m#`` of ``e4m3``."""
    return re.sub(r"\d+", "#", spec)


def _with_numbers_of(stem: str, example: str) -> str:
    """``bfp6``, from ``bpf6`` and ``bfp8``: the example with the numbers of ``stem``, as far as there are any."""
    numbers = iter(re.findall(r"\d+", stem))
    return re.sub(r"\d+", lambda own: next(numbers, own[0]), example)
