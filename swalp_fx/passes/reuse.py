"""Buffer reuse: numbers that may be rounded in the memory that they lie in."""

from __future__ import annotations

from torch.fx import Graph, Node

from ..formats import FLOAT
from .facts import facts
from .operations import writes_in_place
from .rounding import ACTIVATION, ERROR, Rounding

__all__ = ["reuse", "sole_reader"]


def reuse(graph: Graph) -> Graph:
    """Marks the quantize_output nodes of ``graph`` that need no memory of their own; returns ``graph``.

    An output is rounded in place if its producer makes it in memory that autograd does not keep, and the quantize node
    is its only reader. An error signal is rounded in place if one layer alone reads the node, and makes the gradient in
    memory of its own. A fresh tensor costs page faults. No hook is missed: each is a node, or has ended the graph.

    Before:

        conv_q = quantize_output(conv, key, 1325632447, "bfp8", "bfp8", "nearest")
        relu = torch.relu(conv_q)
        relu_q = quantize_output(relu, key, 3041826051, "bfp8", "bfp8", "nearest")
        fc = linear(relu_q, fc_weight_q, fc_bias_q)

    After:

        conv_q = quantize_output(conv, key, 1325632447, "bfp8", "bfp8", "nearest", in_place="AE")
        relu = torch.relu(conv_q)
        relu_q = quantize_output(relu, key, 3041826051, "bfp8", "bfp8", "nearest", in_place="E")    autograd keeps relu
        fc = linear(relu_q, fc_weight_q, fc_bias_q)
    """
    for each in Rounding.all(graph, ACTIVATION):
        letters = "A" if ACTIVATION not in each.kept and _owns_output(each.source) else ""
        is_rounded = ERROR not in each.kept and each.quantizers[ERROR] != str(FLOAT)
        letters += "E" if is_rounded and _owns_error(each.node) else ""
        each.mark(in_place=letters)
    return graph


def _owns_output(node: Node) -> bool:
    """Whether only the one reader of ``node`` will see the memory of its output again."""
    if len(node.users) != 1:
        return False
    does = facts(node).does
    if "adds" in does:
        written = node.args[0]
        return isinstance(written, Node) and (_is_rounded(written) or _owns_output(written))
    return "own" in does and not writes_in_place(node) and "out" not in node.kwargs


def _is_rounded(node: Node) -> bool:
    found = Rounding.of(node, ACTIVATION)
    return found is not None and len(node.users) == 1 and ACTIVATION not in found.kept


def _owns_error(node: Node) -> bool:
    """Whether the error signal that reaches ``node`` is in memory that nothing else will see again."""
    reader = sole_reader(node)
    return reader is not None and "regrad" in facts(reader).does


def sole_reader(node: Node) -> Node | None:
    """The only reader of ``node``, if it reads it as its first input; else None."""
    if len(node.users) != 1:
        return None
    (reader,) = node.users
    return reader if reader.args and reader.args[0] is node else None
