"""The keys of ``node.meta`` that the capture writes: all that the passes know of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn
from torch.fx import Node
from torch.nn.utils.parametrize import ParametrizationList

from ..recipe import Subject
from .tables import layer_part

__all__ = [
    "ARGUMENT",
    "CALLS",
    "CARRIED",
    "FOLLOWED",
    "HOLDS",
    "HOOK",
    "INTO",
    "KEPT",
    "LATER",
    "LAYER",
    "METHOD",
    "MODULE",
    "PARAMETER",
    "STEPS",
    "TWIN",
    "TYPE",
    "UPDATE",
    "Layer",
    "Scope",
    "calls_around",
    "is_layer",
]

# Of a placeholder or an attribute: "input", "number", "parameter", "state", "body"; or "operand", an input of a body.
HOLDS = "swalp_fx.holds"
ARGUMENT = "swalp_fx.argument"  # of an input of a graph: its name
PARAMETER = "swalp_fx.parameter"  # of a placeholder for a parameter: its first name in the model
MODULE = "swalp_fx.module"  # the qualified name of the module that ran this code; None: outside of the model
TYPE = "swalp_fx.type"  # the type of that module
UPDATE = "swalp_fx.update"  # true of the new value of a buffer
KEPT = "swalp_fx.kept"  # true of an output that an attribute or a hook keeps, though the frame does not return it
LATER = "swalp_fx.later"  # true of an input that the frame returns, or that code outside of its graph still names
INTO = "swalp_fx.into"  # of the call of a body: the positions of the operands that the body writes into
CARRIED = "swalp_fx.carried"  # true of a state that a loop's step hands to the next one, a reader like any layer
FOLLOWED = "swalp_fx.followed"  # true of a mask on scores that takes them out of the product before it is rounded
TWIN = "swalp_fx.twin"  # of a loop's rounded output that may leave the model: the number of the output before rounding
LAYER = "swalp_fx.layer"  # the Layer that this node is computed inside of
HOOK = "swalp_fx.hook"  # the qualified name of the module whose hook, before or behind its forward, ran this code
CALLS = "swalp_fx.calls"  # the calls around a node that may turn out to be one operation: Layers, part unknown
STEPS = "swalp_fx.steps"  # true of a node in a module that the recipe says is not whole: its steps form no norm
METHOD = "method"  # in a key of nn_module_stack, if the module has hooks: its method ran this code, and no hook


class Layer(NamedTuple):
    """One call of a module that counts as one operation, however many nodes it takes.

    Such are PyTorch's own layers, norms written by hand, and modules that the recipe calls whole.
    """

    call: str  # unique for each call
    path: str  # the module's qualified name
    kind: type
    part: str | None = None  # the part that it plays


@dataclass
class Scope:
    """The surroundings of a graph in its model."""

    # First name of each parameter of the model -> its subjects, for the recipe's patterns.
    parameters: Mapping[str, tuple[Subject, ...]]
    place: str = ""  # tells the graphs of one module apart: the point where code resumes after a graph break
    returns: bool = True  # whether its outputs go to the model's caller
    enters: bool = True  # whether its inputs come from the model's caller, so no graph has rounded them
    uses: Counter[tuple[str, str]] = field(default_factory=Counter)  # (name, operation) -> calls so far
    streams: set[int] = field(default_factory=set)  # the random streams that are taken
    bodies: MutableMapping[str, Any] = field(default_factory=dict)  # attribute -> the GraphModule that a node runs


def is_layer(module: nn.Module) -> bool:
    """Whether a call of ``module`` is one operation: a layer of PyTorch's own, or a parametrization."""
    kind = type(module)
    if isinstance(module, ParametrizationList):
        return True
    is_own = kind.__module__.startswith(("torch.nn.modules", "torch.ao.", "torchvision.ops"))
    return is_own and layer_part(kind) is not None and not any(True for _ in module.children())


def calls_around(node: Node) -> list[tuple[str, str]]:
    """(call, key) of the modules that ``node`` is computed in, outermost first.

    call: unique for each call. PyTorch numbers the calls of each name, so a module with two names has two first calls.
    key: PyTorch's name of the module; with METHOD, if the module has hooks and none of them ran this code.
    """
    stack: list[tuple[str, str]] = []
    for key, (name, *_) in (node.meta.get("nn_module_stack") or {}).items():
        if METHOD in key and stack and stack[-1][1].partition("@")[0] == key.partition("@")[0]:
            stack.pop()  # the call of the module, for its hooks too
        stack.append((f"{key} {name}", key))
    return stack


def kinds_around(node: Node) -> list[str]:
    """The names of the type, and of its bases, of the module that ran ``node``'s code."""
    return [base.__name__ for base in node.meta[TYPE].__mro__] if TYPE in node.meta else []


def around(node: Node) -> str:
    """The qualified name of the module that ran ``node``'s code; "" for the root."""
    return node.meta.get(MODULE) or ""
