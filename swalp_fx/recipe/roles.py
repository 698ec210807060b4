"""The roles of Algorithm 2, and values by role."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ..nearest import did_you_mean
from .errors import RecipeError

__all__ = ["ALL_ROLES", "AVERAGE_ROUNDING", "LETTERS", "OF_PARAMETERS", "OF_WEIGHTS", "ROLES", "STATE", "once"]

# Letter in tables -> role; Q_W, Q_A, Q_E, Q_G, Q_M in the paper's Algorithm 2.
ROLES = {"W": "weight", "A": "activation", "E": "error", "G": "gradient", "M": "momentum"}
# V is not in Algorithm 2, and a format for all roles leaves it out. Adam divides by the root of v: a small v would be
# rounded to zero, and the step would be as long as 1 / epsilon.
ALL_ROLES = {**ROLES, "V": "second_moment"}
LETTERS = {role: letter for letter, role in ALL_ROLES.items()}
OF_WEIGHTS = ("master", "average")  # copies of the weights that the optimizer pass keeps; they have no letter
OF_PARAMETERS = ("weight", "gradient", "momentum", "second_moment", *OF_WEIGHTS)  # all calls of a layer share these
STATE = "state."  # before the name of an optimizer's state
AVERAGE_ROUNDING = "average_rounding"  # the old spelling of average=FORMAT~ROUNDING
_FIELDS = {**ALL_ROLES, "accumulator": "master"}  # letters, and an old name; hardware's accumulator sums a product
ROLE_NAMES = ", ".join(f"{letter} ({role})" for letter, role in ALL_ROLES.items())


def once(values: Iterable[Iterable[Any]], where: str, fields: Collection[str]) -> dict[str, Any]:
    """Field -> value, from values by field, letter or ``state.NAME``. All states together are the mapping ``states``.

    Raises RecipeError for a name that is none of ``fields``, and for a field that is set twice.
    """
    found: dict[str, tuple[str, Any]] = {}
    for name, value in _each(values, where):
        field = _FIELDS.get(name, name)
        if not _is_among(field, fields):
            remedy = did_you_mean(name, (*ALL_ROLES, *fields), f"the roles are {ROLE_NAMES}")
            raise RecipeError(f"{where}: there is no role {name!r}; {remedy}")
        if field in found:
            before, first = found[field]
            raise RecipeError(f"{where} sets {field} twice, {before}={first} and {name}={value}; leave one out")
        found[field] = name, value
    given = {field: value for field, (_, value) in found.items() if not field.startswith(STATE)}
    states = {field[len(STATE) :]: value for field, (_, value) in found.items() if field.startswith(STATE)}
    return given | ({"states": states} if states else {})


def _each(values: Iterable[Iterable[Any]], where: str) -> Iterator[tuple[str, Any]]:
    """The values, each state by itself."""
    for name, value in values:
        if name != "states":
            yield name, value
            continue
        try:
            states = [(f"{STATE}{each}", how) for each, how in (value.items() if isinstance(value, Mapping) else value)]
        except (TypeError, ValueError):
            raise RecipeError(f"{where}: states maps names to formats, such as {STATE}exp_avg_sq=bf16") from None
        yield from states


def _is_among(field: str, fields: Collection[str]) -> bool:
    if field.startswith(STATE):
        return "states" in fields and field[len(STATE) :].isidentifier()
    return field in fields or (field == AVERAGE_ROUNDING and "average" in fields)
