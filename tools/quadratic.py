"""Theorem 1: linear regression with weights of 8 bits. Their average passes below the best point of their grid.

As in the theorem, only the weights are rounded, to fixed point. Gradients, activations and errors are float32.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn

import drawing
import swalp_fx
from drawing import BLACK, BLUE, GREY, VERMILION
from progress import bar

MARKS_A_DECADE = 8  # points of a curve
CHUNK = 1000  # steps that draw their samples together


@dataclass(frozen=True)
class Settings:
    """Rate and batch are large on purpose: they decide how soon the average is below the floor.

    Rounding an update u to a grid of step delta has variance |u| (delta - |u|). So the average of T weights is off by
    about (delta E|g| / lr + tr C) / (curvature^2 T). C is the covariance of the gradient g. At a rate of 1e-3 and
    batches of 1 it would take a million steps.
    """

    seed: int = 0
    dimensions: int = 256
    samples: int = 4096
    format: str = "fixed8.6"
    copies: int = 4  # independent runs; their squared distances are averaged
    batch_size: int = 16
    lr: float = 0.02
    warmup: int = 300  # steps before the average begins
    steps: int = 20_000  # after the warm-up; each one's weights are averaged


FULL = Settings(copies=8, steps=200_000)


def options(parser: argparse.ArgumentParser) -> None:
    pass


class Regressions(nn.Module):
    """Copies of a linear regression, in float and in low precision, on the same batches: [S, n, d] -> [S, n, 2]."""

    def __init__(self, copies: int, dimensions: int) -> None:
        super().__init__()
        self.exact = nn.Parameter(torch.zeros(copies, dimensions))
        self.low = nn.Parameter(torch.zeros(copies, dimensions))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.bmm(inputs, torch.stack([self.exact, self.low], dim=-1))


def problem(settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs [n, d], targets [n], and the optimum [d] of their squared error; all float64."""
    generator = torch.Generator().manual_seed(settings.seed)
    inputs = torch.randn(settings.samples, settings.dimensions, generator=generator, dtype=torch.float64)
    truth = 2 * torch.rand(settings.dimensions, generator=generator, dtype=torch.float64) - 1
    targets = inputs @ truth + torch.randn(settings.samples, generator=generator, dtype=torch.float64)
    return inputs, targets, torch.linalg.lstsq(inputs, targets[:, None]).solution[:, 0]


def run(settings: Settings) -> dict[str, Any]:
    """``averaged`` [points], and each line's ``distance``: the squared distance to the optimum, a mean over copies."""
    inputs, targets, optimum = problem(settings)
    torch.manual_seed(settings.seed)
    model = Regressions(settings.copies, settings.dimensions)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
    recipe = swalp_fx.Recipe.parse("float", rules=(swalp_fx.Rule("low", weight=settings.format),))
    _, swalp = swalp_fx.convert(model, optimizer, recipe=recipe, seed=settings.seed)

    points = _marks(settings.steps)
    lines: dict[str, list[float]] = {line: [] for line in ("SGD-FP", "SWA-FP", "SGD-LP", "SWALP")}
    for step, (x, y) in enumerate(_batches(inputs.float(), targets.float(), settings), start=1 - settings.warmup):
        optimizer.zero_grad()
        # A sum over copies and lines: each has the gradient that it would have alone.
        (0.5 * (model(x) - y.unsqueeze(-1)).square().mean(1)).sum().backward()
        optimizer.step()
        if step > 0:
            swalp.update_average()
        if step in points:
            averages = swalp.state_dict()["average"]
            for name, of_last, of_average in (("exact", "SGD-FP", "SWA-FP"), ("low", "SGD-LP", "SWALP")):
                lines[of_last].append(_distance(model.get_parameter(name), optimum))
                lines[of_average].append(_distance(averages[name], optimum))

    floor = _distance(swalp_fx.quantize(optimum, settings.format), optimum)
    enough = [i for i, point in enumerate(points) if point >= 10 / settings.lr]  # earlier weights are correlated
    return {
        "averaged": points,
        "distance": lines,
        "slopes": {line: _slope(points, lines[line], enough) for line in ("SWA-FP", "SWALP")},
        "final": {line: values[-1] for line, values in lines.items()},
        "floor": floor,
    }


def _batches(inputs: Tensor, targets: Tensor, settings: Settings) -> Any:
    generator = torch.Generator().manual_seed(settings.seed + 1)
    shape = (CHUNK, settings.copies, settings.batch_size)
    steps = settings.warmup + settings.steps
    with bar("quadratic", steps) as progress:
        for step in range(steps):
            if step % CHUNK == 0:
                chosen = torch.randint(settings.samples, shape, generator=generator)
            index = chosen[step % CHUNK]
            yield inputs[index], targets[index]
            progress.update()


def _marks(steps: int) -> list[int]:
    """Numbers of weights, evenly spaced on a logarithmic axis, ``steps`` the last."""
    decades = int(np.log10(steps) * MARKS_A_DECADE)
    return sorted({round(10 ** (i / MARKS_A_DECADE)) for i in range(decades + 1)} | {steps})


def _distance(weights: Tensor, optimum: Tensor) -> float:
    return (weights.detach().double() - optimum).square().sum(-1).mean().item()


def _slope(points: list[int], values: list[float], chosen: list[int]) -> float:
    logs = [np.log([each[i] for i in chosen]) for each in (points, values)]
    return float(np.polyfit(*logs, 1)[0])


def table(record: dict[str, Any]) -> str:
    points, lines = record["averaged"], record["distance"]
    rows = [[points[i], *(f"{line[i]:.5f}" for line in lines.values())] for i in _shown(points)]
    slopes = ", ".join(f"{line} {slope:.3f}" for line, slope in record["slopes"].items())
    return (
        f"squared distance to the optimum, {record['settings']['format']} weights, after T averaged weights\n\n"
        + tabulate(rows, headers=["T", *lines], disable_numparse=True, stralign="right")
        + f"\n\nfloor, the rounded optimum: {record['floor']:.5f}\nslope of the averages in T: {slopes}"
    )


def _shown(points: list[int]) -> list[int]:
    """The whole powers of ten from 100 on, and the last."""
    return [i for i, point in enumerate(points) if point in (100, 1000, 10_000, 100_000) or point == points[-1]]


COLORS = {"SGD-FP": GREY, "SWA-FP": BLACK, "SGD-LP": VERMILION, "SWALP": BLUE}


def figures(record: dict[str, Any]) -> dict[str, Figure]:
    figure, (axes,) = drawing.subplots(1, 6.4, 4.0)
    points, floor = record["averaged"], record["floor"]
    for line, values in record["distance"].items():
        axes.loglog(points, values, color=COLORS[line], linestyle="-" if line in record["slopes"] else "--")
    axes.axhline(floor, color=GREY, linewidth=1, linestyle=":")
    axes.text(1.15 * points[0], 0.93 * floor, "the optimum, rounded to the grid", color=GREY, fontsize=8, va="top")
    end, low = points[-1], record["final"]["SWA-FP"] / 2.5
    axes.plot([end / 30, end], [30 * low, low], color=GREY, linewidth=1)
    axes.text(end / 6, 6 * low * 0.8, "1/T", color=GREY, fontsize=8, ha="right", va="top")
    axes.set_xlim(points[0], end)
    axes.set_xlabel("T, weights averaged (one a step)")
    axes.set_ylabel("squared distance to the optimum")
    slopes = record["slopes"]
    labels = {
        f"{line}, slope {slopes[line]:.2f}" if line in slopes else f"{line}, last weights": (end, value, COLORS[line])
        for line, value in record["final"].items()
    }
    drawing.label_ends(axes, labels)
    return {"quadratic": figure}
