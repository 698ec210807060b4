"""What the capture says of each node, as ``node.meta``: all that the passes know of the model."""

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
    "HOLDS",
    "KEPT",
    "LAYER",
    "MODULE",
    "PARAMETER",
    "STEPS",
    "UPDATE",
    "Layer",
    "Scope",
    "calls_around",
    "is_layer",
]

# Of what a graph is given or holds: "input", "number", "parameter", "state", "body", or "operand", of a body.
HOLDS = "swalp_fx.holds"
ARGUMENT = "swalp_fx.argument"  # the name of what a graph is given
PARAMETER = "swalp_fx.parameter"  # of a placeholder for a parameter: its first name in the model
MODULE = "swalp_fx.module"  # the qualified name of the module whose code makes it; None: it is outside of the model
UPDATE = "swalp_fx.update"  # true of what a buffer is set to
# True of what leaves the graph though the frame does not return it: an attribute, or a hook, keeps it.
KEPT = "swalp_fx.kept"
CARRIED = "swalp_fx.carried"  # true of what a loop's step gives to the next one, which reads it as a layer does
LAYER = "swalp_fx.layer"  # a Layer, of what is computed inside one
CALLS = "swalp_fx.calls"  # the Layers, part unknown, of the calls around a node that may turn out to be one operation
STEPS = "swalp_fx.steps"  # true of what the recipe says is no part of one operation


class Layer(NamedTuple):
    """One call of a module that is one operation, however many nodes it takes: a layer of PyTorch's own, a norm written
    by hand, what the recipe calls whole."""

    call: str  # tells calls from one another
    path: str  # its qualified name
    kind: type
    part: str | None = None  # that it plays


@dataclass
class Scope:
    """Where a graph stands."""

    # First name -> what the recipe's patterns see, of every parameter of the model.
    parameters: Mapping[str, tuple[Subject, ...]]
    place: str = ""  # what tells it from other graphs of one module: where code goes on behind a graph break
    returns: bool = True  # whether what it gives is what the model gives its caller
    enters: bool = True  # whether what it is given is what the caller gives the model, and no graph has rounded
    uses: Counter[tuple[str, str]] = field(default_factory=Counter)  # (name, operation) -> how many came before
    streams: set[int] = field(default_factory=set)  # the random streams that are taken
    bodies: MutableMapping[str, Any] = field(default_factory=dict)  # attribute -> the GraphModule that a node runs


def is_layer(module: nn.Module) -> bool:
    """Whether a call of ``module`` is one operation: a layer of PyTorch's own, or what derives a weight."""
    kind = type(module)
    if isinstance(module, ParametrizationList):
        return True
    is_own = kind.__module__.startswith(("torch.nn.modules", "torch.ao.", "torchvision.ops"))
    return is_own and layer_part(kind) is not None and not any(True for _ in module.children())


def calls_around(node: Node) -> list[tuple[str, str]]:
    """(call, key) of the modules that ``node`` is computed in, outermost first: what tells calls from one another, and
    the module's key. PyTorch numbers calls of each name; a module that is called by two names has two first calls."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(f"{key} {name}", key) for key, (name, *_) in stack.items()]


def kinds_around(node: Node) -> list[str]:
    """The names of the types of the module whose code ``node`` is of."""
    kinds = [kind for _, kind in (node.meta.get("nn_module_stack") or {}).values()]
    return [base.__name__ for base in kinds[-1].__mro__] if kinds and isinstance(kinds[-1], type) else []


def around(node: Node) -> str:
    """The qualified name of the module whose code ``node`` is of; "" for the root's."""
    return node.meta.get(MODULE) or ""
