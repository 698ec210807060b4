"""Expansion of attention: the scores, their softmax (the probabilities) and the result are each an output to round.

A fused product is written out. Attention that is written by hand is brought into the same form.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from ..errors import ConvertError
from ..recipe import Recipe, Subject
from .captured import LAYER, Layer, around, kinds_around
from .heads import split_heads
from .names import base_name, kinds_of_operation, kinds_of_type
from .operations import category, operation_of
from .origin import origins
from .purpose import ATTENTION, Purposes
from .scores import Scores, gives_scores, kind_of, replace
from .tables import PROBABILITIES, SCORES
from .write import Writer, value_of

__all__ = ["expand", "inside", "rounds"]

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
UNFIT = "{} gives scaled_dot_product_attention tensors that do not fit: {}"


def expand(graph: Graph, recipe: Recipe) -> Graph:
    """Writes attention out where ``recipe`` rounds inside of it, and brings it into one form; returns ``graph``.

    Before:

        result = scaled_dot_product_attention(query, key, value, attn_mask=mask)

    After:

        transpose = key.transpose(-2, -1)
        scaled = query * 0.25                               attn_scores: inside
        scores = matmul(scaled, transpose)                  attn_scores: inside, once masked_fill has been
        rows = clamp(amax(mask, -1, True) + -10000.0, ...)
        masked = mask <= rows
        masked_fill = masked_fill(scores, masked, 0.0)      attn_scores: compute, rounded
        mul = masked_fill * 1.1547                          the rest of the scale: moved
        add = mul + mask                                    a mask: moved
        softmax = softmax(add, -1)                          attn_probabilities: activation, rounded
        result = matmul(softmax, value)                     scaled_dot_product_attention: compute, rounded

    The scale is split, wherever it stood. Its power of two goes to the query, where it is exact; the rest, 1 to 2, goes
    behind the product. Masked scores become zero before rounding, so they have no part in the maximum of a block. If
    nothing is rounded, the graph is unchanged.
    """
    for node in list(graph.nodes):
        if _is_fused(node) and any(rounds(recipe, *subject) for subject in inside(node)):
            try:
                _write_out(node)
            except RuntimeError as error:  # PyTorch's kernels do not look at all sizes
                raise ConvertError(UNFIT.format(around(node) or "the model", error)) from error
    purposes = Purposes(graph, origins(graph))
    for node in list(graph.nodes):
        if gives_scores(node, purposes) and rounds(recipe, *_subject_of(node)):
            Scores(node, purposes).bring_into_form()
    split_heads(graph, lambda node: rounds(recipe, *_subject_of(node)))
    graph.lint()
    return graph


def inside(node: Node) -> Iterator[Subject]:
    """The subjects of a fused product's scores and probabilities, as a recipe may name them."""
    if operation_of(node) == ATTENTION:
        for name, part in ((SCORES, "compute"), (PROBABILITIES, "activation")):
            yield (
                ".".join(filter(None, (around(node), name))),
                [*kinds_of_type(kind_of(name), part), *kinds_around(node)],
            )


def rounds(recipe: Recipe, name: str, kinds: Collection[str]) -> bool:
    """Whether an output of that name is rounded; placement "compute" rounds products and included outputs alone."""
    here = recipe.at((name, kinds))
    is_placed = recipe.placement != "compute" or "compute" in kinds or recipe.includes(name)
    return is_placed and (here.activation.rounds or here.error.rounds) and not recipe.excludes(name)


def _subject_of(node: Node) -> tuple[str, list[str]]:
    layer: Layer | None = node.meta.get(LAYER)
    part = layer.part if layer is not None and layer.part else category(node)
    return base_name(node), [*kinds_of_operation(node, part), *kinds_around(node)]


def _is_fused(node: Node) -> bool:
    """Whether it is a fused product that can be written out: its switches and sizes must be numbers, not nodes."""
    if operation_of(node) != ATTENTION or LAYER in node.meta or not isinstance(node.meta.get("example_value"), Tensor):
        return False
    given = _given(node)
    tensors = [given[name] for name in ARGUMENTS[:3]]
    values = [each.meta.get("example_value") if isinstance(each, Node) else None for each in tensors]
    if not all(isinstance(each, Tensor) and not each.is_nested for each in values):
        return False
    branches = (given["dropout_p"], given["is_causal"], given["enable_gqa"])
    lengths = (values[0].shape[-1], *(each.shape[-3] for each in values if given["enable_gqa"]))  # type: ignore[union-attr]
    return not any(isinstance(each, Node) for each in branches) and all(isinstance(each, int) for each in lengths)


def _given(node: Node) -> dict[str, Any]:
    defaults = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
    return defaults | dict(zip(ARGUMENTS, node.args, strict=False)) | node.kwargs


def _write_out(node: Node) -> None:
    """Writes a fused product out, as PyTorch's documentation defines it."""
    given, write = _given(node), Writer(node)
    query, key, value = (given[name] for name in ARGUMENTS[:3])
    mask, scale = given["attn_mask"], given["scale"]
    path = f"{around(node)}." if around(node) else ""

    def layer(name: str, part: str) -> Layer:
        return Layer(f"{name} {node.name}", path + name, kind_of(name), part)

    if given["enable_gqa"]:
        key, value = (_for_each_head(each, query, write) for each in (key, value))
    across = write(torch.transpose, key, -2, -1)
    scores = write(torch.matmul, query, across, layer=layer(SCORES, "compute"))
    scores = write(torch.mul, scores, 1 / math.sqrt(value_of(query).shape[-1] or 1) if scale is None else scale)
    if given["is_causal"]:
        sizes = write.size(query, -2), write.size(key, -2)
        future = write(torch.triu, write("new_ones", query, sizes, dtype=torch.bool), 1)
        scores = write(torch.masked_fill, scores, future, -math.inf)
    if mask is not None and value_of(mask).dtype == torch.bool:
        scores = write(torch.masked_fill, scores, write(torch.logical_not, mask), -math.inf)
    elif mask is not None:
        if value_of(mask).dtype != value_of(scores).dtype:  # a mask in float32 goes with any query
            mask = write("to", mask, value_of(scores).dtype)
        scores = write(torch.add, scores, mask)
    # A row without any key left gives zeros, not NaN.
    softmax = torch.softmax if mask is None else torch._safe_softmax
    weights = write(softmax, scores, -1, layer=layer(PROBABILITIES, "activation"))
    if given["dropout_p"] > 0:
        weights = write(F.dropout, weights, given["dropout_p"])
    result = write(torch.matmul, weights, value, layer=layer(ATTENTION, "compute"))
    replace(node, result)


def _for_each_head(tensor: Node, query: Node, write: Writer) -> Node:
    """Keys or values, repeated for each head of their group."""
    heads, groups = (value_of(each).shape[-3] for each in (query, tensor))
    return tensor if heads == groups else write(torch.repeat_interleave, tensor, heads // groups, -3)
