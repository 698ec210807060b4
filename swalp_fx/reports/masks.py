"""Scores that are rounded with those that a mask takes out: masks that the passes do not follow to the product."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..passes.captured import FOLLOWED
from ..passes.facts import Origin, facts
from ..passes.names import PART, place
from ..passes.operations import CASTS, category, name_of, stem_of
from ..passes.purpose import NONE_LEFT, PRODUCTS, SUMS, constant_of
from ..passes.rounding import ACTIVATION, Rounding
from ..passes.tables import LAYER_PARTS

__all__ = ["masked_later"]

SOFTMAX = ("softmax", "_safe_softmax", "log_softmax", "exp")
FILLS = ("masked_fill", "index_fill", "where", "setitem")


def masked_later(graph: Graph) -> list[str]:
    """In a rewritten graph, the places of rounded scores that a mask takes out later, before or behind a softmax.

    Masked scores are part of the blocks there, so an earlier token's output may depend on a later token.
    """
    found: dict[str, None] = {}
    for node in graph.nodes:
        if stem_of(node) in SOFTMAX and node.args and isinstance(node.args[0], Node):
            readers = [node, *(user for user in node.users if Rounding.of(user, ACTIVATION) is not None)]
            is_masked = any(_multiplies_by_mask(user) for each in readers for user in each.users)
            found |= dict.fromkeys(_rounded_before(node.args[0], is_masked, set()))
    return list(found)


def _rounded_before(node: Node, masked: bool, seen: set[Node]) -> Iterator[str]:
    """The rounded scores that ``node`` is made of; masked: whether a mask lies behind it."""
    if node in seen or facts(node).origin is not Origin.MODEL:
        return
    seen.add(node)
    if (rounding := Rounding.of(node, ACTIVATION)) is not None and masked:
        yield place(rounding.source)
    if rounding is not None or node.meta.get(PART) in LAYER_PARTS:
        return
    masked = masked or _lays_mask(node) or any(_lays_mask(user) for user in node.users if stem_of(user) == "setitem")
    for source in node.all_input_nodes:
        yield from _rounded_before(source, masked, seen)


def _lays_mask(node: Node) -> bool:
    """Whether ``node`` lays a mask that is not followed: it fills in a low number, or adds one that is no constant."""
    if node.meta.get(FOLLOWED):
        return False
    if stem_of(node) in FILLS:
        lows = (constant_of(each) for each in (*node.args[1:], *node.kwargs.values()))
        return any(low is not None and low <= NONE_LEFT for low in lows)
    others = [each for each in node.all_input_nodes if facts(each).origin is not Origin.MODEL]
    return stem_of(node) in (*SUMS, "addcmul") and any(_is_tensor(each) for each in others)


def _multiplies_by_mask(node: Node) -> bool:
    """Whether ``node`` multiplies by truth values, as a mask behind a softmax does."""
    return stem_of(node) in PRODUCTS and any(map(_is_truth, node.all_input_nodes))


def _is_truth(node: Node) -> bool:
    while category(node) == "movement" and name_of(node) not in CASTS and node.all_input_nodes:
        node = node.all_input_nodes[0]
    source = node.all_input_nodes[0] if name_of(node) in CASTS and node.all_input_nodes else node
    value = source.meta.get("example_value")
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _is_tensor(node: Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.dim() > 0 and value.is_floating_point()
