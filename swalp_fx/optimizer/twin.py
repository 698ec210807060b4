"""Steps of an optimizer on masters.

An optimizer steps the parameters of its groups. So its step runs on a twin: an optimizer of the same class, attributes
and states, with a copy of the master in its groups for each parameter. The optimizer itself holds the model's
parameters all the while. Closures, zero_grad and GradScaler find them there, and an exception inside the step leaves
weights and masters unchanged.

Masters of half-precision parameters are float32, and so are their gradients and states in the twin: a second moment
that moves by a thousandth a step would stand still in the 8 bits of bfloat16.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

__all__ = ["Loading", "Twin", "idle", "is_half", "kept_elsewhere", "narrow_states"]

OWN = ("param_groups", "state")  # the attributes that a twin does not share


def is_half(parameter: Tensor) -> bool:
    """Whether the dtype of ``parameter`` is floating and narrower than float32."""
    return parameter.is_floating_point() and torch.promote_types(parameter.dtype, torch.float32) != parameter.dtype


class Twin:
    """An optimizer that steps in the place of another. It lasts for many steps, since a step is compiled for it."""

    def __init__(self, kind: type[Optimizer]) -> None:
        self.optimizer: Optimizer = object.__new__(kind)
        vars(self.optimizer).update(param_groups=[], state=defaultdict(dict))
        self.stand_ins: dict[nn.Parameter, nn.Parameter] = {}  # by the model's parameter, in this step

    def follow(self, optimizer: Optimizer) -> Optimizer:
        """Take over the attributes, states and groups of ``optimizer`` before a step. Returns the twin."""
        twin = self.optimizer
        vars(twin).update({name: value for name, value in vars(optimizer).items() if name not in OWN})
        twin.state.clear()
        twin.state.update(optimizer.state)
        groups = twin.param_groups[: len(optimizer.param_groups)]
        groups += [{} for _ in optimizer.param_groups[len(groups) :]]
        twin.param_groups[:] = groups
        for of_twin, group in zip(groups, optimizer.param_groups, strict=True):
            of_twin.clear()
            of_twin.update(group, params=list(group["params"]))
        return twin

    def put(self, masters: Mapping[nn.Parameter, Tensor]) -> list[tuple[nn.Parameter, str]]:
        """Let copies of ``masters`` stand in for their parameters, with gradients and states in the masters' dtype.

        Returns (parameter, name) of each state that was in the parameter's own dtype.
        """
        twin, before = self.optimizer, self.stand_ins
        self.stand_ins = {}
        narrow = []
        for parameter, master in masters.items():
            stand_in = before.get(parameter)
            if stand_in is None or stand_in.device != master.device:
                stand_in = nn.Parameter(torch.empty_like(master), requires_grad=parameter.requires_grad)
            stand_in.data = master.clone()
            stand_in.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
            self.stand_ins[parameter] = stand_in
            if parameter in twin.state and parameter.dtype != master.dtype:
                state = twin.state[parameter]
                names = [name for name, value in state.items() if _has(value, parameter.dtype)]
                narrow += [(parameter, str(name)) for name in names]
                wide = {name: _cast(state[name], parameter.dtype, master.dtype) for name in names}
                twin.state[parameter] = {**state, **wide}
        _rename(twin.state, self.stand_ins)
        for group in twin.param_groups:
            group["params"][:] = [self.stand_ins.get(parameter, parameter) for parameter in group["params"]]
        return narrow

    def give_back(self, optimizer: Optimizer) -> None:
        """Write the stepped twin back into ``optimizer``: states, options of groups, attributes."""
        optimizer.state.clear()
        optimizer.state.update(self.optimizer.state)
        _rename(optimizer.state, {stand_in: parameter for parameter, stand_in in self.stand_ins.items()})
        for group, of_twin in zip(optimizer.param_groups, self.optimizer.param_groups, strict=True):
            group.update({name: value for name, value in of_twin.items() if name != "params"})
        vars(optimizer).update({name: value for name, value in vars(self.optimizer).items() if name not in OWN})

    def rest(self) -> None:
        """Free the memory of masters and gradients until the next step."""
        self.optimizer.state.clear()
        for stand_in in self.stand_ins.values():
            stand_in.grad, stand_in.data = None, torch.empty(0, dtype=stand_in.dtype, device=stand_in.device)


def idle(optimizer: Optimizer) -> Optimizer:
    """A twin with nothing to step."""
    twin = Twin(type(optimizer)).follow(optimizer)
    for group in twin.param_groups:
        group["params"].clear()
    return twin


def kept_elsewhere(optimizer: Optimizer, parameters: Collection[nn.Parameter]) -> str | None:
    """An attribute of ``optimizer`` besides its groups and states that holds one of ``parameters``; None if none does.

    A twin shares it: the optimizer would find the model's parameters there, and not those that it steps.
    """
    for name, value in vars(optimizer).items():
        leaves = pytree.tree_leaves(value) if name not in OWN else []
        each = itertools.chain.from_iterable(leaf if isinstance(leaf, set | frozenset) else [leaf] for leaf in leaves)
        if any(isinstance(leaf, nn.Parameter) and leaf in parameters for leaf in each):
            return name
    return None


class Loading:
    """Hooks of ``load_state_dict``: they keep float32 states of half-precision parameters, where torch narrows them.

    has_master: whether a parameter has one; only beside a master are states float32.
    """

    def __init__(self, has_master: Callable[[Tensor], bool]) -> None:
        self.has_master = has_master
        self.saved: dict[str, Any] = {}

    def before(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self.saved = state_dict

    def after(self, optimizer: Optimizer) -> None:
        saved, self.saved = self.saved, {}
        places = [key for group in saved["param_groups"] for key in group["params"]]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for place, parameter in zip(places, parameters, strict=True):
            if is_half(parameter) and self.has_master(parameter) and place in saved["state"]:
                loaded = optimizer.state[parameter]
                optimizer.state[parameter] = pytree.tree_map(_as_saved, loaded, saved["state"][place])


def narrow_states(optimizer: Optimizer) -> None:
    """Cast the states of half-precision parameters to their dtype, as torch itself does."""
    optimizer.load_state_dict(optimizer.state_dict())


def _rename(states: dict[Tensor, Any], names: Mapping[Any, Tensor]) -> None:
    """Move each state from its key to ``names[key]``, in the same order."""
    moved = {names.get(key, key): state for key, state in states.items()}
    states.clear()
    states.update(moved)


def _has(value: Any, dtype: torch.dtype) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.dtype == dtype for leaf in pytree.tree_leaves(value))


def _cast(value: Any, dtype: torch.dtype, to: torch.dtype) -> Any:
    return pytree.tree_map(lambda leaf: leaf.to(to) if _has(leaf, dtype) else leaf, value)


def _as_saved(loaded: Any, saved: Any) -> Any:
    if isinstance(loaded, Tensor) and loaded.dtype != saved.dtype:
        return saved.to(loaded.device, copy=True)
    return loaded
