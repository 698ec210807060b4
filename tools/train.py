"""Trains one network in float and in low-precision recipes, and prints the gain of averaging.

    python tools/train.py --dataset fashion-mnist --model convnet --recipe "bfp8[0]" --epochs 12 --seed 0
    python tools/train.py --dataset stdlib --recipe "bfp8[0] M=float" --recipe mxfp8 --out runs/decoder
    python tools/train.py --config tools/configs/vgg16-cifar10.toml --line authors --seeds 3 --out runs/vgg16
    torchrun --nproc-per-node 2 tools/train.py --recipe "bfp8[0]" --out runs/digits

All lines of equal settings have the same start, data order and schedule. A row has the paper's scores. SGD is the
weights at the end of the warm-up, where the learning rate has decayed to 1 %. SWA or SWALP is the average of the
weights after it. Beside them are the last weights, and the average in the rounded graph.

Under torchrun each training batch is shared among the processes; they train one network, on the CPU or a GPU each.
"""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import checkpoint
import data
import files
import models
import ranks
import swalp_fx
import trial
from command import SEED, STOPPED, CommandLine, number, raise_interrupt, run, sentence, show
from environment import environment
from line import Line
from progress import Progress, digits
from settings import DEFAULTS, EVERYWHERE, OPTIMIZERS, ConfigError, Plan, Settings, configured, nearest

INPUT_ERRORS = (data.DataError, ConfigError, *trial.INPUT_ERRORS)
RESULTS = "results.json"


def train(name: str, line: Line, folder: Path | None, score_last: bool) -> dict[str, Any]:
    """The line's result after the epochs it still lacks, with a checkpoint in ``folder`` after each.

    score_last: of the epochs the last one alone is scored.
    """
    epochs, steps, done = line.settings.epochs, len(line.dataset.train(line.settings.batch_size)), len(line.epochs)
    with Progress(name, line.dataset.metric, epochs, steps, done) as progress:

        def on_step() -> None:
            progress.step()
            raise_interrupt()
            ranks.refuse_orphan()

        for epoch in range(done, epochs):
            line.train_epoch(on_step, score=not score_last or epoch + 1 == epochs)
            if folder and ranks.RANK == 0:
                line.save(checkpoint.path_of(folder, name))
            progress.end_epoch(line.epochs[-1])
    return line.result()


def train_all(plans: dict[str, Plan], workshop: Workshop, command: str, score_last: bool) -> dict[str, dict[str, Any]]:
    """Each run's result. Ctrl-C says how to go on, and exits."""
    results: dict[str, dict[str, Any]] = {}
    name, line = "", None
    try:
        for name in plans:
            line = None  # one at a time: there may be more of them than memory holds
            line = workshop.line(name)
            results[name] = train(name, line, workshop.folder, score_last)
    except KeyboardInterrupt:
        if ranks.RANK:
            raise SystemExit(STOPPED) from None
        done = 0 if line is None else line.saved if workshop.folder else len(line.epochs)
        way = way_on(workshop.folder, command)
        print(f"train.py: stopped after epoch {done} of line {name}; {way}", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    return results


def way_on(folder: Path | None, command: str) -> str:
    """How to go on with a run that ``command`` began and did not finish."""
    if folder is None:
        return "start again, with --out DIR to keep each epoch"
    if not any(folder.glob("*.pt")):
        return f"start again: nothing is kept in {folder} yet"
    return f"go on with: {command}" + ("" if "--resume" in shlex.split(command) else " --resume")


SCORES = ("warm_up", "last", "average", "rounded")


def table(results: Sequence[dict[str, Any]], metric: str) -> str:
    """A row for each line: the mean of its scores over seeds, and their deviation where there are several."""
    titles = " or ".join(dict.fromkeys(OPTIMIZERS[each["settings"]["optimizer"]].title for each in results))
    rows = []
    for name, group in itertools.groupby(results, key=lambda each: each["line"]):
        runs = list(group)
        seconds = statistics.median(each["median_seconds"] for each in runs)
        cells = [_cell(metric, [each[score] for each in runs]) for score in SCORES]
        rows.append([name, runs[0]["recipe"], *cells, f"{seconds:.2f}"])
    headers = [
        *("line", "recipe", f"{titles}\n(end of warm-up)", "last\nweights", "average\n(SWA, SWALP)"),
        *("average,\nrounded graph", "seconds\nan epoch"),
    ]
    sides = ("left", "left", *["right"] * 5)
    return f"{metric}\n\n" + tabulate(rows, headers=headers, colalign=sides, disable_numparse=True)


def _cell(metric: str, scores: list[float | None]) -> str:
    known = [score for score in scores if score is not None]
    if not known:
        return ""
    text = digits(metric, statistics.mean(known))
    return f"{text} ± {digits(metric, statistics.stdev(known))}" if len(known) > 1 else text


def describe(results: Sequence[dict[str, Any]]) -> str:
    """A sentence for each different training."""
    return "\n".join(dict.fromkeys(_described(result, results) for result in results))


def _described(result: dict[str, Any], results: Sequence[dict[str, Any]]) -> str:
    settings, n = Settings(**result["settings"]), result["n_averaged"]
    seeds = sorted({each["settings"]["seed"] for each in results})
    of = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    every = f"{settings.average_every} steps" if settings.average_every else "epoch"
    average = f"{n} {'set' if n == 1 else 'sets'} of weights averaged, one every {every} after epoch"
    return (
        f"{settings.model} on {settings.dataset}, epochs {settings.epochs}, {of}; "
        + (f"{average} {settings.average_from}" if n else "no weights averaged")
        + ("; the average of one set is that set" if n == 1 else "")
    )


def command_line() -> CommandLine:
    count, natural = number(int, 1, "a whole number of 1 or more"), number(int, 0, "a whole number of 0 or more")
    real, share = number(float, 0, "a number of 0 or more"), number(float, 0, "a number from 0 to below 1", high=1)
    parser = CommandLine(
        prog="train.py",
        usage="%(prog)s [--dataset NAME] [--model NAME] [--recipe RECIPE] [options]",
        description=__doc__,
        epilog="defaults:\n" + defaults(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", metavar="FILE", type=Path, help="lines and their settings, as in tools/configs; options go before")
    add("--line", metavar="NAME", action="append", help="of the configuration; may be repeated (default: all)")
    add("--dataset", choices=data.DATASETS, help="default: digits, which scikit-learn holds")
    add(
        "--data",
        metavar="DIR",
        help="where the images are, as torchvision.datasets keeps them (default: data, or Debian's package), or the"
        " modules of a Python library (default: this one's)",
    )
    add("--model", metavar="NAME", help=f"{', '.join(models.MODELS)}, or one of torchvision's")
    add("--recipe", action="append", help="of a low-precision line; may be repeated (of AdamW: bfp8[0] M=float)")
    add("--epochs", type=count, metavar="N")
    add(
        "--average-from",
        type=natural,
        metavar="N",
        help="epochs of warm-up; the average takes weights after those (where --epochs is given: half of them)",
    )
    add("--average-every", type=natural, metavar="STEPS", help="steps between averagings; 0: once an epoch")
    add("--lr", type=real, help="learning rate at the start of the warm-up")
    add("--average-lr", type=real, help="constant learning rate after the warm-up")
    add("--optimizer", choices=OPTIMIZERS)
    add("--momentum", type=share, help="AdamW's first beta")
    add("--weight-decay", type=real, help="which AdamW multiplies by the learning rate")
    add("--batch-size", type=count, metavar="N")
    add("--lr-changes", choices=("step", "epoch"), help="each step, or as the SWALP authors have it each epoch")
    add("--samples", type=natural, metavar="N", help="of an epoch, drawn anew from all; 0: all")
    add("--seed", type=SEED, default=0, help="of weights, data order and rounding (default: %(default)s)")
    add(
        "--seeds",
        type=count,
        metavar="N",
        default=1,
        help="of each line, from --seed on (default: 1)",
    )
    add("--score-last", action="store_true", help="score no epoch but the last: quicker, and all that the table needs")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--out", metavar="DIR", type=Path, help="write results.json, and a checkpoint of each line after each epoch")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    return parser


def defaults() -> str:
    """A row an option, a column a data set."""
    options = ["recipe", *(name for name in Settings.__dataclass_fields__ if name not in ("dataset", "seed"))]
    columns = {name: {**EVERYWHERE, **DEFAULTS[name]} for name in data.DATASETS}
    for column in columns.values():
        column["recipe"] = OPTIMIZERS[column["optimizer"]].recipe
    rows = [["--" + option.replace("_", "-"), *(column[option] for column in columns.values())] for option in options]
    return tabulate(rows, headers=["", *columns], tablefmt="plain", disable_numparse=True)


def plans_from(args: argparse.Namespace) -> list[Plan]:
    """The lines of the command line, or of its configuration, for each seed; raises ConfigError."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "epochs" in given and "average_from" not in given:
        given["average_from"] = given["epochs"] // 2  # of one epoch all is averaged
    given = {name: given[name] for name in Settings.__dataclass_fields__ if name in given}
    plans = _configured(args, given) if args.config else _plain(args, given)
    seeds = range(args.seed, args.seed + args.seeds)
    return [replace(plan, settings=replace(plan.settings, seed=seed)) for plan in plans for seed in seeds]


def _plain(args: argparse.Namespace, given: dict[str, Any]) -> list[Plan]:
    """The float line, then a low-precision line for each recipe."""
    if args.line:
        raise ConfigError("--line names a line of a configuration; add --config FILE")
    dataset = given.get("dataset", "digits")
    settings = Settings(**{**EVERYWHERE, **DEFAULTS[dataset], **given, "dataset": dataset})
    if settings.average_from >= settings.epochs:
        raise ConfigError(
            f"--average-from {settings.average_from} leaves none of {settings.epochs} epochs to average;"
            " use fewer epochs of warm-up"
        )
    low = args.recipe or [OPTIMIZERS[settings.optimizer].recipe]
    names = [f"low{i}" if i > 1 else "low" for i in range(1, len(low) + 1)]
    return [Plan("float", "float", settings), *(Plan(*each, settings) for each in zip(names, low, strict=True))]


def _configured(args: argparse.Namespace, given: dict[str, Any]) -> list[Plan]:
    if args.recipe:
        raise ConfigError("--recipe does not go with --config, whose lines have their recipes; leave one of them out")
    plans = configured(args.config, given)
    known = {plan.name for plan in plans}
    for name in args.line or ():
        if name not in known:
            raise ConfigError(f"{args.config} has no line {name!r}; use {nearest(name, sorted(known))}")
    return [plan for plan in plans if not args.line or plan.name in args.line]


def key_of(plan: Plan, args: argparse.Namespace) -> str:
    """A run's name in results and checkpoints: the line, and the seed unless it is the first."""
    return plan.name if plan.settings.seed == args.seed else f"{plan.name}-seed{plan.settings.seed}"


def device_from(name: str | None, parser: CommandLine) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            parser.refuse(f"--device {name} cannot be used: nothing is rounded there; use cpu or cuda")
        device = ranks.local_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.refuse(f"--device {name} cannot be used ({sentence(error)}); use cpu")
    return device


def folder_from(args: argparse.Namespace, names: Iterable[str], parser: CommandLine) -> Path | None:
    """``--out``, if it can be one of a new run, or with ``--resume`` is one of a run."""
    if args.out is None:
        if args.resume:
            parser.refuse("--resume needs the --out DIR that holds the run")
        return None
    held = any(checkpoint.path_of(args.out, name).exists() for name in names)
    if args.resume and not held:
        parser.refuse(f"--resume: {args.out} holds no run to go on with; leave --resume out to start one there")
    if not args.resume and (held or (args.out / RESULTS).exists()):
        parser.refuse(f"--out {args.out} holds a run already; add --resume to go on with it, or name another folder")
    files.make_folder(args.out)
    for name in (RESULTS, *(checkpoint.path_of(args.out, name).name for name in names)):
        files.refuse_unwritable(args.out / name)
    return args.out


def steps_to_average(settings: Settings, dataset: data.Source) -> int:
    """The steps after the warm-up."""
    samples = settings.samples or dataset.samples
    return (settings.epochs - settings.average_from) * math.ceil(samples / settings.batch_size)


def fitted(plan: Plan, dataset: data.Source) -> Plan:
    """The plan, averaging once an epoch if the data set's default is more than the steps there are."""
    if plan.settings.average_every <= steps_to_average(plan.settings, dataset):
        return plan
    return replace(plan, settings=replace(plan.settings, average_every=0))


@dataclass
class Workshop:
    """The maker of lines: it has their data, device and folder."""

    plans: dict[str, Plan]
    dataset: data.Source
    device: torch.device
    folder: Path | None

    def line(self, name: str) -> Line:
        """The line of this run, as far as its checkpoint is; raises DataError or FileError if that is another's."""
        line = Line(self.plans[name], self.dataset, self.device)
        if self.folder and (path := checkpoint.path_of(self.folder, name)).exists():
            line.load(path)
        return line

    def refuse_unfit(self) -> None:
        """Raises the errors of plans and checkpoints before the first line trains."""
        for plan in {plan.name: plan for plan in self.plans.values()}.values():  # of the seeds, one
            settings, steps = plan.settings, steps_to_average(plan.settings, self.dataset)
            if settings.samples > self.dataset.samples:
                there = f"the {self.dataset.samples} of an epoch of {settings.dataset}"
                raise data.DataError(f"--samples {settings.samples} is more than {there}; use fewer")
            if settings.average_every > steps > 0:
                every = f"--average-every {settings.average_every}"
                raise data.DataError(f"{every} is more than the {steps} steps after the warm-up; use fewer")
            Line(plan, self.dataset, self.device).try_out()
        for name in self.plans:
            if self.folder and checkpoint.path_of(self.folder, name).exists():
                self.line(name)


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Each run's result, after the table is printed."""
    parser = command_line()
    args = parser.parse_args(argv)
    command = shlex.join(["python", *(sys.argv if argv is None else ["tools/train.py", *argv])])
    device = device_from(args.device, parser)
    with ranks.joined(device):
        return _trained(args, parser, command, device)


def _trained(
    args: argparse.Namespace, parser: CommandLine, command: str, device: torch.device
) -> dict[str, dict[str, Any]]:
    try:
        plans = {key_of(plan, args): plan for plan in plans_from(args)}
        for plan in plans.values():
            swalp_fx.Recipe.parse(plan.recipe)
        folder = folder_from(args, plans, parser)
        dataset = data.load(next(iter(plans.values())).settings.dataset, args.data, device)
        if args.average_every is None and not args.config:
            plans = {name: fitted(plan, dataset) for name, plan in plans.items()}
        workshop = Workshop(plans, dataset, device, folder)
        workshop.refuse_unfit()
    except INPUT_ERRORS as error:
        parser.refuse(error)
    try:
        results = train_all(plans, workshop, command, args.score_last)
        printed = f"{describe([*results.values()])}\n\n{table([*results.values()], dataset.metric)}"
        show(printed)
        if folder and ranks.RANK == 0:
            record = {
                "command": command,
                "environment": environment(device),
                "ranks": ranks.COUNT,
                "metric": dataset.metric,
                "lines": results,
                "table": printed,
            }
            files.write_json(folder / RESULTS, record)
    except files.FileError as error:
        parser.refuse(f"{error}; mend that, then {way_on(folder, command)}")
    return results


if __name__ == "__main__":
    run(main)
