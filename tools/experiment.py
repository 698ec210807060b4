"""What the commands that reproduce the paper share: options, ``results.json``, and the look of the figures.

An experiment is a module with

    Settings                 a frozen dataclass of all that decides its result, ``seed`` among them
    FULL                     the settings of ``--full``; the defaults are ``Settings()``
    options(parser)          adds options of its own, named as the settings are
    run(settings) -> record  a dict that JSON holds, after a progress bar
    table(record) -> text    what the command prints
    figures(record)          file name -> figure
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import data
import swalp_fx
from benchmark import machine

__all__ = ["BLACK", "BLUE", "GREEN", "GREY", "ORANGE", "VERMILION", "label_ends", "main", "subplots"]

# What a bad command line, or one that does not fit its data, raises.
INPUT_ERRORS = (data.DataError, swalp_fx.FormatError, swalp_fx.RecipeError)

# Okabe and Ito's colours, which every eye tells apart.
BLACK, BLUE, VERMILION, GREEN, ORANGE = "#000000", "#0072B2", "#D55E00", "#009E73", "#E69F00"
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


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(prog: str, about: str, experiments: Mapping[str, ModuleType], argv: Sequence[str] | None) -> dict[str, Any]:
    """Run the experiment that the command line names: its record, after its table is printed and its files written."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="experiment", required=True, metavar=" | ".join(experiments))
    for name, module in experiments.items():
        _add_options(commands.add_parser(name, help=_first_line(module), description=_first_line(module)), module)
    args = parser.parse_args(words)
    module = experiments[args.experiment]
    torch.set_num_threads(1)  # the tensors are small; and one thread gives every machine the same sums
    if args.out:
        _make_writable(args.out, parser)
    settings = _settings(module, args)
    try:
        found = module.run(settings)
    except INPUT_ERRORS as error:
        parser.error(f"{args.experiment}: {error}")
    command = shlex.join(["python", f"tools/{prog}", *words])
    record = {"command": command, "environment": environment(), "settings": asdict(settings), **found}
    print(module.table(record))
    if args.out:
        try:
            write(args.out, record, module)
        except OSError as error:
            parser.error(_unwritable(args.out, error))
    return record


def _make_writable(folder: Path, parser: Parser) -> None:
    """Before the minutes of a run, which a folder that cannot be written would lose."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        parser.error(_unwritable(folder, error))


def _unwritable(folder: Path, error: OSError) -> str:
    return f"--out {folder} cannot be written ({error.strerror}); name another folder"


def _first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


def _add_options(parser: argparse.ArgumentParser, module: ModuleType) -> None:
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, help="write results.json, and each figure as SVG and PNG")
    add("--seed", type=_seed, help="of data, weights, data order and rounding (default: 0)")
    add("--full", action="store_true", help="longer, with more copies: some minutes")
    module.options(parser)


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 2^63 - 1")
    return int(text)


def _settings(module: ModuleType, args: argparse.Namespace) -> Any:
    base = module.FULL if args.full else module.Settings()
    given = {name: value for name in asdict(base) if (value := getattr(args, name, None)) is not None}
    return replace(base, **given)


def environment() -> dict[str, Any]:
    """What a figure has to say of where and when it was made."""
    return {
        "swalp_fx": swalp_fx.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": machine("cpu"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "date": date.today().isoformat(),
    }


def write(folder: Path, record: Mapping[str, Any], module: ModuleType) -> None:
    """``results.json`` with the table in it, and each figure as SVG and PNG, in ``folder``."""
    content = json.dumps({**record, "table": module.table(record)}, indent=1, allow_nan=False)
    (folder / "results.json").write_text(content + "\n")
    try:
        with pyplot.rc_context(STYLE):
            for name, figure in module.figures(record).items():
                # Without a date in it, equal results give equal files.
                figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
                figure.savefig(folder / f"{name}.png")
    finally:
        pyplot.close("all")


# Figures


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
    """The heights, moved as little as keeps every two of them ``gap`` apart, in the order they had."""
    groups: list[tuple[list[str], float]] = []  # (names from below, their middle), each group evenly spaced
    for name in sorted(at, key=lambda name: at[name]):
        groups.append(([name], at[name]))
        while len(groups) > 1 and _bottom(groups[-1], gap) - _top(groups[-2], gap) < gap:
            (below, low), (above, high) = groups[-2:]
            names = below + above
            # The middle of what each would like, had it its place in the group to itself.
            groups[-2:] = [(names, (len(below) * low + len(above) * high) / len(names))]
    return {name: _bottom(group, gap) + gap * place for group in groups for place, name in enumerate(group[0])}


def _bottom(group: tuple[list[str], float], gap: float) -> float:
    return group[1] - gap * (len(group[0]) - 1) / 2


def _top(group: tuple[list[str], float], gap: float) -> float:
    return group[1] + gap * (len(group[0]) - 1) / 2
