"""Which roundings would change nothing, since what they get has been rounded to the same format before."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Graph, Node

from .. import nodes
from ..capture import writes
from ..formats import FLOAT, parse
from .classify import LAYER_PARTS, PART
from .reuse import OVERWRITES, layer_of, operation_of

__all__ = ["MASKS", "POOLS", "elide"]

ACTIVATION, ERROR = 3, 4  # places of quantize_output's arguments

# Functions and methods by name, layers by the class whose forward they run.

# What leaves some numbers of its first input as they are and makes zeros of the others; backwards, of the gradient.
MASKS = "ReLU relu relu_"
# What passes some numbers of its input on, each within the index of the first dimension that it had, in the same dtype.
# (In three dimensions autocast casts them on the CPU.)
POOLS = """
    MaxPool1d MaxPool2d AdaptiveMaxPool1d AdaptiveMaxPool2d
    max_pool1d max_pool2d adaptive_max_pool1d adaptive_max_pool2d
"""


def elide(graph: Graph, root: nn.Module) -> Graph:
    """Marks the quantize_output nodes of ``graph`` that would keep the very numbers they get; returns ``graph``.

    An activation is kept if it is some of the numbers of a tensor rounded to its format, and a tensor of its own is not
    needed, since nobody writes into it; an error signal if it is some of those of the error signal, in the same format,
    of the node behind the one layer that reads it. Formats must keep what is left of a block (``keeps_subsets``).

    Before:

        conv_q = quantize_output(conv, key, 1, "bfp8[0]", "bfp8[0]", "stochastic")
        relu = torch.relu(conv_q)
        relu_q = quantize_output(relu, key, 2, "bfp8[0]", "bfp8[0]", "stochastic")
        fc = call_layer(fc_module, {"weight": fc_weight_q}, relu_q)

    After:

        conv_q = quantize_output(conv, key, 1, "bfp8[0]", "bfp8[0]", "stochastic", kept="E")    relu_q rounds it
        relu = torch.relu(conv_q)
        relu_q = quantize_output(relu, key, 2, "bfp8[0]", "bfp8[0]", "stochastic", kept="A")    conv_q has rounded it
        fc = call_layer(fc_module, {"weight": fc_weight_q}, relu_q)
    """
    for node in graph.find_nodes(op="call_function", target=nodes.quantize_output):
        letters = "A" if _keeps_activation(node, root) else ""
        letters += "E" if _keeps_error(node, root) else ""
        if letters:
            node.kwargs = {**node.kwargs, "kept": letters}
    return graph


def _keeps_activation(node: Node, root: nn.Module) -> bool:
    made: Any = node.args[0]
    activation = node.args[ACTIVATION]
    _, inputs = layer_of(made, root)
    if len(made.users) != 1 or not inputs or not _rounds(inputs[0], ACTIVATION, activation):
        return False
    operation = operation_of(made, root)
    fits = operation in MASKS.split() or (operation in POOLS.split() and _is_within_rows(activation))
    return fits and _is_only_read(node, root)


def _rounds(node: Any, role: int, format: Any) -> bool:
    """Whether ``node`` rounds to this format in that role, so that subsets are kept."""
    is_rounded = isinstance(node, Node) and node.target is nodes.quantize_output and node.args[role] == format
    return is_rounded and format != str(FLOAT) and parse(format).keeps_subsets


def _is_within_rows(format: Any) -> bool:
    """Whether what shares a scale has the same index of the first dimension, or is all of the tensor."""
    blocks = parse(format)
    return getattr(blocks, "tile", None) is None and getattr(blocks, "dims", None) in (None, (0,))


def _is_only_read(node: Node, root: nn.Module) -> bool:
    """Whether nothing writes into the memory of ``node``'s output, or hands it out of the graph."""
    for reader in node.users:
        part = reader.meta.get(PART)
        is_written = (writes(reader, root) and reader.args[0] is node) or reader.kwargs.get("out") is node
        if part == "movement":  # perhaps a view
            is_fit = _is_only_read(reader, root)
        else:
            is_fit = part == "number" or (part in LAYER_PARTS and operation_of(reader, root) is not None)
        if is_written or not is_fit:
            return False
    return True


def _keeps_error(node: Node, root: nn.Module) -> bool:
    if len(node.users) != 1:
        return False
    (reader,) = node.users
    _, inputs = layer_of(reader, root)
    is_read_first = bool(inputs) and inputs[0] is node and [*inputs, *reader.kwargs.values()].count(node) == 1
    passes = is_read_first and operation_of(reader, root) in (*MASKS.split(), *OVERWRITES)
    return passes and len(reader.users) == 1 and _rounds(next(iter(reader.users)), ERROR, node.args[ERROR])
