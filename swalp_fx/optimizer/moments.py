"""Optimizers that divide one moment by another, and formats of the divisor that make them diverge.

Adam steps by m / (sqrt(v) + 1e-8), where v averages squares. If a gradient is 2^-k of the largest in its block, its v
is 2^-2k of the largest. A format of less range rounds v to zero but not m, and the step is 10^8 times too long. Plain
RMSprop, Adagrad, Adadelta and Adafactor divide the gradient itself, after adding its square to v: they may slow down,
but not diverge.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.optim import Adam, Adamax, NAdam, Optimizer, RAdam, RMSprop

from ..formats import Format
from ..recipe import Recipe
from ..warn import warn
from .parameters import Parameters
from .states import quantizer_of

__all__ = ["ends_in", "warn_of_moments"]


class _Need(NamedTuple):
    """The range that a format must have for the moments of an optimizer, in powers of two."""

    states: tuple[str, ...]  # the states that make the divisor
    block: float  # the largest over the smallest number of a block, if blocks have a scale
    below_one: float  # one over the smallest number, if there is no scale
    precision: float = 0  # the steps of an octave


# Measured on a perceptron of 64 units and scikit-learn's digits, 60 steps, two learning rates, 10 seeds each: with less
# than this, some run ends above the loss that it began with; with this, none does. Nor does any of torch's other
# optimizers, in 25 formats from mxfp4 to bfp24[0]. `pytest -m slow tests/test_moments.py` measures both sides of each
# bound again (AMD EPYC, 2 cores, AVX-512, torch 2.14.1, 2026-11-26).
_ADAM = _Need(("exp_avg_sq",), block=24, below_one=60)  # diverges in bfp24, mxfp8 and e6m8; not in mxfp8_e5m2 and e7m0
_NEEDS: tuple[tuple[type[Optimizer], Callable[[dict[str, Any]], bool], _Need], ...] = (
    (Adam, lambda group: bool(group.get("amsgrad")), _ADAM._replace(states=("exp_avg_sq", "max_exp_avg_sq"))),
    (Adam, lambda group: True, _ADAM),
    (NAdam, lambda group: True, _ADAM),
    (RAdam, lambda group: True, _ADAM),
    # Divides by a largest magnitude, and not by the root of a square: diverges in bfp13[0] and fixed16.15.
    (Adamax, lambda group: True, _Need(("exp_inf",), block=14, below_one=16)),
    # Divides by the root of a difference of moments, which must not be below zero: diverges in mxfp8_e5m2 and e8m3.
    (
        RMSprop,
        lambda group: group["centered"],
        _Need(("square_avg", "grad_avg"), block=math.inf, below_one=60, precision=4),
    ),
)


def ends_in(optimizer: Optimizer, group: dict[str, Any], recipe: Recipe) -> str | None:
    """The first state with a format that may let ``optimizer`` diverge on a group; None if there is none."""
    for kind, is_so, need in _NEEDS:
        if isinstance(optimizer, kind) and is_so(group):
            states = ((name, quantizer_of(recipe, name)) for name in need.states)
            return next((name for name, each in states if each.rounds and not _has(each.format, need)), None)
    return None


def warn_of_moments(optimizer: Optimizer, parameters: Parameters) -> None:
    """Warns, in one sentence, of the parameters whose moments may let ``optimizer`` diverge."""
    groups = [(group, p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    ending = [
        (p, name) for group, p in groups if (name := ends_in(optimizer, group, parameters.recipe_of(p))) is not None
    ]
    if not ending:
        return
    parameter, state = ending[0]
    recipe = parameters.recipe_of(parameter)
    others = f"and {len(ending) - 1} more " if len(ending) > 1 else ""
    word = f"state.{state}" if state in dict(recipe.states) else "V"
    warn(
        f"{type(optimizer).__name__} divides one moment by another, and may diverge with the {state} of "
        f"{parameters.name_of(parameter)!r} {others}in {quantizer_of(recipe, state).format}; keep it in float: "
        f"{word}=float"
    )


def _has(format: Format, need: _Need) -> bool:
    reach = -math.log2(format.min_subnormal)
    precision = math.log2(format.min_normal / format.min_subnormal)
    if format.scale_bits:
        return reach + math.log2(format.max) >= need.block
    return reach >= need.below_one and precision >= need.precision
