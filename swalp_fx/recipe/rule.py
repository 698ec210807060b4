"""A rule: an exception of a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import RecipeError
from .patterns import Subject, is_numbered, matches
from .quantizer import Quantizer, States, as_states
from .roles import ALL_ROLES, LETTERS, OF_PARAMETERS, once

__all__ = ["FIELDS_OF_RULE", "Rule"]

FIELDS_OF_RULE = (*ALL_ROLES.values(), "states")  # that it may set


@dataclass(frozen=True, init=False)
class Rule:
    """An exception of a recipe: the roles of what it matches. One left at None is as the recipe says.

    ``match`` is a glob, or a regular expression behind ``re:``, which must match the whole qualified name of a layer,
    an output, a parameter or of a module around it: ``"fc"`` is the layer, its output, ``fc.weight`` and ``fc.bias``.
    A function's output is named by the module that calls it and by what is called: ``layer1.0.add``.
    A role goes by its letter too: ``Rule("fc", W="float", G="e5m2~stochastic")``. ``states`` maps names of an
    optimizer's states to formats, as in a recipe.
    ``kind`` is the operation besides, by a part ("compute", "norm", "activation", "arithmetic", "pooling"), a type
    ("Conv2d") or a function's name ("matmul"). What the code of a module gives is of that module's type besides, as
    what is inside of a "MultiheadAttention" is. A parameter is of the kind of the layer that holds it, or "parameter".
    Where several outputs have one name, as those of a module that is called twice, it matches them all;
    ``layer1.0.relu@2`` is the second of them in the graph, and has no role but activation and error. ``report`` prints
    every name.
    """

    match: str
    kind: str | None = None
    weight: Quantizer | None = None
    activation: Quantizer | None = None
    error: Quantizer | None = None
    gradient: Quantizer | None = None
    momentum: Quantizer | None = None
    second_moment: Quantizer | None = None
    states: States = ()  # of the optimizer, by name, sorted

    def __init__(self, match: str, kind: str | None = None, **roles: Any) -> None:
        if not isinstance(match, str) or not match:
            raise RecipeError(f"a rule matches a qualified name, such as 'layer1.*', not {match!r}")
        if kind is not None and not (isinstance(kind, str) and kind):
            raise RecipeError(f"rule {match!r}: a kind is a part, a type or a function's name, not {kind!r}")
        if match.startswith("re:"):
            try:
                re.compile(match[3:])
            except re.error as error:
                raise RecipeError(f"rule {match!r} is no regular expression: {error}") from error
        given = once(roles.items(), f"rule {match!r}", FIELDS_OF_RULE)
        states = as_states(given.pop("states", ()))
        values = {role: Quantizer.parse(spec) for role, spec in given.items() if spec is not None}
        if not (values or states):
            raise RecipeError(f"rule {match!r} sets no format; name a role, such as weight='float'")
        unset = dict.fromkeys(ALL_ROLES.values())
        for name, value in {"match": match, "kind": kind, **unset, **values, "states": states}.items():
            object.__setattr__(self, name, value)

    def roles(self) -> dict[str, Quantizer]:
        """Role -> quantizer, of the roles that it sets."""
        return {role: value for role in ALL_ROLES.values() if (value := getattr(self, role)) is not None}

    def matches(self, subjects: Iterable[Subject]) -> bool:
        return any((self.kind is None or self.kind in kinds) and matches(self.match, name) for name, kinds in subjects)

    def refuse_shared(self, subjects: Iterable[Subject]) -> None:
        """Raises RecipeError if it means single calls of a layer, and sets what all its calls share."""
        shared = [role for role in OF_PARAMETERS if role in self.roles()]
        matched = (name for name, kinds in subjects if self.matches([(name, kinds)]))
        if shared and "@" in self.match and all(map(is_numbered, matched)):
            raise RecipeError(
                f"rule {self.match!r} sets {', '.join(shared)}, which all calls of a layer share; set activation and "
                "error alone, or name the layer without @"
            )

    def __repr__(self) -> str:
        kind = [f"kind={self.kind!r}"] if self.kind is not None else []
        roles = [f"{LETTERS[role]}={str(value)!r}" for role, value in self.roles().items()]
        if self.states:
            roles.append(f"states={ {name: str(quantizer) for name, quantizer in self.states} }")
        return f"Rule({', '.join([repr(self.match), *kind, *roles])})"
