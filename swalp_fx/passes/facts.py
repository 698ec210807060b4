"""The facts of each node of a captured graph: category, origin, meaning, and effects on memory and derivatives.

``analyse`` writes them once, before any pass reads them. The passes and the proof read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

__all__ = ["FACTS", "MEANINGS", "Facts", "Origin", "facts", "is_floating", "is_number", "memory_of"]

FACTS = "swalp_fx.facts"  # the node.meta key that analyse writes: Facts

# The use of a tensor that is not rounded by itself.
#   constant  made of no parameter and of no floating input
#   mask      on the way to a softmax: a product with a scale, or a sum with a mask such as -inf; and the mask itself
#   angle     read by sin and cos alone
MEANINGS = ("constant", "mask", "angle")


class Origin(IntEnum):
    """The origin of a tensor: the greatest origin of its inputs."""

    CONSTANT = 0  # sizes, positions, tokens, buffers
    GIVEN = 1  # floating inputs, and no parameter
    MODEL = 2  # parameters, and products of floating inputs


@dataclass(frozen=True)
class Facts:
    """category: the node's part in the table of operations, without regard to its surroundings.
    meaning: one of MEANINGS; "mixes" for movement that mixes in a constant; "" for every other node.
    does: the effects on memory and derivatives in the same row; empty for code that is not PyTorch's own.
    """

    category: str
    origin: Origin
    meaning: str = ""
    does: frozenset[str] = frozenset()


def facts(node: Node) -> Facts:
    """The facts of a node; empty facts for a node that a pass has inserted."""
    return node.meta.get(FACTS, _NONE)


_NONE = Facts("", Origin.MODEL)


def is_floating(node: Node) -> bool:
    """Whether ``node`` is known to give one tensor of floating or complex numbers."""
    return is_number(node.meta.get("example_value"))


def is_number(value: Any) -> bool:
    """Whether ``value`` is a tensor of floating or complex numbers."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def memory_of(*nodes: Node) -> frozenset[int]:
    """The pieces of memory that the outputs of ``nodes`` lie in; none of what is no tensor. Views share one.

    The capture has run the model on tensors without data. They share memory where the model's own tensors do: so
    ``x.contiguous()`` is a view if there is nothing to do, and ``x[[1, 0]]`` is none.
    """
    leaves = pytree.tree_leaves([node.meta.get("example_value") for node in nodes])
    return frozenset(leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor) and _has_one(leaf))


def _has_one(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_nested
