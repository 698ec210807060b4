"""Patterns: what a rule, and the globs of a recipe, name in a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from fnmatch import fnmatchcase

from ..nearest import listed, nearest
from .errors import RecipeError

__all__ = ["GLOBS", "Subject", "around", "is_all_of", "is_numbered", "matches", "shortened", "unmatched"]

GLOBS = ("include", "exclude", "whole")  # the fields of a recipe that hold globs

# What a pattern is held against: (qualified name, kinds), kinds being the part and the names of its operation. A tied
# parameter has one subject a name.
Subject = tuple[str, Collection[str]]

_NUMBER = re.compile(r"@\d+$")  # behind a name that several outputs have: which of them


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches all of ``name``, or of the name of a module around it.

    A pattern without ``@`` does not see the number in ``relu@2``: ``relu`` matches, ``*2`` does not.
    """
    names = around(name if "@" in pattern else _NUMBER.sub("", name))
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], each) for each in names)
    return any(fnmatchcase(each, pattern) for each in names)


def is_all_of(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches ``name``, and not only what is around that."""
    return bool(re.fullmatch(pattern[3:], name)) if pattern.startswith("re:") else fnmatchcase(name, pattern)


def is_numbered(name: str) -> bool:
    """Whether it names one of several outputs of one name: ``relu@2``."""
    return _NUMBER.search(name) is not None


def around(name: str) -> Iterator[str]:
    """``a.b.c@2``, ``a.b.c``, ``a.b``, ``a``."""
    while name:
        yield name
        number = _NUMBER.search(name)
        name = name[: number.start()] if number else name.rpartition(".")[0]


def unmatched(what: str, wanted: str, known: Iterable[str]) -> RecipeError:
    """The nearest of ``known``, outer names before inner ones; if none is alike, the outermost there are."""
    by_depth = sorted(known, key=lambda name: name.count("."))
    wanted = re.sub(r"[.*]+$", "", wanted.removeprefix("re:"))
    # fc is near to hed.fc, and conv1 to layer1.0.conv: by the whole name or by its end.
    ends = {name.rpartition(".")[2]: name for name in reversed(by_depth)}
    found = nearest(wanted, by_depth) or [ends[end] for end in nearest(wanted.rpartition(".")[2], ends)]
    if found:
        return RecipeError(f"{what} matches nothing in the model; the nearest names are {listed(found)}")
    outermost = [name for name in by_depth if "." not in name]
    return RecipeError(f"{what} matches nothing in the model; its outermost names are {shortened(outermost)}")


def shortened(names: list[str], most: int = 12) -> str:
    """``"a, b, ..., z"``: the first and the last, if there are more than ``most``."""
    return ", ".join(names if len(names) <= most else [*names[: most // 2], "...", *names[-most // 2 :]])
