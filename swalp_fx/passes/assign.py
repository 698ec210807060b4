"""Which format each number is kept in, and which random stream rounds it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from torch import Tensor, nn
from torch.fx import Graph, Node

from ..formats import FLOAT
from ..recipe import Recipe
from .classify import LAYER_PARTS, PART, attribute

__all__ = ["SITE", "Output", "Site", "Weight", "assign", "parameters_read"]

SITE = "swalp_fx.site"  # the node.meta key that assign writes: a Site


@dataclass(frozen=True)
class Weight:
    """One quantized parameter: Q_W."""

    parameter: str  # its first name in the model; a tied parameter is one parameter
    stream: int
    format: str
    rounding: str


@dataclass(frozen=True)
class Output:
    """One quantized layer output: Q_A forward, Q_E backward."""

    stream: int
    activation: str
    error: str
    rounding: str


@dataclass(frozen=True)
class Site:
    """What is quantized around one node."""

    weights: tuple[tuple[str, Weight], ...] = ()  # the parameters it reads, by their names in the module it calls
    output: Output | None = None


def assign(graph: Graph, root: nn.Module, recipe: Recipe, *, identity: bool = False) -> Graph:
    """Writes ``node.meta[SITE]`` on every node with something to quantize; returns the classified ``graph``.

    Streams are numbered in the order of the graph. A role in ``float`` has no site; with ``identity`` it has, so that
    a graph full of nodes can be shown to compute what the model computes.

        conv = self.conv(x)         Site(weights=(("weight", Weight("conv.weight", 0, "bfp8[0]", "stochastic")),),
                                         output=Output(1, "bfp8[0]", "bfp8[0]", "stochastic"))
        relu = torch.relu(conv)     Site(output=Output(2, "bfp8[0]", "bfp8[0]", "stochastic"))
        fc = self.fc(relu)          Site(weights=(("weight", Weight("fc.weight", 3, ...)),))    the logits: no output
        return fc
    """
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    quantize_weights = identity or recipe.weight != FLOAT
    quantize_outputs = identity or recipe.activation != FLOAT or recipe.error != FLOAT
    streams = count()
    weights: dict[int, Weight] = {}
    for node in graph.nodes:
        site_weights = []
        for name, parameter in parameters_read(node, root) if quantize_weights else ():
            if id(parameter) not in weights:
                weights[id(parameter)] = Weight(
                    names[id(parameter)], next(streams), str(recipe.weight), recipe.rounding
                )
            site_weights.append((name, weights[id(parameter)]))
        output = None
        if quantize_outputs and node.meta[PART] in LAYER_PARTS and _is_read(node):
            output = Output(next(streams), str(recipe.activation), str(recipe.error), recipe.rounding)
        if site_weights or output:
            node.meta[SITE] = Site(tuple(site_weights), output)
    return graph


def parameters_read(node: Node, root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floating parameters that ``node`` reads, by their names in the module it calls ("" for an attribute)."""
    if node.meta[PART] == "parameter":
        named = iter([("", attribute(root, str(node.target)))])
    elif node.op == "call_module":
        named = root.get_submodule(str(node.target)).named_parameters(remove_duplicate=False)
    else:
        return
    yield from ((name, parameter) for name, parameter in named if parameter.is_floating_point())


def _is_read(node: Node) -> bool:
    """Whether a later layer reads it: what the model only returns (its logits) is left as it is."""
    return any(user.meta[PART] not in ("exit", "output") for user in node.users)
