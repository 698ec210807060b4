"""A large graph in panels: blocks that are alike are drawn once, and each call of them is a box."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .kinds import Box, Item, Kind, alike, in_runs, ranks
from .marks import Call, Mark, seen_from
from .repeats import best_repeat, units_of

__all__ = ["RANKS", "Panel", "panels"]

RANKS = 34  # most steps on a panel's longest path; each is about 42 points high
SAVING = 6  # a kind of block gets a panel if that leaves at least so many layers out of the picture


@dataclass(eq=False)
class Panel:
    """One piece of the picture: the items inside the calls of a kind."""

    kind: Kind
    items: list[Item]

    def frames(self) -> dict[Item, str]:
        """The name of the frame of each item that has one: the outermost module that holds several, but not all."""
        call = self.kind.shown
        child_of = {mark: child for child in call.items if isinstance(child, Call) for mark in child.marks}
        held: dict[Call, list[Item]] = defaultdict(list)
        for item in self.items:
            children = {child_of.get(mark) for mark in item.marks}
            child = children.pop() if len(children) == 1 else None
            if child is not None:
                held[child].append(item)
        several = {child: items for child, items in held.items() if 1 < len(items) < len(self.items)}
        return {item: seen_from(call.path, child.name) for child, items in several.items() for item in items}


def panels(roots: Sequence[Call]) -> list[Panel]:
    """The panels of the roots, then of each kind of block inside them.

    Calls are alike if their pictures are: the same operations, formats and names, connected in the same way. Sizes are
    not compared. A kind gets a panel if that leaves at least ``SAVING`` layers out of the picture. A panel of more than
    ``RANKS`` steps folds repeated sequences of layers. If it is still too long, its largest module gets a panel, and in
    the end it is cut.
    """
    return _Folding(roots).panels()


class _Folding:
    def __init__(self, roots: Sequence[Call]) -> None:
        self.roots = alike(roots)
        self.kind_of = {
            call: kind for kind in alike([call for root in roots for call in _calls_in(root)]) for call in kind.calls
        }
        self.folded = {kind for kind in self.kind_of.values() if len(kind.calls) > 1}
        self._drop_what_does_not_pay()

    def panels(self) -> list[Panel]:
        found = [Panel(kind, self._fitting(kind.shown)) for kind in self.roots]
        for panel in found:  # it grows in the loop
            for item in panel.items:
                if isinstance(item, Box) and not item.kind.number:
                    item.kind.number = len(found) - len(self.roots) + 1
                    found.append(Panel(item.kind, self._fitting(item.kind.shown)))
        return found

    def _drop_what_does_not_pay(self) -> None:
        """Leaves in ``folded`` the kinds that save enough layers. The outermost are dropped first: then the inner ones
        may save enough."""
        while True:
            bodies = self._bodies()
            drawn = Counter(item.kind for items in bodies.values() for item in items if isinstance(item, Box))
            poor = [
                kind
                for kind in self.folded & bodies.keys()
                if (drawn[kind] - 1) * sum(isinstance(item, Box) or bool(item.operation) for item in bodies[kind])
                < SAVING
            ]
            if not poor:
                return
            largest = max(len(kind.shown.marks) for kind in poor)
            self.folded -= {kind for kind in poor if len(kind.shown.marks) == largest}

    def _bodies(self) -> dict[Kind, list[Item]]:
        """The items inside each root, and inside each kind of block that is reached from a root."""
        bodies: dict[Kind, list[Item]] = {}
        pending = list(self.roots)
        while pending:
            kind = pending.pop()
            if kind not in bodies:
                bodies[kind] = self._expanded(kind.shown)
                pending += [item.kind for item in bodies[kind] if isinstance(item, Box)]
        return bodies

    def _expanded(self, call: Call) -> list[Item]:
        """The items inside ``call``: marks, and a box for each folded call."""
        items: list[Item] = []
        for item in call.items:
            if isinstance(item, Mark):
                items.append(item)
            elif self.kind_of[item] in self.folded:
                items.append(Box(self.kind_of[item], [item]))
            else:
                items += self._expanded(item)
        return items

    def _fitting(self, call: Call) -> list[Item]:
        """The items inside ``call``, in at most ``RANKS`` steps."""
        items = in_runs(self._expanded(call))
        if ranks(items) > RANKS:
            items = self._repeats_folded(call, items)
        while ranks(items) > RANKS:
            inner = self._largest_module(call, len(items))
            if inner is None:
                return self._cut(call, items)
            self.folded.add(self.kind_of[inner])
            items = self._repeats_folded(call, in_runs(self._expanded(call)))
        return items

    def _largest_module(self, call: Call, most: int) -> Call | None:
        """The module in ``call`` that holds most items and is not folded, unless it holds nearly all of them."""
        sizes = {
            inner: len(self._expanded(inner)) for inner in _calls_in(call) if self.kind_of[inner] not in self.folded
        }
        fit = [inner for inner, size in sizes.items() if SAVING <= size < 0.9 * most]
        return max(fit, key=lambda inner: sizes[inner], default=None)

    def _cut(self, call: Call, items: list[Item]) -> list[Item]:
        pieces: list[list[Item]] = [[]]
        for unit in units_of(items):
            if pieces[-1] and ranks([*pieces[-1], *unit]) > RANKS:
                pieces.append([])
            pieces[-1] += unit
        calls = [_sequence(call, piece, f"part {number} of {len(pieces)}") for number, piece in enumerate(pieces, 1)]
        return [self._box(piece, Kind([piece])) for piece in calls]

    def _repeats_folded(self, call: Call, items: list[Item]) -> list[Item]:
        """``items`` with repeated sequences of layers as boxes, such as Conv2d, ReLU, Conv2d, ReLU."""
        while True:
            pieces = [
                (_sequence(call, piece) if repeats else None, piece) for piece, repeats in best_repeat(items, SAVING)
            ]
            kinds = {inner: kind for kind in alike(inner for inner, _ in pieces if inner) for inner in kind.calls}
            folded = in_runs(
                item
                for inner, piece in pieces
                for item in ([self._box(inner, kinds[inner])] if inner and len(kinds[inner].calls) > 1 else piece)
            )
            if len(folded) == len(items):
                return items
            items = folded

    def _box(self, call: Call, kind: Kind) -> Box:
        self.kind_of[call] = kind
        self.folded.add(kind)
        return Box(kind, [call])


def _sequence(call: Call, items: list[Item], type: str = "") -> Call:
    """``items``, which are inside ``call``, as a call of their own."""
    inside = [each for item in items for each in ([item] if isinstance(item, Mark) else item.calls)]
    named = [each for each in inside if isinstance(each, Call) or each.operation]
    operations = [each.type if isinstance(each, Call) else each.operation for each in named]
    if len(operations) > 4:
        operations[3:] = [f"… ({len(operations)} layers)"]
    first, last = (named[0], named[-1]) if named else (call, call)
    name_of_last = last.last or last.name if isinstance(last, Call) else last.name
    return Call(first.name, call.path, type or ", ".join(operations) or f"{len(items)} steps", inside, name_of_last)


def _calls_in(call: Call) -> Iterator[Call]:
    for item in call.items:
        if isinstance(item, Call):
            yield item
            yield from _calls_in(item)
