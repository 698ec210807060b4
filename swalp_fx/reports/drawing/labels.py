"""Labels, in Graphviz' HTML: layers, quantize nodes, boxes, titles and the legend."""

from __future__ import annotations

import html
import textwrap

from ...formats import FLOAT
from .kinds import Box, Kind
from .marks import names, seen_from

__all__ = ["box", "chips", "folded", "legend", "moved", "port", "text", "title"]

# Fill of a role's nodes: three of Okabe and Ito's colours, lightened; colour-blind readers can tell them apart.
FILLS = {"W": "#9fd3f2", "A": "#f7cd76", "E": "#e8b7d0"}
FLOAT_FILL = "#ffffff"
ROUNDED_EDGE, FLOAT_EDGE = "#c98500", "#8c8c8c"
INK, QUIET = "#222222", "#767676"
FOLD_FILL = "#e4e4e4"

# (fill or ink, sign, meaning)
LEGEND = (
    (FILLS["W"], "W", "a parameter, rounded where it is read"),
    (FILLS["A"], "A ↓", "a layer's output, rounded on its way forward"),
    (FILLS["E"], "E ↑", "its error signal, rounded on its way back"),
    (ROUNDED_EDGE, "━━━", "rounded numbers"),
    (FLOAT_EDGE, "╍╍╍", "numbers in float"),
)
FOLDED = ((FOLD_FILL, "①", "a block, drawn once, in the frame of its number"),)
NUMBERS = "①②③④⑤⑥⑦⑧⑨⑩"  # every font has these
LINE = 60  # characters in a line of names
TIMES = "\N{MULTIPLICATION SIGN}"


def box(operation: str, name: str) -> str:
    """A layer: its operation, and below it its name."""
    return (
        f'<table border="1" cellborder="0" cellpadding="4" style="rounded" color="{INK}" bgcolor="white">'
        f"<tr><td><b>{text(operation)}</b>{_below(name if name != operation else '')}</td></tr></table>"
    )


def chips(values: list[tuple[str, str, str]]) -> str:
    """A table of (role, text, spec), two in a row; a role in float is white."""
    cells = []
    for role, shown, spec in values:
        fill = FLOAT_FILL if spec == str(FLOAT) else FILLS[role]
        cells.append(f'<td bgcolor="{fill}"><font point-size="9">{text(shown)}</font></td>')
    rows = "".join(f"<tr>{''.join(cells[i : i + 2])}</tr>" for i in range(0, len(cells), 2))
    return f'<table border="0" cellborder="1" cellspacing="0" cellpadding="3" color="#999999">{rows}</table>'


def port(name: str) -> str:
    """An input or an output."""
    return f"<i>{text(name)}</i>"


def moved(operation: str) -> str:
    """A movement: an operation that makes no new numbers."""
    return f'<font color="{QUIET}">{text(operation)}</font>'


def folded(calls: Box, path: str) -> str:
    """A box for calls of one kind, as seen from the module at ``path``."""
    times = f" {TIMES} {len(calls.calls)}" if len(calls.calls) > 1 else ""
    seen = [seen_from(path, name) for name in names(calls.calls)]
    name = ", ".join(seen)
    if len(name) > LINE:
        name = f"{seen[0]}, …, {seen[-1]}"
    below = _below(", ".join(filter(None, [name, calls.arrangement])))
    return (
        f'<table border="1" cellborder="0" cellpadding="4" style="rounded" color="{INK}" bgcolor="{FOLD_FILL}">'
        f"<tr><td><b>{_heading(calls.kind)}{times}</b>{below}</td></tr></table>"
    )


def _heading(kind: Kind) -> str:
    number = NUMBERS[kind.number - 1] if 0 < kind.number <= len(NUMBERS) else f"({kind.number})"
    return f"{number if kind.number else ''} {text(kind.shown.type)}".strip()


def title(kind: Kind) -> str:
    """The title of a panel: its kind, and in at most two lines the places of its calls in the model."""
    count = f"{len(kind.calls)} alike: " if len(kind.calls) > 1 else ""
    lines = textwrap.wrap(count + ", ".join(names(kind.calls)), LINE, max_lines=2, placeholder=" …")
    below = "".join(f'<br align="left"/>{text(line)}' for line in lines)
    small = f'<font point-size="8" color="{QUIET}">{below}<br align="left"/></font>'
    return f'<font color="{INK}"><b>{_heading(kind)}</b></font>{small}'


def _below(name: str) -> str:
    return f'<br/><font point-size="8" color="{QUIET}">{text(name)}</font>' if name else ""


def legend(signs: tuple[tuple[str, str, str], ...]) -> str:
    rows = ""
    for color, sign, meaning in signs:
        is_line = color in (ROUNDED_EDGE, FLOAT_EDGE)
        cell = f'<font color="{color}">{sign}</font>' if is_line else sign
        fill = "" if is_line else f' bgcolor="{color}" border="1" color="#999999"'
        rows += f'<tr><td{fill}>{cell}</td><td align="left">{text(meaning)}</td></tr>'
    return f'  legend [fontsize=9, label=<<table border="0" cellspacing="3" cellpadding="2">{rows}</table>>]'


def text(value: object) -> str:
    return html.escape(str(value))
