"""Views of a converted model: ``report``, ``draw`` and ``measure``; ``check`` compares it with the original."""

from .checking import Check, check
from .drawing.draw import draw
from .measuring import Measures, Rounded, measure
from .reporting import report
from .value import Report

__all__ = ["Check", "Measures", "Report", "Rounded", "check", "draw", "measure", "report"]
