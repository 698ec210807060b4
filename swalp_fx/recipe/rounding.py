"""The roundings by name."""

from __future__ import annotations

import re

from ..nearest import did_you_mean
from .errors import RecipeError

__all__ = ["RANDOM_BITS", "ROUNDINGS", "parse_rounding"]

# In the order of csrc/round.h: the index is the code there.
ROUNDINGS = ("nearest", "stochastic", "toward_zero", "down", "up", "nearest_away", "nearest_up")

RANDOM_BITS = 16  # default of a stochastic rounding: half a word; the bias is at most 2^-17 of a step
MAX_RANDOM_BITS = 24


def parse_rounding(rounding: str) -> tuple[str, int]:
    """Name and number of random bits: ``"stochastic8"`` is ("stochastic", 8).

    Raises RecipeError for an unknown rounding; it names the roundings that exist.
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
