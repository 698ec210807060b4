"""How long a training step takes in low precision, beside the same step in float, by turns."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
import overhead
import qpytorch
import swalp_fx

RECIPE = "bfp8[0]"
MODELS = ["vgg16", "cifar_resnet18", "resnet18"]  # torchvision's resnet18 leaves one pixel of such small images
BATCH, SIZE = 32, 32
SECONDS = 40.0  # of steps for a model
TURNS = 3  # at least, behind one that warms up

PHASES = ("forward", "backward", "update")


@dataclass
class Contender:
    """One way to train: its model, its optimizer, and the seconds of its steps, by phase."""

    name: str
    model: nn.Module
    optimizer: Any
    seconds: list[tuple[float, ...]] = field(default_factory=list)
    scale: float = 1.0  # of the loss; the optimizer takes it off the gradients

    def step(self, once: Callable[[Callable[[], Any]], float], images: Tensor, labels: Tensor) -> None:
        losses: list[Tensor] = []
        self.optimizer.zero_grad()
        forward = once(lambda: losses.append(self.scale * F.cross_entropy(self.model(images), labels)))
        backward = once(losses[0].backward)
        self.seconds.append((forward, backward, once(self.optimizer.step)))

    def row(self, model: str, of_float: float) -> dict[str, Any]:
        """The quickest of its steps."""
        phases = min(self.seconds, key=sum)
        return {
            "model": model,
            "step": self.name,
            **{f"{name} ms": seconds * 1e3 for name, seconds in zip(PHASES, phases, strict=True)},
            "ms": sum(phases) * 1e3,
            "ratio to float": sum(phases) / of_float,
        }


def measure(
    once: Callable[[Callable[[], Any]], float], names: Sequence[str], device: str
) -> dict[str, list[dict[str, Any]]]:
    """The table of ``names``. ``once`` times one call, in seconds."""
    rows = []
    for name in names:
        torch.manual_seed(0)
        model = models.build(name, 10, 3, SIZE).to(device)
        images, labels = torch.randn(BATCH, 3, SIZE, SIZE, device=device), torch.randint(10, (BATCH,), device=device)
        if not (found := swalp_fx.check(model, images[:2])):
            raise SystemExit(f"{name}: {found}; so the speed says nothing")
        contenders = [make(copy.deepcopy(model)) for make in (in_float, in_identity, in_low_precision, in_qpytorch)]
        by_turns = [contender for contender in contenders if contender is not None]
        run(once, by_turns, images, labels)
        of_float = min(map(sum, by_turns[0].seconds))
        rows += [contender.row(name, of_float) for contender in by_turns]
    return {"rows": rows}


def run(
    once: Callable[[Callable[[], Any]], float], contenders: Sequence[Contender], images: Tensor, labels: Tensor
) -> None:
    """Steps of all contenders by turns, for a while; the first of each is not kept."""
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(contenders[0].seconds) <= TURNS:
        for contender in contenders:
            contender.step(once, images, labels)
    for contender in contenders:
        del contender.seconds[0]


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def in_float(model: nn.Module) -> Contender:
    return Contender("float", model, _sgd(model))


def in_identity(model: nn.Module) -> Contender:
    """The graph with all its nodes, though none rounds, and the step in float."""
    return Contender("identity formats", overhead.with_identity(model), _sgd(model))


def in_low_precision(model: nn.Module) -> Contender:
    optimizer = _sgd(model)
    swalp_fx.convert(model, optimizer, recipe=RECIPE)
    return Contender(f"swalp_fx {RECIPE}", model, optimizer)


def in_qpytorch(model: nn.Module) -> Contender | None:
    """QPyTorch's contender, if QPyTorch is installed."""
    try:
        optimizer = qpytorch.in_low_precision(model, _sgd(model), bits=8)
    except ImportError:
        return None
    return Contender("QPyTorch bfp8, dim 0", model, optimizer)
