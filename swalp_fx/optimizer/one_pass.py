"""Steps of torch.optim.SGD in one pass over memory, with the roundings of the optimizer pass: the same bits, faster.

A step by hooks reads and writes every weight, gradient and momentum several times: for each rounding, and for each
operation of torch's own step. They are larger than a cache, so most of a step's time is memory traffic.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as torch_optimizer

from ..ops import is_plain, sgd_
from ..recipe import Quantizer, Recipe
from .states import quantizer_of

__all__ = ["in_one_pass"]

# The rounded roles, in the order of their streams in ops.sgd_.
ROLES = ("weight", "gradient", "momentum")
MOMENTUM = "momentum_buffer"  # the state
ANY = Quantizer.parse("bfp8~nearest")  # for a call that rounds no role
FLOAT32 = torch.finfo(torch.float32)

Streams = Mapping[str, int]  # role -> the parameter's stream in it


class _Call:
    """The tensors of one call of ``ops.sgd_``: one group of the optimizer, and one recipe."""

    def __init__(self, group: dict[str, Any], recipe: Recipe) -> None:
        self.group = group
        self.roles = ROLES if group["momentum"] != 0 else ROLES[:2]
        of_roles = {**{role: getattr(recipe, role) for role in ROLES}, "momentum": quantizer_of(recipe, MOMENTUM)}
        self.rounded = [role for role in self.roles if of_roles[role].rounds]
        self.quantizers = {of_roles[role] for role in self.rounded}
        self.tensors: list[list[Tensor]] = []  # a parameter's, of each role
        self.masters: list[Tensor] = []  # of every parameter, or of none
        self.streams: list[Streams] = []

    def run(self, key: Tensor) -> None:
        quantizer = next(iter(self.quantizers), ANY)
        of_roles = [[tensors[i] for tensors in self.tensors] for i in range(len(self.roles))]
        weights, gradients, momenta = of_roles if len(of_roles) == 3 else [*of_roles, []]
        streams = [[each[role] for each in self.streams] if role in self.rounded else [] for role in ROLES]
        sgd_(weights, gradients, momenta, self.masters, self.group, *quantizer.how(), key=key, streams=streams)


def in_one_pass(
    optimizer: Optimizer, parameters: Iterable[tuple[nn.Parameter, Recipe, Streams, Tensor | None]], key: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Steps ``optimizer`` with its roundings; returns the parameters stepped, with their gradients: all or none.

    parameters: (parameter, its recipe, its streams, its master, if its recipe has one). Recipes are resolved. Equal
        recipes must be one object: one call serves all parameters of a recipe.

    Steps none if anything about the step is not as in ``ops.sgd_``:

    - another class, a fused step, options in tensors or beyond float32
    - hooks of others, which might read in between
    - a tensor off the CPU, in another dtype, or with other strides
    - a state without momentum yet, or with more than momentum
    - roles of one parameter in different formats or roundings
    - masters in another format than float
    - two tensors that share memory
    - nothing to round
    """
    if type(optimizer) is not SGD or not _is_alone(optimizer) or not _multiplies_and_adds_at_once():
        return {}
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    if not all(map(_is_plain, optimizer.param_groups)):
        return {}
    calls: dict[tuple[int, int], _Call] = {}
    gradients: dict[nn.Parameter, Tensor] = {}
    memory: list[tuple[int, int]] = []  # (begin, end) of each tensor
    for parameter, recipe, streams, master in parameters:
        gradient = parameter.grad
        if gradient is None or gradient.numel() == 0:  # nothing to step: left to the optimizer
            continue
        group = groups[parameter]
        state = optimizer.state.get(parameter, {})
        tensors = [parameter, gradient, *state.values()]
        masters = [] if master is None else [master]
        if list(state) != ([MOMENTUM] if group["momentum"] != 0 else []) or not _are_alike([*tensors, *masters]):
            return {}
        if recipe.master is not None and recipe.master.rounds:
            return {}
        which = id(group), id(recipe)
        if which not in calls:
            calls[which] = _Call(group, recipe)
        calls[which].tensors.append(tensors)
        calls[which].masters += masters
        calls[which].streams.append(streams)
        gradients[parameter] = gradient
        memory += [(begin := tensor.data_ptr(), begin + tensor.nbytes) for tensor in (*tensors, *masters)]
    fits = all(len(call.quantizers) <= 1 for call in calls.values()) and any(call.quantizers for call in calls.values())
    memory.sort()
    if not fits or any(end > begin for (_, end), (begin, _) in pairwise(memory)):
        return {}
    for call in calls.values():
        call.run(key)
    return gradients


def _is_alone(optimizer: Optimizer) -> bool:
    """Whether the optimizer pass is the only one with hooks on the step."""
    of_all = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return not of_all and all(len(each) == 1 for each in hooks)


def _multiplies_and_adds_at_once() -> bool:
    """Whether torch's own kernels use fused multiply-add, with one rounding, as ``ops.sgd_`` does."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _is_plain(group: dict[str, Any]) -> bool:
    if group["fused"] or (group["foreach"] and group["nesterov"]):  # the latter may write into the gradients
        return False
    return all(_is_float32(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay"))


def _is_float32(number: Any) -> bool:
    """Whether ``number`` is in the range of float32, up to rounding."""
    return isinstance(number, (int, float)) and (number == 0 or FLOAT32.tiny <= abs(number) <= FLOAT32.max)


def _are_alike(tensors: list[Tensor]) -> bool:
    """Whether all are float32 on the CPU, without gaps in memory, and have the same strides."""
    first = tensors[0]
    strides = first.stride()
    for tensor in tensors:
        if not is_plain(tensor) or not tensor.is_cpu or tensor.dtype is not torch.float32 or tensor.stride() != strides:
            return False
    return first.is_contiguous() or (len(strides) == 4 and first.is_contiguous(memory_format=torch.channels_last))
