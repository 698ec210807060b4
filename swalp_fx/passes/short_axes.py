"""Runs longer than their axis: they have more scales than a format's bits say, and few numbers share one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ..formats import ROWS, Block, Channel, Format, Runs
from ..globs import in_room
from ..recipe import LETTERS, OF_PARAMETERS, Recipe
from ..warn import warn
from .fit import axis_of_parameter
from .names import parameter_subjects

__all__ = ["warn_of_short_axes"]

ROOM = 120  # columns that names take in a warning


def warn_of_short_axes(model: nn.Module, recipe: Recipe) -> None:
    """Warns of parameters with an axis shorter than a run, if other blocks would take fewer bits.

    One sentence for each format and remedy names the parameters and the bits that they really take.
    """
    parameters = dict(model.named_parameters())
    subjects = parameter_subjects(model)
    found: dict[tuple[Format, Block], dict[str, list[str]]] = {}
    for name, parameter in parameters.items():
        here, axis = recipe.at(*subjects[name]), axis_of_parameter(subjects[name])
        for role in OF_PARAMETERS:
            quantizer = getattr(here, role)
            if quantizer is None or not parameter.is_floating_point():
                continue
            if (remedy := _remedy(quantizer.format, parameter.shape, axis)) is not None:
                of_remedy = found.setdefault((quantizer.format, remedy), {})
                of_remedy.setdefault(name, []).append(LETTERS.get(role, role))
    for (format, remedy), roles in found.items():
        bits = sum(_bits(format, parameters[name].shape, axis_of_parameter(subjects[name])) for name in roles)
        values = sum(parameters[name].numel() for name in roles)
        advice = _advice(replace(format, block=remedy), *next(iter(roles.items())))
        names = in_room(roles, parameters, ROOM)
        warn(
            f"{names} in {format}: {bits / values:.1f} bits an element, not {format.bits:g}, "
            f"since an axis is shorter than a run and each run has a scale; {advice}"
        )


def _remedy(format: Format, shape: Sequence[int], axis: int) -> Block | None:
    """The block with fewer bits: runs along the contraction axis, or else rows.

    None if no axis is too short, or neither block takes fewer bits.
    """
    block = format.of_tensor(len(shape), axis).block
    if not isinstance(block, Runs) or not any(0 < shape[d] < size for d, size in block.runs):
        return None
    bits = _bits(format, shape, axis)
    others: tuple[Block, ...] = (*(Channel(size) for _, size in block.runs[:1]), ROWS)
    return next((each for each in others if _bits(replace(format, block=each), shape, axis) < bits), None)


def _bits(format: Format, shape: Sequence[int], axis: int) -> int:
    return format.of_tensor(len(shape), axis).stored_bits(shape)


def _advice(better: Format, name: str, roles: list[str]) -> str:
    if isinstance(better.block, Channel):
        return f"use {better}"
    return f"give a rule, such as Rule({name!r}, {', '.join(f'{role}={str(better)!r}' for role in roles)})"
