"""The states of an optimizer: the role of each, its rounding, and a check of the names in a recipe."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from ..formats import FLOAT
from ..nearest import did_you_mean
from ..ops import quantize_
from ..recipe import LETTERS, Quantizer, Recipe, RecipeError

__all__ = ["is_known", "quantizer_of", "refuse_misnamed", "states_of"]

# Name of a state, in the optimizers of torch and of well-known packages -> its role. States without a role are averages
# of weights, step sizes, and gradients of earlier steps.
ROLES: Mapping[str, str | None] = {
    **dict.fromkeys(("momentum_buffer", "momentum", "exp_avg", "exp_avg_diff", "exp_avg_slow", "moments"), "momentum"),
    **dict.fromkeys(
        # grad_avg is a mean of gradients, but part of a divisor, in a centered RMSprop.
        ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "sum", "acc_delta", "exp_avg_var"),
        "second_moment",
    ),
    **dict.fromkeys(("max_exp_avg_var", "row_var", "col_var", "variance", "hessian"), "second_moment"),
    **dict.fromkeys(("exp_avg_sq_row", "exp_avg_sq_col", "grad_sum_sq"), "second_moment"),
    **dict.fromkeys(("ax", "z", "slow_buffer", "slow_param", "p0", "x0", "s"), None),
    **dict.fromkeys(("step_size", "prev", "previous_grad", "pre_grad", "neg_pre_grad", "last_grad"), None),
}
# What the states of a role are, for an error.
_WORDS = {"momentum": "means of gradients", "second_moment": "second moments"}
# Counters of torch.optim in tensors without dimensions: Adam's step, ASGD's eta and mu, NAdam's mu_product. For a
# parameter without dimensions, their shape does not tell them from moments.
COUNTERS = frozenset({"step", "eta", "mu", "mu_product"})
_IN_FLOAT = Quantizer(FLOAT)


def quantizer_of(recipe: Recipe, name: str) -> Quantizer:
    """The quantizer of ``recipe`` for an optimizer's state of that name."""
    named = dict(recipe.states).get(name)
    if named is not None:
        return named
    role = ROLES.get(name)
    return _IN_FLOAT if role is None else getattr(recipe, role)


def is_known(recipe: Recipe, name: str) -> bool:
    """Whether ROLES or ``recipe`` has a state of that name."""
    return name in ROLES or name in dict(recipe.states)


def states_of(optimizer: Optimizer, parameter: nn.Parameter, recipe: Recipe) -> list[tuple[str, Tensor, Quantizer]]:
    """(name, tensor, quantizer) of each state of ``parameter``, in the order of their streams.

    States of the parameter's shape come first, then others, each sorted by name: a loaded state may hold them in
    another order.
    """
    found = sorted(_rounded(optimizer.state.get(parameter, {})), key=lambda state: state[0])
    found.sort(key=lambda state: state[1].shape != parameter.shape)
    return [((name := _first(path)), tensor, quantizer_of(recipe, name)) for path, tensor in found]


def _first(path: str) -> str:
    return path.partition(".")[0]


def _rounded(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of each floating tensor of a parameter's state, without counters.

    It may lie in a container: AggMo has a momentum for each beta, ``momentum_buffer.0.9``.
    """
    for key, value in state.items():
        if (name := str(key)) in COUNTERS:
            continue
        if isinstance(value, Tensor):  # as nearly all are
            if value.is_floating_point():
                yield name, value
            continue
        for keys, leaf in pytree.tree_leaves_with_path(value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                yield ".".join([name, *(str(_key(each)) for each in keys)]), leaf


def _key(entry: Any) -> Any:
    return entry.key if isinstance(entry, pytree.MappingKey) else getattr(entry, "idx", entry)


def refuse_misnamed(optimizer: Optimizer, trained: Sequence[tuple[str, nn.Parameter, Recipe]]) -> None:
    """Raises RecipeError for states that a recipe names and ``optimizer`` lacks, or that their format does not fit.

    A recipe names states one by one, or by a role of their own. trained: (name, parameter, recipe) of each trained
    parameter.

    Optimizers make their states in their first step. Before that, a copy takes a step on small stand-ins for the
    parameters. The optimizer is not changed, and no random number is drawn.
    """
    recipes = {id(recipe): recipe for _, _, recipe in trained}.values()
    wanted = {name for recipe in recipes for name, _ in recipe.states}
    roles = _named_roles(recipes)
    if not wanted and not roles:
        return
    states = {parameter: optimizer.state.get(parameter, {}) for _, parameter, _ in trained}
    if not all(states.values()):
        what = f"state.{min(wanted)}" if wanted else LETTERS[roles[0]]
        states = _tried(optimizer, list(states), what)
    known = {_first(path) for state in states.values() for path, _ in _rounded(state)}
    has = f"it has {', '.join(sorted(known))}" if known else "it has none that could be rounded"
    for name in sorted(wanted - known):
        raise RecipeError(f"{_kind(optimizer)} has no state {name!r} to round; {did_you_mean(name, known, has)}")
    for role in roles:
        if not any(ROLES.get(name) == role for name in known):
            letter, others = LETTERS[role], sorted(known - set(ROLES))
            remedy = f", or name a state of the optimizer's own: state.{others[0]}=FORMAT" if others else ""
            raise RecipeError(
                f"{_kind(optimizer)} has no {_WORDS[role]} for {letter} to round ({has}); leave {letter} out{remedy}"
            )
    for path, parameter, recipe in trained:
        named = dict(recipe.states)
        for name, tensor in _rounded(states[parameter]):
            if (quantizer := named.get(_first(name), _IN_FLOAT)).rounds:
                _try(quantizer, tensor, f"state {name!r} of parameter {path}")


def _named_roles(recipes: Collection[Recipe]) -> list[str]:
    """The roles of states that the recipes name.

    A format for all roles is M's too, and names nothing. V is in no format for all roles.
    """
    of_all = {getattr(recipe, role) for recipe in recipes for role in ("weight", "activation", "error", "gradient")}
    named = []
    for role in _WORDS:
        given = {each for recipe in recipes if (each := getattr(recipe, role)).rounds}
        if given - (of_all if role == "momentum" else set()):
            named.append(role)
    return named


def _kind(optimizer: Optimizer) -> str:
    return type(optimizer).__name__


def _tried(optimizer: Optimizer, parameters: Sequence[nn.Parameter], wanted: str) -> dict[nn.Parameter, dict[str, Any]]:
    """The states of these parameters after a first step, made on small stand-ins."""
    stand_ins = {parameter: _small(parameter) for parameter in parameters}
    try:
        with torch.random.fork_rng(devices=list({p.device for p in parameters if p.is_cuda})):
            states = _after_a_step(optimizer, stand_ins)
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise RecipeError(
            f"which states {_kind(optimizer)} has cannot be told before its first step, since a copy does not step "
            f"({type(error).__name__}: {first_line}); attach it after that, or leave {wanted} out"
        ) from error
    return {parameter: states[stand_ins[parameter]] for parameter in parameters}


def _small(parameter: nn.Parameter) -> nn.Parameter:
    """A stand-in of ones with as many dimensions as ``parameter``, none longer than 2."""
    small = torch.ones([min(size, 2) for size in parameter.shape], dtype=parameter.dtype, device=parameter.device)
    stand_in = nn.Parameter(small)
    stand_in.grad = torch.ones_like(small)
    return stand_in


def _after_a_step(optimizer: Optimizer, stand_ins: dict[nn.Parameter, nn.Parameter]) -> Any:
    """The state after one step of a copy of ``optimizer`` on ``stand_ins``, without hooks and earlier states."""
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
