"""The seed of a pass's random words."""

from __future__ import annotations

import numbers
from typing import Any

import torch

__all__ = ["drawn_seed", "refuse_seed"]


def refuse_seed(seed: Any) -> None:
    """Raises TypeError for no whole number, and ValueError for one that ``torch.manual_seed`` does not take."""
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"a seed is a whole number, not {seed!r}; leave it out, and torch's generator draws one")
    if not -(2**63) <= int(seed) < 2**64:
        raise ValueError(f"a seed has 64 bits, and {seed} does not fit in them; use one from 0 to 2**64 - 1")


def drawn_seed() -> int:
    """A seed of 63 bits from torch's default CPU generator, drawn as DataLoader draws its own."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_())
