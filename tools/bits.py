"""Draws error against bits: python tools/bits.py runs/fashion-mnist/results.json --out fashion-mnist.svg

It reads a run of train.py with lines named MODEL-float and MODEL-BITS-LAYOUT, as in tools/configs/fashion-mnist.toml.
A panel a model, on one axis of error: SGD-LP at the end of the warm-up and SWALP for each layout, the mean over seeds
and its deviation.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

import drawing
import files
import plot
from command import run
from drawing import BLACK, BLUE, GREY, VERMILION

NAME = re.compile(r"(\w+)-(?:float|(\d+)-(\w+))")
SCORES = {"warm_up": ("SGD-LP, end of warm-up", VERMILION), "average": ("SWALP", BLUE)}
LEVELS = {"warm_up": ("SGD-FP", GREY), "average": ("SWA-FP", BLACK)}
STYLES = ("-", "--", ":")
ERRORS = (1, 2, 3, 5, 10, 15, 20, 30, 50, 90)  # marked on the axis that the panels share


def by_model(record: dict[str, Any]) -> dict[str, dict[tuple[str, str], list[dict[str, Any]]]]:
    """Model -> (layout, bits), or ("", "") for float -> its runs; raises FileError for lines of other names."""
    found: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in record["lines"].values():
        match = NAME.fullmatch(line["line"])
        if match is None:
            kinds = "MODEL-float or MODEL-BITS-LAYOUT"
            raise files.FileError(f"line {line['line']!r} is not called {kinds}; name another run")
        model, bits, layout = match.groups(default="")
        found[model][layout, bits].append(line)
    return found


def figure(record: dict[str, Any]) -> Figure:
    models = by_model(record)
    drawn, panels = drawing.subplots(len(models), 2.6 * len(models) + 2.4, 3.4, sharey=True)
    for axes, (model, runs) in zip(panels, models.items(), strict=True):
        _panel(axes, runs)
        axes.set_title(model, loc="left")
    panels[0].set_ylabel(record["metric"])
    panels[0].set_yscale("log")  # lines are a point apart if a network trains, and far apart if not
    panels[0].yaxis.set(
        major_locator=FixedLocator(ERRORS), major_formatter=ScalarFormatter(), minor_locator=NullLocator()
    )
    panels[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return drawn


def _panel(axes: Axes, runs: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    bits = sorted({int(bits) for _, bits in runs if bits}, reverse=True)
    for score, (title, color) in LEVELS.items():
        if ("", "") in runs:
            axes.axhline(_mean(runs["", ""], score)[0], color=color, linewidth=1, linestyle=":", label=title)
    layouts = dict.fromkeys(layout for layout, _ in runs if layout)
    for style, layout in zip(STYLES, layouts, strict=False):
        for score, (title, color) in SCORES.items():
            there = [(i, _mean(runs[layout, str(n)], score)) for i, n in enumerate(bits) if (layout, str(n)) in runs]
            places = [i for i, _ in there]
            means, spread = zip(*(each for _, each in there), strict=True)
            label = f"{title}, by {layout}"
            axes.errorbar(places, means, spread, color=color, linestyle=style, marker="o", capsize=2, label=label)
    axes.set_xticks(range(len(bits)), [str(each) for each in bits])
    axes.set_xlabel("bits of every role")


def _mean(runs: list[dict[str, Any]], score: str) -> tuple[float, float]:
    """The mean, and the deviation over seeds."""
    values = [line[score] for line in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def main(argv: Sequence[str] | None = None) -> None:
    plot.draw("bits.py", __doc__, figure, argv)


if __name__ == "__main__":
    run(main)
