"""``deep_copy``: a copy of a module, also where it holds results of computations."""

from __future__ import annotations

import copy

from torch import Tensor, nn

__all__ = ["deep_copy"]

HELD = (
    "the model cannot be copied: a list, a hook or another object in it keeps the result of a computation with its "
    "history; keep x.detach() there, or empty it first"
)


def deep_copy(module: nn.Module) -> nn.Module:
    """A deep copy of ``module``. An attribute that is the result of a computation loses its history there.

    PyTorch's copy.deepcopy refuses a pruned weight, and an output that a module keeps. Raises RuntimeError for results
    in other places, such as a list.
    """
    values = (value for each in module.modules() for value in vars(each).values())
    results = [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
    try:
        return copy.deepcopy(module, {id(result): result.detach().clone() for result in results})
    except RuntimeError as error:
        if "graph leaves" not in str(error):
            raise
        raise RuntimeError(HELD) from error
