"""What was done to a model, to look at: ``report``, ``draw``, ``measure``, and ``check``, which compares."""

from .checking import Check, check
from .drawing.draw import draw
from .measuring import Measures, Rounded, measure
from .reporting import report
from .value import Report

__all__ = ["Check", "Measures", "Report", "Rounded", "check", "draw", "measure", "report"]
