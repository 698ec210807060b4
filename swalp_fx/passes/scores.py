"""The scores of attention in one form: a scaled product, with zeros for masked scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache
from types import EllipsisType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from .captured import FOLLOWED, KEPT, LAYER, UPDATE, Layer
from .facts import Origin, memory_of
from .fit import REORDERS, shape_behind
from .names import base_name
from .operations import CASTS, SWITCHES, is_view, memory_written, name_of, stem_of, takes_size, writes
from .purpose import (
    NONE_LEFT,
    QUOTIENTS,
    SUMS,
    Attention,
    Purposes,
    constant_of,
    is_bound,
    is_softmax,
    readers_of,
)
from .purpose import PRODUCTS as SCALES
from .tables import SCORES
from .write import Writer, value_of

__all__ = ["Scores", "gives_scores", "kind_of", "replace"]

PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
LOWEST = torch.finfo(torch.float32).min
# Operations that keep each number's place; and those that keep the order of numbers, if they keep all of them.
KEEPS = {*SUMS, *SCALES, *QUOTIENTS, *CASTS, "masked_fill", "where", "contiguous", "clone", "dropout", "tril", "triu"}
RESHAPES = {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "ravel", "unsqueeze", "squeeze"}
RESHAPES |= {"getitem", "narrow", "select", "expand", "expand_as", "broadcast_to"}


@cache
def kind_of(name: str) -> type:
    return type(name, (Attention,), {})


def replace(old: Node, new: Node) -> None:
    new.meta |= {key: old.meta[key] for key in (KEPT, UPDATE) if key in old.meta}
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


class _Laid(NamedTuple):
    """A mask on scores."""

    where: Node | None  # true where it fills; None if it is added
    value: Any  # the fill, or the addend
    factor: float  # of later scales, up to the softmax
    inverted: bool = False  # whether it fills where ``where`` is false


def gives_scores(node: Node, purposes: Purposes) -> bool:
    """Whether a softmax alone reads this product, through scales and masks."""
    layer = node.meta.get(LAYER)
    if stem_of(node) not in PRODUCTS or (layer is not None and layer.kind is not kind_of(SCORES)):
        return False
    readers = readers_of(node)
    is_led = all(user in purposes.leads or is_softmax(user, node) for user in readers)
    return bool(readers) and is_led and isinstance(node.meta.get("example_value"), Tensor)


class Scores:
    """The product of queries and keys, and the nodes from it to the softmax."""

    def __init__(self, product: Node, purposes: Purposes) -> None:
        self.product, self.purposes = product, purposes

    def bring_into_form(self) -> None:
        if stem_of(self.product) == "baddbmm" and not self._split():
            return
        self._scale()
        self._mask()

    def _split(self) -> bool:
        """Splits ``baddbmm(mask, query, key, beta=1, alpha=scale)`` into a product, a scale and a mask times beta.

        Returns whether it did.
        """
        old = self.product
        given: dict[str, Any] = dict(zip(("input", "batch1", "batch2"), old.args, strict=False)) | old.kwargs
        mask, alpha, beta = given["input"], given.get("alpha", 1), given.get("beta", 1)
        if isinstance(alpha, Node) or isinstance(beta, Node) or "out" in given:
            return False
        write = Writer(old)
        self.product = write(torch.bmm, given["batch1"], given["batch2"])
        scaled = write(torch.mul, self.product, alpha)
        added = write(torch.add, scaled, mask if beta == 1 else write(torch.mul, mask, beta))
        self.purposes.leads.update((scaled, added))
        if mask in self.purposes.carriers or self.purposes.origins[mask] is not Origin.MODEL:
            self.purposes.moved.add(added)
        replace(old, added)
        return True

    def _scale(self) -> None:
        """Merges all scales that are numbers, before the product and right behind it, into two.

        A power of two goes to the query, where it is exact; the rest, 1 to 2, goes behind the product. So half types
        hold the scores, as in PyTorch's fused product.
        """
        before = [each for operand in self.product.args if (each := _scaled(operand, self.product)) is not None]
        behind = [self.product]
        while (reader := _only_reader(behind[-1])) is not None and _factor(reader) is not None:
            if not _in_one_mode(self.product, reader):
                break
            behind.append(reader)
        scale = math.prod(_factor(each) for each in (*before, *behind[1:]))  # type: ignore[misc]
        if scale == 1 and len(behind) == 1 and not before:
            return
        for each in dict.fromkeys(before):  # both operands may be one tensor
            each.replace_all_uses_with(each.all_input_nodes[0])
            each.graph.erase_node(each)
        power = _power_of_two(scale) if any(isinstance(each, Node) for each in self.product.args) else 1.0
        if power != 1:
            place = next(i for i, each in enumerate(self.product.args) if isinstance(each, Node))  # of the query
            query = Writer(self.product, layer=self._layer())(torch.mul, self.product.args[place], power)
            self.product.update_arg(place, query)
        last, scaled = behind[-1], self.product
        if not math.isclose(scale, power, rel_tol=1e-12):
            scaled = Writer(self.product, self.product.next)(torch.mul, self.product, scale / power)
            self.purposes.leads.add(scaled)
        if last is not scaled:
            last.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        for each in reversed(behind[1:]):
            each.replace_all_uses_with(scaled)
            each.graph.erase_node(each)

    def _mask(self) -> None:
        """Sets masked scores to zero before the scores are rounded, for all readers of the rounded scores."""
        chain = [self.product]
        while (reader := _only_reader(chain[-1])) is not None and reader in self.purposes.leads:
            chain.append(reader)
        steps = list(itertools.pairwise(chain))  # (node, its reader)
        followed = len(list(itertools.takewhile(lambda step: self._follows(*step), steps)))
        masks: dict[Node, _Laid] = {}
        factor = 1.0  # of the scales behind
        for i, (scores, node) in reversed(list(enumerate(steps))):
            if i < followed and (found := self._laid_on(node, scores, factor)) is not None:
                masks[node] = found
            factor *= _factor_of_reader(node, scores)
        while masks and not _may_go_to(last := next(iter(masks)), chain[1 : chain.index(last)]):
            del masks[last]
        if not masks or 0 in value_of(self.product).shape:
            return
        last = next(iter(masks))
        alike = self._in_each_shape(steps[: chain.index(last)])
        for node in chain[1 : chain.index(last)]:  # go behind the nodes that make masks, perhaps of their size
            for user in [user for user in node.users if takes_size(user, node)]:
                user.replace_input_with(node, alike[node])
            last.prepend(node)
        for node in masks:
            node.meta[FOLLOWED] = True
        layer, first = self._layer(), chain[1]
        write = Writer(self.product, first, layer)
        laid = []
        for i, (scores, node) in enumerate(steps):
            if node in masks:
                mask: Any = masks[node].value if masks[node].where is None else masks[node].where
                if alike[scores] is not self.product:
                    mask = _laid_back(write("expand_as", mask, alike[scores]), steps[:i], alike, write)
                laid.append((mask, masks[node]))
        axis = _axis_of_softmax(chain[-1], steps[:followed])
        taken = self._taken(laid, axis, value_of(chain[-1]).dtype, write)
        first.replace_input_with(self.product, write(torch.masked_fill, self.product, taken, 0.0))

    def _layer(self) -> Layer:
        """The Layer of the product; a new one if it has none."""
        if (layer := self.product.meta.get(LAYER)) is None:
            name = name_of(self.product)
            layer = Layer(f"{name} {self.product.name}", base_name(self.product), kind_of(name), "compute")
            self.product.meta[LAYER] = layer
        return layer

    def _follows(self, scores: Node, node: Node) -> bool:
        """Whether ``node`` has all numbers of ``scores`` in known places, in the same mode.

        If a reader takes ``node``'s size and type, as to make a mask, its dtype must be the product's.
        """
        given, made = value_of(scores), value_of(node)
        is_of_type = made.dtype == value_of(self.product).dtype or not any(
            takes_size(each, node) for each in node.users
        )
        is_placed = made.shape == given.shape and (stem_of(node) in KEEPS or is_bound(node))
        is_placed = is_placed or _is_reordered(node) or (_is_reshaped(node) and made.dtype == given.dtype)
        return is_placed and is_of_type and _in_one_mode(self.product, node)

    def _in_each_shape(self, steps: list[tuple[Node, Node]]) -> dict[Node, Node]:
        """For each node of ``steps`` the product in its shape, so that sizes can be read from that."""
        alike, layer = {self.product: self.product}, self._layer()
        for scores, node in steps:
            alike[node] = alike[scores]
            if _is_reshaped(node) or _is_reordered(node):
                call, kwargs = cast(Any, (node.target, node.kwargs))
                alike[node] = Writer(self.product, node, layer)(call, alike[scores], *node.args[1:], **kwargs)
        return alike

    def _laid_on(self, node: Node, scores: Node, factor: float) -> _Laid | None:
        """The mask that ``node`` lays on ``scores``; None if it removes none.

        factor: of the scales between ``node`` and the softmax.
        """
        name, found = stem_of(node), None
        if name in SUMS and node in self.purposes.moved and not node.kwargs and factor > 0:
            others = [each for each in node.all_input_nodes if each is not scores]
            if others and (node.args[0] is scores or "sub" not in name):
                found = _Laid(None, others[0], -factor if "sub" in name else factor)
        elif name == "masked_fill":
            given: dict[str, Any] = dict(zip(("input", "mask", "value"), node.args, strict=False)) | node.kwargs
            found = _Laid(given["mask"], given["value"], factor)
        elif name == "where" and len(node.args) == 3:
            mask, kept, other = cast(Any, node.args)
            found = _Laid(mask, other, factor, inverted=True) if kept is scores else _Laid(mask, kept, factor)
        if found is None or (found.where is not None and not _is_low(found.value)):
            return None
        mask = found.value if found.where is None else found.where
        value = value_of(mask) if isinstance(mask, Node) else None
        if not isinstance(value, Tensor) or (found.where is None and value.dtype == torch.bool):
            return None
        return found if _expands(value, value_of(scores)) else None

    def _taken(self, masks: list[tuple[Node, _Laid]], axis: int | None, dtype: torch.dtype, write: Writer) -> Node:
        """True where ``masks`` remove a score before the softmax.

        masks: each with its tensor, as it is laid on the product.
        axis: of the softmax, in the product; negative, or None if it is not known. dtype: of the softmax's input.

        A mask removes a score where it fills. An added mask removes it where the addend is far below the largest of its
        row, and so low that the sum loses the score's digits. So a row that is all masked by -10,000 still has the
        softmax of its scores.
        """
        taken: Node | None = None
        total: Node | None = None  # the sum of addends
        is_added = any(each.where is None for _, each in masks)
        for mask, (where, value, factor, inverted) in masks:
            if where is not None:
                mask = write(torch.logical_not, mask) if inverted else mask
                taken = mask if taken is None else write(torch.logical_or, taken, mask)
                factor = max(constant_of(value) * factor, LOWEST) if factor > 0 else LOWEST
            if is_added:
                mask = mask if factor == 1 else write(torch.mul, mask, factor)
                total = mask if total is None else write(torch.add, total, mask)
        if total is None:
            return taken  # type: ignore[return-value]
        lost = min(NONE_LEFT, -16 / torch.finfo(dtype).eps)
        has_rows = axis is not None and -axis <= value_of(total).dim()  # else the mask is the same for a whole row
        rows = write(torch.amax, total, axis, True) if has_rows else total
        low = write(torch.le, total, write(torch.clamp, write(torch.add, rows, NONE_LEFT), lost))
        return low if taken is None else write(torch.logical_or, taken, low)


def _is_reordered(node: Node) -> bool:
    """Whether ``node`` permutes the axes of its input."""
    return stem_of(node) in REORDERS and len(node.all_input_nodes) == 1


def _is_reshaped(node: Node) -> bool:
    """Whether ``node`` has all numbers of its input, in their order."""
    if stem_of(node) not in RESHAPES or not isinstance(node.args[0], Node):
        return False
    index = node.args[1] if stem_of(node) == "getitem" else ()
    # A list takes its places in any order, and a truth value is a mask: both are ints, or hold some.
    each_axis = index if isinstance(index, tuple) else (index,)
    is_basic = all(each is None or type(each) in (int, slice, EllipsisType) for each in each_axis)
    return is_basic and statically_known_true(value_of(node).numel() == value_of(node.args[0]).numel())


def _order(node: Node, scores: Node) -> list[int]:
    """For each axis of ``node``, which permutes the axes of ``scores``, the axis there."""
    rank = value_of(scores).dim()
    return [size - 2 for size in shape_behind(node, range(2, 2 + rank))]


def _laid_back(mask: Node, steps: list[tuple[Node, Node]], alike: dict[Node, Node], write: Writer) -> Node:
    """``mask``, laid on the last node of ``steps``, as it is laid on the first."""
    for scores, node in reversed(steps):
        if _is_reordered(node):
            order = _order(node, scores)
            mask = write("permute", mask, [order.index(axis) for axis in range(len(order))])
        elif alike[node] is not alike[scores]:
            mask = write("reshape_as", mask, alike[scores])
    return mask


def _axis_of_softmax(last: Node, steps: list[tuple[Node, Node]]) -> int | None:
    """The axis of the softmax that reads ``last``, in the node that ``steps`` begin with, as a negative number."""
    reader = next((user for user in last.users if is_softmax(user, last)), None)
    axis: Any = reader.kwargs.get("dim", (*reader.args, -1)[1]) if reader is not None else -1
    if not isinstance(axis, int):
        return None
    axis -= value_of(last).dim() if axis >= 0 else 0
    for scores, node in reversed(steps):
        if _is_reordered(node):
            axis = _order(node, scores)[axis] - value_of(node).dim()
        elif _is_reshaped(node) and (axis := _same_axis(axis, value_of(node), value_of(scores))) is None:
            return None
    return axis


def _same_axis(axis: int, made: Tensor, given: Tensor) -> int | None:
    """The axis of ``given`` that is the ``axis`` of ``made``, of the same numbers in the same order; both negative."""
    behind = made.shape[axis:]
    for each in range(-given.dim(), 0):
        other = given.shape[each:]
        if statically_known_true(behind[0] == other[0]) and statically_known_true(
            math.prod(behind) == math.prod(other)
        ):
            return each
    return None


def _expands(mask: Tensor, scores: Tensor) -> bool:
    """Whether ``mask`` has the size of ``scores``, or may be expanded to it."""
    sizes = zip(reversed(mask.shape), reversed(scores.shape), strict=False)
    return mask.dim() <= scores.dim() and all(length in (size, 1) for length, size in sizes)


def _is_low(fill: Any) -> bool:
    value = constant_of(fill)
    return value is not None and value <= NONE_LEFT


def _only_reader(node: Node) -> Node | None:
    """The only reader of ``node``'s numbers; None if there are several or none."""
    readers = [user for user in node.users if not takes_size(user, node)]
    return readers[0] if len(readers) == 1 else None


def _power_of_two(scale: float) -> float:
    """The largest power of two not above the size of ``scale``, if half types hold that; else 1."""
    size = abs(scale)
    # A scale counts as a power of two if it is one up to a double's last places.
    return 2.0 ** math.floor(math.log2(size) + 1e-12) if 2.0**-14 <= size < 2.0**14 else 1.0


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
    """The factor by which ``node`` multiplies ``scores``; NaN if it is not known."""
    name = stem_of(node)
    if name in (*SCALES, *QUOTIENTS):
        factor = _factor(node)
        return math.nan if factor is None else factor
    is_plain = name not in SUMS or (not node.kwargs and (node.args[0] is scores or "sub" not in name))
    return 1.0 if is_plain else math.nan


def _scaled(operand: Any, product: Node) -> Node | None:
    """The node that scales ``operand`` by a number, perhaps before views; None if others than ``product`` read it."""
    reader = product
    while isinstance(operand, Node) and _only_reader(operand) is reader and operand.op.startswith("call"):
        if _factor(operand) is not None:
            return operand if _may_go_to(product, [operand]) and _in_one_mode(operand, product) else None
        if not is_view(operand) or LAYER in operand.meta or len(operand.all_input_nodes) != 1:
            return None
        reader, operand = operand, operand.args[0]
    return None


def _in_one_mode(first: Node, second: Node) -> bool:
    """Whether both run with gradients or both without, and in the same blocks of autocast and inference."""
    return _mode(first) == _mode(second)


def _mode(node: Node) -> tuple[Any, set[Any]]:
    sets, enters, exits, *inference = (node.graph.find_nodes(op="call_function", target=each) for each in SWITCHES)
    before = [each for each in sets if each < node] or sets  # the last of all restores the mode of the start
    opened = {each for each in (*enters, *inference[0]) if each < node}
    closed = {each.args[0] for each in (*exits, *inference[1]) if each < node}
    return before[-1].args if before else None, opened - closed


def _may_go_to(place: Node, moved: list[Node]) -> bool:
    """Whether the nodes ``moved``, in order, give the same numbers right before ``place``.

    They do not if a node between writes into what they read, or touches what they write into.
    """
    if not moved:
        return True
    behind = list(itertools.takewhile(lambda node: node is not place, _from(moved[0])))
    passed: list[Node] = []  # by the node that is moved, from the last to the first
    for node in reversed(behind):
        if node not in moved:
            passed.append(node)
            continue
        touched = memory_of(*(each for other in passed for each in (other, *other.all_input_nodes)))
        if memory_of(*node.all_input_nodes) & memory_written(*passed) or memory_written(node) & touched:
            return False
    return True


def _from(node: Node) -> Iterator[Node]:
    """``node`` and the nodes behind it."""
    while node.op != "root":
        yield node
        node = node.next
