"""SGD-LP, its average SWALP, and both in float: a network on digits from many seeds, 8 to 4 bits in every role."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

import data
import drawing
from drawing import BLACK, BLUE, GREY, VERMILION
from progress import bar
from stacked import LOST, Training, scores, summary

# Name of a block layout -> the recipe of N bits. In the authors' code, activations and errors share one a tensor.
LAYOUTS = {
    "tensor": "bfp{0}",
    "row": "bfp{0}[0]",
    "as the authors' code": "bfp{0}[0] A=bfp{0} E=bfp{0}",
}


@dataclass(frozen=True)
class Settings(Training):
    bits: tuple[int, ...] = (8, 6, 5, 4)


FULL = Settings(seeds=64)


def options(parser: argparse.ArgumentParser) -> None:
    pass


def run(settings: Settings) -> dict[str, Any]:
    """``lines``: recipe, bits and layout, and of each score its ``errors`` by seed; the first is float."""
    dataset = data.load("digits")
    lines = [{"recipe": "float", "bits": None, "layout": None}]
    lines += [
        {"recipe": text.format(bits), "bits": bits, "layout": layout}
        for layout, text in LAYOUTS.items()
        for bits in settings.bits
    ]
    steps = settings.epochs * settings.steps(dataset)
    with bar("ordering", len(lines) * steps) as progress:
        return {"lines": [line | summary(scores(line["recipe"], settings, dataset, progress.update)) for line in lines]}


COLUMNS = {
    "warm-up": "SGD-LP (end of warm-up)",
    "last": "last weights",
    "mean": "mean over averaged epochs",
    "average": "SWALP",
    "gain": "gain over that mean",
}


def table(record: dict[str, Any]) -> str:
    seeds = record["settings"]["seeds"]
    rows = [[line["recipe"], *_cells(line), f"{line['won']} of {seeds}"] for line in record["lines"]]
    return f"test error in %, mean over {seeds} seeds ± standard error\n\n" + tabulate(
        rows,
        headers=["recipe", *COLUMNS.values(), "seeds won"],
        disable_numparse=True,
        colalign=("left", *["right"] * 6),
    )


def _cells(line: dict[str, Any]) -> list[str]:
    cells = [f"{line['mean'][name]:.2f} ± {line['standard error'][name]:.2f}" for name in COLUMNS]
    return cells if line["mean"]["mean"] < LOST else [*cells[:-1], "does not train"]


# Score -> its name in a figure, colour and line.
DRAWN = {
    "mean": ("SGD-LP while averaging (mean)", VERMILION, "--"),
    "warm-up": ("SGD-LP, end of warm-up", VERMILION, "-"),
    "average": ("SWALP", BLUE, "-"),
}
FLOAT = {"warm-up": ("SGD-FP", GREY), "average": ("SWA-FP", BLACK)}


def figures(record: dict[str, Any]) -> dict[str, Figure]:
    exact, *low = record["lines"]
    figure, panels = drawing.subplots(len(LAYOUTS), 9.6, 3.4, sharey=True)
    bits = record["settings"]["bits"]
    for axes, layout in zip(panels, LAYOUTS, strict=True):
        lines = [line for line in low if line["layout"] == layout]
        _panel(axes, lines, exact)
        axes.set_xticks(range(len(bits)), [str(each) for each in bits])
        axes.set_xlim(-0.2, len(bits) - 0.8)
        axes.set_xlabel("bits of every role")
        axes.set_title(layout if "code" in layout else f"one exponent a {layout}", loc="left")
    panels[0].set_ylabel("test error, %")
    end = len(bits) - 1
    labels = {title: (end, lines[-1]["mean"][score], color) for score, (title, color, _) in DRAWN.items()}
    labels |= {title: (end, exact["mean"][score], color) for score, (title, color) in FLOAT.items()}
    drawing.label_ends(panels[-1], labels, right=10)
    return {"ordering": figure}


def _panel(axes: Axes, lines: list[dict[str, Any]], exact: dict[str, Any]) -> None:
    for score, (_, color) in FLOAT.items():
        axes.axhline(exact["mean"][score], color=color, linewidth=1, linestyle=":")
    for score, (_, color, style) in DRAWN.items():
        means, errors = ([line[key][score] for line in lines] for key in ("mean", "standard error"))
        axes.errorbar(range(len(lines)), means, errors, color=color, linestyle=style, marker="o", capsize=2)
