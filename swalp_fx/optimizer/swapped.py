"""A model that has other weights for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .. import fingerprints

__all__ = ["IN_AVERAGED", "own_weights_later"]

IN_AVERAGED = "inside `with swalp.averaged()` would use the averaged weights; do it outside"


@contextlib.contextmanager
def own_weights_later(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """A context: at its end the model has its own weights and buffers again, bit for bit.

    Inside, ``load_state_dict`` of the model and of its parts raises ValueError: the loaded weights would be lost.
    """
    # A forward may set a buffer to another tensor, or to None, so each goes back to its place.
    places = [(module._buffers, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    tensors = [*parameters.values(), *(buffer for _, _, buffer in places if buffer is not None)]
    before = [tensor.detach().clone() for tensor in tensors]
    stored = [(parameter, fingerprints.number_of(parameter)) for parameter in parameters.values()]
    refusal = _RefusedLoad(is_on=True)
    handles = [module.register_load_state_dict_pre_hook(refusal) for module in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
        fingerprints.put(stored)
        for buffers, name, buffer in places:
            buffers[name] = buffer


class _RefusedLoad:
    """A hook that refuses to load weights into a module while it is on. A copy or a pickle of it is off."""

    def __init__(self, is_on: bool = False) -> None:
        self.is_on = is_on

    def __call__(self, *args: Any) -> None:
        if self.is_on:
            raise ValueError(f"load_state_dict() {IN_AVERAGED}")

    def __reduce__(self) -> Any:
        return _RefusedLoad, ()
