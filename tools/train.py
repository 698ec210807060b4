"""Trains one network twice, in float and in a low-precision recipe, and prints what averaging gave back.

    python tools/train.py --dataset fashion-mnist --model convnet --recipe "bfp8[0]" --epochs 12 --seed 0

Both lines have the same start, data order and schedule. SGD is the weights at the end of training, SWA and SWALP the
average of the weights after the warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import data
import models
import swalp_fx
from swalp_fx.capture import ConvertError
from swalp_fx.random import fold_in

# What a bad command line, or one that does not fit its data or model, raises: one line, and no traceback.
INPUT_ERRORS = (data.DataError, models.ModelError, swalp_fx.FormatError, swalp_fx.RecipeError, ConvertError)
ORDER, DRAWS = range(2)  # what an epoch's random numbers are for: the data order, or the model's own


@dataclass(frozen=True)
class Settings:
    """All that decides a run's result, and so may not change when it is resumed; ``epochs`` alone may grow."""

    dataset: str
    model: str
    recipe: str
    epochs: int
    average_from: int  # epochs of warm-up; the average takes weights after those
    average_every: int  # steps between two averagings; 0: at the end of each epoch
    lr: float
    average_lr: float  # constant, after the warm-up
    momentum: float
    weight_decay: float
    batch_size: int
    seed: int


# Defaults. CIFAR: as the SWALP authors' scripts train VGG16. (Their PreResNet-164: epochs 225,
# average_from 150, lr 0.1, weight_decay 3e-4.)
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"model": "convnet", "epochs": 30, "average_from": 10, "lr": 0.05, "average_lr": 0.05, "batch_size": 32},
    "fashion-mnist": {"model": "convnet", "epochs": 12, "average_from": 6, "lr": 0.05, "average_lr": 0.02},
    "cifar10": {"model": "vgg16", "epochs": 300, "average_from": 200, "lr": 0.05, "average_lr": 0.01},
    "cifar100": {"model": "vgg16", "epochs": 300, "average_from": 200, "lr": 0.05, "average_lr": 0.01},
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
        self.name, self.settings, self.dataset = name, settings, dataset
        torch.manual_seed(settings.seed)  # every line starts from the same weights
        self.model = models.build(settings.model, dataset.classes, dataset.channels, dataset.image_size).to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.module, self.swalp = swalp_fx.convert(self.model, self.optimizer, recipe=recipe)
        self.epochs: list[dict[str, Any]] = []

    def train_epoch(self, on_step: Callable[[], object]) -> None:
        """One pass over the training images, and the error on the test images, appended to ``epochs``."""
        settings, epoch = self.settings, len(self.epochs)
        # Every epoch's random numbers follow from (seed, epoch): a resumed run draws what an unbroken one would.
        seed = fold_in(settings.seed, epoch)
        torch.manual_seed(fold_in(seed, DRAWS))
        batches = self.dataset.train(settings.batch_size, fold_in(seed, ORDER))
        total = torch.zeros((), device=self.dataset.train_images.device)
        self.module.train()
        start = time.perf_counter()
        for step, (images, labels) in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(epoch + step / len(batches), settings)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.module(images), labels)
            loss.backward()
            self.optimizer.step()
            total += loss.detach() * len(labels)
            if self._averages_after(epoch, step, len(batches)):
                self.swalp.update_average()
            on_step()
        mean_loss = total.item() / len(self.dataset.train_labels)  # waits for the device: the time is the epoch's own
        seconds = time.perf_counter() - start
        self.epochs.append({"loss": mean_loss, "test_error": self.test_error(self.module), "seconds": seconds})

    def _averages_after(self, epoch: int, step: int, steps: int) -> bool:
        if epoch < self.settings.average_from:
            return False
        every = self.settings.average_every or steps
        return ((epoch - self.settings.average_from) * steps + step + 1) % every == 0

    @torch.no_grad()
    def test_error(self, module: nn.Module) -> float:
        """Per cent of the test images that ``module``, in evaluation mode, gets wrong."""
        module.eval()
        wrong = sum((module(images).argmax(1) != labels).sum().item() for images, labels in self.dataset.test())
        return 100 * wrong / len(self.dataset.test_labels)

    def result(self) -> dict[str, Any]:
        """Test errors of the last weights and of the average, and the epochs behind them."""
        averaged = self.swalp.averaged_model(self.dataset.train(self.settings.batch_size))
        return {
            "sgd_error": self.epochs[-1]["test_error"],
            "average_error": self.test_error(averaged),
            "n_averaged": self.swalp.n_averaged,
            "median_seconds": statistics.median(epoch["seconds"] for epoch in self.epochs),
            "epochs": self.epochs,
        }

    def save(self, folder: Path) -> None:
        state = {
            "settings": asdict(self.settings),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "swalp": self.swalp.state_dict(),
            "epochs": self.epochs,
        }
        path = checkpoint(folder, self.name)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)  # at once: an interruption leaves the last epoch's checkpoint whole

    def load(self, folder: Path) -> None:
        """Go on from the checkpoint in ``folder``; raises DataError if it is of another run."""
        path = checkpoint(folder, self.name)
        state = torch.load(path, map_location=self.dataset.train_images.device, weights_only=True)
        for name, now in asdict(self.settings).items():
            then = state["settings"][name]
            if now != then and not (name == "epochs" and now >= len(state["epochs"])):
                option = "--" + name.replace("_", "-")
                raise data.DataError(f"{path} was made with {option} {then}, not {now}; give the same or another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.swalp.load_state_dict(state["swalp"])
        self.epochs = state["epochs"]


def checkpoint(folder: Path, name: str) -> Path:
    return folder / f"{name}.pt"


def train(line: Line, folder: Path | None) -> dict[str, Any]:
    """The line's result after the epochs it still lacks, with a checkpoint in ``folder`` after each."""
    epochs, steps = line.settings.epochs, len(line.dataset.train(line.settings.batch_size))
    done = len(line.epochs)
    with tqdm(total=epochs * steps, initial=done * steps, desc=line.name, unit="step", disable=None) as bar:
        for _ in range(done, epochs):
            line.train_epoch(bar.update)
            last = line.epochs[-1]
            bar.set_postfix(loss=f"{last['loss']:.3f}", test_error=f"{last['test_error']:.2f} %")
            if folder:
                line.save(folder)
    return line.result()


def table(results: dict[str, dict[str, Any]]) -> str:
    """Four columns: the last weights and the average, of the float line and of the low-precision one."""
    lines = [results["float"], results["low"]]
    errors = [f"{line[key]:.2f}" for line in lines for key in ("sgd_error", "average_error")]
    seconds = [f"{line['median_seconds']:.2f}" for line in lines for _ in range(2)]
    return tabulate(
        [["test error, %", *errors], ["seconds an epoch (median)", *seconds]],
        headers=["", "SGD-FP", "SWA-FP", "SGD-LP", "SWALP"],
        colalign=("left", *["right"] * 4),
        disable_numparse=True,
    )


def describe(settings: Settings, n_averaged: int) -> str:
    every = f"{settings.average_every} steps" if settings.average_every else "epoch"
    return (
        f"{settings.model} on {settings.dataset}, {settings.epochs} epochs, recipe {settings.recipe}, seed "
        f"{settings.seed}; {n_averaged} weights averaged, one every {every} after epoch {settings.average_from}"
    )


def environment(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "swalp_fx": swalp_fx.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device} ({name})",
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def _number(kind: type, low: float, what: str) -> Callable[[str], Any]:
    """An argparse type: a number of at least ``low``."""

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not value >= low:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return convert


def command_line() -> argparse.ArgumentParser:
    count, natural = _number(int, 1, "a whole number of 1 or more"), _number(int, 0, "a whole number of 0 or more")
    real = _number(float, 0, "a number of 0 or more")
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="%(prog)s [--dataset NAME] [--model NAME] [--recipe RECIPE] [options]; --help lists them",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", choices=data.DATASETS, default="digits", help="digits comes with scikit-learn (default)")
    add("--data", metavar="DIR", help="where torchvision.datasets has stored the data set (default: data)")
    add("--model", metavar="NAME", help="convnet, vgg16, vgg16_bn, preresnet20, preresnet164, or one of torchvision's")
    add("--recipe", default="bfp8[0]", help="number formats of the low-precision line (default: %(default)s)")
    add("--epochs", type=count, metavar="N")
    add("--average-from", type=count, metavar="N", help="epochs of warm-up; the average takes weights after those")
    add("--average-every", type=natural, metavar="STEPS", help="steps between averagings; 0: once an epoch")
    add("--lr", type=real, help="learning rate at the start of the warm-up")
    add("--average-lr", type=real, help="constant learning rate after the warm-up")
    add("--momentum", type=real, default=0.9, help="default: %(default)s")
    add("--weight-decay", type=real, default=5e-4, help="default: %(default)s")
    add("--batch-size", type=count, metavar="N", default=None)
    add("--seed", type=natural, default=0, help="of the weights, the data order and the rounding (default: 0)")
    add("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    add("--out", metavar="DIR", type=Path, help="write results.json, and a checkpoint of each line after each epoch")
    add("--resume", action="store_true", help="go on from the checkpoints in --out")
    return parser


def settings_from(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Settings:
    """The command line, completed with the data set's defaults."""
    values = {"average_every": 0, "batch_size": 128, **DEFAULTS[args.dataset]}
    given = {name: value for name, value in vars(args).items() if value is not None}
    if "epochs" in given and "average_from" not in given:
        given["average_from"] = max(1, given["epochs"] // 2)
    values |= {name: given[name] for name in Settings.__dataclass_fields__ if name in given}
    settings = Settings(**values)
    if settings.average_from >= settings.epochs:
        parser.error(
            f"--average-from {settings.average_from} leaves none of {settings.epochs} epochs to average;"
            " use fewer epochs of warm-up"
        )
    return settings


def device_from(name: str | None, parser: argparse.ArgumentParser) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {name} cannot be used ({str(error).splitlines()[0]}); use cpu")
    return device


def folder_from(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Path | None:
    if args.out is None:
        if args.resume:
            parser.error("--resume needs the --out DIR that holds the run")
        return None
    if not args.resume and any(checkpoint(args.out, name).exists() for name in ("float", "low")):
        parser.error(f"--out {args.out} holds a run already; add --resume to go on with it, or name another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    return args.out


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Both lines' results, after the table is printed."""
    parser = command_line()
    args = parser.parse_args(argv)
    settings, device, folder = settings_from(args, parser), device_from(args.device, parser), folder_from(args, parser)
    try:
        dataset = data.load(settings.dataset, args.data, device)
        recipes = {"float": "float", "low": settings.recipe}
        lines = [Line(name, recipe, settings, dataset, device) for name, recipe in recipes.items()]
        for line in lines:
            if args.resume and folder and checkpoint(folder, line.name).exists():
                line.load(folder)
    except INPUT_ERRORS as error:
        raise SystemExit(f"train.py: error: {error}") from None
    results = {line.name: train(line, folder) for line in lines}
    printed = f"{describe(settings, results['low']['n_averaged'])}\n\n{table(results)}"
    if folder:
        record = {"settings": asdict(settings), "environment": environment(device), "lines": results, "table": printed}
        (folder / "results.json").write_text(json.dumps(record, indent=2) + "\n")
    print(printed)
    return results


if __name__ == "__main__":
    main()
