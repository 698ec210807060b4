"""The common part of the commands that reproduce the paper: options, ``results.json``, and figures.

An experiment is a module with

    Settings                 a frozen dataclass of all that decides its result, ``seed`` among them
    FULL                     the settings of ``--full``; the defaults are ``Settings()``
    options(parser)          adds options of its own, named as the settings are
    run(settings) -> record  a dict that JSON holds, after a progress bar
    table(record) -> text    the output of the command
    figures(record)          file name -> figure
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from matplotlib import pyplot

import data
import drawing
import files
import swalp_fx
from command import SEED, CommandLine, show
from environment import environment

__all__ = ["main"]

# The errors of a bad command line, or of one that does not fit its data.
INPUT_ERRORS = (data.DataError, files.FileError, swalp_fx.FormatError, swalp_fx.RecipeError)
RESULTS = "results.json"


def main(prog: str, about: str, experiments: Mapping[str, ModuleType], argv: Sequence[str] | None) -> dict[str, Any]:
    """Run the experiment that the command line names: its record, after its table is printed and its files written."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = CommandLine(prog=prog, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="experiment", required=True, metavar=" | ".join(experiments))
    for name, module in experiments.items():
        _add_options(commands.add_parser(name, help=_first_line(module), description=_first_line(module)), module)
    args = parser.parse_args(words)
    module = experiments[args.experiment]
    torch.set_num_threads(1)  # the tensors are small; and one thread gives every machine the same sums
    settings = _settings(module, args)
    try:
        if args.out:  # before the minutes of a run
            files.make_folder(args.out)
            files.refuse_unwritable(args.out / RESULTS)
        found = module.run(settings)
        command = shlex.join(["python", f"tools/{prog}", *words])
        record = {"command": command, "environment": environment(), "settings": asdict(settings), **found}
        show(module.table(record))
        if args.out:
            write(args.out, record, module)
    except INPUT_ERRORS as error:
        parser.refuse(error)
    return record


def _first_line(module: ModuleType) -> str:
    return (module.__doc__ or "").partition("\n")[0]


def _add_options(parser: argparse.ArgumentParser, module: ModuleType) -> None:
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, help="write results.json, and each figure as SVG and PNG")
    add("--seed", type=SEED, help="of data, weights, data order and rounding (default: 0)")
    add("--full", action="store_true", help="longer, with more copies: some minutes")
    module.options(parser)


def _settings(module: ModuleType, args: argparse.Namespace) -> Any:
    base = module.FULL if args.full else module.Settings()
    given = {name: value for name in asdict(base) if (value := getattr(args, name, None)) is not None}
    return replace(base, **given)


def write(folder: Path, record: Mapping[str, Any], module: ModuleType) -> None:
    """``results.json`` with the table in it, and each figure as SVG and PNG, in ``folder``."""
    files.write_json(folder / RESULTS, {**record, "table": module.table(record)})
    try:
        with pyplot.rc_context(drawing.STYLE):
            drawn = module.figures(record)
        for name, figure in drawn.items():
            for kind in ("svg", "png"):
                files.write(folder / f"{name}.{kind}", drawing.saved(figure, kind))
    finally:
        pyplot.close("all")
