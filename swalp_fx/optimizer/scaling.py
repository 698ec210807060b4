"""The scale of the loss: gradients are rounded times this scale.

Low precision would lose small gradients. So a loss is multiplied by a scale before the backward, and its gradients are
divided by it before the step. Hardware rounds the scaled gradients (Micikevicius et al., ICLR 2018, section 3.2).
torch.amp.GradScaler divides before the hooks of a step. It calls the step, so it is found on the stack.
"""

from __future__ import annotations

import math
from types import FrameType
from typing import Any

from torch.amp import GradScaler
from torch.optim import Optimizer

__all__ = ["scale_of", "scaler_of", "skip"]


def scaler_of(frame: FrameType | None) -> GradScaler | None:
    """The GradScaler on the stack at ``frame``; None if there is none, or a disabled one."""
    while frame is not None:
        if frame.f_globals.get("__name__") == GradScaler.__module__:
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, GradScaler):
                return scaler if scaler.is_enabled() else None
        frame = frame.f_back
    return None


def scale_of(given: Any, scaler: GradScaler | None) -> float:
    """The scale of the loss: ``given``, or its result if it is a function; else the scaler's; else 1.

    Raises ValueError if it is not a finite number above zero.
    """
    if given is None:
        return 1.0 if scaler is None else scaler.get_scale()
    value = given() if callable(given) else given
    try:
        scale = float(value)
    except (TypeError, ValueError):
        scale = math.nan
    if not 0.0 < scale < math.inf:
        raise ValueError(
            f"grad_scale is {value!r}; it takes the number that the loss was multiplied by, or a function that "
            "returns it, such as scaler.get_scale"
        )
    return scale


def skip(scaler: GradScaler, optimizer: Optimizer) -> None:
    """Tell ``scaler`` of an infinity in the gradients of ``optimizer``, as if it had found one itself."""
    for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
        found.fill_(1.0)
