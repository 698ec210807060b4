"""How few bits the average itself needs: many averages of one trajectory of low-precision weights.

Averages differ in bits, in the steps between updates, and in rounding: at each update, to nearest or stochastically,
or once, when it is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

import data
import drawing
import swalp_fx
from drawing import BLUE, GREEN, GREY, ORANGE, VERMILION
from progress import bar
from stacked import Runs, Training, stacked, standard_error
from swalp_fx.random import fold_in

NEAREST, STOCHASTIC, READ = "nearest", "stochastic", "read"
MODES = {
    READ: "rounded once, when it is read",
    STOCHASTIC: "stochastically, at each update",
    NEAREST: "to nearest, at each update",
}


@dataclass(frozen=True)
class Settings(Training):
    epochs: int = 40
    recipe: str = "bfp4[0]"
    bits: tuple[int, ...] = (12, 10, 9, 8, 7, 6, 5, 4)  # of the averages, one exponent a row
    every: tuple[int, ...] = (1, 8, 32, 64)  # steps between two updates; an epoch has 32
    watched: int = 8  # bits of the averages that are compared with the average in float


FULL = Settings(seeds=32, epochs=136)


def options(parser: argparse.ArgumentParser) -> None:
    pass


def format_of(bits: int) -> swalp_fx.Format:
    return stacked(swalp_fx.parse(f"bfp{bits}[0]"))


def step_of(x: Tensor, bits: int) -> Tensor:
    """The step of ``format_of(bits)`` in each of the rows of a stack [S, rows, n]: [S, rows, 1]."""
    _, exponent = torch.frexp(x.abs().amax(-1, keepdim=True))
    return torch.exp2(exponent - 1.0 - (bits - 2))


class Averages:
    """The averages of one trajectory, and the distances between some of them as it goes on."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.steps = settings, 0
        self.exact = {every: swalp_fx.Average() for every in settings.every}
        self.rounded = {
            (mode, every, bits): swalp_fx.Average(format_of(bits), mode)
            for mode in (NEAREST, STOCHASTIC)
            for every in settings.every
            for bits in settings.bits
        }
        self.distance: dict[str, list[float]] = {name: [] for name in ("updates", "steps", "weights", *MODES)}

    def update(self, parameters: dict[str, Tensor]) -> None:
        self.steps += 1
        key = fold_in(self.settings.seed, self.steps)
        for every, average in self.exact.items():
            if self.steps % every == 0:
                average.update(parameters)
        for (_, every, _), average in self.rounded.items():
            if self.steps % every == 0:
                average.update(parameters, key=key)
        if self.steps in _marks():
            self._measure(parameters)

    @torch.no_grad()
    def _measure(self, parameters: dict[str, Tensor]) -> None:
        """The relative distance of the most frequent averages from their average in float.

        ``steps``: the distance of the weights, a root mean square in steps of the watched format: sigma / delta.
        """
        often, bits = self.settings.every[0], self.settings.watched
        exact = self.exact[often]
        found = {"weights": parameters, READ: exact.mean(format_of(bits))}
        found |= {mode: self.rounded[mode, often, bits].means for mode in (NEAREST, STOCHASTIC)}
        norm = _flat(exact.means).norm()
        away = [(parameters[name] - mean) / step_of(mean, bits) for name, mean in exact.means.items()]
        self.distance["updates"].append(exact.n_averaged)
        self.distance["steps"].append(torch.cat([each.flatten() for each in away]).square().mean().sqrt().item())
        for name, tensors in found.items():
            self.distance[name].append(((_flat(tensors) - _flat(exact.means)).norm() / norm).item())

    def read(self) -> Iterator[tuple[str, int, int | None, swalp_fx.Average, swalp_fx.Format]]:
        """(mode, every, bits or None for float, average, format to read it in) for each average to be scored."""
        for every, average in self.exact.items():
            for mode in MODES:
                yield mode, every, None, average, swalp_fx.FLOAT
            for bits in self.settings.bits:
                yield READ, every, bits, average, format_of(bits)
        for (mode, every, bits), average in self.rounded.items():
            yield mode, every, bits, average, swalp_fx.FLOAT


def _marks() -> set[int]:
    """The numbers of updates to measure distances at, eight a decade; the first few averages lie on every grid."""
    return {round(10 ** (i / 8)) for i in range(6, 50)}


@torch.no_grad()
def _flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors.values()])


def run(settings: Settings) -> dict[str, Any]:
    """``errors`` and ``standard error``: mode -> steps between updates -> a list by bits, float first.

    ``SGD-LP``: the mean over the averaged epochs; ``distance``: of averages of ``watched`` bits from float's.
    """
    dataset = data.load("digits")
    runs, averages = Runs(settings.recipe, settings, dataset), Averages(settings)
    parameters = dict(runs.model.named_parameters())
    history = []
    with bar("averaging", settings.epochs * settings.steps(dataset)) as progress:

        def after_step() -> None:
            if runs.averaging:
                averages.update(parameters)
            progress.update()

        for _ in range(settings.epochs):
            runs.train_epoch(after_step)
            history.append(runs.errors(runs.model))
    low = torch.stack(history[settings.average_from :]).mean(0)
    record: dict[str, Any] = {
        "SGD-LP": {"mean": low.mean().item(), "standard error": standard_error(low)},
        "bits": [None, *settings.bits],
        "errors": {mode: {str(every): [] for every in settings.every} for mode in MODES},
        "standard error": {mode: {str(every): [] for every in settings.every} for mode in MODES},
        "distance": averages.distance,
        "epoch": settings.steps(dataset),
    }
    with swalp_fx.in_float(runs.model):  # copies made here are float models
        found = {
            (mode, every, bits): runs.errors(average.applied_to(runs.model, format))
            for mode, every, bits, average, format in averages.read()
        }
    for mode in MODES:
        for every in settings.every:
            for bits in record["bits"]:
                errors = found[mode, every, bits]
                record["errors"][mode][str(every)].append(errors.mean().item())
                record["standard error"][mode][str(every)].append(standard_error(errors))
    return record


def table(record: dict[str, Any]) -> str:
    settings, low = record["settings"], record["SGD-LP"]
    headers = ["updated every", *(_bits(bits) for bits in record["bits"])]
    parts = [
        f"test error in %, mean over {settings['seeds']} seeds, by the bits of the average; training in "
        f"{settings['recipe']}, SGD-LP while averaging {low['mean']:.2f} ± {low['standard error']:.2f}"
    ]
    for mode, title in MODES.items():
        rows = [
            [_every(every, record), *(f"{e:.2f}" for e in errors)] for every, errors in record["errors"][mode].items()
        ]
        sides = ("left", *["right"] * len(record["bits"]))
        text = tabulate(rows, headers=headers, disable_numparse=True, colalign=sides)
        parts.append(f"{title} (± {max(map(max, record['standard error'][mode].values())):.2f} at most)\n\n{text}")
    n = stalls_from(record)
    parts.append(
        f"an average of {settings['watched']} bits, updated every step, has n > 2 sigma / delta from n = {n} on"
    )
    return "\n\n".join(parts)


def stalls_from(record: dict[str, Any]) -> int | None:
    """The first measured n beyond 2 sigma / delta; None if there is none."""
    pairs = zip(record["distance"]["updates"], record["distance"]["steps"], strict=True)
    return next((n for n, steps in pairs if n > 2 * steps), None)


def _bits(bits: int | None) -> str:
    return "float" if bits is None else str(bits)


def _every(every: str, record: dict[str, Any]) -> str:
    return {"1": "step", str(record["epoch"]): "epoch"}.get(every, f"{every} steps")


COLORS = (VERMILION, ORANGE, GREEN, BLUE)


def figures(record: dict[str, Any]) -> dict[str, Figure]:
    return {"averaging": _errors(record), "stall": _stall(record)}


def _errors(record: dict[str, Any]) -> Figure:
    figure, panels = drawing.subplots(len(MODES), 9.6, 3.4, sharey=True)
    places = range(len(record["bits"]))
    for axes, mode in zip(panels, MODES, strict=True):
        axes.axhline(record["SGD-LP"]["mean"], color=GREY, linewidth=1, linestyle=":")
        for (every, errors), color in zip(record["errors"][mode].items(), COLORS, strict=False):
            spread = record["standard error"][mode][every]
            axes.errorbar(places, errors, spread, color=color, marker="o", capsize=2)
        axes.set_xticks(places, [_bits(bits) for bits in record["bits"]])
        axes.set_xlabel("bits of the average")
        axes.set_title(MODES[mode], loc="left")
    panels[0].set_ylabel("test error, %")
    end, nearest = len(places) - 1, record["errors"][NEAREST].items()
    labels = {
        f"updated every {_every(every, record)}": (end, errors[-1], color)
        for (every, errors), color in zip(nearest, COLORS, strict=False)
    }
    labels["SGD-LP, not averaged"] = (end, record["SGD-LP"]["mean"], GREY)
    drawing.label_ends(panels[-1], labels, right=10)
    return figure


def _stall(record: dict[str, Any]) -> Figure:
    figure, (axes,) = drawing.subplots(1, 6.4, 3.6)
    distance, end = record["distance"], record["distance"]["updates"][-1]
    names = {
        "weights": ("the weights, not averaged", GREY),
        NEAREST: (MODES[NEAREST], VERMILION),
        STOCHASTIC: (MODES[STOCHASTIC], ORANGE),
        READ: (MODES[READ], BLUE),
    }
    labels = {}
    for name, (title, color) in names.items():
        axes.loglog(distance["updates"], distance[name], color=color)
        labels[title] = (end, distance[name][-1], color)
    if (stalls := stalls_from(record)) is not None:
        axes.axvline(stalls, color=GREY, linewidth=1, linestyle=":")
        axes.annotate(
            r"n = 2$\sigma$/$\delta$",
            (stalls, distance[READ][0]),
            (4, 0),
            textcoords="offset points",
            color=GREY,
            fontsize=8,
            va="top",
        )
    axes.set_xlim(distance["updates"][0], end)
    axes.set_xlabel("n, updates of the average (one a step)")
    axes.set_ylabel("distance from the average in float\n(share of its norm)")
    axes.set_title(f"an average of {record['settings']['watched']} bits", loc="left")
    drawing.label_ends(axes, labels)
    return figure
