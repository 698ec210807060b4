"""Low-precision training with weight averaging (SWALP), as a rewrite of torch.fx graphs."""

from .averaging import Average, recalibrate
from .capture import ConvertError
from .check import Check, check
from .convert import Converted, convert
from .draw import draw
from .formats import (
    FLOAT,
    BlockFloat,
    FixedPoint,
    Float,
    Format,
    FormatError,
    Microscaling,
    Nvfp4,
    ScaledInteger,
    parse,
)
from .measure import Measures, Rounded, measure
from .nodes import call_layer, draw_key, quantize_output, quantize_weight
from .ops import quantize, quantize_
from .optimizer import SWALP
from .passes import RewrittenModule
from .recipe import Recipe, RecipeError, Rule
from .report import report

__all__ = [
    "FLOAT",
    "SWALP",
    "Average",
    "BlockFloat",
    "Check",
    "ConvertError",
    "Converted",
    "FixedPoint",
    "Float",
    "Format",
    "FormatError",
    "Measures",
    "Microscaling",
    "Nvfp4",
    "Recipe",
    "RecipeError",
    "RewrittenModule",
    "Rounded",
    "Rule",
    "ScaledInteger",
    "call_layer",
    "check",
    "convert",
    "draw",
    "draw_key",
    "measure",
    "parse",
    "quantize",
    "quantize_",
    "quantize_output",
    "quantize_weight",
    "recalibrate",
    "report",
]

__version__ = "0.1.0"
