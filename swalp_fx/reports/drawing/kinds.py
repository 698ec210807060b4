"""Which calls are alike, and how a run of them is connected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from .marks import Call, Mark, seen_from, unnumbered

__all__ = ["Box", "Item", "Kind", "alike", "in_runs", "ranks", "signature"]


@dataclass(eq=False)
class Kind:
    """Calls that are alike, in the order of the graph."""

    calls: list[Call]
    number: int = 0  # in the picture; 0 for a root

    @property
    def shown(self) -> Call:
        """The call that stands for all: the first that holds its own parameters."""
        return max(self.calls, key=lambda call: len(call.marks))


@dataclass(eq=False)
class Box:
    """Calls of one kind in a run, drawn as one."""

    kind: Kind
    calls: list[Call]
    arrangement: str = ""  # in words, if they do not follow one another

    @property
    def marks(self) -> list[Mark]:
        return [mark for call in self.calls for mark in call.marks]


Item = Mark | Box


def ranks(items: Sequence[Item]) -> int:
    """Steps on the longest path through ``items``."""
    owner = {mark: item for item in items for mark in item.marks}
    rank: dict[Item, int] = {}
    for item in items:
        sources = (owner[source] for mark in item.marks for source in mark.sources if source in owner)
        rank[item] = 1 + max((rank.get(source, 0) for source in sources), default=0)
    return max(rank.values(), default=0)


def alike(calls: Iterable[Call]) -> list[Kind]:
    kinds: dict[object, Kind] = {}
    for call in calls:
        kinds.setdefault(signature(call), Kind([])).calls.append(call)
    return list(kinds.values())


def signature(call: Call) -> tuple[object, ...]:
    """A key that is equal for calls with equal pictures."""
    marks = [mark for mark in call.marks if not call.owns(mark)]
    index = {mark: i for i, mark in enumerate(marks)}
    outside: dict[Mark, int] = {}

    def label(mark: Mark) -> str:
        return mark.label("" if call.last is not None else unnumbered(seen_from(call.path, mark.name)))

    def origin(source: Mark) -> object:
        if source in index:
            return index[source]
        if call.owns(source):
            return label(source)
        return "outside", source.rounded, outside.setdefault(source, len(outside))

    rows = []
    for mark in marks:
        origins = [origin(source) for source in mark.sources]
        if mark.gathers:
            origins = list(dict.fromkeys(each[:2] if isinstance(each, tuple) else each for each in origins))
        rows.append((label(mark), mark.rounded, tuple(origins)))
    read = tuple(i for mark, i in index.items() if any(user not in index for user in mark.users))
    return call.type, tuple(rows), read


def in_runs(items: Iterable[Item]) -> list[Item]:
    """``items``, with consecutive boxes of one kind joined."""
    joined: list[Item] = []
    pending: list[Box] = []
    for item in [*items, None]:
        if pending and not (isinstance(item, Box) and item.kind is pending[0].kind):
            joined += _joined(pending)
            pending = []
        if isinstance(item, Box):
            pending.append(item)
        elif item is not None:
            joined.append(item)
    return joined


def _joined(boxes: list[Box]) -> Iterator[Box]:
    """``boxes``, all of one kind, joined into as few as possible."""
    start = 0
    while start < len(boxes):
        for end in range(len(boxes), start, -1):
            calls = [call for box in boxes[start:end] for call in box.calls]
            arrangement = _arrangement(calls)
            if arrangement is not None:
                yield Box(boxes[start].kind, calls, arrangement)
                start = end
                break


def _arrangement(calls: list[Call]) -> str | None:
    """The connection of ``calls`` in words; "" if each reads the one before it; None if there is no simple one."""
    marks = [set(call.marks) for call in calls]
    reads, readers = [call.reads() for call in calls], [call.readers() for call in calls]
    later = range(1, len(calls))
    if all(
        reads[i] & marks[i - 1] and reads[i] <= marks[i - 1] | reads[0] and readers[i - 1] <= marks[i] for i in later
    ):
        return ""
    everywhere = set[Mark]().union(*marks)
    outer = [each - everywhere for each in readers]
    if any(outer[i] != outer[0] for i in later):
        return None
    if all(reads[i] == reads[0] for i in later):
        return "side by side"
    if len(calls) > 2 and all(
        all(reads[i] & marks[j] for j in range(i)) and reads[i] <= reads[0].union(*marks[:i]) for i in later
    ):
        return "each reads all before it"
    return None
