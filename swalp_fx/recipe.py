"""A recipe: one format for each role of Algorithm 2, how to round to them, where, and with which exceptions."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar

from .formats import FLOAT, Format, FormatError, parse
from .nearest import did_you_mean, listed, nearest

__all__ = ["PLACEMENTS", "ROLES", "ROUNDINGS", "Recipe", "RecipeError", "Rule", "Subject", "matches", "parse_rounding"]

# Letter in tables -> role; Q_W, Q_A, Q_E, Q_G, Q_M in the paper's Algorithm 2.
ROLES = {"W": "weight", "A": "activation", "E": "error", "G": "gradient", "M": "momentum"}
LETTERS = {role: letter for letter, role in ROLES.items()}
ROLE_NAMES = ", ".join(f"{letter} ({role})" for letter, role in ROLES.items())
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

_NUMBER = re.compile(r"@\d+$")  # behind a name that several outputs have: which of them


class RecipeError(ValueError):
    """A recipe that names a role, a rounding, a layer or a value that does not exist."""


@dataclass(frozen=True, init=False)
class Rule:
    """An exception of a recipe: the formats of what it matches. A role left at None is as the recipe says.

    ``match`` is a glob, or a regular expression behind ``re:``, which must match the whole qualified name of a layer,
    an output, a parameter or of a module around it: ``"fc"`` is the layer, its output, ``fc.weight`` and ``fc.bias``.
    A function's output is named by the module that calls it and by what is called: ``layer1.0.add``.
    A role goes by its letter too: ``Rule("fc", W="float")``.
    ``kind`` is the operation besides, by a part ("compute", "norm", "activation", "arithmetic", "pooling"), a type
    ("Conv2d") or a function's name ("matmul"). A parameter is of the kind of the layer that holds it, or "parameter".
    Where several outputs have one name, as those of a module that is called twice, it matches them all;
    ``layer1.0.relu@2`` is the second of them in the graph, and has no role but activation and error. ``report`` prints
    every name.
    """

    match: str
    kind: str | None = None
    weight: Format | None = None
    activation: Format | None = None
    error: Format | None = None
    gradient: Format | None = None
    momentum: Format | None = None

    def __init__(self, match: str, kind: str | None = None, **formats: str | Format | None) -> None:
        if not isinstance(match, str) or not match:
            raise RecipeError(f"a rule matches a qualified name, such as 'layer1.*', not {match!r}")
        if match.startswith("re:"):
            try:
                re.compile(match[3:])
            except re.error as error:
                raise RecipeError(f"rule {match!r} is no regular expression: {error}") from error
        given = _once(formats.items(), f"rule {match!r}", tuple(ROLES.values()))
        values = {role: parse(spec) for role, spec in given.items() if spec is not None}
        if not values:
            raise RecipeError(f"rule {match!r} sets no format; name a role, such as weight='float'")
        for name, value in {"match": match, "kind": kind, **dict.fromkeys(ROLES.values()), **values}.items():
            object.__setattr__(self, name, value)

    def formats(self) -> dict[str, Format]:
        """Role -> format, of the roles that it sets."""
        return {role: value for role in ROLES.values() if (value := getattr(self, role)) is not None}

    def matches(self, subjects: Iterable[Subject]) -> bool:
        return any((self.kind is None or self.kind in kinds) and matches(self.match, name) for name, kinds in subjects)

    def __repr__(self) -> str:
        kind = [f"kind={self.kind!r}"] if self.kind else []
        formats = (f"{LETTERS[role]}={str(value)!r}" for role, value in self.formats().items())
        return f"Rule({', '.join([repr(self.match), *kind, *formats])})"

    def __str__(self) -> str:
        words = [self.match, *([f"kind={self.kind}"] if self.kind else [])]
        return " ".join([*words, *(f"{LETTERS[role]}={value}" for role, value in self.formats().items())])


def _once(values: Iterable[Iterable[Any]], where: str, fields: Collection[str]) -> dict[str, Any]:
    """Field -> value, of values by field or letter. Raises RecipeError for what is none of ``fields``, and twice."""
    found: dict[str, tuple[str, Any]] = {}
    for name, value in values:
        field = ROLES.get(name, name)
        if field not in fields:
            remedy = did_you_mean(name, (*ROLES, *fields), f"the roles are {ROLE_NAMES}")
            raise RecipeError(f"{where}: there is no role {name!r}; {remedy}")
        if field in found:
            before, first = found[field]
            raise RecipeError(f"{where} sets {field} twice, {before}={first} and {name}={value}; leave one out")
        found[field] = name, value
    return {field: value for field, (_, value) in found.items()}


def matches(pattern: str, name: str) -> bool:
    """Whether ``pattern`` matches all of ``name``, or of the name of a module around it.

    A pattern without ``@`` does not see the number in ``relu@2``: ``relu`` matches, ``*2`` does not.
    """
    names = _around(name if "@" in pattern else _NUMBER.sub("", name))
    if pattern.startswith("re:"):
        return any(re.fullmatch(pattern[3:], each) for each in names)
    return any(fnmatchcase(each, pattern) for each in names)


def _around(name: str) -> Iterator[str]:
    """``a.b.c@2``, ``a.b.c``, ``a.b``, ``a``."""
    while name:
        yield name
        number = _NUMBER.search(name)
        name = name[: number.start()] if number else name.rpartition(".")[0]


def parse_rounding(rounding: str) -> tuple[str, int]:
    """Name and number of random bits: ``"stochastic8"`` is ("stochastic", 8).

    Raises RecipeError, naming the rounding and those there are, if there is no such one.
    """
    name, bits = rounding, RANDOM_BITS
    if isinstance(rounding, str) and (match := re.fullmatch(r"(stochastic)(\d+)", rounding)):
        name, bits = match[1], int(match[2])
    if name not in ROUNDINGS or not 1 <= bits <= MAX_RANDOM_BITS:
        raise RecipeError(f"unknown rounding {rounding!r}; {_other_rounding(name)}")
    return name, bits


def _other_rounding(name: str) -> str:
    numbered = f"stochastic1 to stochastic{MAX_RANDOM_BITS} for a number of random bits"
    if name == "stochastic":
        return f"use {numbered}"
    return did_you_mean(str(name), ROUNDINGS, f"use one of {', '.join(ROUNDINGS)}, or {numbered}")


@dataclass(frozen=True, init=False)
class Recipe:
    """Which format each role is kept in, and where. Fields of formats take specs too, and go by their letters.

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
    _path: ClassVar[str] = ""  # see ``within``

    def __init__(self, **values: Any) -> None:
        given = _once(values.items(), "a recipe", FIELDS)
        for field in fields(self):
            object.__setattr__(self, field.name, given.get(field.name, field.default))
        self._refuse_unfit()

    def _refuse_unfit(self) -> None:
        for role in _FORMATS:
            value = getattr(self, role)
            if value is not None or role != "accumulator":
                object.__setattr__(self, role, parse(value))
        parse_rounding(self.rounding)
        parse_rounding(self.average_rounding)
        if self.placement not in PLACEMENTS:
            remedy = did_you_mean(str(self.placement), PLACEMENTS, f"use one of {', '.join(PLACEMENTS)}")
            raise RecipeError(f"unknown placement {self.placement!r}; {remedy}")
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
            remedy = f"; use {str(text)!r}" if isinstance(text, Format) else ""
            raise RecipeError(f"a recipe must be a string or a Recipe, not {type(text).__name__} {text!r}{remedy}")
        values = {} if isinstance(text, Recipe) else _read(text)
        values |= _once(changes.items(), f"recipe {str(text)!r}", FIELDS)
        if isinstance(text, str) and not any(role in values for role in _FORMATS):
            raise RecipeError(f"recipe {text!r} names no format; put one first: {f'bfp8[0] {text.strip()}'!r}")
        if isinstance(text, Recipe):
            return replace(text, **values) if values else text
        return cls(**values)

    def within(self, path: str) -> Recipe:
        """The same recipe for what was named ``path`` in a model: patterns see the names that its layers had there."""
        new = replace(self)
        object.__setattr__(new, "_path", self._named(path))
        return new

    @property
    def is_within(self) -> bool:
        return bool(self._path)

    def _named(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def at(self, *subjects: Subject) -> Recipe:
        """The recipe of one layer's output or one parameter, its rule applied."""
        named = [(self._named(name), kinds) for name, kinds in subjects]
        rule = next((rule for rule in self.rules if rule.matches(named)), None)
        return self if rule is None else replace(self, **rule.formats())  # type: ignore[arg-type]

    def of_tensor(self, rank: int, axis: int) -> Recipe:
        """The recipe of a tensor of ``rank`` axes, ``axis`` being its contraction axis."""
        formats = {role: format for role in _FORMATS if (format := getattr(self, role)) is not None}
        fitting = {role: fits for role, format in formats.items() if (fits := format.of_tensor(rank, axis)) != format}
        return replace(self, **fitting) if fitting else self

    def excludes(self, name: str) -> bool:
        return any(matches(pattern, self._named(name)) for pattern in self.exclude)

    def includes(self, name: str) -> bool:
        return any(matches(pattern, self._named(name)) for pattern in self.include)

    def unmatched(self, subjects: Collection[Subject]) -> Iterator[tuple[str, RecipeError]]:
        """(pattern, what to raise) of each rule, include and exclude that matches none of ``subjects``.

        Raises RecipeError for a rule that means single calls of a layer, and sets what all its calls share.
        """
        names = {each: None for name, _ in subjects for each in _around(name)}
        for rule in self.rules:
            if not rule.matches(subjects):
                kinds = sorted({kind for _, each in subjects for kind in each})
                by_name = any(matches(rule.match, name) for name, _ in subjects)
                what = f"kind={rule.kind!r} of rule {rule.match!r}" if by_name else f"rule {rule.match!r}"
                error = _unmatched(what, rule.kind or "" if by_name else rule.match, kinds if by_name else names)
                yield rule.kind or "" if by_name else rule.match, error
            _refuse_shared(rule, subjects)
        for field in ("include", "exclude"):
            for pattern in getattr(self, field):
                if not any(matches(pattern, name) for name, _ in subjects):
                    yield pattern, _unmatched(f"{field} {pattern!r}", pattern, names)

    def __str__(self) -> str:
        rules = [f"rules=[{'; '.join(map(str, self.rules))}]"] if self.rules else []
        return " ".join([self._text(), *rules])

    def __repr__(self) -> str:
        rules = f", rules={self.rules!r}" if self.rules else ""
        return f"Recipe.parse({self._text()!r}{rules})"

    def _text(self) -> str:
        """What parse reads: all but the rules."""
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
        return " ".join(words)


def _read(text: str) -> dict[str, Any]:
    """Field -> value, of a recipe's text."""
    text = text.strip()
    where = f"recipe {text!r}"
    if re.search(r"(^|[\s;])rules\s*=", text):
        raise RecipeError("rules are not read from text; pass them: Recipe.parse(text, rules=(Rule(...),))")
    if (spaced := re.sub(r",\s*(?=\w+\s*=)", " ", text)) != text:
        raise RecipeError(f"{where} has a comma between words; write {spaced!r}")
    if (tight := re.sub(r"\s*=\s*|(?<=,)\s+|\s+(?=[\[(])", lambda gap: gap[0].strip(), text)) != text:
        raise RecipeError(f"{where} has a space within a word; write {tight!r}")
    words = re.split(r"[\s;]+", text.strip(";"))
    everywhere, named = (words[:1], words[1:]) if "=" not in words[0] else ([], words)
    if (bare := next((word for word in named if "=" not in word), None)) is not None:
        if ROLES.get(bare, bare) in FIELDS:
            raise RecipeError(f"{where}: {bare!r} lacks its value; write {bare}=...")
        remedy = _with_role(bare) if everywhere else "put it first"
        raise RecipeError(f"{where}: {bare!r} would undo what stands before it; {remedy}")
    values: dict[str, Any] = {role: spec for spec in everywhere for role in ROLES.values()}
    once = _once((word.split("=", 1) for word in named), where, FIELDS)
    values |= {field: _READ.get(field, str)(value) for field, value in once.items()}
    return values


def _with_role(bare: str) -> str:
    """How a word without a role, which stands behind a format for all, may have been meant."""
    name, separator, spec = bare.partition(":")
    if separator and ROLES.get(name, name) in FIELDS:
        return f"write {name}={spec}"
    try:
        return f"name its role, such as M={parse(bare)}"
    except FormatError:
        return "write ROLE=FORMAT, such as M=float"


def _read_globs(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _read_bool(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text, text)


FIELDS = tuple(field.name for field in fields(Recipe))
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


def _refuse_shared(rule: Rule, subjects: Iterable[Subject]) -> None:
    """Raises RecipeError for a rule that means single calls of a layer, and sets what all its calls share."""
    shared = [role for role in ("weight", "gradient", "momentum") if role in rule.formats()]
    matched = (name for name, kinds in subjects if rule.matches([(name, kinds)]))
    if shared and "@" in rule.match and all(_NUMBER.search(name) for name in matched):
        raise RecipeError(
            f"rule {rule.match!r} sets {', '.join(shared)}, which all calls of a layer share; set activation and error "
            "alone, or name the layer without @"
        )


def _unmatched(what: str, wanted: str, known: Iterable[str]) -> RecipeError:
    """The nearest of ``known``, outer names before inner ones; if none is alike, the outermost there are."""
    by_depth = sorted(known, key=lambda name: name.count("."))
    wanted = re.sub(r"[.*]+$", "", wanted.removeprefix("re:"))
    # fc is near to hed.fc, and conv1 to layer1.0.conv: by the whole name or by its end.
    ends = {name.rpartition(".")[2]: name for name in reversed(by_depth)}
    found = nearest(wanted, by_depth) or [ends[end] for end in nearest(wanted.rpartition(".")[2], ends)]
    if found:
        return RecipeError(f"{what} matches nothing in the model; the nearest names are {listed(found)}")
    outermost = [name for name in by_depth if "." not in name]
    return RecipeError(f"{what} matches nothing in the model; its outermost names are {_shortened(outermost)}")


def _shortened(names: list[str], most: int = 12) -> str:
    """``"a, b, ..., z"``: the first and the last, if there are more than ``most``."""
    return ", ".join(names if len(names) <= most else [*names[: most // 2], "...", *names[-most // 2 :]])
