"""Number formats: frozen values with a canonical string, an element on a scale that a block shares.

A format says which numbers exist; it never says how to round to them.
``parse(str(f)) == f`` holds for every format. Named formats are constants, ``E4M3`` or ``MXFP8``,
and ``PRESETS`` has them by the names that ``parse`` takes. docs/formats.md is their table.
"""

from . import named
from .block import ROWS, WHOLE, Block, Channel, Rectangle, Runs, Slices
from .element import Codebook, Element, Float, Grid, Integer, Posit, posit
from .errors import FormatError
from .format import FLOAT, Format
from .grammar import parse
from .named import *  # noqa: F403
from .named import PRESETS
from .scale import Absmax, Affine, PowerOfTwo, Scale, Static, TwoLevel

__all__ = [
    "FLOAT",
    "PRESETS",
    "ROWS",
    "WHOLE",
    "Absmax",
    "Affine",
    "Block",
    "Channel",
    "Codebook",
    "Element",
    "Float",
    "Format",
    "FormatError",
    "Grid",
    "Integer",
    "Posit",
    "PowerOfTwo",
    "Rectangle",
    "Runs",
    "Scale",
    "Slices",
    "Static",
    "TwoLevel",
    "parse",
    "posit",
    *named.CONSTANTS,
]
