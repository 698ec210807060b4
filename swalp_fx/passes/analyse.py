"""The analysis: the category, the origin and the meaning of each node."""

from __future__ import annotations

from torch.fx import Graph, Node

from .facts import FACTS, Facts, Origin, is_floating
from .norms import mark_wholes
from .operations import category, operation_of, stem_of
from .origin import origins
from .purpose import Purposes
from .tables import LAYER_PARTS, does

__all__ = ["analyse"]


def analyse(graph: Graph) -> Graph:
    """Writes ``node.meta[FACTS]`` on every node, and LAYER on the nodes of one operation; returns ``graph``.

    place = arange(x.shape[1])        number      CONSTANT
    cos = (place * inv_freq).cos()    arithmetic  CONSTANT   constant
    scores = matmul(query, key)       compute     MODEL
    add = scores + mask               arithmetic  MODEL      mask
    softmax = add.softmax(-1)         activation  MODEL
    """
    origin = origins(graph)
    mark_wholes(graph, origin)
    purposes = Purposes(graph, origin)
    for node in graph.nodes:
        part = _category(node, origin[node])
        meaning = purposes.meaning(node)
        if origin[node] is Origin.CONSTANT:
            is_made = is_floating(node) and part in LAYER_PARTS
            meaning = "constant" if is_made else ""
        node.meta[FACTS] = Facts(part, origin[node], meaning, does(operation_of(node)))
    return graph


def _category(node: Node, origin: Origin) -> str:
    is_drawn = stem_of(node) == "normal" and origin is not Origin.CONSTANT  # with a mean or a deviation from the model
    return "arithmetic" if is_drawn else category(node)
