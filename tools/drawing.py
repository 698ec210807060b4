"""The look of the tools' figures, and the files they become."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    *("BLACK", "BLUE", "GREEN", "GREY", "ORANGE", "PALETTE", "PINK", "SKY", "STYLE", "VERMILION"),
    *("label_ends", "saved", "subplots"),
]

# Okabe and Ito's colours, which every eye tells apart.
BLACK, BLUE, VERMILION, GREEN = "#000000", "#0072B2", "#D55E00", "#009E73"
PINK, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
PALETTE = (BLACK, BLUE, VERMILION, GREEN, PINK, ORANGE, SKY)
GREY = "#767676"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#ececec",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 150,
    "svg.hashsalt": "swalp_fx",  # the same results give the same file
}
LABEL_GAP = 10.5  # points between the baselines of two labels, at a font of 8


def saved(figure: Figure, kind: str) -> bytes:
    """The file of this kind, such as ``svg``; equal figures give equal files, without a date in them."""
    drawn = io.BytesIO()
    with pyplot.rc_context(STYLE):
        figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return drawn.getvalue()


def subplots(columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A row of axes; width and height in inches."""
    figure, axes = pyplot.subplots(1, columns, figsize=(width, height), squeeze=False, **options)
    return figure, list(axes[0])


def label_ends(axes: Axes, labels: Mapping[str, tuple[float, float, str]], right: float = 4) -> None:
    """Write each label (text -> x, y, colour) beside its point, moved up or down until none covers another.

    right: points between a point and its label. Call it last: where labels come to lie depends on the axes' limits.
    """
    axes.figure.draw_without_rendering()  # the layout is settled, so that points on the page are known
    points = 72 / axes.figure.dpi
    at = {text: axes.transData.transform((x, y))[1] * points for text, (x, y, _) in labels.items()}
    for text, height in _spread(at, LABEL_GAP).items():
        x, y, color = labels[text]
        axes.annotate(
            text,
            (x, y),
            (right, height - at[text]),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=8,
            annotation_clip=False,
        )


def _spread(at: Mapping[str, float], gap: float) -> dict[str, float]:
    """The heights, moved as little as possible so that any two are ``gap`` apart, in the same order."""
    groups: list[tuple[list[str], float]] = []  # (names from below, their middle), each group evenly spaced
    for name in sorted(at, key=lambda name: at[name]):
        groups.append(([name], at[name]))
        while len(groups) > 1 and _bottom(groups[-1], gap) - _top(groups[-2], gap) < gap:
            (below, low), (above, high) = groups[-2:]
            names = below + above
            # The middle of the heights that each label of the group would take by itself.
            groups[-2:] = [(names, (len(below) * low + len(above) * high) / len(names))]
    return {name: _bottom(group, gap) + gap * place for group in groups for place, name in enumerate(group[0])}


def _bottom(group: tuple[list[str], float], gap: float) -> float:
    return group[1] - gap * (len(group[0]) - 1) / 2


def _top(group: tuple[list[str], float], gap: float) -> float:
    return group[1] + gap * (len(group[0]) - 1) / 2
