"""Optimizers and steps that the pass cannot serve, each refused in a sentence before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from ..random import is_captured
from ..recipe import Recipe
from ..whole import SHARDED, class_of_torch, unwhole

__all__ = ["refuse_optimizer", "refuse_sparse", "refuse_step"]


def refuse_optimizer(optimizer: Any, model: nn.Module) -> None:
    """Raises TypeError for what is no optimizer, and ValueError for one whose steps have no low-precision order."""
    name = type(optimizer).__name__
    if (kind := class_of_torch(type(optimizer), SHARDED)) is not None:
        raise ValueError(f"cannot attach to {kind}; {SHARDED[kind]}")
    if (shard := unwhole(model)) is not None:
        raise ValueError(f"{name} cannot train {shard}")
    held = vars(optimizer) if hasattr(optimizer, "__dict__") else {}
    inner = next((key for key, value in held.items() if isinstance(value, Optimizer)), None)
    is_bare = isinstance(optimizer, Optimizer) and not hasattr(optimizer, "_optimizer_step_pre_hooks")
    if inner is not None or is_bare:
        raise ValueError(f"{name} wraps another optimizer, which has the states; attach to its .{inner or 'optimizer'}")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"attach takes a torch.optim.Optimizer, not {name}")
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            "LBFGS evaluates its closure several times a step, which has no low-precision order; use SGD or Adam"
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"{name} has differentiable=True, and rounding in place has no gradient; use differentiable=False"
        )


def refuse_step(optimizer: Optimizer, kwargs: Mapping[str, Any]) -> None:
    """Raises ValueError if this step unscales gradients by itself, or is captured in a CUDA graph."""
    name = type(optimizer).__name__
    scaled = any(getattr(optimizer, attribute, None) is not None for attribute in ("grad_scale", "found_inf"))
    if scaled or kwargs.get("grad_scaler") is not None:
        raise ValueError(
            f"{name} unscales the gradients of a GradScaler inside its step, too late to round them; use fused=False"
        )
    if is_captured():
        raise ValueError(
            f"{name}.step() is being captured in a CUDA graph, whose replays would all round alike; step outside of it"
        )


def refuse_sparse(parameters: Iterable[tuple[str, nn.Parameter, Recipe]]) -> None:
    """Raises ValueError for a sparse gradient, if it or a state is to be rounded: SGD's momentum is sparse too."""
    for name, parameter, recipe in parameters:
        if parameter.grad is None or parameter.grad.layout == torch.strided:
            continue
        states = (recipe.momentum, recipe.second_moment, *(quantizer for _, quantizer in recipe.states))
        if any(quantizer.rounds for quantizer in (recipe.gradient, *states)):
            raise ValueError(
                f"the gradient of {name!r} is {parameter.grad.layout}, which has no rounding; "
                "make it dense (sparse=False in nn.Embedding)"
            )
