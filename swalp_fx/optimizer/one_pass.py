"""Steps of an optimizer in one pass over memory, with the roundings of the optimizer pass: the same bits, faster.

A step by hooks reads and writes every weight, gradient and state several times: for each rounding, and for each
operation of torch's own step. They are larger than a cache, so most of a step's time is memory traffic.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from ..ops import is_plain, quantize_foreach_, update_
from ..random import ROLES, parameter_stream
from ..recipe import Quantizer, Recipe
from .kernels import KERNELS, kernel_of
from .states import quantizer_of

__all__ = ["in_one_pass"]

ANY = Quantizer.parse("bfp8~nearest")  # for a call that rounds no role


class _Call:
    """The tensors of one call of ``ops.update_``: of one group, one recipe, and one count of steps."""

    def __init__(self, recipe: Recipe, names: Sequence[str], numbers: Sequence[float]) -> None:
        self.numbers = numbers
        quantizers = [recipe.gradient, recipe.weight, *(quantizer_of(recipe, name) for name in names)]
        numbers_of = [ROLES["gradient"], ROLES["weight"], *(ROLES["momentum"] + slot for slot in range(len(names)))]
        self.roles = list(zip(quantizers, numbers_of, strict=True))
        # The quantizer of the roles that are rounded in the pass: the gradient's, if it is rounded.
        self.first = next((quantizer for quantizer in quantizers if quantizer.rounds), None)
        self.parameters: list[nn.Parameter] = []
        self.gradients: list[Tensor] = []
        self.states: list[Tensor] = []  # those of the first parameter, then those of the next
        self.masters: list[Tensor] = []  # of every parameter, or of none
        self.counters: list[Tensor] = []
        self.indices: list[int] = []

    def tensors(self) -> Iterable[Tensor]:
        return (*self.parameters, *self.gradients, *self.states, *self.masters, *self.counters)

    def run(self, kernel: int, key: Tensor, dry: bool = False) -> bool:
        """Steps the parameters; whether it could. If it could not, or if it is dry, nothing has changed."""
        gradient, weight, *states = (
            parameter_stream(role, 0) if each.rounds and each == self.first else None for each, role in self.roles
        )
        could = update_(
            kernel,
            self.numbers,
            self.parameters,
            self.gradients,
            self.states,
            self.masters,
            *(self.first or ANY).how(),
            key=key,
            streams=self.indices,
            roles=[weight, gradient, *states],
            dry=dry,
        )
        if could and not dry:
            if self.counters:
                torch._foreach_add_(self.counters, torch.tensor(1.0, device="cpu"), alpha=1.0)
            self._round_others(key)
        return could

    def _round_others(self, key: Tensor) -> None:
        """Round weights and states in another format than ``first``."""
        of_each = len(self.roles) - 2
        states = (self.states[slot::of_each] for slot in range(of_each))
        tensors: list[Sequence[Tensor]] = [self.gradients, self.parameters, *states]
        for (quantizer, role), xs in zip(self.roles, tensors, strict=True):
            if quantizer.rounds and quantizer != self.first:
                streams = [parameter_stream(role, index) for index in self.indices]
                quantize_foreach_(xs, *quantizer.how(), key=key, streams=streams)


def in_one_pass(
    optimizer: Optimizer, parameters: Iterable[tuple[nn.Parameter, Recipe, int, Tensor | None]], key: Tensor
) -> dict[int, tuple[nn.Parameter, Tensor]]:
    """Steps ``optimizer`` with its roundings; returns the parameters stepped and their gradients, by id: all or none.

    parameters: (parameter, its recipe, its index in the model, its master, if its recipe has one). Recipes are
        resolved. Equal recipes must be one object: one call serves all parameters of a recipe.

    Steps none if anything about the step is not as a row of KERNELS or ``ops.update_`` has it:

    - another class, a fused step, options in tensors or beyond float32
    - hooks of others, which might read in between
    - other states than the row names, as before the first step of an optimizer that has states
    - a tensor off the CPU, in another dtype, with gaps, or in memory that another tensor shares
    - masters in another format than float
    - nothing to round
    """
    kernel = kernel_of(optimizer) if _is_alone(optimizer) else None
    if kernel is None:
        return {}
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    names_of = {id(group): kernel.states(group) for group in optimizer.param_groups}
    states = {id(parameter): state for parameter, state in optimizer.state.items()}
    counter = kernel.counter
    calls: dict[tuple[int, int, float], _Call] = {}
    for parameter, recipe, index, master in parameters:
        if (gradient := parameter.grad) is None:
            continue
        group, state = groups[id(parameter)], states.get(id(parameter), {})
        names = names_of[id(group)]
        if len(state) != len(names) + (counter is not None) or not all(name in state for name in names):
            return {}
        count = 0.0
        if counter is not None:
            if (found := _count(state.get(counter))) is None:
                return {}
            count = found
        which = id(group), id(recipe), count
        call = calls.get(which)
        if call is None:
            numbers = kernel.numbers_of(group, count)
            if numbers is None or (recipe.master is not None and recipe.master.rounds):
                return {}
            call = calls[which] = _Call(recipe, names, numbers)
        call.parameters.append(parameter)
        call.gradients.append(gradient)
        call.states += [state[name] for name in names]
        call.indices.append(index)
        if master is not None:
            call.masters.append(master)
        if counter is not None:
            call.counters.append(state[counter])
    number, of_all = KERNELS.index(kernel), list(calls.values())
    counters = [counter.data_ptr() for call in of_all for counter in call.counters]
    if len(set(counters)) < len(counters) or not any(call.first for call in of_all):
        return {}
    if len(of_all) > 1:
        if _share_memory([tensor for call in of_all for tensor in call.tensors()]):
            return {}
        if not all(call.run(number, key, dry=True) for call in of_all):
            return {}
    if not all(call.run(number, key) for call in of_all):
        return {}
    return {
        id(parameter): (parameter, gradient)
        for call in of_all
        for parameter, gradient in zip(call.parameters, call.gradients, strict=True)
    }


def _is_alone(optimizer: Optimizer) -> bool:
    """Whether the optimizer pass is the only one with hooks on the step."""
    of_all = torch_optimizer._global_optimizer_pre_hooks or torch_optimizer._global_optimizer_post_hooks
    hooks = (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    return not of_all and all(len(each) == 1 for each in hooks)


def _count(counter: Any) -> float | None:
    """The steps that a tensor counts; None if it is no counter as torch makes them."""
    is_one = type(counter) is Tensor and counter.is_cpu and counter.numel() == 1
    return counter.item() if is_one and counter.dtype in (torch.float32, torch.float64) else None


def _share_memory(tensors: Iterable[Tensor]) -> bool:
    """Whether the memory of any two overlaps, or may do so."""
    memory = []
    for tensor in tensors:
        if not is_plain(tensor):
            return True
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            memory.append((begin := tensor.data_ptr(), begin + (last + 1) * tensor.element_size()))
    memory.sort()
    return any(end > begin for (_, end), (begin, _) in pairwise(memory))
