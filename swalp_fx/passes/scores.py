"""The scores of attention in one form: a scaled product, and nothing in it that a mask takes out."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.fx import Node

from .captured import KEPT, LAYER, UPDATE, Layer
from .facts import Origin
from .names import base_name
from .operations import CASTS, SWITCHES, category, is_view, name_of, operation_of, stem_of, writes
from .purpose import PRODUCTS as SCALES
from .purpose import QUOTIENTS, SUMS, Attention, Purposes, constant_of, is_softmax, readers_of
from .tables import SCORES, does
from .write import Writer, value_of

__all__ = ["Scores", "gives_scores", "kind_of", "replace"]

PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
NONE_LEFT = -1e4  # what a softmax is given of a number this far below the rest of its row: nothing
LOWEST = torch.finfo(torch.float32).min
# What gives a number for each that it reads, at its place; and what gives them in the same order, in another shape.
KEEPS = {*SUMS, *SCALES, *QUOTIENTS, *CASTS, "masked_fill", "where", "contiguous", "clone", "dropout"}
RESHAPES = ("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze")


@cache
def kind_of(name: str) -> type:
    return type(name, (Attention,), {})


def replace(old: Node, new: Node) -> None:
    new.meta |= {key: old.meta[key] for key in (KEPT, UPDATE) if key in old.meta}
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


class _Laid(NamedTuple):
    """A mask on scores."""

    where: Node | None  # it fills; None of one that is added
    value: Any  # what it fills with, or adds
    factor: float  # what the softmax is given times, of that
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
    """The product of queries and keys, and what stands between it and the softmax."""

    def __init__(self, product: Node, purposes: Purposes) -> None:
        self.product, self.purposes = product, purposes

    def bring_into_form(self) -> None:
        if stem_of(self.product) == "baddbmm" and not self._split():
            return
        self._scale()
        self._mask()

    def _split(self) -> bool:
        """``baddbmm(mask, query, key, beta=1, alpha=scale)`` is a product, a scale and a mask, which beta scales."""
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
        """All scales that are numbers, before the product and right behind it, are two.

        A power of two is on the query, where it is exact; what is left, 1 to 2, is behind the product. So half types
        hold the scores, as they do in PyTorch's fused product.
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
        """What masks take out of the scores is zero before they are rounded, and all that is read of them then."""
        chain = [self.product]
        while (reader := _only_reader(chain[-1])) is not None and reader in self.purposes.leads:
            chain.append(reader)
        steps = list(itertools.pairwise(chain))  # (what is read, who reads it)
        ordered = len(list(itertools.takewhile(lambda step: self._keeps_order(*step), steps)))
        masks: dict[Node, _Laid] = {}
        factor = 1.0  # of what stands behind
        for i, (scores, node) in reversed(list(enumerate(steps))):
            if i < ordered and (found := self._laid_on(node, scores, factor)) is not None:
                masks[node] = found
            factor *= _factor_of_reader(node, scores)
        if not masks or 0 in value_of(self.product).shape:
            return
        last = next(iter(masks))
        alike = self._in_each_shape(steps[: chain.index(last)])
        for node in chain[1 : chain.index(last)]:  # go behind what makes the masks, which may be of their size
            for user in [user for user in node.users if _reads_sizes(user)]:
                user.replace_input_with(node, alike[node])
            last.prepend(node)
        layer, first = self._layer(), chain[1]
        write = Writer(self.product, first, layer)
        taken = self._taken([(alike[scores], masks[node]) for scores, node in steps if node in masks], chain[-1], write)
        first.replace_input_with(self.product, write(torch.masked_fill, self.product, taken, 0.0))

    def _layer(self) -> Layer:
        """What the product is a part of."""
        if (layer := self.product.meta.get(LAYER)) is None:
            name = name_of(self.product)
            layer = Layer(f"{name} {self.product.name}", base_name(self.product), kind_of(name), "compute")
            self.product.meta[LAYER] = layer
        return layer

    def _keeps_order(self, scores: Node, node: Node) -> bool:
        """Whether ``node`` has the numbers of ``scores`` in their order; a mask that is made like it has its type."""
        given, made = value_of(scores), value_of(node)
        is_of_type = made.dtype == value_of(self.product).dtype or not any(map(_reads_sizes, node.users))
        is_placed = stem_of(node) in RESHAPES or (stem_of(node) in KEEPS and made.shape == given.shape)
        return is_placed and is_of_type and _in_one_mode(self.product, node)

    def _in_each_shape(self, steps: list[tuple[Node, Node]]) -> dict[Node, Node]:
        """For each of the scores in ``steps`` the product, in their shape: for sizes to be read of."""
        alike, layer = {self.product: self.product}, self._layer()
        for scores, node in steps:
            alike[node] = alike[scores]
            if stem_of(node) in RESHAPES:
                call, kwargs = cast(Any, (node.target, node.kwargs))
                alike[node] = Writer(self.product, node, layer)(call, alike[scores], *node.args[1:], **kwargs)
        return alike

    def _laid_on(self, node: Node, scores: Node, factor: float) -> _Laid | None:
        """The mask that ``node`` lays on ``scores``, if it is one that takes them out.

        factor: what the softmax is given times, of what ``node`` makes.
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

    def _taken(self, masks: list[tuple[Node, _Laid]], last: Node, write: Writer) -> Node:
        """True where the softmax is given nothing of the scores, once ``masks`` are laid on them.

        masks: each with the product in the shape of what it is laid on.
        last: what the softmax is given.

        That is where a mask fills; and where what is added is so far below the rest of its row that nothing is left of
        it, or so low that the sum has no place left for a score. A row that is all masked, by -10,000, has the softmax
        of its scores.
        """
        taken: Node | None = None
        total: Node | None = None  # of what is added
        is_added = any(each.where is None for _, each in masks)
        for alike, (where, value, factor, inverted) in masks:
            mask = value if where is None else write(torch.logical_not, where) if inverted else where
            if alike is not self.product:
                mask = write("reshape_as", write("expand_as", mask, alike), self.product)
            if where is not None:
                taken = mask if taken is None else write(torch.logical_or, taken, mask)
                factor = max(constant_of(value) * factor, LOWEST) if factor > 0 else LOWEST
            if is_added:
                mask = mask if factor == 1 else write(torch.mul, mask, factor)
                total = mask if total is None else write(torch.add, total, mask)
        if total is None:
            return taken  # type: ignore[return-value]
        lost = min(NONE_LEFT, -16 / torch.finfo(value_of(last).dtype).eps)
        rows = write(torch.amax, total, _axis_of_softmax(last, value_of(total).dim()), True)
        low = write(torch.le, total, write(torch.clamp, write(torch.add, rows, NONE_LEFT), lost))
        return low if taken is None else write(torch.logical_or, taken, low)


def _axis_of_softmax(last: Node, rank: int) -> int:
    """Along which axis a softmax reads ``last``, from behind; the last one, where a mask of ``rank`` has not that."""
    reader = next((user for user in last.users if is_softmax(user, last)), None)
    axis: Any = reader.kwargs.get("dim", (*reader.args, -1)[1]) if reader is not None else -1
    axis = axis - value_of(last).dim() if isinstance(axis, int) and axis >= 0 else axis
    return axis if isinstance(axis, int) and -rank <= axis else -1


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


def _power_of_two(scale: float) -> float:
    """The largest power of two that is no more than ``scale``, of a scale that half types hold; else 1."""
    size = abs(scale)
    # What is a power of two but for a double's last places is one.
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
