"""What a node of a captured graph does: the name of its operation, what it writes, what it may be a view of."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch.fx import Graph, Node
from torch.fx.node import Argument

__all__ = [
    "CHECKPOINT",
    "IN_PLACE_OPERATORS",
    "SWITCHES",
    "VIEWS",
    "is_torch",
    "name_of",
    "place_of_inplace",
    "read_after_writes",
    "writes",
    "writes_in_place",
    "written",
    "written_parameter",
]

# What switches a mode for all that follows it in a graph.
SWITCHES = (
    torch._C._set_grad_enabled,
    _enter_autocast,
    _exit_autocast,
    _enter_inference_mode,
    _exit_inference_mode,
)

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint  # a body of its own, that backward computes again

IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor")

# What gives the same numbers in another form, or some of them: a write into it is a write into its source.
# fmt: off
VIEWS = (
    "getitem", "data", "_get_data_attr", "register_hook", "detach", "view", "view_as", "reshape", "flatten",
    "unflatten", "squeeze", "unsqueeze", "t", "T", "mT", "H", "mH", "numpy_T", "matrix_H", "transpose", "swapaxes",
    "swapdims", "movedim", "moveaxis", "permute", "narrow", "select", "diagonal", "chunk", "split", "tensor_split",
    "unbind", "expand", "expand_as", "broadcast_to", "real", "imag",
    # These too, where there is nothing to do.
    "contiguous", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "dropout",
)
# fmt: on

_TORCH = ("torch", "torchvision", "_operator", "builtins", "math")


def name_of(node: Node) -> str:
    """What ``node`` calls: ``conv2d``, ``add``. Attributes count as calls: ``x.shape`` is ``shape``."""
    if node.op == "call_function":
        if node.target is getattr:
            return str(node.args[1])
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target)


def is_torch(function: Any) -> bool:
    """Whether ``function`` is one of PyTorch's or Python's own."""
    module = getattr(function, "__module__", None)
    return module is None or module.split(".")[0] in _TORCH


def writes_in_place(node: Node) -> bool:
    """Whether ``node`` writes into its first argument and returns it: ``add_``, ``relu_``, ``relu(inplace=True)``."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    place = place_of_inplace(node.target) if node.op == "call_function" else None
    in_place = node.args[place] if place is not None and place < len(node.args) else node.kwargs.get("inplace")
    return (name.endswith("_") and not name.endswith("__")) or in_place is True


@cache
def place_of_inplace(function: Callable[..., Any]) -> int | None:
    """Where ``function`` takes ``inplace`` among its arguments, as ``relu`` of torch.nn.functional does."""
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # not written in Python
        return None
    return parameters.index("inplace") if "inplace" in parameters else None


def writes(node: Node) -> bool:
    """Whether ``node`` writes into its first argument, whatever it returns: ``x[i] = y`` and ``x += y`` too."""
    return writes_in_place(node) or name_of(node) in ("setitem", *IN_PLACE_OPERATORS)


def written(node: Node) -> Argument:
    """What ``node``, which writes, writes into, or into an item of."""
    target: Argument = node.args[0] if node.args else node.all_input_nodes[0]
    while isinstance(target, Node) and name_of(target) == "getitem":
        target = target.args[0]
    return target


def read_after_writes(graph: Graph) -> None:
    """After ``y = x.add_(1)``, reads of x become reads of y: the same tensor, and what is done to y reaches them."""
    for node in graph.nodes:
        if not (writes_in_place(node) or name_of(node) in IN_PLACE_OPERATORS):
            continue
        if not node.args or not isinstance(node.args[0], Node) or node.args[0].op == "placeholder":
            continue
        written = node.args[0]
        for user in [user for user in written.users if user > node]:
            user.replace_input_with(written, node)


def written_parameter(node: Node, parameters: dict[Node, str]) -> str | None:
    """The name of the parameter that ``node`` writes into, or into a part of."""
    written = node.args[0] if writes(node) and node.args else _renormalised(node)
    while isinstance(written, Node) and name_of(written) in VIEWS and written.args:
        written = written.args[0]
    return parameters.get(written) if isinstance(written, Node) else None


def _renormalised(node: Node) -> Argument:
    """The weight of a functional embedding whose max_norm makes it write into that."""
    if name_of(node) not in ("embedding", "embedding_bag"):
        return None
    names = ("input", "weight", "offsets or padding_idx", "max_norm")
    arguments = dict(zip(names, node.args, strict=False)) | node.kwargs
    return arguments.get("weight") if arguments.get("max_norm") is not None else None
