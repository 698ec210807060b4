"""Patterns: how rules and globs of a recipe name parts of a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase

from ..nearest import listed, nearest
from .errors import RecipeError

__all__ = ["GLOBS", "Subject", "around", "is_all_of", "is_numbered", "matches", "shortened", "unmatched"]

GLOBS = ("include", "exclude", "whole")  # the fields of a recipe that hold globs

# A pattern is matched against subjects: (qualified name, kinds). The kinds are the part and the names of the operation.
# A tied parameter has a subject for each of its names.
Subject = tuple[str, Collection[str]]

_NUMBER = re.compile(r"@\d+$")  # relu@2 is the second of several outputs named relu


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches all of ``name``, or the whole name of a module around it.

    A pattern without ``@`` does not see the number in ``relu@2``: ``relu`` matches, ``*2`` does not.
    """
    names = around(name if "@" in pattern else _NUMBER.sub("", name))
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], each) for each in names)
    return any(fnmatchcase(each, pattern) for each in names)


def is_all_of(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches ``name`` itself; modules around it do not count."""
    return bool(re.fullmatch(pattern[3:], name)) if pattern.startswith("re:") else fnmatchcase(name, pattern)


def is_numbered(name: str) -> bool:
    """Whether ``name`` picks one of several outputs with the same name: ``relu@2``."""
    return _NUMBER.search(name) is not None


def around(name: str) -> Iterator[str]:
    """``a.b.c@2``, ``a.b.c``, ``a.b``, ``a``."""
    while name:
        yield name
        number = _NUMBER.search(name)
        name = name[: number.start()] if number else name.rpartition(".")[0]


def unmatched(what: str, wanted: str, known: Iterable[str]) -> RecipeError:
    """The error for ``wanted``. It has the nearest of ``known``, outer names first, or else the outermost names."""
    by_depth = sorted(known, key=lambda name: name.count("."))
    wanted = re.sub(r"[.*]+$", "", wanted.removeprefix("re:"))
    # Near by the whole name, or by its last part: fc to hed.fc, conv1 to layer1.0.conv.
    ends = {name.rpartition(".")[2]: name for name in reversed(by_depth)}
    found = nearest(wanted, by_depth) or [ends[end] for end in nearest(wanted.rpartition(".")[2], ends)]
    if found:
        return RecipeError(f"{what} matches nothing in the model; the nearest names are {listed(found)}")
    outermost = [name for name in by_depth if "." not in name]
    return RecipeError(f"{what} matches nothing in the model; its outermost names are {shortened(outermost)}")


def shortened(names: list[str], most: int = 12) -> str:
    """``"a, b, ..., z"``: the first and the last, if there are more than ``most``."""
    return ", ".join(names if len(names) <= most else [*names[: most // 2], "...", *names[-most // 2 :]])
