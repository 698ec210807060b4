"""New nodes in a captured graph, with the metadata that the capture would write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node
from torch.fx.node import map_arg

from .captured import CALLS, LAYER, MODULE, STEPS, TYPE, Layer

__all__ = ["VALUE", "Writer", "value_of"]

VALUE = "example_value"
# Copied to a new node from the node that it stands for.
INHERITED = ("nn_module_stack", "stack_trace", MODULE, TYPE, CALLS, STEPS)


class Writer:
    """Writes nodes that stand for ``like``, in front of ``place``, as a part of ``layer``.

    ``write(function, *args)`` returns the node of that call; a method is given by its name.
    """

    def __init__(self, like: Node, place: Node | None = None, layer: Layer | None = None) -> None:
        self.like, self.place, self.layer = like, like if place is None else place, layer

    def __call__(
        self, function: Callable[..., Any] | str, *args: Any, layer: Layer | None = None, **kwargs: Any
    ) -> Node:
        op = "call_method" if isinstance(function, str) else "call_function"
        with self.place.graph.inserting_before(self.place):
            node = self.place.graph.create_node(op, function, args, kwargs)
        node.meta = self.inherited()
        if layer is not None or self.layer is not None:
            node.meta[LAYER] = layer or self.layer
        given, named = map_arg((args, kwargs), value_of)
        call = getattr(type(given[0]), function) if isinstance(function, str) else function
        with torch.no_grad(), enable_python_dispatcher():  # else sizes that change become fixed
            node.meta[VALUE] = call(*given, **named)
        return node

    def inherited(self) -> dict[str, Any]:
        return {key: self.like.meta[key] for key in INHERITED if key in self.like.meta}

    def size(self, tensor: Node, axis: int) -> Any:
        """The length of an axis: a number, or the node that reads it where it may change from call to call."""
        length = value_of(tensor).shape[axis]
        return length if isinstance(length, int) else self("size", tensor, axis)


def value_of(node: Node) -> Any:
    """The output of ``node`` in the capture's run on tensors without data."""
    return node.meta[VALUE]
