"""``convert``: a float model, and the optimizer that trains it, made low-precision in one call."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

from torch import nn
from torch.optim import Optimizer

from . import nodes
from .capture import UNPACK
from .optimizer import SWALP
from .passes import recipes_of_parameters
from .passes.parts import parts_of, rewrite_what_can_be, rewritten_in
from .recipe import Recipe
from .watch import Watch, calls_of

__all__ = ["Converted", "convert"]


class Converted(NamedTuple):
    """What ``convert`` returns."""

    module: (
        nn.Module
    )  # a RewrittenModule, or a model of the same type with such modules in it; call it where the model was called
    swalp: SWALP  # the optimizer pass, and the average

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"a Converted is not called; {UNPACK}")

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a Converted has no {name!r}; {UNPACK}")


def convert(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    recipe: str | Recipe = "bfp8[0]",
    *,
    leaves: Iterable[type[nn.Module]] = (),
) -> Converted:
    """(module, swalp): ``model`` rewritten to compute in ``recipe``, and ``optimizer`` made to step in it.

    The module shares the model's parameters, buffers and layers, so the optimizer, its schedulers and the checkpoints
    stay valid; the model itself computes in float as before. No value is changed: the weights are rounded on their way
    into each forward, and in place by the first step. Without an optimizer, call ``swalp.attach(optimizer)`` later.

    leaves: module types that torch.fx cannot trace, or should not. They are called whole: their weights are
        quantized, what happens inside them is not.

    Hooks on the layers run. One that keeps or changes a layer's output or gradient has to be there before: a later one
    may find the output rounded in place, and what it makes of a ReLU's may not be rounded again (``in_place=false`` in
    the recipe rounds nothing in place, and leaves no rounding out).

    A model whose own forward cannot be traced is rewritten in parts: its largest submodules that can be, in a copy of
    its structure. ``report`` lists what stayed float, and why. Call train() and eval() on that copy: what is between
    its parts has a flag of its own. (A module rewritten whole and its model have one flag.)

    In a process group, convert on each rank, then wrap the module in DistributedDataParallel. Replicas stay bit-equal
    if all ranks have one ``torch.initial_seed()`` here, or load the ``swalp.state_dict()`` of one; their forwards and
    backwards draw bits of each rank's own all the same.

    Warns of such a model. One that branches on its training flag has a graph for each branch, and follows the flag.
    Warns at the step of a training loop that calls the model and not the module.
    Raises ConvertError (no module, nothing to rewrite, already converted, compiled or wrapped), FormatError,
    RecipeError, TypeError for no optimizer, and ValueError for one with parameters that are not the model's, all before
    anything is changed.
    """
    if isinstance(optimizer, str | Recipe):
        raise TypeError(f"recipe is a keyword: convert(model, optimizer, recipe={str(optimizer)!r})")
    parsed = Recipe.parse(recipe)
    module = rewrite_what_can_be(model, parsed, leaves=tuple(leaves))
    if parts := parts_of(module):
        reason = next(iter(parts.floats.values()))
        warnings.warn(
            f"{reason}. Rewritten instead: {len(parts.rewritten)} of its submodules; see report", stacklevel=2
        )
    swalp = SWALP(model, parsed, recipes_of_parameters(model, parsed), _watch(model, module))
    if optimizer is not None:
        swalp.replace(optimizer)
    return Converted(module, swalp)


def _watch(model: nn.Module, module: nn.Module) -> Watch | None:
    """What tells steps on the gradients of ``model`` from those of ``module``; None if that one rounds nothing."""
    calls = calls_of(model)
    parts = [part for _, part in rewritten_in(module)]
    for part in parts:
        vars(part)["_calls"] = calls
    rounds = any(
        node.target in (nodes.quantize_weight, nodes.quantize_output) for part in parts for node in part.graph.nodes
    )
    return Watch(calls) if rounds else None
