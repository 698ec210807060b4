"""Trains one network in float and in low-precision recipes, and prints what averaging gave back.

    python tools/train.py --dataset fashion-mnist --model convnet --recipe "bfp8[0]" --epochs 12 --seed 0
    python tools/train.py --dataset stdlib --recipe "bfp8[0] M=float" --recipe mxfp8 --out runs/decoder

All lines have the same start, data order and schedule. SGD (or AdamW) is the weights at the end of training, SWA and
SWALP the average of the weights after the warm-up.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import checkpoint
import data
import files
import models
import swalp_fx
import trial
from command import SEED, STOPPED, CommandLine, number, run, sentence, show
from environment import environment
from progress import Progress, digits
from swalp_fx.random import fold_in

INPUT_ERRORS = (data.DataError, *trial.INPUT_ERRORS)
ORDER, DRAWS = range(2)  # what an epoch's random numbers are for: the data order, or the model's own
LOSSES_EVERY = 16  # steps whose mean training loss is one point of a line's curve
RESULTS = "results.json"
BETA2 = 0.95  # of AdamW's second moment: at 0.999 it would remember more steps than a short run has


@dataclass(frozen=True)
class Optimizer:
    """How an optimizer is made from the settings, what tables call it, and the recipe that suits it."""

    title: str
    make: Callable[[Iterable[nn.Parameter], Settings], torch.optim.Optimizer]
    recipe: str


OPTIMIZERS = {
    "sgd": Optimizer(
        "SGD",
        lambda parameters, settings: torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        ),
        "bfp8[0]",
    ),
    "adamw": Optimizer(
        "AdamW",
        lambda parameters, settings: torch.optim.AdamW(
            parameters, lr=settings.lr, betas=(settings.momentum, BETA2), weight_decay=settings.weight_decay
        ),
        # Where a second moment is rounded to 0 and the first is not, the step is the first divided by epsilon.
        "bfp8[0] M=float",
    ),
}


@dataclass(frozen=True)
class Settings:
    """All, beside a line's recipe, that decides its result, and so may not change when it is resumed.

    ``epochs`` alone may grow.
    """

    dataset: str
    model: str
    optimizer: str
    epochs: int
    average_from: int  # epochs of warm-up; the average takes weights after those
    average_every: int  # steps between two averagings; 0: at the end of each epoch
    lr: float
    average_lr: float  # constant, after the warm-up
    momentum: float  # AdamW's first beta
    weight_decay: float
    batch_size: int
    seed: int


EVERYWHERE = {"optimizer": "sgd", "average_every": 0, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128}
# Defaults. CIFAR: as the SWALP authors' scripts train VGG16. (Their PreResNet-164: epochs 225,
# average_from 150, lr 0.1, weight_decay 3e-4.)
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"model": "convnet", "epochs": 30, "average_from": 10, "lr": 0.05, "average_lr": 0.05, "batch_size": 32},
    "fashion-mnist": {"model": "convnet", "epochs": 12, "average_from": 6, "lr": 0.05, "average_lr": 0.02},
    "cifar10": {"model": "vgg16", "epochs": 300, "average_from": 200, "lr": 0.05, "average_lr": 0.01},
    "cifar100": {"model": "vgg16", "epochs": 300, "average_from": 200, "lr": 0.05, "average_lr": 0.01},
    "stdlib": {
        **{"model": "decoder", "epochs": 6, "average_from": 4, "average_every": 16, "batch_size": 32},
        **{"optimizer": "adamw", "lr": 2e-3, "average_lr": 1e-3, "weight_decay": 0.1},
    },
}


def learning_rate(epoch: float, settings: Settings) -> float:
    """The SWALP paper's schedule, ``epoch`` counting from 0 and fractional inside an epoch.

    Over the warm-up: ``lr`` for the first half, then linearly down to 1 % of it, reached at 90 % and held. After it:
    ``average_lr``.
    """
    if epoch >= settings.average_from:
        return settings.average_lr
    done = epoch / settings.average_from
    descent = min(max((done - 0.5) / 0.4, 0.0), 1.0)
    return settings.lr * (1 - 0.99 * descent)


class Line:
    """One network in training: model, optimizer, what ``convert`` made of them, and the epochs so far."""

    def __init__(self, name: str, recipe: str, settings: Settings, dataset: data.Dataset, device: torch.device) -> None:
        self.name, self.recipe, self.settings, self.dataset = name, recipe, settings, dataset
        torch.manual_seed(settings.seed)  # every line starts from the same weights
        self.model = models.build(settings.model, dataset.classes, *dataset.shape).to(device)
        self.optimizer = OPTIMIZERS[settings.optimizer].make(self.model.parameters(), settings)
        self.module, self.swalp = swalp_fx.convert(self.model, self.optimizer, recipe=recipe)
        self.epochs: list[dict[str, Any]] = []
        self.saved = 0  # epochs that the checkpoint holds

    def train_epoch(self, on_step: Callable[[], object]) -> None:
        """One epoch of the training samples, and the scores after it, appended to ``epochs``."""
        settings, epoch = self.settings, len(self.epochs)
        # Every epoch's random numbers follow from (seed, epoch): a resumed run draws what an unbroken one would.
        seed = fold_in(settings.seed, epoch)
        torch.manual_seed(fold_in(seed, DRAWS))
        batches = self.dataset.train(settings.batch_size, fold_in(seed, ORDER))
        losses = []
        self.module.train()
        start = time.perf_counter()
        for step, (inputs, targets) in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(epoch + step / len(batches), settings)
            self.optimizer.zero_grad()
            loss = self._loss(inputs, targets)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            if self._averages_after(epoch, step, len(batches)):
                self.swalp.update_average()
            on_step()
        curve = torch.stack([few.mean() for few in torch.stack(losses).split(LOSSES_EVERY)])
        self.epochs.append(
            {
                "steps": len(losses),
                "losses": curve.tolist(),  # waits for the device: the time is the epoch's own
                "seconds": time.perf_counter() - start,
                "last": self.score(self.module),
                "average": self.score(self._averaged_model()) if self.swalp.n_averaged else None,
            }
        )

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.module(inputs).flatten(0, -2), targets.flatten())

    def _averages_after(self, epoch: int, step: int, steps: int) -> bool:
        if epoch < self.settings.average_from:
            return False
        every = self.settings.average_every or steps
        return ((epoch - self.settings.average_from) * steps + step + 1) % every == 0

    def _averaged_model(self) -> nn.Module:
        return self.swalp.averaged_model(self.dataset.train(self.settings.batch_size))

    @torch.no_grad()
    def score(self, module: nn.Module) -> float:
        """The data set's metric of ``module`` in evaluation mode, over the test samples."""
        module.eval()
        metric = data.METRICS[self.dataset.metric]
        total = sum(metric(module(inputs), targets).item() for inputs, targets in self.dataset.test())
        return total / self.dataset.test_targets.numel()

    def result(self) -> dict[str, Any]:
        """Scores of the last weights and of the average, and the epochs behind them."""
        return {
            "recipe": self.recipe,
            "last": self.epochs[-1]["last"],
            "average": self.epochs[-1]["average"],
            "n_averaged": self.swalp.n_averaged,
            "median_seconds": statistics.median(epoch["seconds"] for epoch in self.epochs),
            "epochs": self.epochs,
        }

    def try_out(self) -> None:
        """A step and an average, on as few samples as an epoch's last batch may have; the line is of no use after it.

        Raises ModelError or RecipeError if the model does not take the samples, or a format its tensors.
        """
        size, samples = self.settings.batch_size, self.dataset.samples
        few = 1 if min(size, samples) == 1 or samples % size == 1 else 2
        trial.of_model(self.settings.model, self.model, *self.dataset.shape, batch=few)
        with trial.of_recipe(self.recipe):
            inputs, targets = next(iter(self.dataset.train(few)))
            self._loss(inputs, targets).backward()
            self.optimizer.step()
            self.swalp.update_average()

    def save(self, folder: Path) -> None:
        """Raises FileError, and leaves the last checkpoint as it was, if it cannot be written."""
        state = {
            "settings": self._settings(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "swalp": self.swalp.state_dict(),
            "epochs": self.epochs,
        }
        checkpoint.save(checkpoint.path_of(folder, self.name), state)
        self.saved = len(self.epochs)

    def _settings(self) -> dict[str, Any]:
        return {**asdict(self.settings), "recipe": self.recipe}

    def load(self, folder: Path) -> None:
        """Go on from the checkpoint in ``folder``; raises DataError or FileError if it is damaged or another run's."""
        path = checkpoint.path_of(folder, self.name)
        state = checkpoint.load(path, self.dataset.train_inputs.device)
        if state["settings"].keys() != self._settings().keys():
            raise data.DataError(f"{path} was made by another version of train.py; give another --out")
        for name, now in self._settings().items():
            then = state["settings"][name]
            if now != then and not (name == "epochs" and now >= len(state["epochs"])):
                option = "--" + name.replace("_", "-")
                raise data.DataError(f"{path} was made with {option} {then}, not {now}; give the same or another --out")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.swalp.load_state_dict(state["swalp"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise data.DataError(f"{path} does not fit the model ({sentence(error)}); name another --out") from None
        self.epochs = state["epochs"]
        self.saved = len(self.epochs)


def train(line: Line, folder: Path | None) -> dict[str, Any]:
    """The line's result after the epochs it still lacks, with a checkpoint in ``folder`` after each."""
    epochs, steps, done = line.settings.epochs, len(line.dataset.train(line.settings.batch_size)), len(line.epochs)
    with Progress(line.name, line.dataset.metric, epochs, steps, done) as progress:
        for _ in range(done, epochs):
            line.train_epoch(progress.step)
            if folder:
                line.save(folder)
            progress.end_epoch(line.epochs[-1])
    return line.result()


def train_all(lines: Sequence[Line], folder: Path | None, command: str) -> dict[str, dict[str, Any]]:
    """Each line's result. Ctrl-C says how to go on, and exits."""
    results: dict[str, dict[str, Any]] = {}
    try:
        for line in lines:
            results[line.name] = train(line, folder)
    except KeyboardInterrupt:
        line = lines[len(results)]
        done = line.saved if folder else len(line.epochs)
        way = way_on(folder, command)
        print(f"train.py: stopped after epoch {done} of line {line.name}; {way}", file=sys.stderr)
        raise SystemExit(STOPPED) from None
    return results


def way_on(folder: Path | None, command: str) -> str:
    """What to do about a run that ``command`` began and that did not come to its end."""
    if folder is None:
        return "start again, with --out DIR to keep each epoch"
    if not any(folder.glob("*.pt")):
        return f"start again: nothing is kept in {folder} yet"
    return f"go on with: {command}" + ("" if "--resume" in shlex.split(command) else " --resume")


def table(line: dict[str, Any], beside: dict[str, Any], settings: Settings, metric: str) -> str:
    """Four columns: the last weights and the average, of the float line (``beside``) and of a low-precision one."""
    title = OPTIMIZERS[settings.optimizer].title
    scores = [digits(metric, each[key]) for each in (beside, line) for key in ("last", "average")]
    seconds = [f"{each['median_seconds']:.2f}" for each in (beside, line) for _ in range(2)]
    return tabulate(
        [[metric, *scores], ["seconds an epoch (median)", *seconds]],
        headers=["", f"{title}-FP", "SWA-FP", f"{title}-LP", "SWALP"],
        colalign=("left", *["right"] * 4),
        disable_numparse=True,
    )


def describe(line: dict[str, Any], settings: Settings) -> str:
    every, n = f"{settings.average_every} steps" if settings.average_every else "epoch", line["n_averaged"]
    average = f"{n} {'set' if n == 1 else 'sets'} of weights averaged, one every {every}"
    return (
        f"{settings.model} on {settings.dataset}, epochs {settings.epochs}, recipe {line['recipe']}, seed"
        f" {settings.seed}; {average} after epoch {settings.average_from}"
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
    add("--dataset", choices=data.DATASETS, default="digits", help="default: %(default)s, which scikit-learn holds")
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
    add("--seed", type=SEED, default=0, help="of weights, data order and rounding (default: %(default)s)")
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


def settings_from(args: argparse.Namespace, parser: CommandLine) -> Settings:
    """The command line, completed with the data set's defaults."""
    values = {**EVERYWHERE, **DEFAULTS[args.dataset]}
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "epochs" in given and "average_from" not in given:
        given["average_from"] = given["epochs"] // 2  # of one epoch all is averaged
    values |= {name: given[name] for name in Settings.__dataclass_fields__ if name in given}
    settings = Settings(**values)
    if settings.average_from >= settings.epochs:
        parser.refuse(
            f"--average-from {settings.average_from} leaves none of {settings.epochs} epochs to average;"
            " use fewer epochs of warm-up"
        )
    return settings


def recipes_from(args: argparse.Namespace, settings: Settings) -> dict[str, str]:
    """Line -> recipe: the float line, then a low-precision line for each recipe."""
    low = args.recipe or [OPTIMIZERS[settings.optimizer].recipe]
    return {"float": "float"} | {f"low{i}" if i > 1 else "low": recipe for i, recipe in enumerate(low, 1)}


def device_from(name: str | None, parser: CommandLine) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type not in ("cpu", "cuda"):
            parser.refuse(f"--device {name} cannot be used: nothing is rounded there; use cpu or cuda")
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


def lines_from(
    args: argparse.Namespace, settings: Settings, device: torch.device, recipes: dict[str, str]
) -> list[Line]:
    """The lines, tried out before the first of them trains, and with ``--resume`` as far as they were."""
    dataset = data.load(settings.dataset, args.data, device)
    steps = (settings.epochs - settings.average_from) * len(dataset.train(settings.batch_size))
    if settings.average_every > steps:
        raise data.DataError(
            f"--average-every {settings.average_every} is more than the {steps} steps after the warm-up; use fewer"
        )
    for name, recipe in recipes.items():
        Line(name, recipe, settings, dataset, device).try_out()
    lines = [Line(name, recipe, settings, dataset, device) for name, recipe in recipes.items()]
    for line in lines:
        if args.resume and checkpoint.path_of(args.out, line.name).exists():
            line.load(args.out)
    return lines


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Each line's result, after the tables are printed."""
    parser = command_line()
    args = parser.parse_args(argv)
    command = shlex.join(["python", *(sys.argv if argv is None else ["tools/train.py", *argv])])
    settings, device = settings_from(args, parser), device_from(args.device, parser)
    recipes = recipes_from(args, settings)
    try:
        for recipe in recipes.values():
            swalp_fx.Recipe.parse(recipe)
        folder = folder_from(args, recipes, parser)
        lines = lines_from(args, settings, device, recipes)
    except INPUT_ERRORS as error:
        parser.refuse(error)
    metric = lines[0].dataset.metric
    try:
        results = train_all(lines, folder, command)
        printed = "\n\n".join(
            f"{describe(result, settings)}\n\n{table(result, results['float'], settings, metric)}"
            for name, result in results.items()
            if name != "float"
        )
        show(printed)
        if folder:
            record = {
                "command": command,
                "settings": asdict(settings),
                "environment": environment(device),
                "metric": metric,
                "lines": results,
                "table": printed,
            }
            files.write_json(folder / RESULTS, record)
    except files.FileError as error:
        parser.refuse(f"{error}; mend that, then {way_on(folder, command)}")
    return results


if __name__ == "__main__":
    run(main)
