"""Low-precision training with weight averaging (SWALP), as a rewrite of torch.fx graphs."""

from .capture import Graphs, Rewritten
from .codes import Codes, decode, encode
from .converting import Converted, convert, in_float, restore
from .errors import ConvertError, NotRewritten
from .formats import (
    FLOAT,
    Format,
    FormatError,
    parse,
)
from .nodes import checkpointed, draw_key, quantize_output, quantize_weight, recurrent
from .ops import quantize, quantize_
from .optimizer import SWALP, Average, recalibrate
from .recipe import Quantizer, Recipe, RecipeError, Rule
from .reports import Check, Measures, Report, Rounded, check, draw, measure, report

__all__ = [
    "FLOAT",
    "SWALP",
    "Average",
    "Check",
    "Codes",
    "ConvertError",
    "Converted",
    "Format",
    "FormatError",
    "Graphs",
    "Measures",
    "NotRewritten",
    "Quantizer",
    "Recipe",
    "RecipeError",
    "Report",
    "Rewritten",
    "Rounded",
    "Rule",
    "check",
    "checkpointed",
    "convert",
    "decode",
    "draw",
    "draw_key",
    "encode",
    "in_float",
    "measure",
    "parse",
    "quantize",
    "quantize_",
    "quantize_output",
    "quantize_weight",
    "recalibrate",
    "recurrent",
    "report",
    "restore",
]

__version__ = "0.1.0"
