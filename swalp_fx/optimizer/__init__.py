"""The optimizer pass: Algorithm 2 on the user's own optimizer, and averages of its weights."""

from .algorithm import SWALP
from .averaging import Average
from .recalibration import recalibrate

__all__ = ["SWALP", "Average", "recalibrate"]
