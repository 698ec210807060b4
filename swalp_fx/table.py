"""Tables, paragraphs and lists of names, at most WIDTH columns wide."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from tabulate import tabulate

__all__ = ["WIDTH", "escaped", "folded", "folded_rows", "listed", "markdown", "paragraph", "table"]

WIDTH = 100
NARROW = 20  # no column but the first gives way below this, before the first does
_MARKS = re.compile(r"[\\`*<&|]|\b_|_\b")  # an underline within a word is one to Markdown too
GAP = 2  # columns between two cells; tabulate leaves as many beside a header


def table(header: list[str], rows: list[list[str]], *, numbers: int) -> str:
    """``rows`` under ``header``; the last ``numbers`` columns are flush right.

    Where the rows are wider than WIDTH, the widest columns are narrowed, the first one last. A cell that is too long
    goes on in the next line, indented: a list behind a comma, a name in front of a dot.
    """
    widths = [max([len(title) + GAP, *map(len, column)]) for title, *column in zip(header, *rows, strict=True)]
    while sum(widths) + GAP * (len(widths) - 1) > WIDTH:
        wide = widths[1:] if max(widths[1:]) > NARROW else widths
        widths[widths.index(max(wide), len(widths) - len(wide))] -= 1
    cells = [[_broken(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    alignment = ["left"] * (len(header) - numbers) + ["right"] * numbers
    return tabulate(cells, header, colalign=alignment, disable_numparse=True)


def markdown(header: list[str], rows: list[list[str]], *, numbers: int) -> str:
    """The same as a table of Markdown, as wide as it is."""
    cells = [[escaped(cell) for cell in row] for row in rows]
    alignment = ["left"] * (len(header) - numbers) + ["right"] * numbers
    return tabulate(cells, header, "pipe", colalign=alignment, disable_numparse=True)


def escaped(text: str) -> str:
    """``text`` that Markdown shows as it is: ``layers.*.relu@*`` keeps its stars, and ``<b>`` is no tag."""
    return _MARKS.sub(r"\\\g<0>", text)


def _broken(cell: str, width: int) -> str:
    if len(cell) <= width:
        return cell
    wrapper = textwrap.TextWrapper(width, subsequent_indent="  ", break_on_hyphens=False)
    breaks = r"(?<=, )|(?<=/)" if ", " in cell else r"(?=\.)" if "." in cell else r"(?=_)"
    wrapper.wordsep_simple_re = re.compile(breaks)
    return "\n".join(wrapper.wrap(cell))


def paragraph(text: str, indent: int) -> str:
    """``text`` in lines of at most WIDTH columns, those after the first indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)


def listed(names: Iterable[str], among: Collection[str], room: int) -> str:
    """``names`` with commas between them, folded if they take more than ``room`` columns."""
    names = tuple(names)
    full = ", ".join(names)
    return full if len(full) <= room else ", ".join(folded(names, among))


def folded(names: Iterable[str], among: Collection[str]) -> list[str]:
    """Names that differ only in their numbers as one glob, with how many they are: ``layer*.*.relu@* (16)``.

    Where the glob matches more of the names ``among`` which these are, it says so: ``(2 of 16)``.
    """
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        alike.setdefault(_unnumbered(name), []).append(name)
    return [_glob(each, among) for each in alike.values()]


def folded_rows(rows: list[list[str]]) -> list[list[str]]:
    """``rows``, those of equal blocks as one, where the first of them stood.

    These differ only in numbers in front of the last dot of the name in their first cell.
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
