"""A small network, optimizers of every kind, and a plain loop of Algorithm 2 to judge their steps."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swalp_fx.ops import quantize
from swalp_fx.optimizer import SWALP
from swalp_fx.random import fold_in
from swalp_fx.recipe import Recipe

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "for-each": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}
# Every role in a format of its own, so that no two can be mistaken for one another.
RECIPE = "W=bfp8[0] G=fixed8.9 M=bfp10[0] V=bfp12[0] A=float E=float"
MEANS = ("momentum_buffer", "exp_avg")  # of gradients; the rest are second moments
ORDERS = list(itertools.permutations(range(3)))  # of model, optimizer and swalp
MASTERS = {"none": {}, "rounded": {"master": "fixed16.12"}, "float": {"master": "float"}}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Tests compare the bits of a step, so these optimizers give the same bits each time.
    pytest.mark.filterwarnings("ignore:.*divides one moment by another"),
]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def loss_of(model, step):
    rows = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 6, generator=rows), torch.randint(3, (16,), generator=rows)
    return F.cross_entropy(model(x), y)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def setup(make=OPTIMIZERS["momentum"], recipe=RECIPE, model=None, **changes):
    """(model, optimizer, attached swalp), the same each time."""
    model = net() if model is None else model
    optimizer = make(model.parameters())
    swalp = SWALP(model, Recipe.parse(fitted(recipe, optimizer), **changes), seed=7)
    swalp.attach(optimizer)
    return model, optimizer, swalp


def fitted(recipe, optimizer):
    """The text of a recipe without the roles that the optimizer has no states for: naming those is refused."""
    if not isinstance(optimizer, torch.optim.SGD):
        return recipe
    lacks = ("V=",) if optimizer.param_groups[0]["momentum"] else ("V=", "M=")
    return " ".join(word for word in recipe.split() if not word.startswith(lacks))


def values(model, optimizer=None, swalp=None):
    """Every number of a run, as nested plain containers of tensors."""
    return [
        dict(model.state_dict()),
        optimizer.state_dict()["state"] if optimizer else None,
        swalp.state_dict() if swalp else None,
    ]


def same(a, b):
    """Whether nested containers hold the same bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def algorithm_2(model, optimizer, recipe, seed, steps):
    """The plain loop that the pass must equal, written out for one optimizer that has no hooks."""
    parameters = list(model.parameters())
    masters = None if recipe.master is None else [p.detach().clone() for p in parameters]

    def q(tensor, quantizer, role, index):
        rounding = quantizer.rounding or recipe.rounding
        return quantize(tensor, quantizer.format, rounding, key=key, stream=role * 2**32 + index)

    for step in steps:
        key = fold_in(seed, step)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for i, p in enumerate(parameters):
            p.grad = q(p.grad, recipe.gradient, 1, i)
        if masters is not None:
            for p, master in zip(parameters, masters, strict=True):
                p.data.copy_(master)
        optimizer.step()
        for i, p in enumerate(parameters):
            if masters is not None:
                masters[i] = q(p.data, recipe.master, 2, i)
                p.data.copy_(masters[i])
            p.data.copy_(q(p.data, recipe.weight, 3, i))
            moments = {k: v for k, v in optimizer.state.get(p, {}).items() if k != "step" and v is not None}
            for slot, name in enumerate(sorted(moments)):
                quantizer = recipe.momentum if name in MEANS else recipe.second_moment
                optimizer.state[p][name] = q(moments[name], quantizer, 4 + slot, i)
    return masters


class Decayed(torch.optim.SGD):
    """Goes on after super().step(), by when torch has fired the step hooks of the inner call."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.97)


class Breaks(torch.optim.SGD):
    """Raises in the middle of its step, as an optimizer out of memory would."""

    broken = False

    def step(self, closure=None):
        if self.broken:
            raise MemoryError
        return super().step(closure)


def run_on(model, optimizer, swalp, steps):
    for step in steps:
        train(model, optimizer, [step])
        swalp.update_average()
