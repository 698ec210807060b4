"""Capture: a converted model runs rewritten graphs, made by PyTorch's guarded front end at the first call."""

from typing import Any

from .conversion import Conversion, Graphs, Rewritten, conversion_of
from .running import local
from .unfit import refuse_unfit

__all__ = ["Conversion", "Graphs", "Rewritten", "conversion_of", "local", "refuse_unfit"]

_ENTRIES = ("float_copy", "in_float", "install", "restore")  # they import torch._dynamo, which takes a second


def __getattr__(name: str) -> Any:
    if name not in _ENTRIES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import entries

    return getattr(entries, name)
