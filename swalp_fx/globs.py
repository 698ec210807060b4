"""Names that differ only in their numbers, folded into globs: ``layers.*.relu@* (16)``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

__all__ = ["folded", "folded_rows", "in_room"]


def in_room(names: Iterable[str], among: Collection[str], room: int) -> str:
    """``names`` with commas between them, folded if they take more than ``room`` columns."""
    names = tuple(names)
    full = ", ".join(names)
    return full if len(full) <= room else ", ".join(folded(names, among))


def folded(names: Iterable[str], among: Collection[str]) -> list[str]:
    """Names that differ only in their numbers as one glob, with their count: ``layer*.*.relu@* (16)``.

    among: all names. If the glob matches more of them, the count is ``(2 of 16)``.
    """
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        alike.setdefault(_unnumbered(name), []).append(name)
    return [_glob(each, among) for each in alike.values()]


def folded_rows(rows: list[list[str]]) -> list[list[str]]:
    """``rows`` with the rows of equal blocks folded into the first of them.

    Such rows differ only in numbers before the last dot of the name, which is the first cell.
    """
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        around, _, last = name.rpartition(".")
        alike.setdefault((_unnumbered(around), last, *cells), []).append(name)
    every = [name for name, *_ in rows]
    return [[_glob(names, every), *cells] for (_, _, *cells), names in alike.items()]


def _unnumbered(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _glob(alike: list[str], among: Collection[str]) -> str:
    if len(alike) == 1:
        return alike[0]
    pieces = zip(*(re.split(r"(\d+)", name) for name in alike), strict=True)
    glob = "".join(here[0] if len(set(here)) == 1 else "*" for here in pieces)
    matched = sum(fnmatchcase(name, glob) for name in set(among))
    return f"{glob} ({len(alike)})" if matched <= len(alike) else f"{glob} ({len(alike)} of {matched})"
