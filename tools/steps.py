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
import trial

RECIPE = "bfp8[0]"
# torchvision's resnet18 leaves one pixel of such small images; the last two are the gallery's.
MODELS = ["vgg16", "cifar_resnet18", "resnet18", "vit", "rotary"]
BATCH, SIZE = 32, 32
ADAMW = ("vit", "decoder", "rotary")  # trained with AdamW in the gallery, the others with SGD
SECONDS = 40.0  # of steps for a model
TURNS = 3  # at least, behind one that warms up

PHASES = ("forward", "backward", "update")
Make = Callable[[nn.Module], torch.optim.Optimizer]


@dataclass
class Contender:
    """One way to train: its model, its optimizer, and the seconds of its steps, by phase."""

    name: str
    model: nn.Module
    optimizer: Any
    seconds: list[tuple[float, ...]] = field(default_factory=list)
    scale: float = 1.0  # of the loss; the optimizer takes it off the gradients

    def step(self, once: Callable[[Callable[[], Any]], float], inputs: Tensor, targets: Tensor) -> None:
        losses: list[Tensor] = []
        self.optimizer.zero_grad()
        forward = once(lambda: losses.append(self.scale * _loss(self.model, inputs, targets)))
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


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, inputs, targets): a new model of that name, and a batch that it can be trained on.

    Images are [N, 3, side, side] with a class each, texts int64 [N, T] with a next byte for each place.
    Raises ModelError for an unknown name, and for a model that does not take the batch.
    """
    of_images = len(models.default_shape(name)) == 2
    shape = (3, SIZE) if of_images else models.default_shape(name)
    classes = 10 if of_images else 256
    torch.manual_seed(0)
    model = models.build(name, classes, *shape)
    trial.of_model(name, model, *shape, batch=BATCH)
    if of_images:
        return model, torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(classes, (BATCH,))
    return model, torch.randint(classes, (BATCH, *shape)), torch.randint(classes, (BATCH, *shape))


def contenders_of(name: str, model: nn.Module) -> list[Contender]:
    """One for each way to train a copy of ``model``.

    QPyTorch has none for a transformer: it rounds outputs of layers alone, and no state of AdamW.
    """
    optimizer, ways = (_adamw, WAYS) if name in ADAMW else (_sgd, (*WAYS, in_qpytorch))
    found = (way(copy.deepcopy(model), optimizer) for way in ways)
    return [contender for contender in found if contender is not None]


def measure(
    once: Callable[[Callable[[], Any]], float], names: Sequence[str], device: str
) -> dict[str, list[dict[str, Any]]]:
    """The table of ``names``. ``once`` times one call, in seconds."""
    rows = []
    for name in names:
        model, inputs, targets = (each.to(device) for each in made(name))
        if not (found := swalp_fx.check(model, inputs[:2])):
            raise SystemExit(f"{name}: {found}; so the speed says nothing")
        by_turns = contenders_of(name, model)
        run(once, by_turns, inputs, targets)
        of_float = min(map(sum, by_turns[0].seconds))
        rows += [contender.row(name, of_float) for contender in by_turns]
    return {"rows": rows}


def run(
    once: Callable[[Callable[[], Any]], float], contenders: Sequence[Contender], inputs: Tensor, targets: Tensor
) -> None:
    """Steps of all contenders by turns, for a while; the first of each is not kept."""
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(contenders[0].seconds) <= TURNS:
        for contender in contenders:
            contender.step(once, inputs, targets)
    for contender in contenders:
        del contender.seconds[0]


def _loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def in_float(model: nn.Module, optimizer: Make) -> Contender:
    return Contender("float", model, optimizer(model))


def in_identity(model: nn.Module, optimizer: Make) -> Contender:
    """The graph with all its nodes, though none rounds, and the step in float."""
    return Contender("identity formats", overhead.with_identity(model), optimizer(model))


def in_low_precision(model: nn.Module, optimizer: Make) -> Contender:
    made = optimizer(model)
    swalp_fx.convert(model, made, recipe=RECIPE)
    return Contender(f"swalp_fx {RECIPE}", model, made)


def in_qpytorch(model: nn.Module, optimizer: Make) -> Contender | None:
    """QPyTorch's contender, if QPyTorch is installed."""
    try:
        made = qpytorch.in_low_precision(model, optimizer(model), bits=8)
    except ImportError:
        return None
    return Contender("QPyTorch bfp8, dim 0", model, made)


WAYS = (in_float, in_identity, in_low_precision)
