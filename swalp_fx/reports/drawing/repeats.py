"""Sequences of layers that repeat inside one module, such as Conv2d, ReLU, Conv2d, ReLU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .kinds import Box, Item
from .marks import Mark

__all__ = ["best_repeat", "units_of"]

LONGEST = 8  # units in a sequence


def units_of(items: Iterable[Item]) -> list[list[Item]]:
    """Each layer, with its parameters before it and the quantize node of its output after it."""
    units: list[list[Item]] = [[]]
    for item in items:
        last = units[-1][-1] if units[-1] else None
        is_whole = last is not None and not (isinstance(last, Mark) and last.parameter)
        if is_whole and not (isinstance(item, Mark) and item.rounds and item.sources == [last]):
            units.append([])
        units[-1].append(item)
    return units


def _looks(units: list[list[Item]]) -> list[int]:
    """A number for each unit: equal for units that look alike and read from the same distance before them."""
    place = {mark: i for i, unit in enumerate(units) for item in unit for mark in item.marks}

    def look(i: int, item: Item) -> object:
        if isinstance(item, Box):
            return id(item.kind), len(item.calls)
        origins = tuple((i - place[source], source.rounded) for source in item.sources if source in place)
        return item.label(""), item.rounded, origins

    numbers: dict[object, int] = {}
    looks = (tuple(look(i, item) for item in unit) for i, unit in enumerate(units))
    return [numbers.setdefault(each, len(numbers)) for each in looks]


def best_repeat(items: list[Item], least: int) -> list[tuple[list[Item], bool]]:
    """``items`` in pieces. Pieces with True are one sequence: it saves most layers, and at least ``least``."""
    units = units_of(items)
    looks = _looks(units)
    best, length, places = least - 1, 1, set[int]()
    for longer in range(2, LONGEST + 1):
        for sequence in {tuple(looks[start : start + longer]): None for start in range(len(units) - longer + 1)}:
            found = set(_places(looks, list(sequence)))
            runs = sum(at - longer not in found for at in found)
            saved = len(found) * longer - runs - 2 * longer
            if runs < len(found) and saved > best:
                best, length, places = saved, longer, found
    pieces, at = [], 0
    while at < len(units):
        step = length if at in places else 1
        pieces.append(([item for unit in units[at : at + step] for item in unit], at in places))
        at += step
    return pieces


def _places(looks: list[int], sequence: list[int]) -> Iterator[int]:
    """The places of ``sequence`` in ``looks``, without overlap."""
    at = 0
    while at <= len(looks) - len(sequence):
        found = looks[at : at + len(sequence)] == sequence
        if found:
            yield at
        at += len(sequence) if found else 1
