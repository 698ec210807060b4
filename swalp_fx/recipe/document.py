"""A recipe as JSON: an object with all its fields, in order. Roles are texts of quantizers, rules are objects."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from .errors import RecipeError
from .quantizer import Quantizer
from .roles import once
from .rule import FIELDS_OF_RULE, Rule

if TYPE_CHECKING:
    from .recipe import Recipe

__all__ = ["from_json", "to_json"]


class _Object(list[tuple[str, Any]]):
    """The pairs of an object. A dict would lose a key that is there twice."""


def to_json(recipe: Recipe, fields: Collection[str]) -> str:
    return json.dumps({field: _plain(getattr(recipe, field)) for field in fields}, indent=1)


def _plain(value: Any) -> Any:
    if isinstance(value, Quantizer):
        return str(value)
    if isinstance(value, Rule):
        states = {"states": _states(value.states)} if value.states else {}
        return {"match": value.match, "kind": value.kind, **{k: str(v) for k, v in value.roles().items()}, **states}
    if isinstance(value, tuple):
        is_states = bool(value) and isinstance(value[0], tuple)
        return _states(value) if is_states else [_plain(each) for each in value]
    return value


def _states(states: Any) -> dict[str, str]:
    return {name: str(quantizer) for name, quantizer in states}


def from_json(text: str, fields: Collection[str]) -> dict[str, Any]:
    """Field -> value. Raises RecipeError if ``text`` is no JSON of a recipe, or has an unknown key; it names the
    nearest key."""
    try:
        pairs = json.loads(text, object_pairs_hook=_Object)
    except (json.JSONDecodeError, TypeError) as error:
        raise RecipeError(f"a recipe's JSON does not parse: {error}") from None
    values = once(_object(pairs, "a recipe"), "a recipe's JSON", fields)
    rules = values.pop("rules", [])
    if type(rules) is not list:
        raise RecipeError(f"a recipe's JSON: rules is a list of objects, not {rules!r}")
    return values | {"rules": tuple(_rule(_object(rule, "a rule")) for rule in rules)}


def _object(value: Any, what: str) -> _Object:
    if not isinstance(value, _Object):
        raise RecipeError(f'{what} is an object in JSON, such as {{"weight": "bfp8[0]"}}, not {value!r}')
    return value


def _rule(pairs: _Object) -> Rule:
    values = once(pairs, "a rule in JSON", ("match", "kind", *FIELDS_OF_RULE))
    return Rule(values.pop("match", ""), **values)
