"""The operation of a node: its name, its category, its writes and its views."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch.fx import Graph, Node
from torch.fx.node import Argument
from torch.utils import _pytree as pytree

from .. import nodes
from .captured import INTO
from .facts import memory_of
from .tables import does, part_of

__all__ = [
    "CASTS",
    "CHECKPOINT",
    "NESTED",
    "SWITCHES",
    "category",
    "is_torch",
    "is_view",
    "memory_written",
    "name_of",
    "operands_of",
    "operation_of",
    "place_of_inplace",
    "read_after_writes",
    "stem_of",
    "takes_size",
    "writes",
    "writes_in_place",
    "written",
    "written_parameter",
]

# Calls that switch a mode for all later nodes of a graph.
SWITCHES = (
    torch._C._set_grad_enabled,
    _enter_autocast,
    _exit_autocast,
    _enter_inference_mode,
    _exit_inference_mode,
)

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint  # runs a body, and again in backward

NESTED = (CHECKPOINT, nodes.recurrent)  # calls that run a graph of their own

CASTS = ("to", "type", "type_as", "float", "double", "half", "bfloat16")

_METHOD = re.compile(r"__(i(?:add|sub|mul|truediv|floordiv|mod|pow|and|or|xor)|setitem)__")  # x.__iadd__(1) is x += 1
_TORCH = ("torch", "torchvision", "_operator", "builtins", "math")
_OPERATORS = ("torch._ops.aten", "torch._ops.prims", "torch._ops.higher_order", "torch._ops.torchvision")


def name_of(node: Node) -> str:
    """The name of the function or method: ``conv2d``, ``add``. Attributes count as calls: ``x.shape`` is ``shape``."""
    if node.op == "call_function":
        if node.target is getattr:
            return str(node.args[1])
        if isinstance(node.target, OpOverload | OpOverloadPacket):  # _softmax.int is softmax
            packet = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
            return packet.__name__.lstrip("_")
        return getattr(node.target, "__name__", str(node.target))
    in_place = _METHOD.fullmatch(str(node.target))
    return in_place[1] if in_place else str(node.target)


def is_torch(function: Any) -> bool:
    """Whether ``function`` is one of PyTorch's or Python's own, and no operator that others have registered."""
    module = getattr(function, "__module__", None)
    if module is None:
        return True
    return module.split(".")[0] in _TORCH and (not module.startswith("torch._ops.") or module in _OPERATORS)


def operation_of(node: Node) -> str:
    """The name to look up in the table of operations; "" unless ``node`` calls PyTorch's own code."""
    is_own = node.op == "call_method" or (node.op == "call_function" and is_torch(node.target))
    return name_of(node) if is_own else ""


def stem_of(node: Node) -> str:
    """``operation_of`` without the mark of the in-place form: ``masked_fill`` for ``masked_fill_`` too."""
    return operation_of(node).rstrip("_")


def category(node: Node) -> str:
    """The part of ``node`` in the table, without regard to its surroundings; "" if it is no call."""
    if not node.op.startswith("call"):
        return ""
    if node.target is nodes.recurrent:
        return "compute"
    if node.op == "call_function" and not is_torch(node.target):
        return "movement" if isinstance(node.target, type) else "arithmetic"  # a tuple or a record with names
    return part_of(name_of(node)) or "arithmetic"


def takes_size(user: Node, node: Node) -> bool:
    """Whether ``user`` reads only the size or the type of ``node``, as ``x.type_as(node)`` does."""
    if stem_of(user).endswith("_as"):
        return bool(user.args) and user.args[0] is not node
    return category(user) == "number" and "reads" not in does(operation_of(user))


def operands_of(call: Node) -> list[Argument]:
    """The operands that a call hands to the graph that it runs, without the key."""
    if call.target is nodes.recurrent:
        _, _, x, states, weights = call.args
        return [x, *states, *weights]  # type: ignore[misc]
    return list(call.args[1:] if call.target is CHECKPOINT else call.args[2:])


def is_view(node: Node) -> bool:
    """Whether a write into ``node`` may be a write into its first input."""
    return "views" in does(operation_of(node))


def writes_in_place(node: Node) -> bool:
    """Whether ``node`` writes into its first argument and returns it: ``add_``, ``relu_``, ``relu(inplace=True)``."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    place = place_of_inplace(node.target) if node.op == "call_function" else None
    in_place = node.args[place] if place is not None and place < len(node.args) else node.kwargs.get("inplace")
    return (name.endswith("_") and not name.endswith("__")) or in_place is True


@cache
def place_of_inplace(function: Callable[..., Any]) -> int | None:
    """The position of ``function``'s argument ``inplace``, as in ``torch.nn.functional.relu``; None if it has none."""
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not written in Python
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def writes(node: Node) -> bool:
    """Whether ``node`` writes into its first argument; ``x[i] = y`` and ``x += y`` do too."""
    return writes_in_place(node) or "writes" in does(operation_of(node))


def written(node: Node) -> list[Node]:
    """The tensors, or tuples of them, that ``node`` writes into: its target, its ``out``, and each of a list."""
    if not node.op.startswith("call"):
        return []
    targets: list[Any] = [node.kwargs.get("out"), _renormalised(node)]
    targets += [operands_of(node)[i] for i in node.meta.get(INTO, ())]
    if writes(node):
        targets.append(node.args[0] if node.args else node.all_input_nodes[0])
    if isinstance(node.target, OpOverload):
        given = {each.name: each for each in node.target._schema.arguments}
        named = dict(zip(given, node.args, strict=False)) | node.kwargs
        targets += [named[name] for name, each in given.items() if each.is_write and name in named]
    found = (each for each in pytree.tree_leaves(targets) if isinstance(each, Node))
    return list(dict.fromkeys(found))


def memory_written(*nodes: Node) -> frozenset[int]:
    """The pieces of memory that ``nodes`` write into."""
    return memory_of(*(target for node in nodes for target in written(node)))


def read_after_writes(graph: Graph) -> None:
    """After ``y = x.add_(1)``, turns reads of x into reads of y: the same tensor, and a rounding of y reaches them."""
    for node in graph.nodes:
        if not writes(node) or name_of(node) == "setitem":
            continue
        if not node.args or not isinstance(node.args[0], Node) or node.args[0].op == "placeholder":
            continue
        written = node.args[0]
        for user in [user for user in written.users if user > node]:
            user.replace_input_with(written, node)


def written_parameter(node: Node, parameters: dict[Node, str]) -> str | None:
    """The name of the parameter that ``node`` writes into, wholly or partly; None if it writes into none."""
    memory = memory_written(node)
    return next((name for parameter, name in parameters.items() if memory & memory_of(parameter)), None)


def _renormalised(node: Node) -> Argument:
    """The weight of a functional embedding with max_norm, which writes into it; None for other nodes."""
    if name_of(node) not in ("embedding", "embedding_bag"):
        return None
    names = ("input", "weight", "offsets or padding_idx", "max_norm")
    arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
    return arguments.get("weight") if arguments.get("max_norm") is not None else None
