"""Text that is given, and written to a file where one is named."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["written"]


def written(text: str, path: str | os.PathLike[str] | None) -> str:
    """``text``, written to ``path`` too, if given: UTF-8, its lines ending as they do."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8", newline="\n")
    return text
