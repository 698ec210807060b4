"""One network from many seeds at once: each parameter holds a copy for each seed, and each copy its own order of data.

Digits need so little arithmetic that 16 stacked runs take the time of four.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swalp_fx
from data import Dataset
from settings import learning_rate
from swalp_fx.formats import block
from swalp_fx.random import fold_in

__all__ = ["LOST", "Runs", "Training", "errors", "recipe", "scores", "stacked", "standard_error", "summary"]

HIDDEN = (128, 64)
LOST = 50.0  # % of test error from which on a format counts as one that training does not survive; chance is 90


@dataclass(frozen=True)
class Training:
    """The paper's schedule on digits; all but ``seed`` and ``seeds`` holds for each run alike."""

    seed: int = 0
    seeds: int = 16  # stacked runs
    epochs: int = 20
    average_from: int = 8  # epochs of warm-up
    lr: float = 0.05
    average_lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 32

    def steps(self, dataset: Dataset) -> int:
        """In an epoch."""
        return math.ceil(len(dataset.train_targets) / self.batch_size)


def stacked(format: swalp_fx.Format) -> swalp_fx.Format:
    """The format that rounds a stack of tensors as ``format`` rounds each: scales are shared within one seed only.

    NVFP4 is an exception: the seeds share its second scale, the tensor's.
    """
    if not format.scale_bits:
        return format
    if isinstance(format.block, block.Runs):
        return replace(format, block=block.Runs(tuple((within(axis), size) for axis, size in format.block.runs)))
    return replace(format, block=block.Slices((0, *map(within, format.block.dims))))


def within(dim: int) -> int:
    """The number, in a stack, of a tensor's dimension."""
    return dim if dim < 0 else dim + 1


def recipe(text: str) -> swalp_fx.Recipe:
    """The recipe of a stack of runs that each have the recipe ``text``."""
    single = swalp_fx.Recipe.parse(text)
    values = {field.name: getattr(single, field.name) for field in fields(single)}
    quantizers = {name: value for name, value in values.items() if isinstance(value, swalp_fx.Quantizer)}
    return replace(single, states=_stacked(dict(single.states)), **_stacked(quantizers))


def _stacked(quantizers: dict[str, swalp_fx.Quantizer]) -> dict[str, Any]:
    return {name: replace(each, format=stacked(each.format)) for name, each in quantizers.items()}


class Linear(nn.Module):
    """``nn.Linear`` for each seed: [S, n, inputs] -> [S, n, outputs].

    The bias has a dimension of 1 for the samples, so that it takes the formats of a weight: a block a seed.
    """

    def __init__(self, seeds: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(seeds, outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(seeds, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight.transpose(1, 2))


def network(seeds: int, inputs: int, classes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in HIDDEN:
        layers += [Linear(seeds, inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, Linear(seeds, inputs, classes))


class Runs:
    """The stacked runs of one recipe in training, ``swalp`` with their average."""

    def __init__(self, text: str, settings: Training, dataset: Dataset) -> None:
        self.settings, self.dataset, self.epoch = settings, dataset, 0
        torch.manual_seed(settings.seed)  # every recipe starts from the same weights
        self.model = network(settings.seeds, dataset.train_inputs[0].numel(), dataset.classes)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        _, self.swalp = swalp_fx.convert(self.model, self.optimizer, recipe=recipe(text), seed=settings.seed)

    @property
    def averaging(self) -> bool:
        """Whether the warm-up is over."""
        return self.epoch >= self.settings.average_from

    def train_epoch(self, after_step: Callable[[], Any]) -> None:
        settings, steps = self.settings, self.settings.steps(self.dataset)
        generator = torch.Generator().manual_seed(fold_in(settings.seed, self.epoch) >> 1)
        order = torch.rand(settings.seeds, len(self.dataset.train_targets), generator=generator).argsort(1)
        self.model.train()
        for step, index in enumerate(order.split(settings.batch_size, 1)):
            self.optimizer.param_groups[0]["lr"] = learning_rate(self.epoch + step / steps, settings)
            inputs, targets = self.dataset.train_inputs[index].flatten(2), self.dataset.train_targets[index]
            self.optimizer.zero_grad()
            # A sum over seeds: each has the gradient that it would have alone.
            loss = F.cross_entropy(self.model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
            (loss / index.shape[1]).backward()
            self.optimizer.step()
            after_step()
        self.epoch += 1

    def errors(self, model: nn.Module) -> Tensor:
        return errors(model, self.dataset, self.settings.seeds)


@torch.no_grad()
def errors(model: nn.Module, dataset: Dataset, seeds: int) -> Tensor:
    """Test error in % of each seed [S], float64."""
    inputs = dataset.test_inputs.flatten(1).expand(seeds, -1, -1)
    wrong = model.eval()(inputs).argmax(-1) != dataset.test_targets
    return 100 * wrong.double().mean(1)


def scores(text: str, settings: Training, dataset: Dataset, on_step: Callable[[], Any]) -> dict[str, Tensor]:
    """Score -> test errors in % of each seed [S], of runs in the recipe ``text``.

    ``warm-up``: the weights at its end, SGD-LP in the paper (the rate has decayed to 1 %). ``last``: the weights at the
    end, under the rate of averaging. ``mean``: over the epochs after the warm-up. ``average``: SWALP.
    """
    runs = Runs(text, settings, dataset)

    def after_step() -> None:
        if runs.averaging:
            runs.swalp.update_average()
        on_step()

    history = []
    for _ in range(settings.epochs):
        runs.train_epoch(after_step)
        history.append(runs.errors(runs.model))
    return {
        "warm-up": history[settings.average_from - 1],
        "last": history[-1],
        "mean": torch.stack(history[settings.average_from :]).mean(0),
        "average": runs.errors(runs.swalp.averaged_model()),
    }


def summary(of: dict[str, Tensor]) -> dict[str, Any]:
    """``errors`` by seed, ``mean`` and ``standard error`` of each score and of the gain; ``won``: seeds with a gain.

    The gain: how much lower the error of the average is than the mean error of its epochs.
    """
    gain = of["mean"] - of["average"]
    each = of | {"gain": gain}
    return {
        "errors": {name: values.tolist() for name, values in of.items()},
        "mean": {name: values.mean().item() for name, values in each.items()},
        "standard error": {name: standard_error(values) for name, values in each.items()},
        "won": int((gain > 0).sum()),
    }


def standard_error(values: Tensor) -> float:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else 0.0
