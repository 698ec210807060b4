"""How long an optimizer's step takes in low precision, and how much memory, beside the plain optimizer's, by turns."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.profiler import ProfilerActivity, profile

import models
from swalp_fx.optimizer import SWALP
from swalp_fx.recipe import Recipe

RECIPE = "bfp8[0]"
MODEL = "resnet50"
TINY = (1500, 64)  # parameters, numbers of each
SECONDS = 8.0  # of steps for a row
TURNS = 3  # at least
MIB = 2**20

Make = Callable[[Iterable[nn.Parameter]], Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "SGD, momentum": lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=5e-4),
    "SGD, nesterov": lambda p: SGD(p, lr=0.01, momentum=0.9, weight_decay=5e-4, nesterov=True),
    "AdamW": lambda p: AdamW(p, lr=0.01),
}


@dataclass(frozen=True)
class Case:
    optimizer: str
    tiny: bool = False  # many small parameters instead of the model's
    dtype: torch.dtype = torch.float32
    changes: str = ""  # of the recipe
    goal: float | None = None  # of the ratio to the plain optimizer


CASES = [
    *(Case(name, goal=1.25) for name in OPTIMIZERS),
    *(Case(name, changes=" master=float", goal=1.6) for name in OPTIMIZERS),
    # Where the time of a step goes: without random draws, and with one rounding to nearest of the three.
    Case("SGD, momentum", changes=" rounding=nearest"),
    Case("SGD, momentum", changes=" rounding=nearest W=float M=float"),
    *(Case(name, dtype=torch.bfloat16, changes=" master=float") for name in ("SGD, momentum", "AdamW")),
    *(Case(name, tiny=True, goal=1.5) for name in OPTIMIZERS),
]
AVERAGE_GOAL = 0.4  # of the plain step


class Contender:
    """One optimizer and parameters of its own, with or without the pass."""

    def __init__(self, model: nn.Module, make: Make, recipe: str | None) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = make(self.model.parameters())
        self.swalp = None if recipe is None else SWALP(self.model, Recipe.parse(recipe), seed=0)
        if self.swalp is not None:
            self.swalp.attach(self.optimizer)

    def receive(self, gradients: Iterable[Tensor]) -> None:
        """Gradients that no step has rounded yet."""
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient.clone()
            else:
                parameter.grad.copy_(gradient)

    def held(self) -> int:
        """Bytes of parameters, gradients, states and masters."""
        tensors = [each for p in self.model.parameters() for each in (p, p.grad, *self.optimizer.state[p].values())]
        tensors += [] if self.swalp is None else self.swalp.state_dict()["masters"].values()
        return sum(each.nbytes for each in tensors if isinstance(each, Tensor))

    def peak(self) -> int:
        """Bytes at the peak of a step, with all that is held between steps."""
        if next(self.model.parameters()).is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.optimizer.step()
            return self.held() + torch.cuda.max_memory_allocated() - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self.optimizer.step()
        events: Any = found.profiler
        changes = [
            (each.start_ns(), each.nbytes()) for each in events.kineto_results.events() if each.name() == "[memory]"
        ]
        now = most = 0
        for _, change in sorted(changes, key=lambda each: each[0]):
            now += change
            most = max(most, now)
        return self.held() + most


def measure(once: Callable[[Callable[[], Any]], float], device: str) -> dict[str, list[dict[str, Any]]]:
    """The table. ``once`` times one call, in seconds."""
    torch.manual_seed(0)
    model = models.build(MODEL).to(device)
    tiny = nn.ParameterList(torch.randn(TINY[1]) for _ in range(TINY[0])).to(device)
    for name, make in OPTIMIZERS.items():
        refuse_unequal(name, tiny, make)
    rows = [row(case, once, (tiny if case.tiny else model).to(case.dtype)) for case in CASES]
    return {"rows": [*rows, averaging(once, model.float())]}


def refuse_unequal(name: str, model: nn.Module, make: Make) -> None:
    """Raises SystemExit unless the pass gives the plain optimizer's bits where it rounds nothing."""
    contenders = [Contender(model, make, recipe) for recipe in (None, "float", "float master=float")]
    for _ in range(2):
        gradients = [torch.randn_like(p) for p in model.parameters()]
        for each in contenders:
            each.receive(gradients)
            each.optimizer.step()
    plain, *others = (list(each.model.parameters()) for each in contenders)
    if not all(torch.equal(a, b) for other in others for a, b in zip(plain, other, strict=True)):
        raise SystemExit(f"{name}: a step that rounds nothing differs from the plain one, so its speed says nothing")


def row(case: Case, once: Callable[[Callable[[], Any]], float], model: nn.Module) -> dict[str, Any]:
    make, recipe = OPTIMIZERS[case.optimizer], RECIPE + case.changes
    plain, low = Contender(model, make, None), Contender(model, make, recipe)
    gradients = [torch.randn_like(p) / 100 for p in model.parameters()]
    for each in (plain, low):  # the first step makes the states
        each.receive(gradients)
        each.optimizer.step()
    least = {plain: math.inf, low: math.inf}
    end, turns = time.perf_counter() + SECONDS, 0
    while turns < TURNS or time.perf_counter() < end:
        for each in least:
            each.receive(gradients)
            least[each] = min(least[each], once(each.optimizer.step))
        turns += 1
    dtype = "" if case.dtype == torch.float32 else f", {str(case.dtype).removeprefix('torch.')}"
    peaks = [each.peak() for each in (low, plain)]
    parameters = f"{TINY[0]:,} of {TINY[1]}" if case.tiny else MODEL
    return line(f"{case.optimizer}{dtype}", recipe, parameters, (least[low], least[plain]), case.goal, peaks)


def averaging(once: Callable[[Callable[[], Any]], float], model: nn.Module) -> dict[str, Any]:
    """``update_average`` beside a plain step of SGD."""
    name = next(iter(OPTIMIZERS))
    plain, low = Contender(model, OPTIMIZERS[name], None), Contender(model, OPTIMIZERS[name], RECIPE)
    gradients = [torch.randn_like(p) / 100 for p in model.parameters()]
    for each in (plain, low):
        each.receive(gradients)
        each.optimizer.step()
    assert low.swalp is not None
    low.swalp.update_average()
    of_step = of_update = math.inf
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or of_update == math.inf:
        of_step, of_update = min(of_step, once(plain.optimizer.step)), min(of_update, once(low.swalp.update_average))
    held = low.held() + sum(each.nbytes for each in low.swalp.average.means.values())
    peaks = [held, plain.held()]
    return line(f"update_average beside {name}", RECIPE, MODEL, (of_update, of_step), AVERAGE_GOAL, peaks)


def line(
    what: str, recipe: str, parameters: str, seconds: tuple[float, float], goal: float | None, peaks: list[int]
) -> dict[str, Any]:
    (low, plain), (most, of_plain) = seconds, peaks
    return {
        "optimizer": what,
        "recipe": recipe,
        "parameters": parameters,
        "ms": low * 1e3,
        "plain ms": plain * 1e3,
        "ratio to plain": low / plain,
        "goal": goal,
        "peak MiB": most / MIB,
        "ratio of peaks": most / of_plain,
    }
