"""Redundant-rounding elimination: a number on a format's grid is not rounded to that format again."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, Node

from ..formats import FLOAT, ROWS, WHOLE, Format
from ..recipe import Quantizer
from .facts import MEANINGS, facts
from .names import PART
from .operations import SWITCHES, operation_of, writes
from .reuse import sole_reader
from .rounding import ACTIVATION, ERROR, Rounding
from .tables import LAYER_PARTS, part_of

__all__ = ["elide"]


def elide(graph: Graph) -> Graph:
    """Marks the quantize_output nodes of ``graph`` that would keep the very numbers they get; returns ``graph``.

    An activation is kept if its layer passes on a subset of a tensor rounded to its format, and nothing writes into
    either tensor's memory. An error signal is kept if one layer reads the node, and passes back a subset of an error
    signal of the same format: the quantize node behind that layer has rounded it. The format must leave every subset of
    a rounded block unchanged (``keeps_subsets``). The mode of rounding is free: none moves a number on the grid.

    Before:

        conv_q = quantize_output(conv, key, 1325632447, "bfp8", "bfp8", "nearest")
        relu = torch.relu(conv_q)
        relu_q = quantize_output(relu, key, 3041826051, "bfp8", "bfp8", "nearest")
        fc = linear(relu_q, fc_weight_q, fc_bias_q)

    After:

        conv_q = quantize_output(conv, key, 1325632447, "bfp8", "bfp8", "nearest", kept="E")    relu_q rounds it
        relu = torch.relu(conv_q)
        relu_q = quantize_output(relu, key, 3041826051, "bfp8", "bfp8", "nearest", kept="A")    conv_q has rounded it
        fc = linear(relu_q, fc_weight_q, fc_bias_q)
    """
    switches = 0
    mode: dict[Node, int] = {}
    for node in graph.nodes:
        switches += node.target in SWITCHES
        mode[node] = switches
    for each in Rounding.all(graph, ACTIVATION):
        letters = "A" if _keeps_activation(each) else ""
        behind = _rounds_its_error(each)
        letters += "E" if behind is not None and mode[behind] == mode[each.node] else ""
        each.mark(kept=letters)
    return graph


def _keeps_activation(rounding: Rounding) -> bool:
    made = rounding.source
    activation = _format(rounding, ACTIVATION)
    inputs: Any = made.args
    if len(made.users) != 1 or not inputs or not _rounds(inputs[0], ACTIVATION, activation):
        return False
    does = facts(made).does
    # max_pool3d does not select: autocast on the CPU casts its output.
    is_pool = "selects" in does and _is_within_rows(activation) and not _is_dilated(made)
    fits = "masks" in does or is_pool
    return fits and _is_only_read(rounding.node) and _is_only_read(inputs[0], but=made)


def _format(rounding: Rounding, role: str) -> Format:
    return Quantizer.parse(rounding.quantizers[role]).format


def _rounds(node: Any, role: str, format: Format) -> bool:
    """Whether ``node`` rounds to this format in that role, and the format keeps subsets."""
    found = Rounding.of(node, role)
    is_rounded = found is not None and _format(found, role) == format
    return is_rounded and format != FLOAT and format.keeps_subsets


def _is_within_rows(format: Format) -> bool:
    """Whether a block is a row (one index of the first dimension) or the whole tensor."""
    return format.block in (WHOLE, ROWS)


def _is_dilated(node: Node) -> bool:
    """Whether a window may hold padding alone: its maximum is -infinity."""
    by_place = node.args[4] if len(node.args) > 4 else 1  # after the input, kernel size, stride and padding
    return node.kwargs.get("dilation", by_place) not in (1, (1,), (1, 1))


def _is_only_read(node: Node, but: Node | None = None) -> bool:
    """Whether no reader may write into the memory of ``node``'s output, or hand it on. ``but`` is not asked."""
    return all(_reads(reader, node) for reader in node.users if reader is not but)


def _reads(reader: Node, node: Node) -> bool:
    """Whether ``reader`` is known only to read. If it may be a view, the same must hold for its readers."""
    if writes(reader) and not _is_another(reader.args[:1], node):
        return False
    if "out" in reader.kwargs and not _is_another((reader.kwargs["out"],), node):
        return False
    part, known = reader.meta.get(PART), part_of(operation_of(reader))
    if part == "movement" or (part == "inside" and known == "movement"):
        return _is_only_read(reader)
    return part == "number" or (part in (*LAYER_PARTS, *MEANINGS, "inside") and known is not None)


def _is_another(written: tuple[Any, ...], node: Node) -> bool:
    return len(written) == 1 and isinstance(written[0], Node) and written[0] is not node


def _rounds_its_error(rounding: Rounding) -> Node | None:
    """The quantize node behind the sole reader, if it rounds this error signal to the same format; else None.

    The reader must be a mask or an in-place add: this error signal is then a subset of that one.
    """
    node, reader = rounding.node, sole_reader(rounding.node)
    if reader is None or len(reader.users) != 1 or not facts(reader).does.intersection(("masks", "adds")):
        return None
    if [*reader.args, *reader.kwargs.values()].count(node) != 1:  # its gradient is a sum
        return None
    (behind,) = reader.users
    return behind if _rounds(behind, ERROR, _format(rounding, ERROR)) else None
