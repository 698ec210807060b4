"""The roles of Algorithm 2, and values by role."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from ..nearest import did_you_mean
from .errors import RecipeError

__all__ = ["AVERAGE_ROUNDING", "LETTERS", "ROLES", "once"]

# Letter in tables -> role; Q_W, Q_A, Q_E, Q_G, Q_M in the paper's Algorithm 2.
ROLES = {"W": "weight", "A": "activation", "E": "error", "G": "gradient", "M": "momentum"}
LETTERS = {role: letter for letter, role in ROLES.items()}
AVERAGE_ROUNDING = "average_rounding"  # once a field: now average=FORMAT~ROUNDING
_FIELDS = {**ROLES, "accumulator": "master"}  # letters, and the old word: hardware's accumulator is a product's
ROLE_NAMES = ", ".join(f"{letter} ({role})" for letter, role in ROLES.items())


def once(values: Iterable[Iterable[Any]], where: str, fields: Collection[str]) -> dict[str, Any]:
    """Field -> value, of values by field or letter. Raises RecipeError for what is none of ``fields``, and twice."""
    found: dict[str, tuple[str, Any]] = {}
    for name, value in values:
        field = _FIELDS.get(name, name)
        if field not in fields and not (field == AVERAGE_ROUNDING and "average" in fields):
            remedy = did_you_mean(name, (*ROLES, *fields), f"the roles are {ROLE_NAMES}")
            raise RecipeError(f"{where}: there is no role {name!r}; {remedy}")
        if field in found:
            before, first = found[field]
            raise RecipeError(f"{where} sets {field} twice, {before}={first} and {name}={value}; leave one out")
        found[field] = name, value
    return {field: value for field, (_, value) in found.items()}
