"""A call of a model that leaves it as it was, to make its graphs."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch

from .conversion import Conversion

__all__ = ["try_on"]


def try_on(conversion: Conversion, inputs: tuple[Any, ...] | list[Any] | Mapping[str, Any]) -> None:
    """Makes the graphs of a call with ``inputs``; buffers and random state are as before.

    Raises RecipeError for a rule, an include or an exclude that matches nothing in them.
    """
    model = conversion.root
    buffers = {name: (buffer, buffer.detach().clone()) for name, buffer in model.named_buffers()}
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=devices):
            if isinstance(inputs, Mapping):
                model(**inputs)
            else:
                model(*inputs)
    finally:
        random.setstate(state)
        for name, (buffer, before) in buffers.items():
            path, _, own = name.rpartition(".")
            buffer.detach().copy_(before)
            model.get_submodule(path)._buffers[own] = buffer
    conversion.refuse_unmatched()
