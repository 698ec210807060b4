"""The proof's own walk of a graph's memory, for writes that a reader of a tensor would not see."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from itertools import count

from torch.fx import Graph, Node

from ..captured import LATER
from ..facts import memory_of
from .reading import reads_sizes, written_by

__all__ = ["Writes"]


class Writes:
    """The writes of a captured graph, and the memory that they go into."""

    def __init__(self, graph: Graph) -> None:
        self._targets = {node: written_by(node) for node in graph.nodes}
        self._memory = {node: memory_of(node) for node in graph.nodes}
        written = {node: self._memory_of(targets) for node, targets in self._targets.items()}
        self.into = {node: memory for node, memory in written.items() if memory}
        self._end = graph.output_node()
        self._pieces = frozenset[int]().union(*self.into.values())
        self._touching: defaultdict[int, list[Node]] = defaultdict(list)  # memory that is written -> nodes, in order
        for node in graph.nodes:
            for piece in self._memory_of((node, *node.all_input_nodes)) & self._pieces:
                self._touching[piece].append(node)

    def _memory_of(self, nodes: Iterable[Node]) -> frozenset[int]:
        return frozenset[int]().union(*(self._memory[node] for node in nodes))

    def are_into(self, node: Node) -> bool:
        """Whether something is written into the memory of ``node``'s output."""
        return bool(self._memory[node] & self._pieces)

    def fill(self, node: Node) -> bool:
        """Whether other numbers are written into the memory that ``node`` makes."""
        made = self._memory[node] - self._memory_of(node.all_input_nodes)
        return any(into & made and len(each.all_input_nodes) > 1 for each, into in self.into.items())

    def unseen(self, copied: Mapping[Node, Set[Node]]) -> Iterator[tuple[Node, Node, Node]]:
        """(reader, operand, write) of each write that a reader of ``operand`` would not see.

        copied: node -> those of its readers that read a copy of its output, made right behind it.
        """
        for piece in sorted({piece for node in copied for piece in self._memory[node] & self._pieces}):
            yield from self._unseen(piece, copied)

    def _unseen(self, piece: int, copied: Mapping[Node, Set[Node]]) -> Iterator[tuple[Node, Node, Node]]:
        fresh = count()  # each copy of the piece has a number
        bare: dict[Node, int] = {}  # node -> the copy that its output lies in
        rounded: dict[Node, int] = {}  # node -> the copy that is made of its output
        holds: defaultdict[int, set[Node]] = defaultdict(set)  # copy -> the writes that it has
        every: list[Node] = []
        for node in self._touching[piece]:
            given = [each for each in node.all_input_nodes if each in bare]
            at = {each: rounded[each] if node in copied.get(each, ()) else bare[each] for each in given}
            is_inside = piece in self._memory[node]
            targets = [each for each in self._targets[node] if each in at]
            for each in given:
                if (targets or not is_inside) and not reads_sizes(node, each):
                    yield from ((node, each, write) for write in _missing(every, holds[at[each]]))
            for each in targets:
                holds[at[each]].add(node)
                every.append(node)
            if is_inside:
                bare[node] = at[(*targets, *given)[0]] if given else next(fresh)
                if node in copied:
                    rounded[node] = next(fresh)
                    holds[rounded[node]] = set(holds[bare[node]])

        for node in bare:
            if node.meta.get(LATER):  # what lies behind the graph reads it
                yield from ((self._end, node, write) for write in _missing(every, holds[bare[node]]))


def _missing(every: list[Node], held: set[Node]) -> list[Node]:
    return [write for write in every if write not in held] if len(held) < len(every) else []
