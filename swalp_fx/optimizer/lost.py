"""Half-precision parameters that the learning rate cannot move.

A number in bfloat16 has 8 bits. An update of less than half of its last bit is rounded away: in a weight of 1 that is
0.002, more than many learning rates. Adam and its like divide a gradient by its own size, so the learning rate is the
length of a step. SGD multiplies the learning rate by gradients, and these are seldom as large as 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..warn import warn
from .parameters import Parameters
from .twin import is_half

__all__ = ["length_of", "loses_updates", "warn_of_lost_updates"]


def length_of(group: dict[str, Any]) -> float:
    """The length of an update, in a group of parameters, for a gradient of size one.

    It is the learning rate, or its scheduler's initial one if that is higher: a warm-up begins low. Momentum adds up to
    1 / (1 - momentum) of them.
    """
    rate = max(float(group.get("lr") or 0.0), float(group.get("initial_lr") or 0.0))
    momentum = float(group.get("momentum") or 0.0)
    return rate / (1 - momentum) if 0.0 < momentum < 1.0 else rate


@torch.no_grad()
def loses_updates(parameter: nn.Parameter, length: float) -> bool:
    """Whether an update of that length leaves more than half of a half-precision parameter's numbers as they are."""
    if not is_half(parameter) or length == 0.0 or parameter.numel() == 0:
        return False
    stays = (parameter + length == parameter) & (parameter - length == parameter)
    return int(stays.sum()) * 2 > stays.numel()


def warn_of_lost_updates(optimizer: Optimizer, parameters: Parameters) -> None:
    """Warns, in one sentence, of the parameters without a master that ``optimizer`` cannot move."""
    lost = [
        (parameter, length)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
        and not parameters.has_master(parameter)
        and loses_updates(parameter, length := length_of(group))
    ]
    if not lost:
        return
    parameter, length = lost[0]
    others = f"and {len(lost) - 1} more " if len(lost) > 1 else ""
    warn(
        f"an update of {length:.2g}, which is {type(optimizer).__name__}'s for a gradient of one, is lost in "
        f"most of {parameters.name_of(parameter)!r} {others}in {parameter.dtype}; keep masters: master=float"
    )
