"""The parameters that the tensors of a running call are made of, whether a graph or Python makes them.

It says of tensors what ``passes/origin.py`` says of the nodes of a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from ..passes.facts import is_number
from ..passes.tables import does, is_product, part_of
from .conversion import Conversion

__all__ = ["CONSTANT", "Sources"]

Parameter = tuple[Conversion, str]  # of this model, with this name
CONSTANT: frozenset[Parameter] = frozenset()  # of no parameter, and of nothing floating that the model is given


class Sources:
    """Of each tensor, by its memory: the parameters alone that it is made of, CONSTANT, or None for all others.

    It keeps no tensor alive, and memory that is freed is forgotten.
    """

    def __init__(self) -> None:
        self._known: set[Conversion] = set()
        self._found: Any = WeakIdKeyDictionary()
        self._states: Any = WeakIdKeyDictionary()  # memory of buffers: constants, whatever is written into them

    def add(self, conversion: Conversion) -> None:
        """Makes the parameters and buffers of a model known."""
        if conversion not in self._known:
            self._known.add(conversion)
            for name, parameter in conversion.root.named_parameters():
                self._found[_memory(parameter)] = frozenset(((conversion, name),))
            for buffer in conversion.root.buffers():
                self._states[_memory(buffer)] = True

    def of(self, tensor: Tensor) -> frozenset[Parameter] | None:
        memory = _memory(tensor)
        if memory in self._states:
            return CONSTANT
        found: frozenset[Parameter] | None = self._found.get(memory, None if is_number(tensor) else CONSTANT)
        return found

    def note(self, function: OpOverload, args: Sequence[Any], kwargs: dict[str, Any], given: Any) -> None:
        """Notes the sources of an operation's results, and of the tensors that it has written into."""
        name = function.overloadpacket.__name__
        operands = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        results = [each for each in pytree.tree_leaves(given) if isinstance(each, Tensor)]
        made: frozenset[Parameter] | None = CONSTANT
        if _reads_sizes_alone(name):
            before = {id(_memory(each)) for each in operands}
            results = [each for each in results if id(_memory(each)) not in before]
        else:
            sources = [self.of(each) for each in operands]
            made = None if None in sources else CONSTANT.union(*sources)  # type: ignore[arg-type]
            if made and is_product(name):
                made = None
            results += pytree.tree_leaves(_written(function, args, kwargs))
        for each in results:
            if isinstance(each, Tensor):
                self._put(each, made)

    def _put(self, tensor: Tensor, made: frozenset[Parameter] | None) -> None:
        self._found.pop(_memory(tensor), None)
        if self.of(tensor) != made:
            self._found[_memory(tensor)] = made


def _reads_sizes_alone(name: str) -> bool:
    """``new_ones`` does. ``empty_like`` makes memory for numbers, which a kernel may write there unseen."""
    return part_of(name) == "number" and "reads" not in does(name.strip("_")) and "empty" not in name


def _memory(tensor: Tensor) -> Any:
    return tensor.untyped_storage() if tensor.layout is torch.strided else tensor


def _written(function: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operation writes into."""
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in _places_written(function)]


@cache
def _places_written(function: OpOverload) -> tuple[tuple[int, str], ...]:
    arguments = function._schema.arguments
    return tuple((i, each.name) for i, each in enumerate(arguments) if each.alias_info and each.alias_info.is_write)
