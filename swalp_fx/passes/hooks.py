"""Hooks of layers. A weight that a hook makes is part of its layer; all else in a hook is code around the layer."""

from __future__ import annotations

from torch.fx import Graph, Node

from .captured import HOLDS, HOOK, LAYER

__all__ = ["give_weights_to_layers"]


def give_weights_to_layers(graph: Graph) -> None:
    """Writes LAYER on the nodes by which a hook makes a weight for its layer, from parameters and buffers alone.

    The hook of ``torch.nn.utils.prune`` is one: the weight is rounded, and its mask is a part of the layer.

        mask = placeholder                    state
        orig = placeholder                    parameter
        mul = mask * orig                     LAYER
        linear = linear(x, mul, bias)         LAYER
    """
    alone: set[Node] = set()
    for node in graph.nodes:
        is_given = node.meta.get(HOLDS) in ("parameter", "state", "number")
        if is_given or (HOOK in node.meta and alone.issuperset(node.all_input_nodes)):
            alone.add(node)
    for node in reversed(graph.nodes):
        if node not in alone or HOOK not in node.meta or LAYER in node.meta:
            continue
        layers = {user.meta.get(LAYER) for user in node.users if user.op != "output"}
        if len(layers) == 1 and (layer := layers.pop()) is not None and layer.path == node.meta[HOOK]:
            node.meta[LAYER] = layer
