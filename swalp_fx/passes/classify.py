"""The part that each node plays."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.fx import Graph, Node

from .captured import CARRIED, HOLDS, KEPT, LAYER, MODULE, UPDATE, Layer
from .facts import Origin, facts, is_floating, memory_of
from .names import PART, name_places
from .operations import NESTED, memory_written, takes_size, written
from .tables import LAYER_PARTS

__all__ = ["OUT", "classify"]

OUT = ("exit", "output", "outside")  # these readers get a number of the model unrounded


def classify(graph: Graph) -> Graph:
    """Writes ``node.meta[PART]`` on every node, and ``node.meta[NAME]`` on every place; returns ``graph``.

    A part is one of PARTS, one of MEANINGS, or one of these:

    "input", "output"
    "parameter"  a Parameter, or a weight that a parametrization derives
    "state"      a buffer, a write into it, or a number computed of buffers alone
    "inside"     a node of a layer that is not its output
    "body"       a graph that this one runs: a checkpoint, or the step of a loop
    "nested"     the call of a body
    "operand"    an input of a body
    "exit"       movement, if the model only returns its result; a write, if only a returned tensor shows it
    "outside"    code around the model, if caller and model are compiled together

    x = placeholder                         input
    conv = conv2d(x, conv_weight, ...)      compute
    relu = relu(conv)                       activation
    add = relu + bias                       arithmetic   (bias: parameter)
    n = x.size(0)                           number
    flat = add.view(n, -1)                  movement
    fc = linear(flat, fc_weight, fc_bias)   compute
    view = fc.view(n, 2, -1)                exit
    setitem(view, 0, 0.0)                   exit
    return view                             output
    """
    filled = set(_filled(graph))
    for node in graph.nodes:
        part = _part(node)
        node.meta[PART] = "movement" if part == "number" and node in filled else part
    _mark_updates(graph)
    _mark_exits(graph)
    name_places(graph)
    return graph


def _part(node: Node) -> str:
    if node.op == "output":
        return "output"
    if HOLDS in node.meta:
        return node.meta[HOLDS]
    if node.target in NESTED:  # also one around the model: its body may call that
        return "nested"
    if node.meta.get(MODULE, "") is None:
        return "outside"
    if _writes_state(node):
        return "state"
    known = facts(node)
    part = _part_in_layer(node, node.meta[LAYER]) if LAYER in node.meta else known.category
    if known.origin is Origin.CONSTANT:
        if known.meaning == "constant":
            return "constant" if part in LAYER_PARTS else part
        is_state = any(source.meta[PART] == "state" for source in node.all_input_nodes)
        return "state" if is_state else "inside" if part == "inside" else "number"
    if part in LAYER_PARTS and isinstance(node.meta.get("example_value"), Tensor) and not is_floating(node):
        return "number"  # indices, truth values
    return _MEANT.get(known.meaning, part) if part != "inside" else part


_MEANT = {"mask": "mask", "angle": "angle", "mixes": "arithmetic"}


def _part_in_layer(node: Node, layer: Layer) -> str:
    """The layer's part for its output, "inside" for its other nodes, kept by a hook or not."""
    inner = [user for user in node.users if user.meta.get(LAYER) == layer]
    outer = [user for user in node.users if user not in inner and (user.op != "output" or not inner)]
    if inner:  # a reader of sizes alone reads none of the layer's numbers
        outer = [user for user in outer if not takes_size(user, node)]
    if not outer or not _is_tensor(node):
        return "number" if facts(node).category == "number" else "inside"
    return layer.part or "arithmetic"


def _is_tensor(node: Node) -> bool:
    """Whether ``node`` gives one tensor. The items of a tuple are nodes of their own."""
    value = node.meta.get("example_value")
    return value is None or isinstance(value, Tensor)


def _filled(graph: Graph) -> Iterator[Node]:
    """Fresh constants that numbers are then written into, as in ``y = torch.zeros_like(x); y[0] = x[1]``."""
    memory = memory_written(*(node for node in graph.nodes if len(node.all_input_nodes) > 1))
    for node in graph.nodes:
        fresh = memory_of(node) - memory_of(*node.all_input_nodes)
        if fresh & memory and facts(node).origin is not Origin.CONSTANT:
            yield node


def _mark_updates(graph: Graph) -> None:
    """Marks the arithmetic of a buffer's new value as state, as in ``self.mean = self.mean * 0.9 + new * 0.1``.

    State is not rounded, neither here nor for a write in place. The nodes are sums and products that read the buffer,
    and serve only the write.
    """
    updates = {node for node in graph.nodes if node.meta.get(UPDATE)}
    for node in reversed(graph.nodes):
        if facts(node).category == "arithmetic" and node.users and updates.issuperset(node.users):
            updates.add(node)
    for node in graph.nodes:
        reads_state = any(source.meta[PART] == "state" for source in node.all_input_nodes)
        is_state = (node in updates and reads_state) or _writes_state(node)
        if node.meta[PART] in ("arithmetic", "norm", "constant", "inside") and is_state:
            node.meta[PART] = "state"


def _writes_state(node: Node) -> bool:
    return any(target.meta[PART] == "state" for target in written(node))


def _mark_exits(graph: Graph) -> None:
    """Marks what only leaves: movement, sizes, and writes that nobody but the output reads.

    A write leaves if no layer, no later call and no later frame reads the memory that it writes into, under any name.
    """
    kept = (each for each in graph.output_node().all_input_nodes if _is_kept(each) or each.meta.get(CARRIED))
    operands = (each for each in graph.find_nodes(op="placeholder") if each.meta.get(HOLDS) == "operand")
    # The memory that others than exits read, behind the present node. The graph around this one may read its operands.
    read = memory_of(*kept, *operands)
    for node in reversed(graph.nodes):
        memory = memory_written(node)
        leaves = all(user.meta[PART] in OUT for user in node.users) and (memory or node.users)
        is_movement = node.meta[PART] in ("movement", "number")
        if is_movement and leaves and not _is_kept(node) and not memory & read:
            node.meta[PART] = "exit"
        elif node.meta[PART] not in OUT:
            read |= memory_of(*(each for each in node.all_input_nodes if not takes_size(node, each)))


def _is_kept(node: Node) -> bool:
    """Whether a buffer, an attribute or a hook keeps ``node``. Then it is rounded as for a layer."""
    return bool(node.meta.get(UPDATE) or node.meta.get(KEPT))
