"""The proof's own reading of the captured graph: the kind, the name and the readers of each node."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch.fx import Graph, Node

from ... import nodes
from ...recipe import Subject
from ..captured import ARGUMENT, CARRIED, HOLDS, KEPT, LAYER, MODULE, UPDATE
from ..facts import FACTS, MEANINGS, Facts, Origin, memory_of
from .reading import called, reads_sizes, types_around, written_by
from .writes import Writes

__all__ = ["LAYERS", "Model"]

LAYERS = ("compute", "norm", "activation", "arithmetic", "pooling")
NOT_MADE = ("parameter", "input", "operand", "number", "state", "body", "nested", "movement", "inside", "outside")
NO_LAYERS = (*MEANINGS, *NOT_MADE)


class Model:
    """The captured graph, with each node's kind and name, and the nodes that only leave (exits)."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.writes = Writes(graph)
        self.kinds = _kinds(graph, self.writes)
        self.exits = _exits(graph, self.kinds, self.writes)
        self.places = _places(graph, self.kinds)

    def is_layer(self, node: Node) -> bool:
        return self.kinds[node] not in NO_LAYERS and node.op != "output"

    def subject(self, node: Node) -> Subject:
        """(name, kinds) of an input or a layer output, for the recipe's patterns."""
        layer, kinds = node.meta.get(LAYER), [self.kinds[node]]
        if layer is not None:
            kinds += [base.__name__ for base in layer.kind.__mro__]
        elif node.op != "placeholder":
            kinds += [called(node), called(node).rstrip("_")]
        return self.places[node], [*kinds, *types_around(node)]

    def sources(self, node: Node) -> list[Node]:
        """The inputs of ``node``; if it ends a layer, the inputs of the layer."""
        inner = [(self.sources(each) if self.kinds[each] == "inside" else [each]) for each in node.all_input_nodes]
        return list(dict.fromkeys(source for each in inner for source in each))

    def readers(self, node: Node) -> set[Node]:
        """The readers of ``node``; a layer counts as one reader."""
        inner = [(self.readers(user) if self.kinds[user] == "inside" else {user}) for user in node.users]
        return set().union(*inner)

    def group_ends(self) -> set[Node]:
        """The last node of each group.

        Each node joins the group of the node that it continues. If it continues two, it joins the one that began first.
        """
        group: dict[Node, int] = {}
        last: dict[int, Node] = {}
        for number, node in enumerate(self.graph.nodes):
            kind, every = self.kinds[node], self.sources(node)
            sources = [s for s in every if s in group and last[group[s]] is s and len(self.readers(s)) == 1]
            if kind in ("norm", "activation"):
                sources = [source for source in sources if source is every[0] or source not in node.all_input_nodes]
            elif kind == "arithmetic":
                readers = [self.kinds.get(reader) for reader in self.readers(node)]
                is_sum = called(node).rstrip("_") in ("add", "iadd")
                if not sources or not is_sum or readers != ["activation"]:
                    continue
            elif kind == "compute":
                sources = []
            else:
                continue
            group[node] = min((group[source] for source in sources), default=number)
            last[group[node]] = node
        return set(last.values())


def _kinds(graph: Graph, writes: Writes) -> dict[Node, str]:
    """Each node's kind: one of LAYERS for a layer's output; else one of NO_LAYERS, or "output"."""
    kinds: dict[Node, str] = {}
    updates = _updates(graph)
    for node in graph.nodes:
        kinds[node] = _kind(node, kinds)
        if kinds[node] == "number" and node.meta[FACTS].origin is not Origin.CONSTANT and writes.fill(node):
            kinds[node] = "movement"
        reads_state = "state" in [kinds[source] for source in node.all_input_nodes]
        if kinds[node] in ("arithmetic", "norm", "constant", "inside") and node in updates and reads_state:
            kinds[node] = "state"
    return kinds


def _kind(node: Node, kinds: dict[Node, str]) -> str:
    if node.op == "output" or HOLDS in node.meta:
        return node.meta.get(HOLDS, "output")
    if node.target in (torch.ops.higher_order.tag_activation_checkpoint, nodes.recurrent):
        return "nested"
    if node.meta.get(MODULE, "") is None:
        return "outside"
    if any(kinds[written] == "state" for written in written_by(node)):
        return "state"
    known: Facts = node.meta[FACTS]
    kind = known.category if node.meta.get(LAYER) is None else _kind_in_layer(node, node.meta[LAYER])
    if known.origin is Origin.CONSTANT:
        if known.meaning == "constant" and kind in LAYERS:
            return "constant"
        if kind == "inside" or known.meaning == "constant":
            return kind
        return "state" if "state" in {kinds[source] for source in node.all_input_nodes} else "number"
    value = node.meta.get("example_value")
    if kind in LAYERS and isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
        return "number"
    if known.meaning and kind != "inside":
        return "arithmetic" if known.meaning == "mixes" else known.meaning
    return kind


def _kind_in_layer(node: Node, layer: Any) -> str:
    """The layer's kind for its output; "inside" for its other nodes, kept by a hook or not."""
    value = node.meta.get("example_value")
    inner = {user for user in node.users if user.meta.get(LAYER) == layer}
    outer = {user for user in node.users if not inner or (user.op != "output" and not reads_sizes(user, node))} - inner
    if not outer or not (value is None or isinstance(value, torch.Tensor)):
        return "number" if node.meta[FACTS].category == "number" else "inside"
    return layer.part


def _places(graph: Graph, kinds: dict[Node, str]) -> dict[Node, str]:
    """The name of each input and layer output."""
    layers = {layer.path for node in graph.nodes if (layer := node.meta.get(LAYER)) is not None}
    named: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if kinds[node] in (*LAYERS, *MEANINGS):
            named.setdefault(_owner_of_weight(node, layers) or _unnumbered(node), []).append(node)
    places: dict[Node, str] = {}
    for name, nodes_of in named.items():
        free = (number for number in count(1) if f"{name}@{number}" not in named)
        places |= {node: name if len(nodes_of) == 1 else f"{name}@{next(free)}" for node in nodes_of}
    for node in graph.find_nodes(op="placeholder"):
        name = node.meta.get(ARGUMENT, node.name)
        places[node] = f"{name}@0" if name in named else name
    return places


def _owner_of_weight(node: Node, layers: set[str]) -> str:
    """The layer whose weight a linear function reads, of those that its module holds and the graph does not call."""
    weight = node.args[1] if len(node.args) > 1 else None
    if called(node) != "linear" or "MultiheadAttention" not in types_around(node) or not isinstance(weight, Node):
        return ""
    parameter = weight.meta.get(ARGUMENT, "") if weight.meta.get(HOLDS) == "parameter" else ""
    owner = parameter.removesuffix(".weight")
    around = node.meta.get(MODULE) or ""
    is_held = owner.startswith(f"{around}.") if around else True
    return owner if is_held and f"{owner}.weight" == parameter and owner not in layers else ""


def _unnumbered(node: Node) -> str:
    if (layer := node.meta.get(LAYER)) is not None:
        return layer.path or layer.kind.__name__.lower()
    return ".".join(name for name in (node.meta.get(MODULE), called(node).strip("_")) if name)


def _updates(graph: Graph) -> set[Node]:
    """The arithmetic that serves only the new value of a buffer. The last node may have other readers."""
    updates: set[Node] = set()
    found = [node for node in graph.nodes if node.meta.get(UPDATE)]
    while found:
        node = found.pop()
        # Movement may only be the last node.
        if node not in updates and (node.meta.get(UPDATE) or _is_arithmetic(node)):
            updates.add(node)
            found += [source for source in node.all_input_nodes if updates.issuperset(source.users)]
    return {node for node in updates if _is_arithmetic(node)}


def _is_arithmetic(node: Node) -> bool:
    return node.meta[FACTS].category == "arithmetic"


def _exits(graph: Graph, kinds: dict[Node, str], writes: Writes) -> set[Node]:
    """The output node, the movement, sizes and writes that serve it alone, and the code around the model."""
    exits: set[Node] = set()
    inner: set[int] = set()  # the memory that the model's own nodes read, behind the present node
    for node in graph.output_node().all_input_nodes:
        if node.meta.get(UPDATE) or node.meta.get(KEPT) or node.meta.get(CARRIED):
            inner |= memory_of(node)
    inner |= memory_of(*(node for node in graph.nodes if kinds[node] == "operand"))
    for node in reversed(graph.nodes):
        into = writes.into.get(node, frozenset())
        kept = node.meta.get(UPDATE) or node.meta.get(KEPT)
        leaves = (node.users or into) and exits.issuperset(node.users) and not kept and not inner & into
        if kinds[node] in ("output", "outside") or (leaves and kinds[node] in ("movement", "number")):
            exits.add(node)
        else:
            inner |= memory_of(*(each for each in node.all_input_nodes if not reads_sizes(node, each)))
    return exits
