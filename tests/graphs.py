"""A model's rewritten graph, in one call."""

import copy
from typing import Any

from torch import nn

from swalp_fx.capture import Conversion, Rewritten, install, refuse_unfit
from swalp_fx.recipe import Recipe


def rewritten(
    model: nn.Module, recipe: str | Recipe, *inputs: Any, identity: bool = False, **keywords: Any
) -> Rewritten:
    """The one graph of a copy of ``model``, in its mode, made by one call with these inputs.

    ``.captured`` is the classified and assigned graph of the model's own code, ``.graph`` its rewrite.
    """
    low = converted(model, recipe, identity=identity)
    low(*inputs, **keywords)
    (graph,) = low.graphs
    return graph


def converted(model: nn.Module, recipe: str | Recipe, *, identity: bool = False) -> Any:
    """A copy of ``model``, converted; with ``identity``, roles in float have nodes too."""
    parsed = Recipe.parse(recipe)
    refuse_unfit(model, parsed)
    low = copy.deepcopy(model)
    conversion = Conversion(low, parsed, identity=identity)
    conversion.refuse_unmatched()
    install(conversion)
    return low
