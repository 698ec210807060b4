"""The purpose of tensors: scales and masks on the way to a softmax, angles, and constants that movement mixes in.

In attention the products and the softmax are rounded; the nodes between them are not. If a mask were rounded, its -inf
or -1e9 would be the maximum of a block, and the scores would become zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from .captured import LAYER
from .facts import Origin, is_floating
from .operations import CASTS, category, stem_of, takes_size
from .tables import LAYER_PARTS

__all__ = [
    "ATTENTION",
    "BOUNDS",
    "NONE_LEFT",
    "PRODUCTS",
    "QUOTIENTS",
    "SUMS",
    "Attention",
    "Purposes",
    "constant_of",
    "is_bound",
    "is_softmax",
    "readers_of",
]

SOFTMAX = ("softmax", "_safe_softmax", "log_softmax", "logsumexp", "cross_entropy")
MAXIMA = ("max", "amax", "argmax", "topk")  # these drop the fill of masked numbers too
BOUNDS = ("clamp", "clamp_min", "clip", "max", "maximum")  # these keep masked scores above a type's lowest number
NONE_LEFT = -1e4  # a number this far below the rest of its row has a softmax of zero
SUMS = ("add", "iadd", "sub", "isub")
PRODUCTS = ("mul", "imul", "multiply")
QUOTIENTS = ("div", "truediv", "itruediv", "true_divide")
WAVES = ("sin", "cos")
FILLS = ("masked_fill", "index_fill", "where", "pad", "cat", "concat", "concatenate", "stack")
ATTENTION, ATTN_MASK = "scaled_dot_product_attention", 3  # its name, and the position of its mask


class Attention(nn.Module):
    """The base of the types of attention's outputs, one for each name: ``Rule("*", kind="attn_scores", ...)``."""


class Purposes:
    """The nodes of ``graph`` that lead to a softmax alone, are masks or angles, or mix in a constant."""

    def __init__(self, graph: Graph, origins: dict[Node, Origin]) -> None:
        self.origins = origins
        self.leads: set[Node] = set()  # to a softmax, and nowhere else
        self.angles: set[Node] = set()
        for node in reversed(graph.nodes):
            if self._passes_on(node) and self._leads(node):
                self.leads.add(node)
            if self._turns(node) and self._serves(node, lambda _, user: stem_of(user) in WAVES or user in self.angles):
                self.angles.add(node)
        self.carriers: set[Node] = set()  # nodes with a mask in their numbers
        self.moved: set[Node] = set()  # sums with a mask and products with a scale
        for node in graph.nodes:
            self._mask(node)
        self.masks: set[Node] = set()  # nodes that serve as masks alone
        for node in reversed(graph.nodes):
            if self.origins[node] is not Origin.MODEL and self._serves(node, self._takes_as_mask):
                self.masks.add(node)

    def meaning(self, node: Node) -> str:
        makes = category(node) in LAYER_PARTS
        if LAYER in node.meta and stem_of(node) not in ("pad", "fold", "alpha_dropout", "feature_alpha_dropout"):
            return ""
        if makes and node in self.moved | self.masks:
            return "mask"
        if makes and node in self.angles:
            return "angle"
        return "mixes" if self._mixes(node) else ""

    def _serves(self, node: Node, serves: Callable[[Node, Node], bool]) -> bool:
        """Whether ``node`` has readers of its numbers, and ``serves`` is true of each."""
        readers = readers_of(node)
        return bool(readers) and all(serves(node, user) for user in readers)

    def _leads(self, node: Node) -> bool:
        """Whether ``node`` leads to a softmax alone. A maximum may read it too: a softmax by hand subtracts it."""
        readers = [user for user in readers_of(node) if stem_of(user) not in MAXIMA or is_bound(user)]
        return bool(readers) and all(user in self.leads or is_softmax(user, node) for user in readers)

    def _passes_on(self, node: Node) -> bool:
        if LAYER in node.meta or not is_floating(node):
            return False
        name = stem_of(node)
        if name in (*PRODUCTS, *QUOTIENTS):  # with one number a row
            return any(not self._is_of_model(each) or _is_a_number_a_row(each, node) for each in _beside(node))
        is_log = name == "log_softmax" and all(stem_of(user) == "exp" for user in readers_of(node))
        is_moved = category(node) == "movement" or is_bound(node) or self._adds_a_mask(node)
        return name in SUMS or is_moved or is_log

    def _adds_a_mask(self, node: Node) -> bool:
        """Whether ``node`` adds a product of masks, as ``addcmul(scores, mask, -1e9)`` does."""
        return stem_of(node) == "addcmul" and len(node.args) == 3 and not any(map(self._is_of_model, node.args[1:]))

    def _is_of_model(self, value: Any) -> bool:
        return isinstance(value, Node) and self.origins[value] is Origin.MODEL

    def _turns(self, node: Node) -> bool:
        """Whether ``node`` may be an angle: a sum or a product with no weight in it."""
        part = category(node)
        is_product = part == "compute" and not any(map(self._is_of_model, node.all_input_nodes))
        return LAYER not in node.meta and (part in ("arithmetic", "movement") or is_product)

    def _mask(self, node: Node) -> None:
        if node not in self.leads:
            return
        name, sources = stem_of(node), node.all_input_nodes
        carries = any(source in self.carriers for source in sources)
        if name in (*SUMS, *PRODUCTS, *QUOTIENTS):
            moves = any(not self._is_of_model(each) for each in _beside(node))
            if moves or carries:
                self.moved.add(node)
            carries = carries or (name in SUMS and moves and len(sources) > 1)
        elif is_bound(node) or name == "log_softmax":
            self.moved.add(node)
        elif self._adds_a_mask(node):
            self.moved.add(node)
            carries = True
        elif name in FILLS and any(constant_of(each) != 0 for each in self._fills(node)):
            carries = True
        if carries:
            self.carriers.add(node)

    def _takes_as_mask(self, node: Node, user: Node) -> bool:
        if stem_of(user) == ATTENTION:
            return _is_attention_mask(node, user)
        if LAYER in user.meta and issubclass(user.meta[LAYER].kind, Attention):  # written-out attention
            return self.origins[user] is not Origin.MODEL
        return user in self.masks or (user in self.moved and self.origins[user] is Origin.MODEL)

    def _mixes(self, node: Node) -> bool:
        """Whether movement puts constants that a format may not hold among other numbers."""
        if node in self.leads or self._serves(node, lambda _, user: stem_of(user) in MAXIMA):
            return False
        if self.origins[node] is Origin.CONSTANT or not is_floating(node):
            return False
        if _is_cast_of_integers(node) or _adds_up(node):
            return True
        return any(not _is_on_every_grid(constant_of(fill)) for fill in self._fills(node))

    def _fills(self, node: Node) -> list[Any]:
        """The constants that ``node`` mixes into its output."""
        name, args, kwargs = stem_of(node), node.args, node.kwargs
        if name in ("masked_fill", "index_fill"):
            given = [kwargs.get("value", args[-1] if args else None)]
        elif name == "where":
            given = [*args[1:3], *(kwargs[each] for each in ("self", "input", "other") if each in kwargs)]
        elif name == "pad":
            modes = [*args[2:3], kwargs.get("mode", "constant")]
            given = [*args[3:4], kwargs.get("value")] if modes[0] == "constant" else []
            given = [each for each in given if each is not None]
        elif name in FILLS:
            tensors = args[0] if args else kwargs.get("tensors", ())
            given = list(tensors) if isinstance(tensors, (tuple, list)) else []
        else:
            return []
        constants = (each for each in given if not isinstance(each, Node) or self.origins[each] is Origin.CONSTANT)
        return [each for each in constants if not _is_empty(each)]


def readers_of(node: Node) -> list[Node]:
    """The readers of ``node``'s numbers, without the output node and readers of sizes and types."""
    readers = (user for user in node.users if user.op != "output" and category(user) != "number")
    return [user for user in readers if not takes_size(user, node)]


def is_bound(node: Node) -> bool:
    """Whether ``node`` keeps scores above a number so low that it masks them, as ``max(scores, finfo.min)`` does."""
    name, given = stem_of(node), [*node.args[1:], *node.kwargs.values()]
    if name not in BOUNDS or len(node.kwargs.keys() - {"min", "other"}) or len(given) != 1:
        return False
    value = constant_of(given[0])
    return value is not None and value <= NONE_LEFT


def _is_empty(fill: Any) -> bool:
    """Whether it holds no number, as a cache before the first token."""
    value = fill.meta.get("example_value") if isinstance(fill, Node) else None
    return isinstance(value, Tensor) and 0 in value.shape


def is_softmax(user: Node, node: Node) -> bool:
    """Whether ``user`` is a softmax of ``node``, or fused attention with ``node`` as its mask.

    A softmax by hand is an exp with a sum behind it, or an exp of a log_softmax.
    """
    if stem_of(user) == ATTENTION:
        return _is_attention_mask(node, user)
    is_summed = any(stem_of(each) == "sum" for each in user.users)
    by_hand = stem_of(user) == "exp" and (is_summed or _is_log_softmax(node))
    return (stem_of(user) in SOFTMAX or by_hand) and user.args[:1] == (node,)


def _is_log_softmax(node: Node) -> bool:
    """Whether ``node`` is a log_softmax, perhaps by hand: scores without their logsumexp."""
    if stem_of(node) == "sub" and len(node.args) == 2:
        total = node.args[1]
        while isinstance(total, Node) and category(total) == "movement" and total.all_input_nodes:
            total = total.all_input_nodes[0]
        return isinstance(total, Node) and stem_of(total) == "logsumexp"
    return stem_of(node) == "log_softmax"


def _beside(node: Node) -> tuple[Any, ...]:
    """The operands of a sum, a product or a quotient that may be a mask or a scale."""
    return node.args[1:2] if stem_of(node) in QUOTIENTS else node.args[:2]


def _adds_up(node: Node) -> bool:
    """Whether ``node``, by its name movement, makes new numbers: sums of overlapping places, or alpha dropout."""
    name, values = stem_of(node), [*node.args, *node.kwargs.values()]
    if name == "fold":
        names = ("input", "output_size", "kernel_size", "dilation", "padding", "stride")
        taken = dict(zip(names, node.args, strict=False)) | node.kwargs
        steps = zip(_pair(taken["kernel_size"]), _pair(taken.get("stride", 1)), strict=True)
        return any(size > step for size, step in steps) or _pair(taken.get("dilation", 1)) != (1, 1)
    if name == "scatter":
        return "reduce" in node.kwargs
    return name in ("alpha_dropout", "feature_alpha_dropout") and any(value is True for value in values)


def _pair(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value, value)


def _is_attention_mask(node: Node, user: Node) -> bool:
    return node in (*user.args[ATTN_MASK : ATTN_MASK + 1], user.kwargs.get("attn_mask"))


def _is_a_number_a_row(value: Any, reader: Node) -> bool:
    """Whether ``value`` has one number for each row of ``reader`` along the last axis."""
    given, made = (each.meta.get("example_value") if isinstance(each, Node) else None for each in (value, reader))
    if not isinstance(given, Tensor) or not isinstance(made, Tensor):
        return False
    return made.dim() > 0 and made.shape[-1] != 1 and (given.dim() == 0 or given.shape[-1] == 1)


def _is_cast_of_integers(node: Node) -> bool:
    """Whether ``node`` casts integers. Truth values do not count: zero and one are in every format."""
    source = node.all_input_nodes[0] if node.all_input_nodes else None
    value = source.meta.get("example_value") if source is not None else None
    is_of_integers = isinstance(value, Tensor) and not value.is_floating_point() and value.dtype not in _EXACT
    return stem_of(node) in CASTS and is_of_integers


_EXACT = (torch.bool, torch.complex64, torch.complex128, torch.complex32)


def constant_of(fill: Any) -> Any:
    """The one value of a constant; None if it is not known."""
    while isinstance(fill, Node) and category(fill) == "movement" and fill.all_input_nodes:
        fill = fill.all_input_nodes[0]
    if not isinstance(fill, Node):
        return fill if isinstance(fill, (int, float)) else None
    name = stem_of(fill)
    if "zeros" in name:
        return 0
    if "ones" in name:
        return 1
    if "full" in name:
        value = fill.kwargs.get("fill_value", fill.args[1] if len(fill.args) > 1 else None)
    else:
        value = fill.args[0] if name in ("tensor", "scalar_tensor") and fill.args else None
    return value if isinstance(value, (int, float)) else None


def _is_on_every_grid(value: Any) -> bool:
    """Whether ``value`` is zero or stands for no number: an infinity, NaN, or the extreme numbers of a type."""
    extremes = [torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
    return value is not None and (value == 0 or not math.isfinite(value) or abs(value) in extremes)
