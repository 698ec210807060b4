"""The names of places: of parameters, inputs and layer outputs, in recipes, reports, measures and drawings."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import count

from torch import nn
from torch.fx import Graph, Node
from torch.nn.utils.parametrize import ParametrizationList

from ..recipe import Subject
from .captured import ARGUMENT, HOLDS, LAYER, PARAMETER, around, kinds_around
from .facts import MEANINGS
from .operations import name_of
from .tables import LAYER_PARTS, layer_part

__all__ = [
    "NAME",
    "PART",
    "derived_name",
    "is_derived",
    "kinds_of",
    "kinds_of_operation",
    "kinds_of_type",
    "name_places",
    "originals",
    "parameter_subject",
    "parameter_subjects",
    "place",
    "subject",
]

# The node.meta keys that classify writes: the part of a node, and the name that ``place`` reads.
PART = "swalp_fx.part"
NAME = "swalp_fx.name"


def place(node: Node) -> str:
    """The one name of the place that ``node`` is, in recipes, reports, measures and drawings.

    node: an input, a parameter or a layer output of a classified graph, or of its rewrite.

    A layer's output has the layer's name: ``layer1.0.conv1``. A function's output is named by the module that calls it
    and by the function: ``layer1.0.iadd``. In attention, a product with the weight of a layer that is not called
    has that layer's name: ``attention.out_proj``. If several places of a graph have one name, they are numbered in the
    order of the graph: ``layer1.0.relu@1``, ``layer1.0.relu@2``. An input with the name of a layer has the number 0:
    ``tokens@0``. A graph's root that is a bare layer is named by its type: ``linear``.
    """
    return node.meta.get(NAME) or node.name


def kinds_of(node: Node) -> list[str]:
    """The kinds of a classified ``node`` for rules: part, names of the operation, types of the module that ran it."""
    if node.op == "placeholder":
        return [node.meta[PART]]
    return [*kinds_of_operation(node, node.meta[PART]), *kinds_around(node)]


def kinds_of_operation(node: Node, part: str) -> list[str]:
    """``part``, and the names of the operation of ``node``."""
    if (layer := node.meta.get(LAYER)) is not None:
        return kinds_of_type(layer.kind, part)
    return [part, *dict.fromkeys((name_of(node), name_of(node).rstrip("_")))]


def kinds_of_type(kind: type, part: str | None) -> list[str]:
    """The kinds of a module of type ``kind`` for rules: its part, if any, and the names of the type and its bases."""
    return [*([part] if part else []), *(base.__name__ for base in kind.__mro__)]


def subject(node: Node) -> Subject:
    """(name, kinds) of a classified node, for the recipe's patterns."""
    return place(node), kinds_of(node)


def base_name(node: Node) -> str:
    """The name of a layer output, without a number."""
    layer = node.meta.get(LAYER)
    if layer is not None:
        return layer.path or layer.kind.__name__.lower()
    return ".".join(filter(None, (around(node), name_of(node).strip("_"))))


def _name_of_output(node: Node, called: set[str]) -> str:
    """The name of a layer output, without a number. called: the paths of the layers that the graph calls."""
    weight = node.args[1] if len(node.args) > 1 else None
    if name_of(node) == "linear" and "MultiheadAttention" in kinds_around(node) and isinstance(weight, Node):
        parameter = weight.meta[ARGUMENT] if weight.meta.get(HOLDS) == "parameter" else ""
        owner, _, name = parameter.rpartition(".")
        inside = f"{around(node)}." if around(node) else ""
        if name == "weight" and owner not in ("", around(node), *called) and owner.startswith(inside):
            return owner
    return base_name(node)


def name_places(graph: Graph) -> None:
    """Writes ``node.meta[NAME]``: see ``place``. A parameter is one place, however often it is read."""
    names: dict[Node, str] = {}
    called = {node.meta[LAYER].path for node in graph.nodes if node.meta.get(LAYER) is not None}
    for node in graph.nodes:
        if node.meta[PART] == "parameter":
            derived = derived_name(f"{node.meta[LAYER].path}.") if is_derived(node) else None
            node.meta[NAME] = derived or node.meta.get(PARAMETER) or node.meta.get(ARGUMENT) or node.name
        elif node.meta[PART] in ("input", *LAYER_PARTS, *MEANINGS):
            is_input = node.op == "placeholder"
            names[node] = node.meta.get(ARGUMENT, node.name) if is_input else _name_of_output(node, called)
        elif node.op == "placeholder":
            node.meta[NAME] = node.meta.get(ARGUMENT, node.name)
    calls = Counter(name for node, name in names.items() if node.op != "placeholder")
    numbers: dict[str, Iterator[int]] = defaultdict(lambda: count(1))
    for node, name in names.items():
        if node.op == "placeholder":
            node.meta[NAME] = f"{name}@0" if name in calls else name
        else:
            # A module may itself be named relu@1.
            numbered = (f"{name}@{number}" for number in numbers[name])
            node.meta[NAME] = name if calls[name] == 1 else next(each for each in numbered if each not in calls)


def parameter_subjects(root: nn.Module) -> dict[str, tuple[Subject, ...]]:
    """First name of each parameter -> its subjects for the recipe's patterns: all its names, with its layers' kinds."""
    names: dict[int, str] = {id(parameter): name for name, parameter in root.named_parameters()}
    subjects: dict[str, list[Subject]] = {name: [] for name in names.values()}
    for path, module in root.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full = f"{path}.{name}" if path else name
            aliases = [full]
            if derived := derived_name(full):  # ``fc.weight`` is made of it: its name matches this too
                module = root.get_submodule(derived.rpartition(".")[0])
                aliases.append(derived)
            subjects[names[id(parameter)]] += [parameter_subject(alias, module) for alias in aliases]
    return {name: tuple(each) for name, each in subjects.items()}


def parameter_subject(name: str, module: nn.Module) -> Subject:
    """(name, kinds) of a parameter of ``module``, for the recipe's patterns."""
    return name, kinds_of_type(type(module), layer_part(type(module)) or "parameter")


# ``fc.parametrizations.weight.original0``: the layer, with the dot after it, and the derived tensor.
_DERIVED = re.compile(r"((?:.+\.)?)parametrizations\.([^.]+)\.")


def derived_name(parameter: str) -> str | None:
    """``fc.weight``, of ``fc.parametrizations.weight.original0``; None if nothing is derived from ``parameter``."""
    return derived[1] + derived[2] if (derived := _DERIVED.match(parameter)) else None


def originals(root: nn.Module) -> tuple[str, ...]:
    """First names of the parameters that a parametrization derives weights from."""
    return tuple(name for name, _ in root.named_parameters() if _DERIVED.match(name))


def is_derived(node: Node) -> bool:
    """Whether ``node`` is computed inside a parametrization, to derive a weight."""
    layer = node.meta.get(LAYER)
    return layer is not None and issubclass(layer.kind, ParametrizationList)
