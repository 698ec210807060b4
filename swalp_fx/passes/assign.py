"""Which numbers are rounded, to which format, and which random stream rounds them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from torch import Tensor, nn
from torch.fx import Graph, Node

from ..capture import ConvertError, name_of
from ..formats import FLOAT
from ..recipe import Recipe, Subject
from .classify import LAYER_PARTS, PART, attribute, is_derived, kinds_of, parameter_subjects, place

__all__ = ["SITE", "Output", "Scope", "Site", "Weight", "assign", "parameters_read", "subjects"]

ADDS = ("add", "iadd")

SITE = "swalp_fx.site"  # the node.meta key that assign writes: a Site


@dataclass(frozen=True)
class Weight:
    """One quantized parameter, or weight that a parametrization derives: Q_W."""

    parameter: str  # its first name in the model; a tied parameter is one. Of a derived weight, what derives it
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
    returned: bool = False  # whether the model returns it rounded too


@dataclass(frozen=True)
class Scope:
    """Where a graph's root stands in the model whose names the recipe uses: ``Scope.of(root)`` is the model itself."""

    path: str = ""
    parameters: dict[str, tuple[Subject, ...]] = field(default_factory=dict)  # by their names in the root

    @classmethod
    def of(cls, root: nn.Module) -> Scope:
        return cls("", parameter_subjects(root))

    def subject(self, node: Node, root: nn.Module) -> Subject:
        """What the recipe sees of a classified node."""
        return place(node, self.path), kinds_of(node, root)


@dataclass(frozen=True)
class Site:
    """What is quantized around one node."""

    weights: tuple[tuple[str, Weight], ...] = ()  # the parameters it reads, by their names in the module it calls
    output: Output | None = None


def assign(
    graph: Graph, root: nn.Module, recipe: Recipe, *, scope: Scope | None = None, identity: bool = False
) -> Graph:
    """Writes ``node.meta[SITE]`` on every node with something to quantize; returns the classified ``graph``.

    Streams are numbered in the order of the graph. A role in ``float`` has no site; with ``identity`` it has, so that
    a graph full of nodes can be shown to compute what the model computes.

        conv = self.conv(x)         Site(weights=(("weight", Weight("conv.weight", 0, "bfp8[0]", "stochastic")),),
                                         output=Output(1, "bfp8[0]", "bfp8[0]", "stochastic"))
        relu = torch.relu(conv)     Site(output=Output(2, "bfp8[0]", "bfp8[0]", "stochastic"))
        fc = self.fc(relu)          Site(weights=(("weight", Weight("fc.weight", 3, ...)),))    the logits: no output
        return fc
    """
    scope = scope or Scope.of(root)
    names = {id(parameter): name for name, parameter in root.named_parameters()}
    local = {name: recipe.at(*subjects) for name, subjects in scope.parameters.items()}
    placed = _placed(graph, root, recipe, scope)
    streams = count()
    weights: dict[str, Weight] = {}
    for node in graph.nodes:
        site_weights = []
        for alias, parameter in parameters_read(node, root):
            name = names[id(parameter)]
            if local[name].weight == FLOAT and not identity:
                continue
            if local[name].weight != FLOAT:
                _refuse_renormalised(node, alias, root)
            if is_derived(node, root):
                site_weights = [("", Weight(str(node.target), next(streams), str(local[name].weight), recipe.rounding))]
                break
            if name not in weights:
                weights[name] = Weight(name, next(streams), str(local[name].weight), recipe.rounding)
            site_weights.append((alias, weights[name]))
        output = None
        if node in placed:
            here = recipe.at(scope.subject(node, root))
            if identity or here.activation != FLOAT or here.error != FLOAT:
                formats = str(here.activation), str(here.error), recipe.rounding
                output = Output(next(streams), *formats, returned=recipe.quantize_logits)
        if site_weights or output:
            node.meta[SITE] = Site(tuple(site_weights), output)
    return graph


def subjects(graph: Graph, root: nn.Module, scope: Scope) -> Iterator[Subject]:
    """All of a classified graph that a recipe may name: its inputs and outputs. (Parameters are the model's.)"""
    return (scope.subject(node, root) for node in graph.nodes if node.meta[PART] in ("input", *LAYER_PARTS))


def _placed(graph: Graph, root: nn.Module, recipe: Recipe, scope: Scope) -> set[Node]:
    """The nodes whose output is rounded.

    every               each layer output
    compute             those of convolutions, linear layers, products, attention, recurrent layers, embeddings
    compute+activation  and those of activations
    group               the last of each group: see _group_ends

    and what the recipe includes, without what it excludes. The model's inputs, and what it only returns, are rounded
    if the recipe says so.
    """
    ends = _group_ends(graph) if recipe.placement == "group" else set()
    parts = LAYER_PARTS if recipe.placement == "every" else recipe.placement.split("+")
    placed = set()
    for node in graph.nodes:
        part = node.meta[PART]
        if part not in ("input", *LAYER_PARTS):
            continue
        name = place(node, scope.path)
        if part == "input":
            wanted = recipe.quantize_input and any(user.meta[PART] != "number" for user in node.users)
        else:
            wanted = node in ends or part in parts or recipe.includes(name)
            wanted = wanted and (_is_read(node) or (recipe.quantize_logits and bool(node.users)))
        if wanted and not recipe.excludes(name):
            placed.add(node)
    return placed


def _group_ends(graph: Graph) -> set[Node]:
    """The last node of each group: what hardware computes in one go before it writes anything to memory.

    A group begins at a compute node, or at a norm or an activation that is in no group yet. While its last node has
    one reader, it goes on through a norm, an activation, or an add that only an activation reads. Where two groups
    meet in an add, the one that began first goes on.

        conv -> norm -> relu            one group, rounded after relu
        conv -> norm -> add -> relu     one group; the add's other operand ends a group of its own
    """
    ends, grouped = set(), set()
    for node in graph.nodes:
        if node in grouped or node.meta[PART] not in ("compute", "norm", "activation"):
            continue
        grouped.add(node)
        while (following := _goes_on(node)) is not None and following not in grouped:
            node = following
            grouped.add(node)
        ends.add(node)
    return ends


def _goes_on(node: Node) -> Node | None:
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if user.meta[PART] in ("norm", "activation"):
        return user if user.all_input_nodes[0] is node else None  # not its weight
    if user.meta[PART] == "arithmetic" and name_of(user).rstrip("_") in ADDS and len(user.users) == 1:
        return user if next(iter(user.users)).meta[PART] == "activation" else None
    return None


def parameters_read(node: Node, root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The floating parameters that ``node`` reads, by their names in the module it calls ("" for an attribute)."""
    if node.op == "get_attr" and node.meta[PART] == "parameter":
        named = iter([("", attribute(root, str(node.target)))])
    elif node.op == "call_module":
        named = root.get_submodule(str(node.target)).named_parameters(remove_duplicate=False)
    else:
        return
    yield from ((name, parameter) for name, parameter in named if parameter.is_floating_point())


def _refuse_renormalised(node: Node, alias: str, root: nn.Module) -> None:
    """Raises ConvertError if the layer whose weight is ``alias`` in ``node``'s module writes into it in its forward."""
    if node.op != "call_module":
        return
    path = ".".join(filter(None, [str(node.target), alias.rpartition(".")[0]]))
    layer = root.get_submodule(path)
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.max_norm is not None:
        raise ConvertError(
            f"{path or 'the model'}: max_norm makes {type(layer).__name__} write into its weight in its forward, where "
            "a graph reads a rounded one; use max_norm=None, or a rule that leaves the weight in float"
        )


def _is_read(node: Node) -> bool:
    """Whether a later layer reads it: what the model only returns (its logits) is left as it is."""
    return any(user.meta[PART] not in ("exit", "output") for user in node.users)
