"""The states of an optimizer: which of them a step rounds, and whether it has those that a recipe names."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .nearest import did_you_mean
from .ops import quantize_
from .recipe import Quantizer, Recipe, RecipeError

__all__ = ["refuse_misnamed", "states_of"]

# What torch.optim counts in tensors without dimensions, which the shape of a parameter without
# dimensions cannot tell from its moments: Adam's step, ASGD's eta and mu, NAdam's mu_product.
COUNTERS = frozenset({"step", "eta", "mu", "mu_product"})


def states_of(optimizer: Optimizer, parameter: nn.Parameter, recipe: Recipe) -> list[tuple[Tensor, Quantizer]]:
    """(tensor, how it is rounded) of each state of ``parameter`` that a step rounds, in the order of their streams.

    That is the order of their names, because a loaded state may hold them in another: first those of the parameter's
    shape, which are moments, and of which M tells how they are rounded where the recipe does not name them; then others
    that it does name.
    """
    found = sorted(_rounded(optimizer.state.get(parameter, {})))
    moments = [name for name, tensor in found if tensor.shape == parameter.shape]
    named = [name for name, _ in recipe.states if name not in moments]
    tensors = dict(found)
    return [(tensors[name], recipe.state(name)) for name in (*moments, *named) if name in tensors]


def _rounded(state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What may be rounded of a parameter's state: floating tensors that count nothing."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name not in COUNTERS:
            yield name, value


def refuse_misnamed(optimizer: Optimizer, trained: Sequence[tuple[str, nn.Parameter, Recipe]]) -> None:
    """Raises RecipeError for a state that a recipe names and ``optimizer`` does not have, or whose format does not fit.

    trained: (name, parameter, recipe) of what it trains.

    Optimizers make their states in their first step. So before that a copy takes one, on small parameters that stand in
    for the real ones; nothing of the optimizer is changed, and no random number is drawn.
    """
    wanted = {name for _, _, recipe in trained for name, _ in recipe.states}
    if not wanted:
        return
    states = {parameter: optimizer.state.get(parameter, {}) for _, parameter, _ in trained}
    if not all(states.values()):
        states = _tried(optimizer, list(states), min(wanted))
    known = {name for state in states.values() for name, _ in _rounded(state)}
    for name in sorted(wanted - known):
        has = f"it has {', '.join(sorted(known))}" if known else "it has none that could be rounded"
        raise RecipeError(f"{_kind(optimizer)} has no state {name!r} to round; {did_you_mean(name, known, has)}")
    for path, parameter, recipe in trained:
        for name, quantizer in recipe.states:
            if quantizer.rounds and (tensor := states[parameter].get(name)) is not None:
                _try(quantizer, tensor, f"state {name!r} of parameter {path}")


def _kind(optimizer: Optimizer) -> str:
    return type(optimizer).__name__


def _tried(optimizer: Optimizer, parameters: Sequence[nn.Parameter], wanted: str) -> dict[nn.Parameter, dict[str, Any]]:
    """The states that a first step would give these parameters, in small."""
    stand_ins = {parameter: _small(parameter) for parameter in parameters}
    try:
        with torch.random.fork_rng(devices=list({p.device for p in parameters if p.is_cuda})):
            states = _after_a_step(optimizer, stand_ins)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise RecipeError(
            f"which states {_kind(optimizer)} has cannot be told before its first step, since a copy does not step "
            f"({type(error).__name__}: {first_line}); attach it after that, or leave state.{wanted} out"
        ) from error
    return {parameter: states[stand_ins[parameter]] for parameter in parameters}


def _small(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter with as many dimensions, none longer than 2."""
    small = torch.ones([min(size, 2) for size in parameter.shape], dtype=parameter.dtype, device=parameter.device)
    stand_in = nn.Parameter(small)
    stand_in.grad = torch.ones_like(small)
    return stand_in


def _after_a_step(optimizer: Optimizer, stand_ins: dict[nn.Parameter, nn.Parameter]) -> Any:
    """The state of a copy that has stepped, whose parameters are ``stand_ins``, without hooks and without a state."""
    copied = object.__new__(type(optimizer))
    instead: dict[int, Any] = {id(optimizer): copied, id(optimizer.state): defaultdict(dict)}
    instead |= {id(value): OrderedDict() for name, value in vars(optimizer).items() if name.endswith("_hooks")}
    for group in optimizer.param_groups:
        instead |= {id(p): stand_ins[p] if p in stand_ins else _frozen(p) for p in group["params"]}
    # A scheduler sets a step on the optimizer that is the optimizer's own, and no copy's.
    attributes = {name: value for name, value in vars(optimizer).items() if name != "step"}
    vars(copied).update(copy.deepcopy(attributes, instead))
    step: Any = type(optimizer).step
    getattr(step, "__wrapped__", step)(copied)  # past the hooks that all optimizers share
    return copied.state


def _frozen(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty(0, dtype=parameter.dtype, device=parameter.device), requires_grad=False)


@torch.no_grad()
def _try(quantizer: Quantizer, tensor: Tensor, what: str) -> None:
    try:
        quantize_(tensor.clone(), quantizer.format)
    except RuntimeError as error:
        raise RecipeError(f"{what} cannot be rounded to {quantizer.format}: {str(error).splitlines()[0]}") from None
