"""Attention is three products' outputs: the scores, the probabilities that a softmax makes of them, and the result.

Whoever writes it, and however: a fused product is written out, and what is written out has one form.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from ..errors import ConvertError
from ..recipe import Recipe, Subject
from .captured import KEPT, LAYER, UPDATE, Layer, around
from .facts import Origin
from .names import base_name, kinds_of_type
from .operations import CASTS, SWITCHES, category, is_view, name_of, operation_of, stem_of, writes
from .origin import origins
from .purpose import ATTENTION, QUOTIENTS, SUMS, Purposes, constant_of, is_softmax, readers_of
from .purpose import PRODUCTS as SCALES
from .tables import PROBABILITIES, SCORES, does
from .write import Writer, value_of

__all__ = ["Attention", "expand", "inside", "rounds"]

PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
UNFIT = "{} gives scaled_dot_product_attention tensors that do not fit: {}"
NONE_LEFT = -1e4  # what a softmax is given of a number this far below: nothing
# What gives a number for each that it reads, at its place.
KEEPS = ("masked_fill", "where", "contiguous", "clone", "view", "reshape", "dropout")
PLACED = {*SUMS, *SCALES, *QUOTIENTS, *CASTS, *KEEPS}


class Attention(nn.Module):
    """The type of attention's outputs. Each has one of its own, by its name: ``Rule("*", kind="attn_scores", ...)``."""


@cache
def _kind(name: str) -> type:
    return type(name, (Attention,), {})


def expand(graph: Graph, recipe: Recipe) -> Graph:
    """Writes attention out where ``recipe`` rounds inside of it, and brings it into one form; returns ``graph``.

    Before:

        result = scaled_dot_product_attention(query, key, value, attn_mask=mask)

    After:

        transpose = key.transpose(-2, -1)
        scores = matmul(query, transpose)                   attn_scores, once masked_fill has been
        masked = mask <= -10000.0
        masked_fill = masked_fill(scores, masked, 0.0)      attn_scores: compute, rounded
        mul = masked_fill * 0.125                           a scale: moved
        add = mul + mask                                    a mask: moved
        softmax = softmax(add, -1)                          attn_probabilities: activation, rounded
        result = matmul(softmax, value)                     scaled_dot_product_attention: compute, rounded

    The scale comes behind the product, whoever had it before. What a mask takes out is zero before the scores are
    rounded, so it has no part in the maximum of a block. Where nothing is rounded, all stays as it is.
    """
    for node in list(graph.nodes):
        if _is_fused(node) and any(rounds(recipe, *subject) for subject in inside(node)):
            try:
                _write_out(node)
            except RuntimeError as error:  # PyTorch's kernels do not look at all sizes
                raise ConvertError(UNFIT.format(around(node) or "the model", error)) from error
    purposes = Purposes(graph, origins(graph))
    for node in list(graph.nodes):
        if _gives_scores(node, purposes) and rounds(recipe, *_subject_of(node)):
            _Scores(node, purposes).bring_into_form()
    graph.lint()
    return graph


def inside(node: Node) -> Iterator[Subject]:
    """What a recipe sees of the scores and the probabilities of a fused product."""
    if operation_of(node) == ATTENTION:
        for name, part in ((SCORES, "compute"), (PROBABILITIES, "activation")):
            yield ".".join(filter(None, (around(node), name))), kinds_of_type(_kind(name), part)


def rounds(recipe: Recipe, name: str, kinds: Collection[str]) -> bool:
    """Whether an output of that name is rounded; by all placements if it is a product's."""
    here = recipe.at((name, kinds))
    is_placed = recipe.placement != "compute" or "compute" in kinds or recipe.includes(name)
    return is_placed and (here.activation.rounds or here.error.rounds) and not recipe.excludes(name)


def _subject_of(node: Node) -> tuple[str, list[str]]:
    layer = node.meta.get(LAYER)
    return base_name(node), kinds_of_type(layer.kind, "compute") if layer else ["compute", name_of(node)]


def _is_fused(node: Node) -> bool:
    """Whether it is a fused product that can be written out: what it branches on are numbers, not nodes."""
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
        return Layer(f"{name} {node.name}", path + name, _kind(name), part)

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
    _replace(node, result)


def _for_each_head(tensor: Node, query: Node, write: Writer) -> Node:
    """Keys or values, those of a group given to each head of it."""
    heads, groups = (value_of(each).shape[-3] for each in (query, tensor))
    return tensor if heads == groups else write(torch.repeat_interleave, tensor, heads // groups, -3)


def _replace(old: Node, new: Node) -> None:
    new.meta |= {key: old.meta[key] for key in (KEPT, UPDATE) if key in old.meta}
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _gives_scores(node: Node, purposes: Purposes) -> bool:
    """Whether a softmax alone reads this product, through scales and masks."""
    layer = node.meta.get(LAYER)
    if stem_of(node) not in PRODUCTS or (layer is not None and layer.kind is not _kind(SCORES)):
        return False
    readers = readers_of(node)
    is_led = all(user in purposes.leads or is_softmax(user, node) for user in readers)
    return bool(readers) and is_led and isinstance(node.meta.get("example_value"), Tensor)


class _Scores:
    """The product of queries and keys, and what stands between it and the softmax."""

    def __init__(self, product: Node, purposes: Purposes) -> None:
        self.product, self.purposes = product, purposes

    def bring_into_form(self) -> None:
        if stem_of(self.product) == "baddbmm" and not self._split():
            return
        self._scale()
        self._mask()

    def _split(self) -> bool:
        """``baddbmm(mask, query, key, alpha=scale)`` is a product, a scale and a mask, unless ``beta`` scales that."""
        old, alpha = self.product, self.product.kwargs.get("alpha", 1)
        if len(old.args) != 3 or old.kwargs.get("beta", 1) != 1 or isinstance(alpha, Node):
            return False
        mask, *factors = old.args
        write = Writer(old)
        self.product = write(torch.bmm, *factors)
        scaled = write(torch.mul, self.product, alpha)
        added = write(torch.add, scaled, mask)
        self.purposes.leads.update((scaled, added))
        if mask in self.purposes.carriers or self.purposes.origins[mask] is not Origin.MODEL:  # type: ignore[index]
            self.purposes.moved.add(added)
        _replace(old, added)
        return True

    def _scale(self) -> None:
        """All scales that are numbers, before the product and right behind it, are one, behind it."""
        before = [each for operand in self.product.args if (each := _scaled(operand, self.product)) is not None]
        behind = [self.product]
        while (reader := _only_reader(behind[-1])) is not None and _factor(reader) is not None:
            if not _in_one_mode(self.product, reader):
                break
            behind.append(reader)
        if not before and [stem_of(each) for each in behind[1:]] in ([], ["mul"]):
            return
        write = Writer(self.product, self.product.next)
        factors = [_factor(each) for each in (*before, *behind[1:])]
        scale = write(torch.mul, self.product, math.prod(factors))
        behind[-1].replace_all_uses_with(scale, delete_user_cb=lambda user: user is not scale)
        for each in reversed(behind[1:]):
            each.replace_all_uses_with(scale)
            each.graph.erase_node(each)
        for each in dict.fromkeys(before):  # both operands may be one tensor
            each.replace_all_uses_with(each.all_input_nodes[0])
            each.graph.erase_node(each)
        self.purposes.leads.add(scale)

    def _mask(self) -> None:
        """What a mask takes out of the scores is zero before they are rounded, and all that is read of them then."""
        chain = [self.product]
        while (reader := _only_reader(chain[-1])) is not None and reader in self.purposes.leads:
            chain.append(reader)
        placed = 1 + len(list(itertools.takewhile(self._is_in_place, chain[1:])))
        masks: list[tuple[Any, ...]] = []
        last, factor = self.product, 1.0  # of what stands behind
        for i in reversed(range(1, len(chain))):
            found = self._taken_out(chain[i], chain[i - 1], factor) if i < placed else None
            if found is not None:
                masks.insert(0, found)
                last = chain[i] if last is self.product else last
            factor *= _factor_of_reader(chain[i], chain[i - 1])
        if not masks:
            return
        for node in chain[1 : chain.index(last)]:  # go behind what makes the masks, which may be of their size
            for user in [user for user in node.users if _reads_sizes(user)]:
                user.replace_input_with(node, self.product)
            last.prepend(node)
        first = chain[1]
        write = Writer(self.product, first)
        each_taken = [write(how[0], mask, *how[1:]) if how else mask for mask, *how in masks]
        taken = functools.reduce(lambda a, b: write(torch.logical_or, a, b), each_taken)
        layer = self.product.meta.get(LAYER)
        if layer is None:
            name = name_of(self.product)
            layer = Layer(f"{name} {self.product.name}", base_name(self.product), _kind(name), "compute")
            self.product.meta[LAYER] = layer
        filled = write(torch.masked_fill, self.product, taken, 0.0, layer=layer)
        first.replace_input_with(self.product, filled)

    def _is_in_place(self, node: Node) -> bool:
        """Whether ``node`` has each number where the product has it; a mask that is made like it is of its type too."""
        given, made = value_of(self.product), value_of(node)
        is_of_type = made.dtype == given.dtype or not any(map(_reads_sizes, node.users))
        is_placed = stem_of(node) in PLACED and made.shape == given.shape
        return is_placed and is_of_type and _in_one_mode(self.product, node)

    def _taken_out(self, node: Node, scores: Node, factor: float) -> tuple[Any, ...] | None:
        """(mask, the function of it that is true where ``node`` takes ``scores`` out, its other arguments), or None.

        factor: what the softmax is given times, of what ``node`` makes.
        """
        found: tuple[Any, ...] = ()
        if stem_of(node) in ("add", "iadd") and node in self.purposes.moved and not node.kwargs and factor > 0:
            found = *(each for each in node.all_input_nodes if each is not scores), torch.le, NONE_LEFT / factor
        elif stem_of(node) == "masked_fill":
            given = dict(zip(("input", "mask", "value"), node.args, strict=False)) | node.kwargs
            found = (given["mask"],) if _is_low(given["value"]) else ()
        elif stem_of(node) == "where" and len(node.args) == 3:
            mask, kept, other = node.args
            takes_out = _is_low(other if kept is scores else kept)
            found = () if not takes_out else (mask, torch.logical_not) if kept is scores else (mask,)
        if not found or not isinstance(found[0], Node) or not isinstance(value_of(found[0]), Tensor):
            return None
        return found if _expands(value_of(found[0]), value_of(scores)) else None


def _expands(mask: Tensor, scores: Tensor) -> bool:
    """Whether ``mask`` has the size of ``scores``, or may be expanded to it."""
    sizes = zip(reversed(mask.shape), reversed(scores.shape), strict=False)
    return mask.dim() <= scores.dim() and all(length in (size, 1) for length, size in sizes)


def _is_low(fill: Any) -> bool:
    value = constant_of(fill)
    return value is not None and value <= NONE_LEFT


def _only_reader(node: Node) -> Node | None:
    """Who alone reads the numbers of ``node``."""
    readers = [user for user in node.users if not _reads_sizes(user)]
    return readers[0] if len(readers) == 1 else None


def _reads_sizes(user: Node) -> bool:
    """Whether ``user`` reads the size and the type of what it is given, and no number."""
    return category(user) == "number" and "reads" not in does(operation_of(user))


def _factor(node: Node) -> float | None:
    """The number that ``node`` multiplies by, or divides by; None if it does something else."""
    name = stem_of(node)
    if name not in (*SCALES, *QUOTIENTS) or len(node.args) != 2 or node.kwargs or writes(node) or LAYER in node.meta:
        return None
    first, second = node.args
    if name in QUOTIENTS:
        return 1 / second if isinstance(second, (int, float)) and second else None
    return next((each for each in (first, second) if isinstance(each, (int, float))), None)


def _factor_of_reader(node: Node, scores: Node) -> float:
    """What ``node`` multiplies ``scores`` by on the way to the softmax; NaN if that is not known."""
    name = stem_of(node)
    if name in (*SCALES, *QUOTIENTS):
        factor = _factor(node)
        return math.nan if factor is None else factor
    is_plain = name not in SUMS or (not node.kwargs and (node.args[0] is scores or "sub" not in name))
    return 1.0 if is_plain else math.nan


def _scaled(operand: Any, product: Node) -> Node | None:
    """What makes ``operand`` a number times another tensor, views in between, if ``product`` alone reads it."""
    reader = product
    while isinstance(operand, Node) and _only_reader(operand) is reader and operand.op.startswith("call"):
        if _factor(operand) is not None:
            is_fixed = not any(_is_written(each) for each in operand.all_input_nodes)
            return operand if is_fixed and _in_one_mode(operand, product) else None
        if not is_view(operand) or LAYER in operand.meta or len(operand.all_input_nodes) != 1:
            return None
        reader, operand = operand, operand.args[0]
    return None


def _in_one_mode(first: Node, second: Node) -> bool:
    """Whether both run with gradients or both without, and in the same blocks of autocast and inference."""
    return _mode(first) == _mode(second)


def _mode(node: Node) -> tuple[Any, set[Any]]:
    sets, enters, exits, *inference = (node.graph.find_nodes(op="call_function", target=each) for each in SWITCHES)
    before = [each for each in sets if each < node] or sets  # the last of all gives back what was at the start
    opened = {each for each in (*enters, *inference[0]) if each < node}
    closed = {each.args[0] for each in (*exits, *inference[1]) if each < node}
    return before[-1].args if before else None, opened - closed


def _is_written(node: Node) -> bool:
    return any(writes(user) or (is_view(user) and _is_written(user)) for user in node.users)
