"""The origin of each node's numbers: constants alone, floating inputs, or parameters."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from .captured import HOLDS
from .facts import Origin, is_floating
from .operations import category, stem_of, writes, written
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
    """
    found: dict[Node, Origin] = {}
    for node in graph.nodes:
        found[node] = _origin(node, found)
        if writes(node):  # later reads of the target read this too
            target = written(node)
            if isinstance(target, Node) and target.meta.get(HOLDS) != "state":
                found[target] = max(found[target], found[node])
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
