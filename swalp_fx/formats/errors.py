"""The error of an impossible format."""

from __future__ import annotations

__all__ = ["FormatError", "require"]


class FormatError(ValueError):
    """A spec that names no format, a parameter out of its range, or parts that do not go together."""


def require(ok: bool, message: str) -> None:
    """Raises FormatError unless ``ok``."""
    if not ok:
        raise FormatError(message)
