"""Attention in three dimensions, [batch * heads, queries, keys], as PyTorch's code has it where it returns its weights.

It is rounded as attention in four dimensions is, so a flag that asks for the weights changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.fx import Graph, Node

from .captured import LAYER, Layer
from .names import base_name
from .operations import category, name_of, stem_of
from .scores import PRODUCTS, kind_of
from .write import Writer, value_of

__all__ = ["split_heads"]

PYTORCHS = "in multi_head_attention_forward"  # the line of a stack trace


def split_heads(graph: Graph, rounds: Callable[[Node], bool]) -> None:
    """Gives scores, probabilities and result the shape [batch, heads, ...] where ``rounds`` is true of them.

    Before:

        softmax = softmax(scores, -1)
        weights = softmax.view(batch, heads, queries, keys)

    After:

        softmax = softmax(scores, -1)             inside
        unflatten = softmax.unflatten(0, (-1, heads))    activation, rounded
        flatten = unflatten.flatten(0, 1)
        weights = flatten.view(batch, heads, queries, keys)
    """
    for node in list(graph.nodes):
        if stem_of(node) == "softmax" and (heads := _heads(node)) is not None:
            for each in [_product_before(node), node, *_products_behind(node)]:
                if each is not None and rounds(each):
                    _split(each, heads)


def _heads(softmax: Node) -> int | None:
    """The number of heads, if PyTorch's own code views these probabilities of three dimensions as four."""
    if PYTORCHS not in (softmax.meta.get("stack_trace") or "") or value_of(softmax).dim() != 3:
        return None
    views = (user for user in _readers(softmax) if stem_of(user) == "view" and value_of(user).dim() == 4)
    heads = next((value_of(view).shape[1] for view in views), None)
    return heads if isinstance(heads, int) else None


def _readers(node: Node) -> Iterator[Node]:
    """The readers of ``node``, behind dropout too."""
    for user in node.users:
        yield user
        if stem_of(user) == "dropout":
            yield from user.users


def _product_before(softmax: Node) -> Node | None:
    """The scores, with zeros where a mask takes them out, if they have been brought into form."""
    node: Any = softmax.args[0]
    while isinstance(node, Node) and stem_of(node) not in PRODUCTS and LAYER not in node.meta:
        node = node.args[0] if node.args else None
    return node if isinstance(node, Node) else None


def _products_behind(softmax: Node) -> list[Node]:
    return [user for user in _readers(softmax) if stem_of(user) in PRODUCTS]


def _split(node: Node, heads: int) -> None:
    """Splits the first axis of ``node`` for its rounding, and merges it again for its readers."""
    if (layer := node.meta.get(LAYER)) is None:
        name = name_of(node)
        layer = node.meta[LAYER] = Layer(f"{name} {node.name}", base_name(node), kind_of(name), category(node))
    split = Writer(node, node.next, layer)("unflatten", node, 0, (-1, heads))
    merged = Writer(node, split.next)("flatten", split, 0, 1)
    node.replace_all_uses_with(merged, delete_user_cb=lambda user: user is not split)
