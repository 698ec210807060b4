"""The optimizers whose step is one pass over memory: a row each, beside a functor of csrc/cpu/updates.h."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from ..ops import update_

__all__ = ["Kernel", "kernel_of"]

Group = Mapping[str, Any]
FLOAT32 = torch.finfo(torch.float32)
COUNTED = 2**24  # a float32 counts no further


@dataclass(frozen=True)
class Kernel:
    """What ``ops.update_`` is given for an optimizer. Its place in KERNELS is its number in csrc/cpu/updates.h."""

    optimizers: tuple[type[Optimizer], ...]  # and none of their subclasses
    states: Callable[[Group], Sequence[str]]  # of a group's parameters, in the order of states.states_of
    # The numbers of a group's update after ``count`` steps; None if torch makes it another way.
    numbers: Callable[[Group, float], Sequence[Any] | None]
    trials: tuple[Callable[[list[nn.Parameter]], Optimizer], ...]  # with each kind of operation among them
    counter: str | None = None  # the state that counts the steps

    def numbers_of(self, group: Group, count: float) -> list[float] | None:
        """The numbers of a group's update after ``count`` steps; None if the kernel does not take them."""
        numbers = self.numbers(group, count) if 0 <= count < COUNTED and float(count).is_integer() else None
        return None if numbers is None or not all(map(_is_float32, numbers)) else [float(each) for each in numbers]


def _states_of_sgd(group: Group) -> Sequence[str]:
    return ("momentum_buffer",) if group["momentum"] != 0 else ()


def _numbers_of_sgd(group: Group, count: float) -> Sequence[Any] | None:
    if group["fused"] or (group["foreach"] and group["nesterov"]):  # the latter may write into the gradients
        return None
    undamped = 1 - group["dampening"]
    return group["lr"], group["momentum"], undamped, group["weight_decay"], group["nesterov"], group["maximize"]


def _numbers_of_adam(group: Group, count: float) -> Sequence[Any] | None:
    if any(group[name] for name in ("amsgrad", "capturable", "differentiable", "fused")):
        return None
    (mean, square), lr, decay = group["betas"], group["lr"], group["weight_decay"]
    if not mean > 2**-24:  # a mean that is the gradient: of a zero, torch's last few numbers have another sign
        return None
    kept = 1 - lr * decay if group["decoupled_weight_decay"] else 1
    step = -(lr / (1 - mean ** (count + 1)))
    root_correction = (1 - square ** (count + 1)) ** 0.5
    decay = 0 if group["decoupled_weight_decay"] else decay
    return kept, decay, 1 - mean, square, 1 - square, root_correction, group["eps"], step, group["maximize"]


KERNELS = (
    Kernel(
        optimizers=(SGD,),
        states=_states_of_sgd,
        numbers=_numbers_of_sgd,
        trials=(lambda p: SGD(p, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1),),
    ),
    Kernel(
        optimizers=(Adam, AdamW),
        states=lambda group: ("exp_avg", "exp_avg_sq"),
        numbers=_numbers_of_adam,
        trials=(
            lambda p: AdamW(p, lr=0.1, betas=(0.4, 0.999)),
            lambda p: Adam(p, lr=0.1, weight_decay=0.1),
        ),
        counter="step",
    ),
)


def kernel_of(optimizer: Optimizer) -> Kernel | None:
    """The row of ``optimizer``; None if there is none, or if it does not give torch's bits on this processor."""
    row = next((each for each in KERNELS if type(optimizer) in each.optimizers), None)
    return row if row is not None and _agrees(row) else None


@functools.cache
def _agrees(row: Kernel) -> bool:
    """Whether torch's own steps give the bits of a kernel.

    A build of torch, or its choice for a processor, may round a product before adding to it, where the kernel does not.
    """
    return all(map(functools.partial(_agrees_in, row), row.trials))


@torch.no_grad()
def _agrees_in(row: Kernel, make: Callable[[list[nn.Parameter]], Optimizer]) -> bool:
    numbers = torch.arange(2000, dtype=torch.float32, device="cpu")
    weight = nn.Parameter(numbers.sin())
    weight.grad = (numbers * 3).cos()
    optimizer = make([weight])
    optimizer.step()  # makes the states
    (group,), state = optimizer.param_groups, optimizer.state[weight]
    numbers_of_update = row.numbers_of(group, 0 if row.counter is None else float(state[row.counter]))
    assert numbers_of_update is not None, "a kernel does not take its trial"
    stepped = [weight, weight.grad, *(state[name] for name in row.states(group))]
    found = [each.clone() for each in stepped]
    optimizer.step()
    update_(
        KERNELS.index(row),
        numbers_of_update,
        found[:1],
        found[1:2],
        found[2:],
        [],
        "bfp8",
        "nearest",
        key=None,
        streams=[0],
        roles=[None] * len(stepped),
    )
    return all(map(_same_bits, found, stepped))


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def _is_float32(number: Any) -> bool:
    """Whether ``number`` is in the range of float32, up to rounding."""
    return isinstance(number, (int, float)) and (number == 0 or FLOAT32.tiny <= abs(number) <= FLOAT32.max)
