"""A recipe: one format for each role of Algorithm 2, how to round to them, where, and with which exceptions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from .formats import FLOAT, Format, parse

__all__ = ["PLACEMENTS", "ROLES", "ROUNDINGS", "Recipe", "RecipeError", "Rule", "Subject", "matches", "parse_rounding"]

# Letter in tables -> role; Q_W, Q_A, Q_E, Q_G, Q_M in the paper's Algorithm 2.
ROLES = {"W": "weight", "A": "activation", "E": "error", "G": "gradient", "M": "momentum"}
LETTERS = {role: letter for letter, role in ROLES.items()}
_FORMATS = (*ROLES.values(), "accumulator", "average")
# In the order of csrc/round.h, whose codes these are.
ROUNDINGS = ("nearest", "stochastic", "toward_zero", "down", "up", "nearest_away", "nearest_up")
# Which layer outputs are rounded; passes/assign.py has the rule of each.
PLACEMENTS = ("every", "compute", "compute+activation", "group")

# What a pattern is held against: (qualified name, kinds), kinds being the part and the names of its operation. A tied
# parameter has one subject a name.
Subject = tuple[str, Collection[str]]


RANDOM_BITS = 16  # of a stochastic rounding that does not say: half a word, at most 2^-17 of a step from unbiased
MAX_RANDOM_BITS = 24


class RecipeError(ValueError):
    """A recipe that names a role, a rounding, a layer or a value that does not exist."""


@dataclass(frozen=True)
class Rule:
    """An exception of a recipe: the formats of what it matches. A role left at None is as the recipe says.

    ``match`` is a glob, or a regular expression behind ``re:``, which must match the whole qualified name of a layer,
    an output, a parameter or of a module around it: ``"fc"`` is the layer, its output, ``fc.weight`` and ``fc.bias``.
    A function's output is named by the module that calls it and by what is called: ``layer1.0.add``.
    ``kind`` is the operation besides, by a part ("compute", "norm", "activation", "arithmetic", "pooling"), a type
    ("Conv2d") or a function's name ("matmul"). A parameter is of the kind of the layer that holds it, or "parameter".
    """

    match: str
    kind: str | None = None
    weight: Format | None = None
    activation: Format | None = None
    error: Format | None = None
    gradient: Format | None = None
    momentum: Format | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not self.match:
            raise RecipeError(f"a rule matches a qualified name, such as 'layer1.*', not {self.match!r}")
        if self.match.startswith("re:"):
            try:
                re.compile(self.match[3:])
            except re.error as error:
                raise RecipeError(f"rule {self.match!r} is no regular expression: {error}") from error
        for role in ROLES.values():
            if (value := getattr(self, role)) is not None:
                object.__setattr__(self, role, parse(value))
        if not self.formats():
            raise RecipeError(f"rule {self.match!r} sets no format; name a role, such as weight='float'")

    def formats(self) -> dict[str, Format]:
        """Role -> format, of the roles that it sets."""
        return {role: value for role in ROLES.values() if (value := getattr(self, role)) is not None}

    def matches(self, subjects: Iterable[Subject]) -> bool:
        return any((self.kind is None or self.kind in kinds) and matches(self.match, name) for name, kinds in subjects)

    def __str__(self) -> str:
        words = [self.match, *([f"kind={self.kind}"] if self.kind else [])]
        return " ".join([*words, *(f"{LETTERS[role]}={value}" for role, value in self.formats().items())])


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches all of ``name``, or of the name of a module around it."""
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], each) for each in _around(name))
    return any(fnmatchcase(each, pattern) for each in _around(name))


def _around(name: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def parse_rounding(rounding: str) -> tuple[str, int]:
    """Name and number of random bits: ``"stochastic8"`` is ("stochastic", 8).

    Raises RecipeError, naming the rounding and those there are, if there is no such one.
    """
    name, bits = rounding, RANDOM_BITS
    if isinstance(rounding, str) and (match := re.fullmatch(r"(stochastic)(\d+)", rounding)):
        name, bits = match[1], int(match[2])
    if name not in ROUNDINGS or not 1 <= bits <= MAX_RANDOM_BITS:
        raise RecipeError(
            f"unknown rounding {rounding!r}; use one of {', '.join(ROUNDINGS)}, or stochastic1 to "
            f"stochastic{MAX_RANDOM_BITS} for other than {RANDOM_BITS} random bits"
        )
    return name, bits


@dataclass(frozen=True)
class Recipe:
    """Which format each role is kept in, and where. Fields of formats take specs too.

    ``Recipe.parse(str(recipe)) == recipe`` for every recipe without rules, so it fits in a log line or a checkpoint.
    Rules are printed, and have no text that parse reads.
    """

    weight: Format = FLOAT
    activation: Format = FLOAT
    error: Format = FLOAT
    gradient: Format = FLOAT
    momentum: Format = FLOAT
    accumulator: Format | None = None  # what the optimizer steps on; None: the weights themselves
    average: Format = FLOAT  # of the averaged weights, Q_SWA in the paper's section 5.1
    average_rounding: str = "nearest"  # how each update of it is rounded; to nearest it stalls, see averaging.Average
    rounding: str = "stochastic"
    placement: str = "every"  # which layer outputs are rounded
    include: tuple[str, ...] = ()  # globs: layer outputs rounded though the placement leaves them out
    exclude: tuple[str, ...] = ()  # globs: outputs, inputs and logits left in float, whatever else says
    quantize_input: bool = False
    quantize_logits: bool = False  # what the model returns
    # Round where a number already lies, if nothing else reads it there, and not at all if it is known to be rounded:
    # the same numbers, sooner.
    in_place: bool = True
    rules: tuple[Rule, ...] = ()  # in order: the first that matches wins

    def __post_init__(self) -> None:
        for role in _FORMATS:
            value = getattr(self, role)
            if value is not None or role != "accumulator":
                object.__setattr__(self, role, parse(value))
        parse_rounding(self.rounding)
        parse_rounding(self.average_rounding)
        if self.placement not in PLACEMENTS:
            raise RecipeError(f"unknown placement {self.placement!r}; use one of {', '.join(PLACEMENTS)}")
        for name in ("include", "exclude"):
            object.__setattr__(self, name, _globs(name, getattr(self, name)))
        for name in ("quantize_input", "quantize_logits", "in_place"):
            if not isinstance(getattr(self, name), bool):
                raise RecipeError(f"{name} is true or false, not {getattr(self, name)!r}")
        if isinstance(self.rules, Rule) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise RecipeError(f"rules must be a tuple of Rule, not {self.rules!r}")
        object.__setattr__(self, "rules", tuple(self.rules))

    @classmethod
    def parse(cls, text: str | Recipe, **changes: Any) -> Recipe:
        """The recipe that ``text`` names: a spec for all of W A E G M, then exceptions; ``changes`` come last.

        ``"bfp8[0]"``, ``"bfp8[0] M=float"``, ``"W=e4m3 A=e4m3 E=e5m2 rounding=nearest"``,
        ``"bfp8[0] placement=compute+activation exclude=relu,*.shortcut quantize_input=true"``.
        """
        if not isinstance(text, str | Recipe):
            raise RecipeError(f"a recipe must be a string or a Recipe, not {type(text).__name__} {text!r}")
        known = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for word in re.split(r"[\s;]+", text.strip()) if isinstance(text, str) else ():
            name, separator, value = word.partition("=")
            if not separator:
                if values:
                    raise RecipeError(f"recipe {text!r}: {word!r} would undo what stands before it; put it first")
                values |= dict.fromkeys(ROLES.values(), word)
                continue
            if name == "rules":
                raise RecipeError("rules are not read from text; pass them: Recipe.parse(text, rules=(Rule(...),))")
            values[ROLES.get(name, name)] = _READ.get(name, str)(value)
        values |= {ROLES.get(name, name): value for name, value in changes.items()}
        if unknown := [name for name in values if name not in known]:
            raise RecipeError(f"recipe {str(text)!r}: there is no role {unknown[0]!r}; use one of {', '.join(known)}")
        if isinstance(text, Recipe):
            return replace(text, **values) if values else text
        return cls(**values)

    def at(self, *subjects: Subject) -> Recipe:
        """The recipe of one layer's output or one parameter, its rule applied."""
        rule = next((rule for rule in self.rules if rule.matches(subjects)), None)
        return self if rule is None else replace(self, **rule.formats())  # type: ignore[arg-type]

    def excludes(self, name: str) -> bool:
        return any(matches(pattern, name) for pattern in self.exclude)

    def includes(self, name: str) -> bool:
        return any(matches(pattern, name) for pattern in self.include)

    def refuse_unmatched(self, subjects: Collection[Subject]) -> None:
        """Raises RecipeError for a rule, an include or an exclude that matches none of ``subjects``."""
        names = {each: None for name, _ in subjects for each in _around(name)}
        for rule in self.rules:
            if not rule.matches(subjects):
                kinds = sorted({kind for _, each in subjects for kind in each})
                by_name = any(matches(rule.match, name) for name, _ in subjects)
                what = f"kind={rule.kind!r} of rule {rule.match!r}" if by_name else f"rule {rule.match!r}"
                raise _unmatched(what, rule.kind or "" if by_name else rule.match, kinds if by_name else names)
        for field in ("include", "exclude"):
            for pattern in getattr(self, field):
                if not any(matches(pattern, name) for name, _ in subjects):
                    raise _unmatched(f"{field} {pattern!r}", pattern, names)

    def __str__(self) -> str:
        words = [f"{letter}={getattr(self, role)}" for letter, role in ROLES.items()]
        formats = {getattr(self, role) for role in ROLES.values()}
        if len(formats) == 1:
            words = [str(formats.pop())]
        default = {field.name: field.default for field in fields(self)}
        for name in ("accumulator", "average", "average_rounding", "rounding", "placement"):
            if getattr(self, name) != default[name]:
                words.append(f"{name}={getattr(self, name)}")
        words += [f"{name}={','.join(globs)}" for name in ("include", "exclude") if (globs := getattr(self, name))]
        words += [f"{name}=true" for name in ("quantize_input", "quantize_logits") if getattr(self, name)]
        words += [] if self.in_place else ["in_place=false"]
        words += [f"rules=[{'; '.join(map(str, self.rules))}]"] if self.rules else []
        return " ".join(words)


def _read_globs(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _read_bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise RecipeError(f"expected true or false, not {text!r}")
    return text == "true"


_READ = {
    "include": _read_globs,
    "exclude": _read_globs,
    "quantize_input": _read_bool,
    "quantize_logits": _read_bool,
    "in_place": _read_bool,
}  # field -> what its text means


def _globs(field: str, globs: Any) -> tuple[str, ...]:
    if isinstance(globs, str) or not all(isinstance(each, str) for each in globs):
        raise RecipeError(f"{field} must be a tuple of globs, such as ('layer1.*',), not {globs!r}")
    for each in globs:
        # These separate words and globs in a recipe's text; no module's name holds them.
        if not each or re.search(r"[\s;,]", each):
            raise RecipeError(f"{field}: {each!r} is no glob of a qualified name")
    return tuple(globs)


def _unmatched(what: str, wanted: str, known: Iterable[str]) -> RecipeError:
    nearest = difflib.get_close_matches(wanted.removeprefix("re:"), list(known), n=3, cutoff=0)
    return RecipeError(f"{what} matches nothing in the model; the nearest names are {', '.join(nearest) or 'none'}")
