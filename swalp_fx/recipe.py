"""A recipe: one format for each role of Algorithm 2, and how to round to them."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from .formats import FLOAT, Format, parse

__all__ = ["ROLES", "ROUNDINGS", "Recipe", "RecipeError", "parse_rounding"]

# Letter in tables -> role; Q_W, Q_A, Q_E, Q_G, Q_M in the paper's Algorithm 2.
ROLES = {"W": "weight", "A": "activation", "E": "error", "G": "gradient", "M": "momentum"}
_FORMATS = (*ROLES.values(), "accumulator", "average")
# In the order of csrc/round.h, whose codes these are.
ROUNDINGS = ("nearest", "stochastic", "toward_zero", "down", "up", "nearest_away", "nearest_up")


RANDOM_BITS = 16  # of a stochastic rounding that does not say: half a word, at most 2^-17 of a step from unbiased
MAX_RANDOM_BITS = 24


class RecipeError(ValueError):
    """A recipe that names a role, a rounding or a value that does not exist."""


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
    """Which format each role is kept in. Fields take formats or their specs.

    ``Recipe.parse(str(recipe)) == recipe``, so a recipe fits in a log line or a checkpoint.
    """

    weight: Format = FLOAT
    activation: Format = FLOAT
    error: Format = FLOAT
    gradient: Format = FLOAT
    momentum: Format = FLOAT
    accumulator: Format | None = None  # what the optimizer steps on; None: the weights themselves
    average: Format = FLOAT  # of the averaged weights, Q_SWA in the paper's section 5.1
    rounding: str = "stochastic"

    def __post_init__(self) -> None:
        for role in _FORMATS:
            value = getattr(self, role)
            if value is not None or role != "accumulator":
                object.__setattr__(self, role, parse(value))
        parse_rounding(self.rounding)

    @classmethod
    def parse(cls, text: str | Recipe, **changes: str) -> Recipe:
        """The recipe that ``text`` names: a spec for all of W A E G M, then exceptions.

        ``"bfp8[0]"``, ``"bfp8[0] M=float"``, ``"W=e4m3 A=e4m3 E=e5m2 rounding=nearest"``.
        """
        if not isinstance(text, str | Recipe):
            raise RecipeError(f"a recipe must be a string or a Recipe, not {type(text).__name__} {text!r}")
        known = [field.name for field in fields(cls)]
        words = re.split(r"[\s;]+", text.strip()) if isinstance(text, str) else []
        values: dict[str, str] = {}
        for word in [*words, *(f"{name}={value}" for name, value in changes.items())]:
            name, separator, value = word.partition("=")
            if not separator:
                if values:
                    raise RecipeError(f"recipe {text!r}: {word!r} would undo what stands before it; put it first")
                values |= dict.fromkeys(ROLES.values(), word)
                continue
            role = ROLES.get(name, name)
            if role not in known:
                raise RecipeError(f"recipe {str(text)!r}: there is no role {name!r}; use one of {', '.join(known)}")
            values[role] = value
        if isinstance(text, Recipe):
            return replace(text, **values) if values else text  # type: ignore[arg-type]
        return cls(**values)  # type: ignore[arg-type]

    def __str__(self) -> str:
        words = [f"{letter}={getattr(self, role)}" for letter, role in ROLES.items()]
        formats = {getattr(self, role) for role in ROLES.values()}
        if len(formats) == 1:
            words = [str(formats.pop())]
        default = {field.name: field.default for field in fields(self)}
        for name in ("accumulator", "average", "rounding"):
            if getattr(self, name) != default[name]:
                words.append(f"{name}={getattr(self, name)}")
        return " ".join(words)
