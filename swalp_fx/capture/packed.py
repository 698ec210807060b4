"""A PackedSequence as input of a recurrent layer: no graph can hold its steps, since values set their number."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.utils.rnn import PackedSequence

from ..errors import NotRewritten
from ..passes.recurrent import inside_module
from .conversion import Conversion

__all__ = ["refuse_packed"]


def refuse_packed(conversion: Conversion, module: nn.Module, described: str, given: Iterable[Any]) -> None:
    """Raises NotRewritten if ``module`` is a recurrent layer with numbers to round, and its input is one."""
    if not isinstance(module, nn.RNNBase) or not any(isinstance(each, PackedSequence) for each in given):
        return
    recipe, places = conversion.recipe, conversion.places
    path = places.path(module) or ""
    names = [name for each in module.parameters() if (name := places.parameter(each)) is not None]
    weights = (recipe.at(*places.subjects[name]).weight for name in names)
    inside = (recipe.at(each) for each in inside_module(path, module) if not recipe.excludes(each[0]))
    if any(each.rounds for each in weights) or any(each.activation.rounds or each.error.rounds for each in inside):
        raise NotRewritten(
            f"{described} would compute in float, since no graph holds a PackedSequence; give it a padded tensor, or "
            f"leave it in float by a rule: Rule({path or '*'!r}, W='float', A='float', E='float')"
        )
