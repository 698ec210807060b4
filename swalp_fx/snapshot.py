"""A model left as it was, whatever is done to it, and what was done to it."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy

__all__ = ["CONSTANT", "Snapshot", "untouched"]

CONSTANT = "_tensor_constant"  # what torch.fx calls a tensor of no module, and numbers
_CONTAINERS = (dict, OrderedDict, list, set)
_VALUES = (bool, int, float, str, type(None))  # equal ones are as good as the same


class Snapshot:
    """A model's attributes, their containers, and the values of its tensors that are no parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.attributes = [(path, module, dict(vars(module))) for path, module in model.named_modules()]
        self.containers = [
            (path, name, value, value.copy())
            for path, _, attributes in self.attributes
            for name, value in attributes.items()
            if type(value) in _CONTAINERS
        ]
        tensors = [
            (path, name, value)
            for path, _, attributes in self.attributes
            for name, value in (*attributes.items(), *attributes["_buffers"].items())
            if isinstance(value, torch.Tensor)
        ]
        self.tensors = [(*each, each[-1]._version, each[-1].detach().clone()) for each in tensors]

    def changes(self) -> Iterator[tuple[str, str]]:
        """(qualified name of the module, attribute) of what is not as it was, but for what the tracer put there:
        training flags, constants of the graph, and what buffers are set to."""
        for path, module, attributes in self.attributes:
            for name, value in vars(module).items():
                is_the_tracers = isinstance(value, Proxy) or name.startswith(CONSTANT) or name in attributes["_buffers"]
                if not is_the_tracers and not _is_same(attributes.get(name), value):
                    yield path, name
            yield from ((path, name) for name in attributes.keys() - vars(module).keys())
        for path, name, container, copy in self.containers:
            if isinstance(container, dict):
                old, new = [*copy, *copy.values()], [*container, *container.values()]
            else:
                old, new = list(copy), list(container)
            if len(old) != len(new) or not all(map(_is_same, old, new)):
                entries = (key for key in (*container, *copy) if copy.get(key) is not container.get(key))
                yield path, next(entries) if name in ("_buffers", "_modules", "_parameters") else name
        for path, name, tensor, version, _ in self.tensors:
            if tensor._version != version:
                yield path, name

    def restore(self) -> None:
        for _, module, attributes in self.attributes:
            vars(module).clear()
            vars(module).update(attributes)
        for _, _, container, copy in self.containers:
            container.clear()
            container.extend(copy) if isinstance(container, list) else container.update(copy)
        for _, _, tensor, version, copy in self.tensors:
            if tensor._version != version:
                tensor.detach().copy_(copy)


def _is_same(old: Any, new: Any) -> bool:
    return old is new or (isinstance(old, _VALUES) and type(old) is type(new) and old == new)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[Snapshot]:
    """On leaving, the model is as it was on entering, and so is the random state."""
    snapshot = Snapshot(model)
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    try:
        yield snapshot
    finally:
        snapshot.restore()
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
