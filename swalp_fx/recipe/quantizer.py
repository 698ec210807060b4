"""A quantizer: a format, and how to round to it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..formats import FLOAT, Format, parse
from .errors import RecipeError
from .rounding import parse_rounding

__all__ = ["MARK", "Quantizer", "States", "as_states", "split"]

MARK = "~"  # before the rounding


def split(text: str) -> tuple[str, str]:
    """(format, rounding) of a quantizer's text; the rounding is "" if the text has none."""
    format, _, rounding = text.partition(MARK)
    return format, rounding


@dataclass(frozen=True, eq=False, repr=False)
class Quantizer:
    """A format, and how to round to it. Its text is FORMAT, or FORMAT~ROUNDING: ``bfp8[0]~stochastic8``.

    It cannot be compared with a format; compare its ``format``: ``recipe.momentum.format == FLOAT``.
    Raises RecipeError for an unknown rounding, and for any rounding to ``float``.
    """

    format: Format
    rounding: str | None = None  # None: the recipe's

    def __post_init__(self) -> None:
        if self.rounding is None:
            return
        parse_rounding(self.rounding)
        if self.format == FLOAT:
            raise RecipeError(f"float rounds nothing, so it has no rounding; leave {MARK}{self.rounding} out")

    @classmethod
    def parse(cls, text: str | Format | Quantizer) -> Quantizer:
        """The quantizer that ``text`` stands for. A quantizer is returned as it is; a format has no rounding yet.

        Raises FormatError or RecipeError; either names the fault and the nearest valid word.
        """
        if isinstance(text, Quantizer):
            return text
        if not isinstance(text, str) or MARK not in text:
            return cls(parse(text))
        format, rounding = split(text)
        return cls(parse(format), rounding)

    @property
    def rounds(self) -> bool:
        """Whether it changes any number: False for ``float``."""
        return self.format != FLOAT

    @property
    def draws(self) -> bool:
        """Whether its rounding is stochastic; False where it has none of its own."""
        return self.rounding is not None and parse_rounding(self.rounding)[0] == "stochastic"

    def under(self, rounding: str) -> Quantizer:
        """The same quantizer; ``rounding`` is filled in if it rounds and has no rounding of its own."""
        return replace(self, rounding=rounding) if self.rounds and self.rounding is None else self

    def how(self) -> tuple[Format, str]:
        """(format, rounding) of a quantizer that has a rounding."""
        assert self.rounding is not None, f"{self} has no rounding yet; see under()"
        return self.format, self.rounding

    def of_tensor(self, rank: int, axis: int) -> Quantizer:
        """The quantizer of a tensor of ``rank`` axes with the contraction axis ``axis``."""
        format = self.format.of_tensor(rank, axis)
        return self if format == self.format else replace(self, format=format)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Format):  # the answer would always be no
            raise TypeError(f"{self!r} is compared with a format; compare its .format")
        if isinstance(other, Quantizer):
            return (self.format, self.rounding) == (other.format, other.rounding)
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self.format, self.rounding))

    def __str__(self) -> str:
        return str(self.format) if self.rounding is None else f"{self.format}{MARK}{self.rounding}"

    def __repr__(self) -> str:
        return f"Quantizer.parse({str(self)!r})"


States = tuple[tuple[str, Quantizer], ...]  # name of an optimizer's state -> quantizer, sorted by name


def as_states(states: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> States:
    """(name, quantizer) of each state, sorted by name."""
    return tuple(
        sorted(((name, Quantizer.parse(text)) for name, text in dict(states).items()), key=lambda each: each[0])
    )
