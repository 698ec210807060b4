"""Warnings at the user's own line."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["warn"]


def warn(message: str) -> None:
    """Warns at the user's line that led here; lines of this package and of torch are skipped."""
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("swalp_fx", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
