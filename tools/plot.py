"""Draws the curves of a run: python tools/plot.py runs/decoder/results.json --out decoder.svg

Left: the training loss. Right: the data set's score after each epoch, of the last weights (hollow) and of the average
of the weights so far (filled). The file's ending picks one of matplotlib's formats.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from command import CommandLine, run

try:
    import drawing
except ImportError as error:
    if __name__ != "__main__":
        raise
    CommandLine(prog="plot.py").refuse(f"matplotlib cannot be imported ({error}); pip install matplotlib")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import files
from drawing import GREY, PALETTE
from line import LOSSES_EVERY
from settings import OPTIMIZERS

LAST = {"marker": "o", "markersize": 4, "markerfacecolor": "white", "linestyle": "--", "linewidth": 1}
AVERAGE = {"marker": "o", "markersize": 4, "linestyle": "-", "linewidth": 1.8}
STEEP = 0.05  # the share of the first steps that may leave the figure


def figure(record: dict[str, Any]) -> Figure:
    """Of a ``results.json``, read."""
    lines = _of_one_seed(record)
    settings = lines[0]["settings"]
    title = OPTIMIZERS[settings["optimizer"]].title
    drawn, (losses, scores) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for line, color in zip(lines, itertools.cycle(PALETTE)):
        _losses(losses, line, color)
        _scores(scores, line, color)
    steps = [0, *itertools.accumulate(epoch["steps"] for epoch in lines[0]["epochs"])]
    start = steps[settings["average_from"]]
    for axes in (losses, scores):
        axes.axvspan(start, steps[-1], color="#f2f2f2", zorder=0)
        axes.set_xlim(0, steps[-1] * 1.02)
        axes.set_xlabel(f"step (batches of {settings['batch_size']})")
    shown = [value for line in lines for step, value in _curve(line) if step > STEEP * steps[-1]]
    if finite := [*filter(math.isfinite, shown)]:  # a line may have diverged, and all of them
        low, high = min(finite), max(finite)
        losses.set_ylim(low - 0.05 * (high - low), high)
    losses.set_ylabel("training loss, nats" + (" a byte" if "byte" in record["metric"] else ""))
    scores.set_ylabel(record["metric"])
    losses.legend()
    scores.plot([], [], **LAST, color=GREY, label=f"last weights ({title})")
    scores.plot([], [], **AVERAGE, color=GREY, label="average (SWA, SWALP)")
    scores.legend()
    scores.text(start, scores.get_ylim()[0], " averaging", va="bottom", color=GREY, fontsize=8)
    return drawn


def _of_one_seed(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The first run of each line."""
    first: dict[str, dict[str, Any]] = {}
    for line in record["lines"].values():
        first.setdefault(line["line"], line)
    return list(first.values())


def _curve(line: dict[str, Any]) -> list[tuple[float, float]]:
    """(step, mean training loss around it)."""
    points, before = [], 0
    for epoch in line["epochs"]:
        for i, loss in enumerate(epoch["losses"]):
            begin = i * LOSSES_EVERY
            end = min(begin + LOSSES_EVERY, epoch["steps"])
            points.append((before + (begin + end) / 2, loss))
        before += epoch["steps"]
    return points


def _losses(axes: Axes, line: dict[str, Any], color: str) -> None:
    steps, losses = zip(*_curve(line), strict=True)
    axes.plot(steps, losses, color=color, linewidth=1.1, label=line["recipe"])


def _scores(axes: Axes, line: dict[str, Any], color: str) -> None:
    steps = list(itertools.accumulate(epoch["steps"] for epoch in line["epochs"]))
    for score, style in (("last", LAST), ("average", AVERAGE)):
        there = [(step, e[score]) for step, e in zip(steps, line["epochs"], strict=True) if e[score] is not None]
        axes.plot([step for step, _ in there], [value for _, value in there], **style, color=color)


def read(path: Path) -> dict[str, Any]:
    """The record that train.py wrote to ``path``; raises FileError if it is unreadable, cut short or something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise files.FileError(f"{path} cannot be read: {error.strerror}; name a results.json of train.py") from None
    except ValueError as error:
        raise files.FileError(f"{path} is no JSON, or cut short ({error}); name a results.json of train.py") from None
    try:
        whole = isinstance(record["metric"], str) and record["lines"] and all(map(_is_whole, record["lines"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        lacks = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise files.FileError(f"{path} is no results.json of train.py: {lacks}; name one") from None
    if not whole:
        raise files.FileError(f"{path} is not as train.py writes it; make it again with train.py --out")
    return record


def _is_whole(line: dict[str, Any]) -> bool:
    settings = line["settings"]
    return (
        isinstance(line["recipe"], str)
        and isinstance(line["line"], str)
        and settings["optimizer"] in OPTIMIZERS
        and 0 <= settings["average_from"] <= settings["epochs"] == len(line["epochs"])
        and settings["batch_size"] > 0
        and all(
            len(epoch["losses"]) == math.ceil(epoch["steps"] / LOSSES_EVERY) > 0
            and all(isinstance(number, float | int) for number in epoch["losses"])
            and all(isinstance(epoch[score], float | int | None) for score in ("last", "average"))
            for epoch in line["epochs"]
        )
        and line["epochs"][-1]["last"] is not None
    )


def main(argv: Sequence[str] | None = None) -> None:
    draw("plot.py", __doc__, figure, argv)


def draw(prog: str, about: str, figure: Callable[[dict[str, Any]], Figure], argv: Sequence[str] | None) -> None:
    """The command ``prog``: the ``figure`` of a run's record, from its results.json into a file."""
    parser = CommandLine(prog=prog, description=about.partition("\n")[0])
    parser.add_argument("results", metavar="RESULTS", type=Path, help="the results.json that train.py --out writes")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the figure: .svg, .png, .pdf")
    args = parser.parse_args(argv)
    known, ending = pyplot.figure().canvas.get_supported_filetypes(), args.out.suffix[1:]
    pyplot.close()
    if ending not in known:
        parser.refuse(
            f"--out {args.out}: its name must end in one of {', '.join(f'.{each}' for each in sorted(known))}"
        )
    try:
        record = read(args.results)
        with pyplot.rc_context(drawing.STYLE):
            drawn = figure(record)
        files.write(args.out, drawing.saved(drawn, ending))
    except files.FileError as error:
        parser.refuse(error)
    finally:
        pyplot.close("all")


if __name__ == "__main__":
    run(main)
