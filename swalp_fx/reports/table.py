"""Tables and paragraphs, at most WIDTH columns wide."""

from __future__ import annotations

import re
import textwrap

from tabulate import tabulate

__all__ = ["WIDTH", "escaped", "markdown", "paragraph", "table"]

WIDTH = 100
NARROW = 20  # the other columns are narrowed to this width before the first column is narrowed
_MARKS = re.compile(r"[\\`*<&|]|\b_|_\b")  # Markdown leaves an underscore within a word alone
GAP = 2  # columns between two cells; tabulate leaves as many beside a header


def table(header: list[str], rows: list[list[str]], *, numbers: int) -> str:
    """``rows`` under ``header``; the last ``numbers`` columns are flush right.

    If the rows are wider than WIDTH, the widest columns are narrowed, the first one last. A cell that is too long goes
    on in the next line, indented. It breaks after a comma of a list, or before a dot of a name.
    """
    widths = [max([len(title) + GAP, *map(len, column)]) for title, *column in zip(header, *rows, strict=True)]
    while sum(widths) + GAP * (len(widths) - 1) > WIDTH:
        wide = widths[1:] if max(widths[1:]) > NARROW else widths
        widths[widths.index(max(wide), len(widths) - len(wide))] -= 1
    cells = [[_broken(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    alignment = ["left"] * (len(header) - numbers) + ["right"] * numbers
    return tabulate(cells, header, colalign=alignment, disable_numparse=True)


def markdown(header: list[str], rows: list[list[str]], *, numbers: int) -> str:
    """The same as a table of Markdown, of any width."""
    cells = [[escaped(cell) for cell in row] for row in rows]
    alignment = ["left"] * (len(header) - numbers) + ["right"] * numbers
    return tabulate(cells, header, "pipe", colalign=alignment, disable_numparse=True)


def escaped(text: str) -> str:
    """``text`` escaped for Markdown: ``layers.*.relu@*`` keeps its stars, and ``<b>`` is no tag."""
    return _MARKS.sub(r"\\\g<0>", text)


def _broken(cell: str, width: int) -> str:
    if len(cell) <= width:
        return cell
    wrapper = textwrap.TextWrapper(width, subsequent_indent="  ", break_on_hyphens=False)
    breaks = r"(?<=, )|(?<=/)" if ", " in cell else r"(?=\.)" if "." in cell else r"(?=_)"
    wrapper.wordsep_simple_re = re.compile(breaks)
    return "\n".join(wrapper.wrap(cell))


def paragraph(text: str, indent: int) -> str:
    """``text`` in lines of at most WIDTH columns; all lines after the first are indented."""
    return textwrap.fill(text, WIDTH, subsequent_indent=" " * indent, break_on_hyphens=False)
