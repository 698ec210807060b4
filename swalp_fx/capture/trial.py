"""Calls that leave a model as it was."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .conversion import Conversion

__all__ = ["randomness_kept", "try_on", "untouched"]


def try_on(conversion: Conversion, inputs: tuple[Any, ...] | list[Any] | Mapping[str, Any]) -> None:
    """Makes the graphs of a call with ``inputs``; the model and the random state stay as they were.

    Raises RecipeError for a rule, an include or an exclude that matches nothing in these graphs.
    """
    model = conversion.root
    conversion.is_proved = True  # no warning in the call: the same is raised below
    with untouched(model):
        if isinstance(inputs, Mapping):
            model(**inputs)
        else:
            model(*inputs)
    conversion.refuse_unmatched()


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """A context that restores gradients, buffers, plain attributes and the random state. Inside, gradients are None.

    Plain attributes are numbers, strings, and tensors that are replaced. Random states are Python's, NumPy's and
    PyTorch's.
    """
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    attributes = [(each, dict(vars(each)), dict(each._buffers)) for each in model.modules()]
    for parameter in gradients:
        parameter.grad = None
    try:
        with randomness_kept(model):
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        for buffer, before in buffers.items():
            buffer.detach().copy_(before)
        for each, own, of_buffers in attributes:
            vars(each).update(own)
            each._buffers.clear()
            each._buffers.update(of_buffers)


@contextlib.contextmanager
def randomness_kept(model: nn.Module) -> Iterator[None]:
    """A context that restores the random state of Python, NumPy and PyTorch, on the model's devices too."""
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.is_cuda})
    numpy = sys.modules.get("numpy")  # if nobody has imported it, nobody has drawn from it
    states = random.getstate(), numpy and numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
