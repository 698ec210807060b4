"""The user's own lines: warnings stand at them, and reports name them."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["is_own", "line_of", "warn"]


def is_own(frame: FrameType) -> bool:
    """Whether ``frame`` runs code of the user, or of another package: neither this one's nor torch's."""
    return frame.f_globals.get("__name__", "").partition(".")[0] not in ("swalp_fx", "torch")


def line_of(frame: FrameType) -> str:
    """``model.py:12 forward``: the line that ``frame`` is at."""
    return f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}"


def warn(message: str) -> None:
    """Warns at the user's line that led here; lines of this package and of torch are skipped."""
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_own(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
