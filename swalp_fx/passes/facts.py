"""What each node of a captured graph is and means: facts that the passes and the proof read, written once.

``analyse`` writes them before any pass reads them: it is the first step of every rewrite.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor
from torch.fx import Node

__all__ = ["FACTS", "MEANINGS", "Facts", "Origin", "facts", "is_floating"]

FACTS = "swalp_fx.facts"  # the node.meta key that analyse writes: Facts

# What a tensor is used for, if it is no number of the model to be rounded.
#   constant  made of no parameter, and of nothing floating that the model is given
#   mask      a scale, or an addend such as -inf, on the way to a softmax; and what is made for that alone
#   angle     what sin and cos alone read
MEANINGS = ("constant", "mask", "angle")


class Origin(IntEnum):
    """What a tensor is made of: the greatest of what it reads."""

    CONSTANT = 0  # sizes, positions, tokens, buffers
    GIVEN = 1  # floating inputs, and no parameter
    MODEL = 2  # parameters, and products of what is given


@dataclass(frozen=True)
class Facts:
    """category: the row of the table of operations, whatever is around the node.
    meaning: one of MEANINGS; "mixes" of movement that mixes in a constant; "" of all else.
    does: what the same row says of memory and derivatives; empty of what is none of PyTorch's own code.
    """

    category: str
    origin: Origin
    meaning: str = ""
    does: frozenset[str] = frozenset()


def facts(node: Node) -> Facts:
    """The facts of a node; of one that a pass has inserted, nothing is known."""
    return node.meta.get(FACTS, _NONE)


_NONE = Facts("", Origin.MODEL)


def is_floating(node: Node) -> bool:
    """Whether ``node`` is known to give one tensor of floating or complex numbers."""
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
