"""``convert``: a float model, and the optimizer that trains it, made low-precision in one call."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, NoReturn

from torch import nn
from torch.optim import Optimizer

from .capture import Conversion, conversion_of, refuse_unfit
from .capture.trial import try_on
from .errors import UNPACK, ConvertError
from .optimizer import SWALP
from .passes import recipes_of_parameters
from .passes.short_axes import warn_of_short_axes
from .recipe import Recipe

__all__ = ["Converted", "convert", "in_float", "restore"]


class Converted(NamedTuple):
    """The result of ``convert``."""

    module: nn.Module  # the model itself
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
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Converted:
    """(model, swalp): from now on ``model`` computes in ``recipe``, and ``optimizer`` steps in it.

    The model is converted in place. It keeps its type, attributes, hooks, methods, parameters and buffers; no value is
    changed. However it is entered (a call, ``generate``, a child, a method), a rewritten graph runs. PyTorch's guarded
    front end makes the graph at the first call, and again if something changes that the code reads. Weights are rounded
    on their way into each forward, and in place by the first step. ``with in_float(model)`` computes in float,
    ``restore(model)`` ends the conversion. Without an optimizer, call ``swalp.attach(optimizer)`` later.

    example_inputs: the positional or the named inputs of one call. With them the graphs of the present mode are made at
        once, and can be read: ``model.graphs``. Buffers and random state are unchanged.

    seed: of the random words of steps and averages. None: torch's default CPU generator draws one, as for a DataLoader,
        if a step rounds stochastically. So ``torch.manual_seed`` before this makes the run reproducible. A forward
        draws its words from that generator, whatever the seed.

    In a process group, convert on each rank, then wrap the module in DistributedDataParallel. Replicas stay bit-equal
    with any seeds: the optimizer pass takes rank 0's seed. In forward and backward each rank draws its own bits.

    Every error is raised before anything is changed. ConvertError: no module, already converted, compiled or wrapped.
    FormatError, and RecipeError: also for a rule, an include or an exclude that matches nothing, if example_inputs show
    all places. TypeError: no optimizer, or no whole number as seed. ValueError: an optimizer of parameters that are not
    the model's, or a seed of more than 64 bits.
    A later call raises NotRewritten if it would compute in float. Warns of weights that take more bits in a format of
    runs than its name says, since an axis is shorter than a run.
    """
    if isinstance(optimizer, str | Recipe):
        raise TypeError(f"recipe is a keyword: convert(model, optimizer, recipe={str(optimizer)!r})")
    from .capture.entries import float_copy, install

    parsed = Recipe.parse(recipe)
    refuse_unfit(model, parsed)
    local = functools.partial(recipes_of_parameters, model, parsed)
    swalp = SWALP(model, parsed, local, float_copy, seed=0 if seed is None else seed)
    if optimizer is not None:
        swalp.refuse(optimizer)
    conversion = Conversion(model, parsed)
    conversion.refuse_unmatched()
    warn_of_short_axes(model, parsed)
    install(conversion)
    try:
        if example_inputs is not None:
            try_on(conversion, example_inputs)
        if optimizer is not None:
            swalp.replace(optimizer)
    except BaseException:
        restore(model)
        raise
    if seed is None:
        swalp.draw_seed()  # last: an error leaves torch's generator as it was
    return Converted(model, swalp)


def restore(module: nn.Module) -> nn.Module:
    """Ends the conversion of ``module``: it computes in float again. Returns it, with its weights unchanged.

    The optimizer pass goes on until its ``detach()``.
    Raises ConvertError for a module that is not converted, or is part of one that is.
    """
    from .capture import entries

    _refuse_part(module, "restore")
    return entries.restore(module)


def in_float(module: nn.Module) -> AbstractContextManager[nn.Module]:
    """A context: inside, ``module`` computes in float, in all threads. Its graphs are kept for afterwards.

    Attributes set on the model inside, a forward too, stay, and are rewritten afterwards. Contexts may be nested.
    Raises ConvertError for a module that is not converted, or is part of one that is.
    """
    from .capture import entries

    _refuse_part(module, "in_float")
    return entries.in_float(module)


def _refuse_part(module: nn.Module, what: str) -> None:
    """Raises ConvertError if ``module`` is not converted, or is part of a converted model."""
    from .capture.entries import is_floating, settled

    if is_floating(module):
        return
    kind = type(module).__name__
    if conversion_of(module) is None:
        raise ConvertError(f"{what} takes a converted module, and this {kind} is none; convert it first")
    conversion = settled(module)
    if conversion.root is not module:
        raise ConvertError(
            f"{what} takes a whole converted model, and this {kind} is {conversion.places.path(module)} of one; give a "
            f"rule of the recipe that leaves it in float, or take it out of the {type(conversion.root).__name__} first"
        )
