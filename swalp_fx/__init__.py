"""Low-precision training with weight averaging (SWALP), as a rewrite of torch.fx graphs."""

from .formats import FLOAT, BlockFloat, FixedPoint, Float, Format, FormatError, parse
from .ops import quantize, quantize_
from .recipe import Recipe, RecipeError

__version__ = "0.1.0"
