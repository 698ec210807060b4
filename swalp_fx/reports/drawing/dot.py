"""The Graphviz source of a drawing, in full or in panels."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from .fold import RANKS, Panel, panels
from .kinds import Box, Item, ranks
from .labels import FLOAT_EDGE, FOLDED, INK, LEGEND, QUIET, ROUNDED_EDGE, folded, legend, port, text, title
from .marks import Call, Mark, layers_in, seen_from, unnumbered

__all__ = ["picture"]

LAYERS = 16  # most layers of a model that is drawn in full

FRAME, PANEL_FILL = "#cccccc", "#fafafa"

# Liberation Sans has the same metrics. So the text fits in a browser as Graphviz has laid it out.
FONT = "Arial,Helvetica,sans-serif"
# Connected components are laid out one by one, and stand in a row, ordered by ``sortv``.
STYLE = f"""\
  graph [fontname="{FONT}", fontsize=11, fontcolor="{QUIET}", ranksep=0.22, nodesep=0.2, pad=0.15, labelloc=t]
  graph [pack=14, packmode="array_ut1000"]
  node [fontname="{FONT}", fontsize=11, fontcolor="{INK}", shape=plain]
  edge [arrowsize=0.55, color="{FLOAT_EDGE}"]"""
UNSEEN = "peripheries=0"  # the style of a frame that only groups nodes
HEADING_RANKS = 3  # height of a title with the inputs and outputs, in ranks


def picture(model: str, recipe: str, roots: list[Call]) -> str:
    """The source of a drawing of a model's graphs: in full if they are small, else in panels."""
    head = ["digraph {", f"  label=<<b>{text(model)}</b>, {text(recipe)}>", STYLE]
    if sum(map(layers_in, roots)) <= LAYERS and all(ranks(root.marks) <= RANKS for root in roots):
        graphs = [line for place, root in enumerate(roots, 1) for line in _in_full(root, place)]
        body = [*_frame("legend", '""', ["  sortv=0", legend(LEGEND)], UNSEEN), *graphs]
    else:
        found = panels(roots)
        is_folded = any(panel.kind.number for panel in found)
        body = [legend(LEGEND + FOLDED if is_folded else LEGEND), *_page(found)]
    return "\n".join([*head, *body, "}", ""])


# ---- nodes and edges -------------------------------------------------------------------------


def _node(id: str, label: str) -> str:
    return f'"{id}" [label=<{label}>]'


def _edge(source: Mark, start: str, end: str, *, is_first: bool = True, passes: bool = False) -> str:
    """An edge from ``source`` to its first reader, or to another; ``passes``: it goes past parameters in a frame."""
    # Weights keep the path of the activations straight, with parameters and residual paths beside it.
    weight = 1 if source.parameter else 200 if is_first else 50
    style = f'style=solid, color="{ROUNDED_EDGE}"' if source.rounded else "style=dashed"
    width = 1.0 if source.parameter and source.rounded else 1.8 if source.rounded else 1.2
    length = ", minlen=2" if passes else ""  # parameters stand one rank above their layer, inside of its frame
    return f'  "{start}" -> "{end}" [weight={weight}, {style}, penwidth={width}{length}]'


def _is_beside_parameters(source: Mark, mark: Mark) -> bool:
    return not source.parameter and any(other.parameter for other in mark.sources)


def _frame(id: str, label: str, lines: Iterable[str], style: str = 'style="rounded"') -> Iterator[str]:
    yield f'  subgraph "cluster_{id}" {{'
    yield f'    peripheries=1; {style}; color="{FRAME}"; labeljust=l; label={label}'
    yield from (f"  {line}" for line in lines)
    yield "  }"


# ---- in full ---------------------------------------------------------------------------------


def _in_full(root: Call, column: int) -> Iterator[str]:
    """Every mark, inside the frames of its modules."""
    edges = []
    for mark in root.marks:
        for source in mark.sources:
            is_first = source.users[0] is mark
            passes = is_first and source.around != mark.around and _is_beside_parameters(source, mark)
            edges.append(_edge(source, source.id, mark.id, is_first=is_first, passes=passes))
    style = 'style="rounded"' if root.path else UNSEEN
    lines = [f"  sortv={column}", *_nested(root), *edges]
    yield from _frame(f"{root.marks[0].id}_", f'"{text(root.path)}"', lines, style)


def _nested(call: Call) -> Iterator[str]:
    for item in call.items:
        if isinstance(item, Mark):
            yield "  " + _node(item.id, item.label(item.name))
        else:
            yield from _frame(f"{item.marks[0].id}_{item.name}", f'"{text(item.name)}"', _nested(item))


# ---- in panels -------------------------------------------------------------------------------


def _page(found: list[Panel]) -> Iterator[str]:
    """The panels in columns: from above, then from the left, about as high as wide."""
    heights = [ranks(panel.items) + HEADING_RANKS for panel in found]
    # A panel is about 420 points wide, and a rank 42 points high.
    highest = max(*heights, math.sqrt(10 * sum(heights)))
    columns: list[list[int]] = []
    filled: list[int] = []
    for number, height in enumerate(heights):
        if not columns or filled[-1] + height > highest:
            columns.append([])
            filled.append(0)
        columns[-1].append(number)
        filled[-1] += height
    drawn = [_Drawn(panel, f"q{number}_") for number, panel in enumerate(found)]
    for place, column in enumerate(columns):
        for number in column:
            yield from drawn[number].lines(place)
        for above, below in pairwise(column):
            yield f'  "{drawn[above].last}" -> "{drawn[below].first}" [style=invis, weight=100]'
    shortest = min(range(len(columns)), key=lambda place: filled[place])
    yield f'  "{drawn[columns[shortest][-1]].last}" -> legend [style=invis, weight=100]'


class _Drawn:
    """One panel: its nodes by frame, its ports, and its edges."""

    def __init__(self, panel: Panel, prefix: str) -> None:
        self.panel, self.prefix, self.call = panel, prefix, panel.kind.shown
        self.owner: dict[Mark, Item] = {mark: item for item in panel.items for mark in item.marks}
        self.frame_of = panel.frames()
        self.ids: dict[Item, str] = {}
        self.nodes: dict[str, list[str]] = defaultdict(list)
        self.edges: dict[tuple[str, str], str] = {}
        for item in panel.items:
            self._place(item)
        self.inputs = [self._port(source) for source in self._from_outside()]
        for item in panel.items:
            for mark in item.marks:
                for source in mark.sources:
                    self._join(source, mark, item)
        self.first, self.last = next(iter([*self.inputs, *self.ids.values()])), self._out()

    def lines(self, column: int) -> Iterator[str]:
        """The panel, in the column of that number; a whole model has no frame."""
        lines = [f"  sortv={column}", *self._framed(), *self.edges.values()]
        has_frame = self.panel.kind.number or self.call.path
        style = f'style="rounded,filled"; fillcolor="{PANEL_FILL}"' if has_frame else UNSEEN
        label = f"<{title(self.panel.kind)}>" if has_frame else '""'
        yield from _frame(self.prefix, label, lines, style)

    def _framed(self) -> Iterator[str]:
        for number, (frame, nodes) in enumerate(self.nodes.items()):
            lines = [f"  {node}" for node in nodes]
            yield from _frame(f"{self.prefix}{number}", f'"{text(frame)}"', lines) if frame else lines

    def _place(self, item: Item) -> None:
        self.ids[item] = id = f"{self.prefix}{len(self.ids)}"
        frame = self.frame_of.get(item, "")
        label = folded(item, self.call.path) if isinstance(item, Box) else item.label(self._name(item, frame))
        self.nodes[frame].append(_node(id, label))

    def _name(self, mark: Mark, frame: str) -> str:
        """The name of a layer, as seen from the module; none if the frame tells it, or if it is one of several."""
        if self.call.last is not None:
            return ""
        name = seen_from(self.call.path, mark.name)
        if len({call.path for call in self.panel.kind.calls}) < len(self.panel.kind.calls):
            name = unnumbered(name)
        return "" if frame and name in (frame, f"{frame}.{mark.operation}") else name

    def _from_outside(self) -> list[Mark]:
        sources = dict.fromkeys(
            source
            for item in self.panel.items
            for mark in item.marks
            for source in mark.sources
            if source not in self.owner and not _hides(item, source)
        )
        return list(sources)

    def _port(self, source: Mark) -> str:
        self.ids[source] = id = f"{self.prefix}in{len(self.ids)}"
        ports = [each for each in self._from_outside() if not each.parameter]
        name = f"in {ports.index(source) + 1}" if len(ports) > 1 and source in ports else "in"
        self.nodes[""].append(_node(id, source.label("") if source.parameter else port(name)))
        return id

    def _join(self, source: Mark, mark: Mark, item: Item) -> None:
        start = self.owner.get(source, source)
        if start is item or start not in self.ids or _hides(item, source):
            return
        readers = (self.owner[user] for user in source.users if user in self.owner)
        is_first = next(reader for reader in readers if reader is not start) is item
        enters = isinstance(item, Mark) and self.frame_of.get(start) != self.frame_of.get(item)
        passes = is_first and enters and _is_beside_parameters(source, mark)
        ends = self.ids[start], self.ids[item]
        self.edges.setdefault(ends, _edge(source, *ends, is_first=is_first, passes=passes))

    def _out(self) -> str:
        """The end of the panel: all marks that are read outside of the block lead there."""
        inside = set(self.call.marks)
        read = [mark for mark in self.owner if not inside.issuperset(mark.users) and not self.call.owns(mark)]
        if not read or not self.panel.kind.number:
            return self.ids[self.panel.items[-1]]
        end = f"{self.prefix}out"
        self.nodes[""].append(_node(end, port("out")))
        for mark in read:
            start = self.ids[self.owner[mark]]
            self.edges.setdefault((start, end), _edge(mark, start, end))
        return end


def _hides(item: Item, source: Mark) -> bool:
    """Whether ``source`` is a parameter inside of a box, though another call may have read it first."""
    return isinstance(item, Box) and any(call.owns(source) for call in item.calls)
