"""``deep_copy``: a copy of a module, also where it holds results of computations."""

from __future__ import annotations

import copy

from torch import Tensor, nn

__all__ = ["deep_copy"]


def deep_copy(module: nn.Module) -> nn.Module:
    """A deep copy of ``module``, in which attributes that are results have no history.

    Such are a pruned weight, and an output that a module has kept. PyTorch's own copy.deepcopy raises RuntimeError of
    them, as this one does of results in other places, such as a list.
    """
    values = (value for each in module.modules() for value in vars(each).values())
    results = [value for value in values if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(module, {id(result): result.detach().clone() for result in results})
