"""The recipe itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

from ..formats import FLOAT, Format
from ..nearest import did_you_mean
from .document import from_json, to_json
from .errors import RecipeError
from .patterns import GLOBS, Subject, around, is_all_of, matches, unmatched
from .quantizer import Quantizer, States, as_states
from .roles import ALL_ROLES, AVERAGE_ROUNDING, OF_PARAMETERS, OF_WEIGHTS, once
from .rounding import parse_rounding
from .rule import Rule
from .text import read, text

__all__ = ["PLACEMENTS", "Recipe"]

_QUANTIZERS = (*ALL_ROLES.values(), *OF_WEIGHTS)
_IN_FLOAT = Quantizer(FLOAT)
# Which layer outputs are rounded; passes/assign.py has the meaning of each word.
PLACEMENTS = ("every", "compute", "compute+activation", "group")


@dataclass(frozen=True, init=False)
class Recipe:
    """The format of each role, its rounding, and the places that are rounded.

    A role is a Quantizer or its text, and may be given by its letter: ``Recipe(W="bfp8[0]", G="e5m2~stochastic8")``.

    ``Recipe.parse(str(recipe)) == recipe``, rules included, so it fits in a log line or a checkpoint.
    """

    weight: Quantizer = _IN_FLOAT
    activation: Quantizer = _IN_FLOAT
    error: Quantizer = _IN_FLOAT
    gradient: Quantizer = _IN_FLOAT
    momentum: Quantizer = _IN_FLOAT  # means of gradients
    second_moment: Quantizer = _IN_FLOAT  # means of squared gradients: the optimizer divides by them
    master: Quantizer | None = None  # the weights that the optimizer steps on; None: it steps on the rounded ones
    # Of the averaged weights after each update, Q_SWA in the paper's section 5.1. The default rounding is to nearest,
    # and then the average stalls: see averaging.Average.
    average: Quantizer = _IN_FLOAT
    # States of the optimizer by name, in place of the format of their role: ``state.exp_avg_sq=bf16~stochastic``.
    states: States = ()
    rounding: str = "stochastic"  # of every role without a rounding of its own, except the average
    placement: str = "every"  # which layer outputs are rounded
    include: tuple[str, ...] = ()  # globs: layer outputs rounded though the placement leaves them out
    exclude: tuple[str, ...] = ()  # globs: outputs, inputs and logits left in float in any case
    whole: tuple[str, ...] = ()  # globs: modules that are one operation, rounded at their output only; "!glob": not one
    quantize_input: bool = False
    quantize_logits: bool = False  # the outputs of the model
    # Two optimizations that change no number: round a tensor in its own memory if nothing else reads it there, and
    # leave out a rounding of numbers that are known to be rounded.
    in_place: bool = True
    rules: tuple[Rule, ...] = ()  # in order: the first that matches wins
    _path: ClassVar[str] = ""  # see ``within``

    def __init__(self, **values: Any) -> None:
        given = _with_average_rounding(once(values.items(), "a recipe", FIELDS))
        for field in fields(self):
            object.__setattr__(self, field.name, given.get(field.name, field.default))
        self._refuse_unfit()

    def _refuse_unfit(self) -> None:
        for role in _QUANTIZERS:
            value = getattr(self, role)
            if value is not None or role != "master":
                object.__setattr__(self, role, Quantizer.parse(value))
        object.__setattr__(self, "states", as_states(self.states))
        parse_rounding(self.rounding)
        if self.placement not in PLACEMENTS:
            remedy = did_you_mean(str(self.placement), PLACEMENTS, f"use one of {', '.join(PLACEMENTS)}")
            raise RecipeError(f"unknown placement {self.placement!r}; {remedy}")
        for name in GLOBS:
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
        ``"bfp8[0] placement=compute+activation exclude=relu,*.shortcut quantize_input=true"``,
        ``'bfp8[0] rounding=nearest G=bfp8[0]~stochastic rules=[fc W=float; "a b" kind=Conv2d A=bfp4]'``.
        """
        if not isinstance(text, str | Recipe):
            remedy = f"; use {str(text)!r}" if isinstance(text, Format) else ""
            raise RecipeError(f"a recipe must be a string or a Recipe, not {type(text).__name__} {text!r}{remedy}")
        values = {} if isinstance(text, Recipe) else read(text, FIELDS)
        changed = once(changes.items(), f"recipe {str(text)!r}", FIELDS)
        if "states" in changed:
            before = text.states if isinstance(text, Recipe) else values.get("states", {})
            changed["states"] = {**dict(before), **changed["states"]}
        values |= changed
        if isinstance(text, str) and not any(role in values for role in _QUANTIZERS):
            raise RecipeError(f"recipe {text!r} names no format; put one first: {f'bfp8[0] {text.strip()}'!r}")
        if isinstance(text, Recipe):
            return replace(text, **values) if values else text
        return cls(**values)

    def within(self, path: str) -> Recipe:
        """The same recipe for the module that a model had at ``path``: patterns see the names of that model."""
        new = replace(self)
        object.__setattr__(new, "_path", self._named(path))
        return new

    @property
    def is_within(self) -> bool:
        return bool(self._path)

    def _named(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def at(self, *subjects: Subject) -> Recipe:
        """The recipe of one layer's output or one parameter, with its rule applied."""
        named = [(self._named(name), kinds) for name, kinds in subjects]
        rule = next((rule for rule in self.rules if rule.matches(named)), None)
        if rule is None:
            return self
        return replace(self, states={**dict(self.states), **dict(rule.states)}, **rule.roles())  # type: ignore[arg-type]

    def of_tensor(self, rank: int, axis: int) -> Recipe:
        """The recipe of a tensor of ``rank`` axes with the contraction axis ``axis``."""
        return self._with_each(lambda role, quantizer: quantizer.of_tensor(rank, axis))

    def resolved(self) -> Recipe:
        """The same recipe, with the rounding of each role filled in."""
        return self._with_each(self._resolved)

    def _resolved(self, role: str, quantizer: Quantizer) -> Quantizer:
        return quantizer.under("nearest" if role == "average" else self.rounding)

    def _with_each(self, change: Callable[[str, Quantizer], Quantizer]) -> Recipe:
        """The recipe with each quantizer replaced by ``change(role, quantizer)``; itself if nothing changes."""
        before = {role: quantizer for role in _QUANTIZERS if (quantizer := getattr(self, role)) is not None}
        after = {role: change(role, quantizer) for role, quantizer in before.items()}
        states = tuple((name, change("momentum", quantizer)) for name, quantizer in self.states)
        if after == before and states == self.states:
            return self
        return replace(self, states=states, **after)  # type: ignore[arg-type]

    @property
    def draws(self) -> bool:
        """Whether a forward or a backward may need random bits."""
        in_graphs = (getattr(each, role) for each in (self, *self.rules) for role in ("weight", "activation", "error"))
        roundings = (self.rounding, *(quantizer.rounding for quantizer in in_graphs if quantizer is not None))
        return any(parse_rounding(rounding)[0] == "stochastic" for rounding in roundings if rounding is not None)

    @property
    def draws_in_steps(self) -> bool:
        """Whether a step of an optimizer, or the average of the weights, may need random bits."""
        given: tuple[Recipe | Rule, ...] = (self, *self.rules)
        roles = [(role, each) for of in given for role in OF_PARAMETERS if (each := getattr(of, role)) is not None]
        states = [("momentum", each) for of in given for _, each in of.states]
        return any(self._resolved(role, each).draws for role, each in (*roles, *states))

    @property
    def rounds_outputs(self) -> bool:
        """Whether any layer's output, or its error signal, may be rounded."""
        quantizers = (getattr(each, role) for each in (self, *self.rules) for role in ("activation", "error"))
        return any(quantizer is not None and quantizer.rounds for quantizer in quantizers)

    def excludes(self, name: str) -> bool:
        return any(matches(pattern, self._named(name)) for pattern in self.exclude)

    def includes(self, name: str) -> bool:
        return any(matches(pattern, self._named(name)) for pattern in self.include)

    def is_whole(self, path: str) -> bool | None:
        """Whether the module at ``path`` is one operation, by the last glob that matches; None if none does."""
        name = self._named(path)
        found = [pattern for pattern in self.whole if is_all_of(pattern.removeprefix("!"), name)]
        return not found[-1].startswith("!") if found else None

    def unmatched_whole(self, paths: Collection[str]) -> Iterator[RecipeError]:
        """An error for each pattern of ``whole`` that matches none of the modules at ``paths``."""
        for pattern in self.whole:
            if not any(is_all_of(pattern.removeprefix("!"), path) for path in paths):
                yield unmatched(f"whole {pattern!r}", pattern.removeprefix("!"), filter(None, paths))

    def unmatched(
        self, subjects: Collection[Subject], unseen: Collection[str] = ()
    ) -> Iterator[tuple[str, RecipeError]]:
        """(pattern, error) of each rule, include and exclude that matches none of ``subjects``.

        unseen: kinds of outputs that graphs have yet to name. A rule of such a kind needs only a name that is known.
        Raises RecipeError for a rule that names single calls of a layer, and sets a role that all its calls share.
        """
        names = {each: None for name, _ in subjects for each in around(name)}
        for rule in self.rules:
            if not rule.matches(subjects):
                kinds = sorted({kind for _, each in subjects for kind in each})
                by_name = any(matches(rule.match, name) for name, _ in subjects)
                if by_name and rule.kind in unseen:
                    continue
                what = f"kind={rule.kind!r} of rule {rule.match!r}" if by_name else f"rule {rule.match!r}"
                error = unmatched(what, rule.kind or "" if by_name else rule.match, kinds if by_name else names)
                yield rule.kind or "" if by_name else rule.match, error
            rule.refuse_shared(subjects)
        for field in ("include", "exclude"):
            for pattern in getattr(self, field):
                if not any(matches(pattern, name) for name, _ in subjects):
                    yield pattern, unmatched(f"{field} {pattern!r}", pattern, names)

    def __str__(self) -> str:
        return text(self)

    def __repr__(self) -> str:
        return f"Recipe.parse({str(self)!r})"

    def to_json(self) -> str:
        """A JSON object with every field, in order: ``Recipe.from_json(recipe.to_json()) == recipe``."""
        return to_json(self, FIELDS)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """The recipe of a JSON object; a field that it leaves out is as in ``Recipe()``.

        Raises RecipeError if ``text`` is no such object, or has an unknown key; it names the nearest key.
        """
        return cls(**from_json(text, FIELDS))


FIELDS = tuple(field.name for field in fields(Recipe))


def _with_average_rounding(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` without an old spelling: ``average=bfp8[0] average_rounding=up`` becomes ``average=bfp8[0]~up``."""
    if AVERAGE_ROUNDING not in given:
        return given
    rounding = given.pop(AVERAGE_ROUNDING)
    parse_rounding(rounding)
    average = Quantizer.parse(given.get("average", FLOAT))
    if average.rounding not in (None, rounding):
        raise RecipeError(f"average={average} and average_rounding={rounding} differ; leave average_rounding out")
    is_said = average.rounds and rounding != "nearest"
    return given | {"average": Quantizer(average.format, rounding if is_said else None)}


def _globs(field: str, globs: Any) -> tuple[str, ...]:
    if isinstance(globs, str) or not all(isinstance(each, str) for each in globs):
        raise RecipeError(f"{field} must be a tuple of globs, such as ('layer1.*',), not {globs!r}")
    if "" in globs:
        raise RecipeError(f"{field}: '' is no glob of a qualified name; leave it out")
    return tuple(globs)
