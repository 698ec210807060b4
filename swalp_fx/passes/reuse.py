"""Which numbers may be rounded in the memory they already lie in."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Graph, Node

from .. import nodes
from ..capture import ROOT, name_of, writes_in_place
from ..formats import FLOAT
from .classify import attribute

__all__ = ["OVERWRITES", "OWN_GRADIENT", "OWN_OUTPUT", "layer_of", "operation_of", "reuse", "sole_reader"]

# Functions and methods by name, layers by the class whose forward they run.

# Producers of an output in memory of its own that autograd does not keep: their derivatives are functions of their
# inputs. Not here: what returns an input or a view of it (dropout, reshape), and what differentiates by its result
# (relu, sigmoid, tanh, softmax, exp, sqrt, attention).
OWN_OUTPUT = """
    Linear Bilinear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d Embedding
    linear bilinear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d embedding
    matmul mm bmm mv
    _BatchNorm LayerNorm GroupNorm batch_norm layer_norm group_norm
    GELU SiLU Mish Hardswish LeakyReLU gelu
    add sub mul
    AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
"""
# Writers into their first argument that keep nothing of it, and return it.
OVERWRITES = frozenset(("iadd", "isub", "add_", "sub_"))
# Readers whose backward makes the gradient of their first input in memory of its own. Not here: what hands on the
# gradient it gets, or a view of it, perhaps to several inputs (add, cat, reshape, dropout in eval mode).
OWN_GRADIENT = """
    Linear Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
    matmul mm bmm
    _BatchNorm LayerNorm GroupNorm batch_norm layer_norm group_norm
    ReLU ReLU6 GELU SiLU Mish Hardswish LeakyReLU Sigmoid Tanh relu relu_ gelu silu sigmoid tanh
    mul
    MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
"""

# With one of these on a layer, its user may keep what goes in or out.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def reuse(graph: Graph, root: nn.Module) -> Graph:
    """Marks the quantize_output nodes of ``graph`` that need no memory of their own; returns ``graph``.

    An output is rounded in place if its producer makes it in memory that autograd does not keep, and the quantize node
    is its only reader; the error signal if the one layer that reads the node makes it in memory of its own. A hook
    that the layer has by now is a reason not to. What a fresh tensor costs beside the arithmetic is its page faults.

    Before:

        conv_q = quantize_output(conv, key, 1, "bfp8", "bfp8", "stochastic")
        relu = torch.relu(conv_q)
        relu_q = quantize_output(relu, key, 2, "bfp8", "bfp8", "stochastic")
        fc = call_layer(fc_module, {"weight": fc_weight_q}, relu_q)

    After:

        conv_q = quantize_output(conv, key, 1, "bfp8", "bfp8", "stochastic", in_place="AE")
        relu = torch.relu(conv_q)
        relu_q = quantize_output(relu, key, 2, "bfp8", "bfp8", "stochastic", in_place="E")    autograd keeps relu
        fc = call_layer(fc_module, {"weight": fc_weight_q}, relu_q)
    """
    for node in graph.find_nodes(op="call_function", target=nodes.quantize_output):
        _, _, _, _, error, _ = node.args
        letters = "A" if not _keeps(node, "A") and _owns_output(node.args[0], root) else ""
        letters += "E" if not _keeps(node, "E") and error != str(FLOAT) and _owns_error(node, root) else ""
        if letters:
            node.kwargs = {**node.kwargs, "in_place": letters}
    return graph


def _owns_output(node: Node, root: nn.Module) -> bool:
    """Whether nothing but its one reader will see the memory of ``node``'s output again."""
    if len(node.users) != 1:
        return False
    operation = operation_of(node, root)
    if operation in OVERWRITES:
        written = node.args[0]
        return isinstance(written, Node) and (_is_rounded(written) or _owns_output(written, root))
    return operation in OWN_OUTPUT.split() and not writes_in_place(node, root) and "out" not in node.kwargs


def _is_rounded(node: Node) -> bool:
    return node.target is nodes.quantize_output and len(node.users) == 1 and not _keeps(node, "A")


def _keeps(node: Node, letter: str) -> bool:
    return letter in str(node.kwargs.get("kept", ""))


def _owns_error(node: Node, root: nn.Module) -> bool:
    """Whether the error signal that reaches ``node`` is in memory that nothing else will see again."""
    reader = sole_reader(node, root)
    return reader is not None and operation_of(reader, root) in OWN_GRADIENT.split()


def sole_reader(node: Node, root: nn.Module) -> Node | None:
    """The one node that reads ``node``, if it does so as its first input."""
    if len(node.users) != 1:
        return None
    (reader,) = node.users
    _, inputs = layer_of(reader, root)
    return reader if inputs and inputs[0] is node else None


def operation_of(node: Node, root: nn.Module) -> str | None:
    """The name to look up in the tables; None for what is no call of PyTorch's own code, or is hooked."""
    module, _ = layer_of(node, root)
    if module is not None:
        if "forward" in vars(module) or any(getattr(module, hooks) or _of_all(hooks) for hooks in HOOKS):
            return None
        runs = next(base for base in type(module).__mro__ if "forward" in vars(base))
        return runs.__name__ if runs.__module__.startswith("torch.nn.") else None
    if node.op == "call_function":
        written_in = getattr(node.target, "__module__", None) or "torch"
        is_registered = written_in.startswith("torch._ops.") and written_in != "torch._ops.aten"  # by whomever
        return name_of(node) if written_in.split(".")[0] in ("torch", "_operator") and not is_registered else None
    return name_of(node) if node.op == "call_method" else None


def _of_all(hooks: str) -> Any:
    """The hooks of this kind that PyTorch calls for every module."""
    return getattr(nn.modules.module, f"_global{hooks}")


def layer_of(node: Node, root: nn.Module) -> tuple[nn.Module | None, tuple[Any, ...]]:
    """(the layer that ``node`` calls, if it does, what it calls it with)"""
    if node.op == "call_module":
        return root.get_submodule(str(node.target)), node.args
    if node.target is nodes.call_layer:
        source, _, *inputs = node.args
        target = str(source.target)  # type: ignore[union-attr]
        return root if target == ROOT else attribute(root, target), tuple(inputs)
    return None, node.args
