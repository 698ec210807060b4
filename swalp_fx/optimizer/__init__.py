"""The optimizer pass: Algorithm 2 on the user's own optimizer, and averages of its weights."""

from .averaging import Average
from .recalibration import recalibrate
from .swalp import SWALP

__all__ = ["SWALP", "Average", "recalibrate"]
