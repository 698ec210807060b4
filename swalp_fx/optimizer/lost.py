"""Half-precision parameters that the learning rate cannot move.

A number in bfloat16 has 8 bits. An update of less than half of its last bit is rounded away: in a weight of 1 that is
0.002, more than many learning rates. Adam and its like divide a gradient by its own size, so the learning rate is the
length of a step. SGD multiplies the learning rate by gradients, and these are seldom as large as 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .twin import is_half

__all__ = ["length_of", "loses_updates"]


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
