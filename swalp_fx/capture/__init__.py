"""Capture: a converted model runs rewritten graphs, made by PyTorch's guarded front end at the first call."""

from .backend import local
from .conversion import Conversion, Graphs, Rewritten
from .entries import conversion_of, float_copy, in_float, install, restore
from .unfit import refuse_unfit

__all__ = [
    "Conversion",
    "Graphs",
    "Rewritten",
    "conversion_of",
    "float_copy",
    "in_float",
    "install",
    "local",
    "refuse_unfit",
    "restore",
]
