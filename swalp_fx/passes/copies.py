"""Rounded copies and writes: a copy of a tensor does not show what is written into the tensor afterwards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

from torch.fx import Graph, Node

from .captured import HOLDS, LATER
from .facts import memory_of
from .operations import takes_size, written

__all__ = ["Copies"]

_START = -1  # the place of a graph's inputs: they are copied before anything runs


class _Access(NamedTuple):
    place: int  # in the graph
    user: Node
    of_copy: bool
    writes: bool


class Copies:
    """The memory that the nodes of a captured graph share, with all reads and writes of it."""

    def __init__(self, graph: Graph) -> None:
        self._places = {node: i for i, node in enumerate(graph.nodes)}
        self._written = {node: frozenset(written(node)) for node in graph.nodes}
        pieces = memory_of(*chain.from_iterable(self._written.values()))
        self._end = graph.output_node()
        self._memory = {node: memory_of(node) & pieces for node in graph.nodes}  # that is written
        self._inside: defaultdict[int, list[Node]] = defaultdict(list)  # a piece of it -> its nodes
        for node, memory in self._memory.items():
            for piece in memory:
                self._inside[piece].append(node)

    def writer_into_memory(self, node: Node) -> Node | None:
        """The first write into the memory of ``node``, under any name; None without one."""
        return self._first_write(self._beside(node))

    def writer_into_copy(self, node: Node) -> Node | None:
        """The first write into a copy that all readers of ``node`` read; None without one."""
        return self._first_write(self._through(node, lambda _: False))

    def _first_write(self, nodes: set[Node]) -> Node | None:
        writers = (user for each in nodes for user in each.users if each in self._written[user])
        return min(writers, key=self._places.__getitem__, default=None)

    def is_given(self, node: Node) -> bool:
        """Whether ``node`` lies in the memory of an input that something is written into."""
        return any(each.meta.get(HOLDS) == "input" for each in self._beside(node))

    def missed(self, node: Node, reads_bare: Callable[[Node], bool]) -> Node | None:
        """A write that is lost if all readers of ``node`` read a copy, but those that ``reads_bare`` names; or None.

        A write goes into the copy, or into the memory of ``node``. It is lost if the other is read afterwards.

            h = linear(x, weight)
            h_q = quantize_output(h)         the copy
            setitem(h_q, 0, 0.0)
            return (linear(h_q, ...), h)     h misses the write, if the output reads it bare
        """
        accesses = sorted(self._accesses(node, reads_bare), key=lambda each: each.place)
        last = {each.of_copy: each.place for each in accesses}
        lost = (each for each in accesses if each.writes and last.get(not each.of_copy, -1) > each.place)
        return next((each.user for each in lost), None)

    def _accesses(self, node: Node, reads_bare: Callable[[Node], bool]) -> Iterator[_Access]:
        """The reads and writes of the memory of ``node`` behind the place where it is copied."""
        nodes = self._beside(node)
        through = self._through(node, reads_bare) if nodes else set()
        for each in nodes:
            if each.meta.get(LATER):
                yield _Access(self._places[self._end], self._end, each in through, writes=False)
            for user in each.users:
                is_view = not self._written[user] and self._memory[user] & self._memory[each]  # it reads no number
                if self._is_after(user, node) and not is_view and not takes_size(user, each):
                    of_copy = each in through and not (each is node and reads_bare(user))
                    yield _Access(self._places[user], user, of_copy, each in self._written[user])

    def _beside(self, node: Node) -> set[Node]:
        """All nodes in the memory of ``node``, if something is written into it."""
        return {each for piece in self._memory[node] for each in self._inside[piece]}

    def _is_after(self, user: Node, node: Node) -> bool:
        return self._places[user] > (_START if node.op == "placeholder" else self._places[node])

    def _through(self, node: Node, reads_bare: Callable[[Node], bool]) -> set[Node]:
        """``node``, and the views of it and results of writes into it that lie in its copy."""
        through, waiting = {node}, [node]
        for each in waiting:
            is_bare = reads_bare if each is node else lambda _: False
            new = [user for user in each.users if self._memory[user] & self._memory[each] and not is_bare(user)]
            waiting += [user for user in new if user not in through]
            through.update(new)
        return through
