"""Modes of PyTorch: those that a graph switches, and the stack of dispatch modes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.grad_mode import _enter_inference_mode

__all__ = ["held", "push", "remove", "stacked"]


@contextlib.contextmanager
def held() -> Iterator[None]:
    """A context that restores the modes of gradients, inference and autocast after an exception.

    A graph has no with-blocks, only switches: an error between two of them would leave a mode on.
    """
    devices = torch._C._autocast_supported_devices()
    grad, inference, depth = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _autocast_depth()
    autocast = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    cache = torch.is_autocast_cache_enabled()
    try:
        yield
    except BaseException:
        while _autocast_depth() > depth:
            torch.autocast_decrement_nesting()
        if depth == 0:
            torch.clear_autocast_cache()
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cache)
        if torch.is_inference_mode_enabled() != inference:
            _enter_inference_mode(inference)
        torch._C._set_grad_enabled(grad)
        raise


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


# A dispatch mode's own ``with`` sets flags that all threads share. Threads that end in another order would leave them
# on.


def stacked() -> int:
    """The number of dispatch modes that are on in this thread."""
    return torch._C._len_torch_dispatch_stack()


def push(mode: Any) -> None:
    """Turns a dispatch mode on, in this thread."""
    torch._C._push_on_torch_dispatch_stack(mode)


def remove(mode: Any) -> None:
    """Turns a dispatch mode off, in this thread; those that came on after it stay on."""
    above = []
    while stacked() and (top := torch._C._pop_torch_dispatch_stack(None)) is not mode:
        above.append(top)
    for each in reversed(above):
        push(each)
