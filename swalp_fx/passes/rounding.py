"""The typed view of a quantize node: passes and reports make and read such nodes by it, never by position."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from .. import nodes

__all__ = ["ACTIVATION", "ERROR", "WEIGHT", "Rounding"]

WEIGHT, ACTIVATION, ERROR = "W", "A", "E"  # roles
_ROLES = {"weight": WEIGHT, "activation": ACTIVATION, "error": ERROR}  # argument -> role
_FUNCTIONS = (nodes.quantize_weight, nodes.quantize_output)
_ARGUMENTS = {each: tuple(inspect.signature(each).parameters) for each in _FUNCTIONS}  # their names, in order


@dataclass(frozen=True)
class Rounding:
    """One quantize node, with its arguments by name."""

    node: Node
    source: Node  # whose output it rounds
    key: Node | None  # the key of the run; None: stochastic rounds to nearest
    stream: int
    quantizers: Mapping[str, str]  # role -> its quantizer, as text: of a weight W, of an output A and E
    rounding: str  # for a quantizer that names no rounding
    in_place: str = ""  # the roles that are rounded in the memory that they arrive in
    kept: str = ""  # the roles that are known to be on their grid already

    @classmethod
    def of(cls, node: Any, role: str = "") -> Rounding | None:
        """The rounding that ``node`` does; None if it is no quantize node, or none of ``role``."""
        if not isinstance(node, Node) or node.target not in _ARGUMENTS:
            return None
        given: dict[str, Any] = dict(zip(_ARGUMENTS[node.target], node.args, strict=False)) | node.kwargs
        quantizers = {letter: str(given.pop(name)) for name, letter in _ROLES.items() if name in given}
        if role and role not in quantizers:
            return None
        return cls(node, given.pop("x"), quantizers=quantizers, **given)

    @classmethod
    def all(cls, graph: Graph, role: str = "") -> Iterator[Rounding]:
        """The roundings of a graph, or those of ``role``, in its order."""
        return (found for node in graph.nodes if (found := cls.of(node, role)) is not None)

    @classmethod
    def insert(cls, source: Node, key: Node | None, stream: int, quantizers: Mapping[str, str], rounding: str) -> Node:
        """A new quantize node at the end of ``source``'s graph, named after ``source``."""
        function = nodes.quantize_weight if WEIGHT in quantizers else nodes.quantize_output
        roles = {name: quantizers[letter] for name, letter in _ROLES.items() if letter in quantizers}
        given = {"x": source, "key": key, "stream": stream, "rounding": rounding, **roles}
        arguments = tuple(given[name] for name in _ARGUMENTS[function] if name in given)
        return source.graph.create_node("call_function", function, arguments, name=f"{source.name}_q")

    @property
    def forward(self) -> str:
        """The quantizer of the node's output: of W or A."""
        return next(iter(self.quantizers.values()))

    def mark(self, **letters: str) -> None:
        """Sets ``in_place`` or ``kept`` on the node. No letters take it away."""
        kwargs = {**self.node.kwargs, **letters}
        self.node.kwargs = {name: given for name, given in kwargs.items() if given}
