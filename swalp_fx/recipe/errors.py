"""The error of a wrong recipe."""

from __future__ import annotations

__all__ = ["RecipeError"]


class RecipeError(ValueError):
    """A recipe that names a role, a rounding, a layer or a value that does not exist."""
