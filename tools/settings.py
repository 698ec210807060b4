"""All that decides the result of a line in training: its settings, the data sets' defaults, and configurations."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = [
    *("DEFAULTS", "EVERYWHERE", "OPTIMIZERS", "ConfigError", "Optimizer", "Plan", "Settings"),
    *("configured", "learning_rate", "nearest"),
]

BETA2 = 0.95  # of AdamW's second moment: at 0.999 it would remember more steps than a short run has


class ConfigError(ValueError):
    """A configuration that cannot be read, or a setting that does not exist or fit."""


@dataclass(frozen=True)
class Optimizer:
    """An optimizer: how it is made from the settings, its name in tables, and the recipe that suits it."""

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
    """Everything beside the recipe that decides a line's result. A resumed line must have the same settings.

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
    lr_changes: str = "step"  # the learning rate changes each "step", or at the start of each "epoch"
    samples: int = 0  # of an epoch, drawn anew from all; 0: as many as the data set has it


EVERYWHERE = {
    **{"optimizer": "sgd", "average_every": 0, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 128},
    **{"lr_changes": "step", "samples": 0},
}
# Defaults. CIFAR: as the SWALP authors' scripts train VGG16; tools/configs has their other runs. ImageNet: as
# torchvision trains ResNet-18, with ten epochs of averaging behind it.
_VGG = {"model": "vgg16", "epochs": 300, "average_from": 200, "lr": 0.05, "average_lr": 0.01}
DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"model": "convnet", "epochs": 30, "average_from": 10, "lr": 0.05, "average_lr": 0.05, "batch_size": 32},
    # So few epochs give too few weights, if each gives one.
    "fashion-mnist": {
        **{"model": "convnet", "epochs": 12, "average_from": 6, "average_every": 16, "lr": 0.05, "average_lr": 0.02},
    },
    "cifar10": _VGG,
    "cifar100": _VGG,
    "imagenet": {
        **{"model": "resnet18", "epochs": 100, "average_from": 90, "average_every": 500, "batch_size": 256},
        **{"lr": 0.1, "average_lr": 0.01, "weight_decay": 1e-4},
    },
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


@dataclass(frozen=True)
class Plan:
    """A line to be trained."""

    name: str
    recipe: str
    settings: Settings


def configured(path: Path, given: Mapping[str, Any]) -> list[Plan]:
    """The lines of a configuration: settings that all share, then a table of its own for each, with its recipe.

    given: settings, and ``seed``, that override the file's. Raises ConfigError.
    """
    common = _read(path)
    lines = {name: common.pop(name) for name, value in list(common.items()) if isinstance(value, dict)}
    kinds = {field.name: field.type for field in fields(Settings) if field.name != "seed"}
    shared = _checked(path, "", common, kinds)
    if not lines:
        raise ConfigError(f'{path} has no line to train; add a table, such as [float] with recipe = "float"')
    dataset = given.get("dataset", shared.get("dataset"))
    if dataset not in DEFAULTS:
        raise ConfigError(f"{path}: dataset is {dataset!r}; use {nearest(str(dataset), DEFAULTS)}")
    del kinds["dataset"]  # the lines stand in one table
    plans = []
    for name, table in lines.items():
        own = _checked(path, f"[{name}] ", table, {**kinds, "recipe": "str"})
        values = {**EVERYWHERE, **DEFAULTS[dataset], **shared, **own, **given, "dataset": dataset}
        recipe = values.pop("recipe", None)
        if recipe is None:
            raise ConfigError(f'{path}: [{name}] has no recipe; add one, such as recipe = "bfp8[0]"')
        settings = Settings(**values)
        if settings.average_from > settings.epochs:
            raise ConfigError(f"{path}: [{name}] ends before its warm-up of {settings.average_from} epochs does")
        plans.append(Plan(name, recipe, settings))
    return plans


def _read(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:
        raise ConfigError("configurations are read from Python 3.11 on; give the settings as options") from None
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}; name a file of tools/configs") from None
    except ValueError as error:
        raise ConfigError(f"{path} is no TOML ({error})") from None


def _checked(path: Path, where: str, values: Mapping[str, Any], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` under the names of settings."""
    known = {name.replace("_", "-"): name for name in kinds}
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{path}: {where}there is no setting {key!r}; use {nearest(key, known)}")
        kind = kinds[known[key]]
        fits = isinstance(value, {"str": str, "int": int, "float": float | int}[kind]) and not isinstance(value, bool)
        least = 1 if key in ("epochs", "batch-size") else 0
        if not fits or (kind != "str" and value < least):
            raise ConfigError(f"{path}: {where}{key} is {value!r}; it takes {WHAT[kind].format(least)}")
        checked[known[key]] = value
    for key, choices in {"optimizer": OPTIMIZERS, "lr_changes": ("step", "epoch")}.items():
        if (value := checked.get(key)) is not None and value not in choices:
            raise ConfigError(f"{path}: {where}{key.replace('_', '-')} is {value!r}; use {' or '.join(choices)}")
    return checked


WHAT = {"str": "a text", "int": "a whole number of {} or more", "float": "a number of {} or more"}


def nearest(name: str, known: Collection[str]) -> str:
    """The names nearest to a misspelt one, or all."""
    return " or ".join(difflib.get_close_matches(name, known, n=2) or known)
