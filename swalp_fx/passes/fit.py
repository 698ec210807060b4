"""Formats on one tensor: a block along the contraction axis runs along the axis that the operation contracts.

One table has the contraction axes: CONTRACTED. An operation without products has the axis of its input.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from ..recipe import Quantizer, Recipe, Subject
from .captured import LAYER
from .operations import NESTED, name_of, operands_of
from .tables import PARTS

__all__ = ["axis_by_reader", "axis_of_parameter", "contraction_axes", "fitted", "of_parameter", "shape_behind"]

LAST = -1
# The start of a convolution's name -> the contraction axis of its weight. Its input and output have channels there.
CONTRACTED = {"conv_transpose": 0, "ConvTranspose": 0, "conv": 1, "Conv": 1, "DeformConv": 1, "deform_conv": 1}
CHANNELS_LAST = frozenset(("conv_tbc",))  # convolutions whose inputs and outputs have channels on the last axis
OTHERWISE = LAST  # linear's: its weight is [outputs, inputs]
# Operations that reorder the axes of their input.
REORDERS = frozenset(("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "T", "mT"))
_PRODUCTS = frozenset(PARTS["compute"])


_SPATIAL = re.compile(r"([123])d")  # the number of axes after the axis of channels


def _contracted(names: Iterable[str]) -> tuple[str, int] | None:
    """(name, contraction axis of the weight) for the first name of a convolution; None if there is none."""
    found = ((name, axis) for name in names for start, axis in CONTRACTED.items() if name.startswith(start))
    return next(found, None)


def axis_of_parameter(subjects: tuple[Subject, ...]) -> int:
    """The contraction axis of a parameter: the axis that its layer contracts."""
    _, axis = _contracted(kind for _, kinds in subjects for kind in kinds) or ("", OTHERWISE)
    return axis


def of_parameter(recipe: Recipe, subjects: tuple[Subject, ...], rank: int) -> Recipe:
    """The recipe of a parameter of ``rank`` axes, its rule applied, its blocks along its layer's contraction axis."""
    return recipe.at(*subjects).of_tensor(rank, axis_of_parameter(subjects))


def axis_by_reader(node: Node, bodies: Mapping[str, Any]) -> tuple[str, int] | None:
    """(name, contraction axis of its weight) of a convolution that reads ``node`` as its weight; None without one.

    bodies: attribute -> GraphModule, of the checkpoints that the graph of ``node`` runs.
    """
    for user in node.users:
        found = None
        if user.target in NESTED:
            body, operands = bodies[str(user.args[0].target)], operands_of(user)  # type: ignore[union-attr]
            inputs = body.graph.find_nodes(op="placeholder")[-len(operands) :]  # behind the key
            inner = (given for given, operand in zip(inputs, operands, strict=True) if operand is node)
            found = next(filter(None, (axis_by_reader(given, dict(body.named_children())) for given in inner)), None)
        elif node in (*user.args[1:2], user.kwargs.get("weight")):
            found = _contracted([name_of(user)])
        if found is not None:
            return found
    return None


def contraction_axes(graph: Graph) -> dict[Node, int]:
    """The contraction axis of each node's output. An input of the graph has the axis of its first reader with one."""
    axes: dict[Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            readers = (_of_operation(user) for user in node.users)
            axes[node] = next((axis for axis in readers if axis is not None), LAST)
            continue
        sources = [each for each in node.all_input_nodes if _rank(each) is not None]
        source = next((each for each in sources if _rank(each) == _rank(node)), *sources[:1] or (None,))
        if (own := _of_operation(node)) is not None:
            axes[node] = own
        else:
            axes[node] = _moved(node, source, axes[source]) if source is not None else LAST
    return axes


def _moved(node: Node, source: Node, axis: int) -> int:
    """The place in ``node``'s output of ``axis`` of its input ``source``.

    If the number of axes changes, as in ``flatten(2)``, and the axes up to ``axis`` keep their lengths, it stays; else
    it is the last axis. A reordering runs on a probe tensor with two elements along ``axis`` and one along each other.
    """
    rank = _rank(node)
    if rank != _rank(source):
        return axis if _has_first_axes(node, source, axis + 1) else LAST
    if name_of(node) not in REORDERS or rank is None or not -rank <= axis < rank:
        return axis
    sizes = [1] * rank
    sizes[axis] = 2
    moved = shape_behind(node, sizes).index(2) - rank
    return moved if moved == LAST else moved + rank


def shape_behind(node: Node, sizes: Sequence[int]) -> torch.Size:
    """The shape that ``node``, which has one input, makes of a tensor of these ``sizes``."""
    probe = torch.empty(tuple(sizes), device="meta")
    args, kwargs = map_arg((node.args, node.kwargs), lambda _: probe)
    call: Any = node.target if node.op == "call_function" else getattr(torch.Tensor, str(node.target))
    return call(*args, **kwargs).shape


def _has_first_axes(node: Node, source: Node, number: int) -> bool:
    """Whether the first ``number`` axes of both have the same lengths, and ``node`` has more."""
    made, given = node.meta.get("example_value"), source.meta.get("example_value")
    if not isinstance(made, Tensor) or not isinstance(given, Tensor) or made.dim() <= number:
        return False
    return all(statically_known_true(a == b) for a, b in zip(made.shape[:number], given.shape[:number], strict=True))


def _of_operation(node: Node) -> int | None:
    """The contraction axis of the output of a convolution or another product; None for other operations."""
    names = [name_of(node)] if node.op.startswith("call") else []
    if LAYER in node.meta:
        names.append(node.meta[LAYER].kind.__name__)
    if CHANNELS_LAST.intersection(names):
        return LAST
    if convolution := _contracted(names):
        spatial, rank = _SPATIAL.search(convolution[0]), _rank(node)
        return rank - 1 - int(spatial[1]) if spatial and rank else 1  # 0 where there is no batch
    return LAST if _PRODUCTS.intersection(names) else None


def _rank(node: Node) -> int | None:
    """The number of axes of ``node``'s output, or of the first tensor of several; None if unknown."""
    value = node.meta.get("example_value")
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    if isinstance(value, Mapping):
        value = next(iter(value.values()), None)
    return value.dim() if isinstance(value, Tensor) else None


def fitted(quantizer: Quantizer, node: Node, axis: int) -> str:
    """The text of ``quantizer`` for ``node``'s output."""
    rank = _rank(node)
    return str(quantizer.of_tensor(2 if rank is None else rank, axis))
