"""Modes that a graph switches, restored if its run ends in an exception."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.autograd.grad_mode import _enter_inference_mode

__all__ = ["held"]


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
