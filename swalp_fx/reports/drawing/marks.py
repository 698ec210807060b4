"""The drawn form of a graph: marks, in the tree of the calls that they are in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

__all__ = ["Call", "Mark", "layers_in", "names", "seen_from", "tree", "unnumbered"]


@dataclass(eq=False)
class Mark:
    """One drawn thing: a layer, a quantize node, a movement, an input or an output."""

    id: str
    label: Callable[[str], str]  # its HTML, with the given name if it is a layer
    rounded: bool  # whether it holds rounded numbers
    sources: list[Mark]
    around: tuple[tuple[str, str, str], ...] = ()  # (key, qualified name, type) of the calls it is in, outermost first
    operation: str = ""  # of a layer
    name: str = ""  # of a layer, qualified
    parameter: str = ""  # the qualified name, if it is a parameter
    rounds: bool = False  # whether it rounds the output of the layer before it
    gathers: bool = False  # whether it treats any number of inputs alike, as ``cat`` does
    users: list[Mark] = field(default_factory=list)

    def __post_init__(self) -> None:
        for source in self.sources:
            source.users.append(self)

    @property
    def marks(self) -> list[Mark]:
        return [self]


@dataclass(eq=False)
class Call:
    """One call of a module; or, if it has a ``last``, a sequence inside one."""

    name: str  # qualified, with a number if the module is called several times: ``block@2``; of a sequence, its first
    path: str  # the module's
    type: str
    items: list[Mark | Call] = field(default_factory=list)
    last: str | None = None  # of a sequence, the name of its last layer

    @property
    def marks(self) -> list[Mark]:
        return [mark for item in self.items for mark in item.marks]

    def owns(self, mark: Mark) -> bool:
        """Whether it is a parameter of this module, whichever call reads it first."""
        if self.last is not None:
            return any(item.owns(mark) for item in self.items if isinstance(item, Call))
        return bool(mark.parameter) and (not self.path or mark.parameter.startswith(f"{self.path}."))

    def reads(self) -> set[Mark]:
        """The marks outside that it reads."""
        inside = set(self.marks)
        sources = {source for mark in inside for source in mark.sources}
        return {source for source in sources - inside if not self.owns(source)}

    def readers(self) -> set[Mark]:
        """The marks outside that read it."""
        inside = set(self.marks)
        return {user for mark in inside if not self.owns(mark) for user in mark.users} - inside


def tree(marks: Iterable[Mark], path: str, type: str) -> Call:
    """The calls that ``marks`` are in, as one call of the module at ``path`` that holds them all."""
    root = Call(path, path, type)
    calls: dict[str, Call] = {}
    for mark in marks:
        call = root
        for key, inner, kind in mark.around:
            if key not in calls:
                calls[key] = Call(inner, inner, kind)
                call.items.append(calls[key])
            call = calls[key]
        call.items.append(mark)
    of_path: dict[str, list[Call]] = defaultdict(list)
    for call in calls.values():
        of_path[call.path].append(call)
    for several in of_path.values():
        for number, call in enumerate(several, 1):
            call.name += f"@{number}" if len(several) > 1 else ""
    return root


def layers_in(call: Call) -> int:
    return sum(bool(mark.operation) for mark in call.marks)


def seen_from(path: str, name: str) -> str:
    """``name`` as it is called in the module at ``path``."""
    return name[len(path) :].removeprefix(".") if name == path or name.startswith(f"{path}.") else name


def unnumbered(name: str) -> str:
    """``relu``, of ``relu@2``."""
    return re.sub(r"@\d+$", "", name)


def names(calls: Sequence[Call]) -> list[str]:
    """The names of ``calls``; names that count up are written ``first … last``."""
    runs: list[list[Call]] = []
    for call in calls:
        if runs and _follows(runs[-1][-1].last or runs[-1][-1].name, call.name):
            runs[-1].append(call)
        else:
            runs.append([call])
    return [name for run in runs for name in _names_of(run)]


def _names_of(run: list[Call]) -> list[str]:
    if len(run) < 3 and all(call.last is None for call in run):
        return [call.name for call in run]
    first, last = run[0].name, run[-1].last or run[-1].name
    number = _number(last)
    return [f"{first} … {number if number and _stem(first) == _stem(last) else last}"] if first else []


def _number(name: str) -> str:
    """The digits at the end of ``name``."""
    return name[len(_stem(name)) :]


def _stem(name: str) -> str:
    return name.rstrip("0123456789")


def _follows(name: str, next: str) -> bool:
    return bool(_number(name)) and next == f"{_stem(name)}{int(_number(name)) + 1}"
