"""The origin of each node's numbers: constants alone, floating inputs, or parameters."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from .captured import HOLDS
from .facts import Origin, is_floating, memory_of
from .operations import category, memory_written, stem_of
from .tables import does

__all__ = ["ORIGIN", "origins"]

ORIGIN = "swalp_fx.origin"  # of an input of a body: its Origin


def origins(graph: Graph) -> dict[Node, Origin]:
    """The origin of each node's output, after all writes into it.

    inv_freq = placeholder                  CONSTANT   a buffer
    x = placeholder                         GIVEN      floating
    place = arange(x.shape[1])              CONSTANT   of a shape, not of x
    angle = place * inv_freq                CONSTANT
    y = x * angle.cos()                     GIVEN
    z = linear(y, weight)                   MODEL
    mask = zeros(4)                         MODEL      z is written into it, behind a view
    copy_ = mask.narrow(0, 0, 2).copy_(z)   MODEL
    """
    found: dict[Node, Origin] = {}
    buffers = (node for node in graph.nodes if node.meta.get(HOLDS) == "state")
    state = memory_of(*buffers)
    inside: defaultdict[int, list[Node]] = defaultdict(list)  # piece of memory -> the nodes that lie in it
    for node in graph.nodes:
        found[node] = _origin(node, found)
        for piece in memory_of(node):
            inside[piece].append(node)
        for piece in memory_written(node) - state:
            for each in inside[piece]:  # later reads of the target, under any name, read this too
                found[each] = max(found[each], found[node])
    return found


def _origin(node: Node, found: dict[Node, Origin]) -> Origin:
    if node.op == "placeholder":
        return _of_given(node)
    if node.op == "get_attr":
        return Origin.CONSTANT
    part, name = category(node), stem_of(node)
    if _is_no_tensor(node) or (part == "number" and "reads" not in does(name)):
        return Origin.CONSTANT
    sources = node.all_input_nodes[:1] if name.endswith("_as") else node.all_input_nodes  # expand_as reads a size
    origin = max((found[source] for source in sources), default=Origin.CONSTANT)
    return Origin.MODEL if origin is Origin.GIVEN and part == "compute" else origin


def _of_given(node: Node) -> Origin:
    if ORIGIN in node.meta:
        return node.meta[ORIGIN]
    holds = node.meta.get(HOLDS)
    if holds == "parameter":
        return Origin.MODEL
    return Origin.GIVEN if holds in ("input", "operand") and is_floating(node) else Origin.CONSTANT


def _is_no_tensor(node: Node) -> bool:
    """Whether ``node`` is known to give a size, a type or the like."""
    value = node.meta.get("example_value")
    return value is not None and not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
