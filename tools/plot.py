"""Draws the curves of a run: python tools/plot.py runs/decoder/results.json --out decoder.svg

Left, the training loss; right, what the data set judges by, after each epoch: the last weights (hollow) and the average
of the weights so far (filled). Any format of matplotlib's, by the file's ending.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import train

# Okabe and Ito's colours, which every eye tells apart; float is black.
COLORS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#767676"
LAST = {"marker": "o", "markersize": 4, "markerfacecolor": "white", "linestyle": "--", "linewidth": 1}
AVERAGE = {"marker": "o", "markersize": 4, "linestyle": "-", "linewidth": 1.8}
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.hashsalt": "swalp_fx",  # the same run gives the same file
}
STEEP = 0.05  # the share of the steps, the first, whose losses may leave the figure


def figure(record: dict[str, Any]) -> Figure:
    """Of a ``results.json``, read."""
    settings, lines = record["settings"], list(record["lines"].values())
    title = train.OPTIMIZERS[settings["optimizer"]].title
    drawn, (losses, scores) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for line, color in zip(lines, itertools.cycle(COLORS)):
        _losses(losses, line, color)
        _scores(scores, line, color)
    steps = list(itertools.accumulate(epoch["steps"] for epoch in lines[0]["epochs"]))
    start = steps[settings["average_from"] - 1]
    for axes in (losses, scores):
        axes.axvspan(start, steps[-1], color="#f2f2f2", zorder=0)
        axes.set_xlim(0, steps[-1] * 1.02)
        axes.set_xlabel(f"step (batches of {settings['batch_size']})")
    shown = [value for line in lines for step, value in _curve(line) if step > STEEP * steps[-1]]
    low, high = min(filter(math.isfinite, shown)), max(filter(math.isfinite, shown))  # a line may have diverged
    losses.set_ylim(low - 0.05 * (high - low), high)
    losses.set_ylabel("training loss, nats" + (" a byte" if "byte" in record["metric"] else ""))
    scores.set_ylabel(record["metric"])
    losses.legend()
    scores.plot([], [], **LAST, color=GREY, label=f"last weights ({title})")
    scores.plot([], [], **AVERAGE, color=GREY, label="average (SWA, SWALP)")
    scores.legend()
    scores.text(start, scores.get_ylim()[0], " averaging", va="bottom", color=GREY, fontsize=8)
    return drawn


def _curve(line: dict[str, Any]) -> list[tuple[float, float]]:
    """(step, mean training loss around it)."""
    points, before = [], 0
    for epoch in line["epochs"]:
        for i, loss in enumerate(epoch["losses"]):
            begin = i * train.LOSSES_EVERY
            end = min(begin + train.LOSSES_EVERY, epoch["steps"])
            points.append((before + (begin + end) / 2, loss))
        before += epoch["steps"]
    return points


def _losses(axes: Axes, line: dict[str, Any], color: str) -> None:
    steps, losses = zip(*_curve(line), strict=True)
    axes.plot(steps, losses, color=color, linewidth=1.1, label=line["recipe"])


def _scores(axes: Axes, line: dict[str, Any], color: str) -> None:
    steps = list(itertools.accumulate(epoch["steps"] for epoch in line["epochs"]))
    last = [epoch["last"] for epoch in line["epochs"]]
    axes.plot(steps, last, **LAST, color=color)
    averaged = [(step, epoch["average"]) for step, epoch in zip(steps, line["epochs"], strict=True) if epoch["average"]]
    axes.plot(*zip(*averaged, strict=True), **AVERAGE, color=color)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="plot.py", description=__doc__.partition("\n")[0])
    parser.add_argument("results", metavar="RESULTS", type=Path, help="the results.json that train.py --out writes")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the figure: .svg, .png, .pdf")
    args = parser.parse_args(argv)
    try:
        record = json.loads(args.results.read_text())
        with pyplot.rc_context(STYLE):
            # Without a date in it, equal runs give equal files.
            metadata = {"Date": None} if args.out.suffix == ".svg" else None
            figure(record).savefig(args.out, dpi=150, metadata=metadata)
    except (OSError, ValueError) as error:
        raise SystemExit(f"plot.py: error: {error}") from None
    except KeyError as error:
        raise SystemExit(f"plot.py: error: {args.results} is no results.json of train.py: it lacks {error}") from None
    finally:
        pyplot.close("all")


if __name__ == "__main__":
    main()
