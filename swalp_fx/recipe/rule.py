"""A rule: an exception of a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .errors import RecipeError
from .patterns import Subject, is_numbered, matches
from .quantizer import Quantizer, States, as_states
from .roles import ALL_ROLES, LETTERS, OF_PARAMETERS, OF_WEIGHTS, once

__all__ = ["FIELDS_OF_RULE", "Rule"]

QUANTIZERS = (*ALL_ROLES.values(), *OF_WEIGHTS)
FIELDS_OF_RULE = (*QUANTIZERS, "states")  # that it may set


@dataclass(frozen=True, init=False)
class Rule:
    """An exception of a recipe: other roles for the layers, outputs and parameters that it matches.

    A role that is left at None is as in the recipe. Roles go by letter too:
    ``Rule("fc", W="float", G="e5m2~stochastic")``. ``states`` maps names of an optimizer's states to formats.
    ``master`` gives the matched parameters masters, whether or not the recipe has them for others.

    ``match`` is a glob, or a regular expression after ``re:``. It must match the whole qualified name of a layer, an
    output, a parameter, or a module around it. ``"fc"`` is the layer, its output, ``fc.weight`` and ``fc.bias``. The
    output of a function is named by the calling module, then by the function: ``layer1.0.add``.

    ``kind`` restricts the match to an operation: a part ("compute", "norm", "activation", "arithmetic", "pooling"), a
    type ("Conv2d") or a function's name ("matmul"). An output of a module's own code also has the module's type, as the
    attention inside of a "MultiheadAttention" has. A parameter has the kind of the layer that holds it, or "parameter".

    Several outputs have the same name if a module is called twice. A rule matches them all. ``layer1.0.relu@2`` matches
    only the second in the graph; such a rule may set activation and error alone. ``report`` prints every name.
    """

    match: str
    kind: str | None = None
    weight: Quantizer | None = None
    activation: Quantizer | None = None
    error: Quantizer | None = None
    gradient: Quantizer | None = None
    momentum: Quantizer | None = None
    second_moment: Quantizer | None = None
    master: Quantizer | None = None
    average: Quantizer | None = None
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
        unset = dict.fromkeys(QUANTIZERS)
        for name, value in {"match": match, "kind": kind, **unset, **values, "states": states}.items():
            object.__setattr__(self, name, value)

    def roles(self) -> dict[str, Quantizer]:
        """Role -> quantizer, of the roles that the rule sets."""
        return {role: value for role in QUANTIZERS if (value := getattr(self, role)) is not None}

    def matches(self, subjects: Iterable[Subject]) -> bool:
        return any((self.kind is None or self.kind in kinds) and matches(self.match, name) for name, kinds in subjects)

    def refuse_shared(self, subjects: Iterable[Subject]) -> None:
        """Raises RecipeError if the rule names single calls of a layer, and sets a role that all its calls share."""
        shared = [role for role in OF_PARAMETERS if role in self.roles()]
        matched = (name for name, kinds in subjects if self.matches([(name, kinds)]))
        if shared and "@" in self.match and all(map(is_numbered, matched)):
            raise RecipeError(
                f"rule {self.match!r} sets {', '.join(shared)}, which all calls of a layer share; set activation and "
                "error alone, or name the layer without @"
            )

    def __repr__(self) -> str:
        kind = [f"kind={self.kind!r}"] if self.kind is not None else []
        roles = [f"{LETTERS.get(role, role)}={str(value)!r}" for role, value in self.roles().items()]
        if self.states:
            roles.append(f"states={ {name: str(quantizer) for name, quantizer in self.states} }")
        return f"Rule({', '.join([repr(self.match), *kind, *roles])})"
