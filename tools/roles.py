"""The role that breaks first: one role at a time in low precision, the others in float, in formats of every family."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from tabulate import tabulate

import data
import drawing
import swalp_fx
from drawing import VERMILION
from progress import bar
from stacked import LOST, Training, scores, summary
from swalp_fx.recipe import ROLES

ALL = "all"
COLUMNS = (ALL, *ROLES)
FORMATS = (
    *("fixed8.6", "fixed8.4", "bfp4", "bfp4[0]", "bfp3[0]", "int4[0]"),
    *("e4m3", "e5m2", "e3m2", "e2m1", "mxfp4", "nvfp4"),
)
# A role breaks if it costs more than so many standard errors, of its own and of float's, and than half a point.
SURE, COST = 3.0, 0.5


@dataclass(frozen=True)
class Settings(Training):
    seeds: int = 8
    epochs: int = 12
    average_from: int = 6
    formats: tuple[str, ...] = FORMATS


FULL = Settings(seeds=32, epochs=20, average_from=8)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        dest="formats",
        metavar="SPEC",
        action="append",
        help=f"repeatable, instead of {', '.join(FORMATS)}",
    )


def run(settings: Settings) -> dict[str, Any]:
    """``float``, and for each of ``formats`` the column ``all`` and one for each role: summaries of scores.

    Raises FormatError, before any training, for a spec that names no format.
    """
    formats = [str(swalp_fx.parse(spec)) for spec in settings.formats]
    dataset = data.load("digits")
    recipes = {spec: {role: spec if role == ALL else f"{role}={spec}" for role in COLUMNS} for spec in formats}
    runs = 1 + len(formats) * len(COLUMNS)
    total = runs * settings.epochs * settings.steps(dataset)
    with bar("formats", total) as progress:

        def of(recipe: str) -> dict[str, Any]:
            return summary(scores(recipe, settings, dataset, progress.update))

        exact = of("float")
        lines = {spec: {role: of(text) for role, text in each.items()} for spec, each in recipes.items()}
    return {"float": exact, "formats": lines, "breaks first": {k: breaks_first(v, exact) for k, v in lines.items()}}


def breaks_first(columns: Mapping[str, Any], exact: Mapping[str, Any]) -> str | None:
    """The role that, alone in low precision, has the largest error while averaging; None if none breaks."""

    def breaks(role: str) -> bool:
        cost = columns[role]["mean"]["mean"] - exact["mean"]["mean"]
        errors = (each["standard error"]["mean"] for each in (columns[role], exact))
        return cost > max(COST, SURE * sum(error**2 for error in errors) ** 0.5)

    return max(filter(breaks, ROLES), key=lambda role: columns[role]["mean"]["mean"], default=None)


# Score -> its name in tables and figures.
SHOWN = {"mean": "SGD-LP, mean over averaged epochs", "average": "SWALP"}


def table(record: dict[str, Any]) -> str:
    seeds, parts = record["settings"]["seeds"], []
    for score, title in SHOWN.items():
        lines = record["formats"].items()
        rows = [["float", _cell(record["float"], score)]]
        rows += [[spec, *(_cell(columns[role], score) for role in COLUMNS)] for spec, columns in lines]
        headers = ["format", *COLUMNS]
        if score == "mean":
            headers.append("breaks first")
            rows = [rows[0], *([*row, record["breaks first"][row[0]] or "none"] for row in rows[1:])]
        text = tabulate(rows, headers=headers, disable_numparse=True)
        parts.append(f"{title}: test error in %, {seeds} seeds ± standard error\n\n{text}")
    return "\n\n".join(parts)


def _cell(of: Mapping[str, Any], score: str) -> str:
    if of["mean"][score] > LOST:
        return "does not train" if score == "mean" else f"{of['mean'][score]:.1f}"
    return f"{of['mean'][score]:.2f} ± {of['standard error'][score]:.2f}"


ERRORS = LinearSegmentedColormap.from_list("errors", ["#ffffff", "#fddfc8", "#f2a676", VERMILION, "#7a2f00"])


def figures(record: dict[str, Any]) -> dict[str, Figure]:
    height = 1.2 + 0.26 * len(record["formats"])
    figure, panels = drawing.subplots(len(SHOWN), 8.6, height, sharey=True)
    for axes, (score, title) in zip(panels, SHOWN.items(), strict=True):
        _heat(axes, record, score)
        axes.set_title(f"{title} (float {record['float']['mean'][score]:.1f})", loc="left")
    return {"formats": figure}


def _heat(axes: Axes, record: dict[str, Any], score: str) -> None:
    lines, exact = record["formats"], record["float"]["mean"][score]
    errors = np.array([[columns[role]["mean"][score] for role in COLUMNS] for columns in lines.values()])
    norm = LogNorm(min(max(exact, 1.0), LOST), 60, clip=True)  # float is white
    axes.imshow(errors, cmap=ERRORS, norm=norm, aspect="auto")
    first = list(record["breaks first"].values())
    for (row, column), error in np.ndenumerate(errors):
        axes.text(
            column,
            row,
            "lost" if error > LOST else f"{error:.1f}",
            ha="center",
            va="center",
            fontsize=8,
            fontweight="bold" if score == "mean" and COLUMNS[column] == first[row] else "normal",
            color="white" if norm(error) > 0.6 else "black",
        )
    axes.set_xticks(range(len(COLUMNS)), COLUMNS)
    axes.set_yticks(range(len(errors)), list(lines))
    axes.axvline(0.5, color="white", linewidth=4)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("role in this format" + (" (bold: breaks first)" if score == "mean" else ""))
