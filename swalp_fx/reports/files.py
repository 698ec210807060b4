"""Text that is returned, and also written to a file if one is named."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["written"]


def written(text: str, path: str | os.PathLike[str] | None) -> str:
    """``text``; also written to ``path`` if given, as UTF-8 with line ends unchanged."""
    if path is not None:
        Path(path).write_text(text, encoding="utf-8", newline="\n")
    return text
