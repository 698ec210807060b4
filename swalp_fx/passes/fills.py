"""Low constants that are written into scores by index, into a view or from a tensor: each becomes ``masked_fill``."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from types import EllipsisType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .captured import KEPT, LAYER, UPDATE
from .facts import is_floating
from .operations import category, stem_of, takes_size, writes
from .purpose import NONE_LEFT, PRODUCTS, QUOTIENTS, SUMS, constant_of, is_softmax
from .scores import in_one_mode
from .write import Writer, value_of

__all__ = ["fill_in"]

# A write into one of these is a write into its source. A ``reshape`` may be a copy, and autograd takes no write into a
# piece of a ``chunk``.
VIEWS = {"select", "narrow", "diagonal", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "permute", "mT"}
VIEWS |= {"getitem", "squeeze", "unsqueeze", "view", "unflatten"}
EVERYTHING = slice(None)


class _Fill(NamedTuple):
    value: float
    mark: tuple[Any, ...]  # (function, *arguments): called on a tensor of False, it writes True in the same places
    mask: Node | None = None  # true in these places, if the graph has such a tensor


def fill_in(graph: Graph, is_rounded_product: Callable[[Node], bool]) -> None:
    """Turns each write of a low constant, between such a product and a softmax, into ``masked_fill``.

    Before:

        scores = matmul(query, key)
        scores[:, :, 0, 1:] = -inf
        softmax = softmax(scores, -1)

    After:

        scores = matmul(query, key)
        mask = zeros_like(scores, dtype=torch.bool)
        mask[:, :, 0, 1:] = True
        masked_fill = scores.masked_fill_(mask, -inf)
        softmax = softmax(masked_fill, -1)

    The numbers are the same, and so is what other views of the scores see. Writes in a row share their mask.
    """
    made: dict[Node, tuple[Node, float]] = {}  # a masked_fill -> its mask, and the constant
    for node in list(graph.nodes):
        if (fill := _fill_of(node)) is None:
            continue
        target = _written(node)
        if _holds(target, fill.value) and _is_on_the_way(target, node, is_rounded_product):
            _replace(node, target, fill, made)


def _fill_of(node: Node) -> _Fill | None:
    """The low constant that ``node`` writes into a floating tensor, or into a copy of one; else None."""
    name, args = stem_of(node), node.args
    is_plain = not node.kwargs and not node.meta.keys() & {LAYER, KEPT, UPDATE}
    if not is_plain or len(args) < 2 or not isinstance(args[0], Node) or not is_floating(args[0]):
        return None
    mask: Any = None
    mark: Any = None
    if name in ("setitem", "index_put") and len(args) == 3:
        index: Any = args[1] if isinstance(args[1], tuple) else (args[1],)  # a list is one index, as in x[[0, 1]]
        if name == "index_put":  # for which None is a whole axis
            index = tuple(EVERYTHING if each is None else each for each in cast(Any, args[1]))
        mark, mask = (operator.setitem, index, True), _mask_of(index, args[0])
    elif name in ("fill", "copy") and len(args) == 2 and writes(node):
        mark = ("fill_", True)
    elif name == "index_fill" and len(args) == 4:
        mark = ("index_fill_", *args[1:3], True)
    elif name == "masked_scatter" or (name == "masked_fill" and _written(node) is not args[0]):
        mark, mask = ("masked_fill_", args[1], True), args[1]
    value = args[-1]
    low = constant_of(value)
    if mark is None or low is None or not low <= NONE_LEFT:
        return None
    is_one = name == "masked_scatter" or not isinstance(value, Node) or value_of(value).numel() == 1
    return _Fill(low, mark, mask if isinstance(mask, Node) else None) if is_one else None


def _mask_of(index: tuple[Any, ...], target: Node) -> Node | None:
    """The mask that ``index`` is, behind axes that it takes whole; None if it is another index."""
    *whole, last = index
    is_mask = isinstance(last, Node) and isinstance(value_of(last), Tensor) and value_of(last).dtype == torch.bool
    axes = value_of(target).dim() - (value_of(last).dim() if is_mask else 0)
    is_behind = is_mask and (whole == [...] or whole == [EVERYTHING] * axes)
    return last if is_behind else None


def _written(node: Node) -> Node:
    """The tensor that ``node`` writes into: of a view that only such writes read, the source."""
    target: Any = node.args[0]
    while writes(node) and _is_basic_view(target) and all(map(_is_write_alone, target.users)):
        target = target.args[0]
    return target


def _is_write_alone(user: Node) -> bool:
    """Whether ``user`` is a write that nobody reads, or a view for such writes."""
    if _is_basic_view(user):
        return bool(user.users) and all(map(_is_write_alone, user.users))
    return writes(user) and not user.users


def _is_basic_view(node: Node) -> bool:
    index = node.args[1] if stem_of(node) == "getitem" else ()
    parts = index if isinstance(index, (tuple, list)) else (index,)
    is_basic = all(each is None or isinstance(each, (int, slice, EllipsisType)) for each in parts)
    return node.op.startswith("call") and stem_of(node) in VIEWS and is_basic and isinstance(node.args[0], Node)


def _holds(target: Node, value: float) -> bool:
    return is_floating(target) and (value == -torch.inf or value >= torch.finfo(value_of(target).dtype).min)


def _is_on_the_way(target: Node, write: Node, is_rounded_product: Callable[[Node], bool]) -> bool:
    """Whether ``target`` is made of a rounded product by scales, masks and movement, and so is a softmax of it."""
    later = [user for user in (*target.users, *write.users) if user > write]
    if not _reaches(
        later, lambda node: node.users, lambda node: any(is_softmax(node, each) for each in node.all_input_nodes)
    ):
        return False
    return _reaches([target], lambda node: node.all_input_nodes, is_rounded_product)


def _reaches(nodes: Iterable[Node], following: Callable[[Node], Iterable[Node]], ends: Callable[[Node], bool]) -> bool:
    stack, seen = list(nodes), set[Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if ends(node):
            return True
        if category(node) == "movement" or stem_of(node) in (*SUMS, *PRODUCTS, *QUOTIENTS):
            stack += [each for each in following(node) if not takes_size(each, node)]
    return False


def _replace(node: Node, target: Node, fill: _Fill, made: dict[Node, tuple[Node, float]]) -> None:
    """Replaces ``node``, which writes into ``target`` or its view, by a masked_fill of ``target``."""
    write = Writer(node)
    source: Any = node.args[0]
    if writes(node) and target in made and made[target][1] == fill.value and _may_move(target, node):
        mask, filled = made[target][0], target
        _mark(write, fill, mask, source, target)
        node.prepend(filled)
    else:
        if fill.mask is not None and target is source:
            mask = fill.mask
        else:
            mask = write(torch.zeros_like, target, dtype=torch.bool)
            _mark(write, fill, mask, source, target)
        filled = write("masked_fill_" if writes(node) else torch.masked_fill, target, mask, fill.value)
        if mask is not fill.mask and writes(node):
            made[filled] = mask, fill.value
        for user in [user for user in target.users if user > node and writes(node)]:
            user.replace_input_with(target, filled)
    node.replace_all_uses_with(filled)
    node.graph.erase_node(node)
    while source not in (target, filled) and not source.users:  # views for the write alone
        source, dead = source.args[0], source
        dead.graph.erase_node(dead)


def _mark(write: Writer, fill: _Fill, mask: Node, source: Any, target: Node) -> None:
    """Writes True into ``mask``, of the size of ``target``, where the write into ``source``, its view, is."""

    def alike(node: Node) -> Node:
        if node is target:
            return mask
        call, viewed, named = cast(Any, (node.target, node.args[0], node.kwargs))
        return write(call, alike(viewed), *node.args[1:], **named)

    function, *given = fill.mark
    write(function, alike(source), *given)


def _may_move(filled: Node, write: Node) -> bool:
    """Whether nothing reads ``filled`` before ``write`` but the view that it writes into, and both are in one mode."""

    def is_for_write(user: Node) -> bool:
        return user >= write or (bool(user.users) and all(map(is_for_write, user.users)))

    return all(map(is_for_write, filled.users)) and in_one_mode(filled, write)
