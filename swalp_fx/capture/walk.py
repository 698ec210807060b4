"""Replaces tensors in any object that a model returns."""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["replaced"]

LEFT = (nn.Module, type, types.ModuleType, types.FunctionType)  # tensors inside these are not returned


def replaced(value: Any, of: Callable[[Tensor], Tensor], given: Any) -> Any:
    """``value`` with ``of(tensor)`` for each tensor in its containers, records and objects, at any depth.

    An object around a replaced tensor is copied, since others may hold it too. Objects in ``given`` stay as they are.
    """
    walk = _Walk(of)
    walk.done.update({id(each): (each, each) for each in pytree.tree_leaves(given) if not isinstance(each, Tensor)})
    return walk(value)


class _Walk:
    def __init__(self, of: Callable[[Tensor], Tensor]) -> None:
        self.of = of
        self.done: dict[int, tuple[Any, Any]] = {}  # id -> (object, kept alive for its id; replacement)

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.of(value)
        if id(value) not in self.done:
            self.done[id(value)] = value, value  # it may hold itself
            self.done[id(value)] = value, self._walked(value)
        return self.done[id(value)][1]

    def _walked(self, value: Any) -> Any:
        leaves, structure = pytree.tree_flatten(value)
        if not structure.is_leaf():
            found = [self(leaf) for leaf in leaves]
            return value if all(map(_is, leaves, found)) else pytree.tree_unflatten(found, structure)
        if isinstance(value, set | frozenset):
            found = [self(each) for each in value]
            return value if all(map(_is, value, found)) else type(value)(found)
        return value if isinstance(value, LEFT) else self._object(value)

    def _object(self, value: Any) -> Any:
        new = value
        for part, name, store in _parts(value):
            if (found := self(part)) is not part:
                new = copy.copy(value) if new is value else new
                store(new, name, found)
        return new


def _parts(value: Any) -> Iterator[tuple[Any, Any, Callable[[Any, Any, Any], None]]]:
    """(part, its name, function that stores another): attributes, slots, and items of a dict's or list's subclass."""
    for name, part in list(getattr(value, "__dict__", {}).items()):
        yield part, name, _store_attribute
    for name in _slots(type(value)):
        if hasattr(value, name):
            yield getattr(value, name), name, object.__setattr__  # works on a frozen object too
    if isinstance(value, dict | list):
        for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield part, key, operator.setitem


def _store_attribute(value: Any, name: str, part: Any) -> None:
    vars(value)[name] = part


def _slots(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        yield from (name for name in ([slots] if isinstance(slots, str) else slots) if not name.startswith("__"))


def _is(one: Any, other: Any) -> bool:
    return one is other
