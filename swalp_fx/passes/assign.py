"""The rounding plan: which numbers are rounded, to which format, and by which random stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph, Node

from ..random import free_stream
from ..recipe import Recipe, Subject
from ..warn import warn
from .captured import CARRIED, KEPT, LAYER, PARAMETER, UPDATE, Scope
from .classify import OUT
from .copies import Copies
from .expand import inside
from .facts import MEANINGS, is_number
from .fit import axis_by_reader, contraction_axes, fitted, of_parameter
from .names import PART, base_name, derived_name, is_derived, place, subject
from .operations import name_of
from .purpose import Attention
from .recurrent import inside_recurrent
from .tables import LAYER_PARTS

__all__ = ["SITE", "Output", "Site", "Weight", "assign", "left_out", "subjects"]

ADDS = ("add", "iadd")

OTHER_AXIS = (
    "{0} is the weight of a {1}, which contracts its axis {2}, but no convolution holds it, so that {3} runs along its "
    "last axis; name the axis: rules=[{0} W={4}]"
)

UNSEEN = (
    "{} is not rounded: {} writes into its memory, which is read under another name too, and a rounded copy would not "
    "show that; write out of place there, as in x = x + y"
)
WRITTEN = (
    "the input {} is not rounded: {} writes into it, and from a rounded copy the caller would not see that; clone the "
    "input first"
)
HIDDEN = "{} writes into the rounded copy of {}, so that the caller does not see it in the input; clone the input first"

SITE = "swalp_fx.site"  # the node.meta key that assign writes: a Site


@dataclass(frozen=True)
class Weight:
    """One quantized parameter, or one weight derived by a parametrization: Q_W."""

    parameter: str  # its first name in the model; tied parameters are one. A derived weight: ``fc.weight``
    stream: int
    quantizer: str
    rounding: str  # for a quantizer that names no rounding


@dataclass(frozen=True)
class Output:
    """One quantized layer output: Q_A forward, Q_E backward."""

    stream: int
    activation: str
    error: str
    rounding: str  # for a quantizer that names no rounding
    returned: bool = False  # whether the model returns it rounded too


@dataclass(frozen=True)
class Site:
    """The rounding plan of one node: of a parameter, or of a layer's output."""

    weight: Weight | None = None
    output: Output | None = None


def assign(graph: Graph, recipe: Recipe, scope: Scope, *, identity: bool = False) -> Graph:
    """Writes ``node.meta[SITE]`` on every node with something to quantize; returns the classified ``graph``.

    A stream is a hash of the place, so the order of making graphs has no influence. A role in ``float`` has no site.
    ``identity`` it has one: tests compare a graph full of identity nodes with the model.

        conv_weight = placeholder                Site(weight=Weight("conv.weight", 2750919342, "bfp8[0]", "stochastic"))
        conv = conv2d(x, conv_weight, ...)       Site(output=Output(1325632447, "bfp8[0]", "bfp8[0]", "stochastic"))
        relu = relu(conv)                        Site(output=Output(3041826051, "bfp8[0]", "bfp8[0]", "stochastic"))
        fc = linear(relu, fc_weight, fc_bias)    the logits: no output
        return fc
    """
    placed = _placed(graph, recipe, scope)
    axes, copies = contraction_axes(graph), Copies(graph)
    for node in graph.nodes:
        weight = output = None
        if node.meta[PART] == "parameter":
            weight = _weight(node, recipe, scope, identity)
        elif node in placed:
            here = recipe.at(subject(node))
            if identity or here.activation.rounds or here.error.rounds:
                activation, error = (fitted(each, node, axes[node]) for each in (here.activation, here.error))
                returned = is_rounded_where_returned(recipe, scope) or _is_kept(node) or _shows_a_write(node, copies)
                stream = _output_stream(node, scope)
                if _may_be_copied(node, copies, scope):
                    output = Output(stream, activation, error, recipe.rounding, returned)
        if weight or output:
            node.meta[SITE] = Site(weight, output)
    return graph


def left_out(graph: Graph, recipe: Recipe) -> list[str]:
    """The places of outputs with a format and no site; empty if any output of the assigned graph has a site.

    They tell that placement and exclude leave nothing rounded. A graph that runs others (a checkpoint) gives none.
    """
    found = []
    for node in graph.nodes:
        site = node.meta.get(SITE)
        if (site is not None and site.output is not None) or node.meta[PART] == "nested":
            return []
        if node.meta[PART] in LAYER_PARTS and not _is_integral(node) and _is_read(node):
            here = recipe.at(subject(node))
            found += [place(node)] if here.activation.rounds or here.error.rounds else []
    return found


def is_rounded_where_returned(recipe: Recipe, scope: Scope) -> bool:
    """Whether a graph returns rounded outputs: the recipe rounds logits, or another graph reads them."""
    return recipe.quantize_logits or not scope.returns


def _weight(node: Node, recipe: Recipe, scope: Scope, identity: bool) -> Weight | None:
    value = node.meta.get("example_value")
    if value is not None and not value.is_floating_point():
        return None
    name = place(node)
    if is_derived(node):  # perhaps of several parameters; the first says how the weight is rounded
        beginning = f"{node.meta[LAYER].path}."
        subjects = next((each for key, each in scope.parameters.items() if key.startswith(beginning)), None)
        if subjects is None:
            return None
    elif (name := node.meta.get(PARAMETER, "")) in scope.parameters and not derived_name(name):
        subjects = scope.parameters[name]
    else:  # rounded at the call of a checkpoint that reads it; or a weight is derived of it, and that is rounded
        return None
    rank = 2 if value is None else value.dim()
    weight = of_parameter(recipe, subjects, rank).weight
    if (found := axis_by_reader(node, scope.bodies)) is not None:
        convolution, axis = found
        if (along := recipe.at(*subjects).of_tensor(rank, axis).weight) != weight:
            warn(OTHER_AXIS.format(name, convolution, axis, weight, along))
    if not (identity or weight.rounds):
        return None
    return Weight(name, free_stream(scope.streams, name), str(weight), recipe.rounding)


def _output_stream(node: Node, scope: Scope) -> int:
    """The stream of a place: module, operation, number of earlier calls of it, and the graph's place in its module."""
    name, operation = (place(node), "input") if node.op == "placeholder" else (base_name(node), _operation_of(node))
    number = scope.uses[name, operation]
    scope.uses[name, operation] += 1
    return free_stream(scope.streams, name, operation, str(number), scope.place)


def _operation_of(node: Node) -> str:
    layer = node.meta.get(LAYER)
    return layer.kind.__name__ if layer is not None and issubclass(layer.kind, Attention) else name_of(node)


def subjects(graph: Graph) -> Iterator[Subject]:
    """The inputs and outputs of a classified graph that a recipe may name. Parameters are named in the model."""
    for node in graph.nodes:
        if node.meta.get(PART) in ("input", *LAYER_PARTS, *MEANINGS):
            yield subject(node)
        yield from inside(node)
        yield from inside_recurrent(node)


def _placed(graph: Graph, recipe: Recipe, scope: Scope) -> set[Node]:
    """The nodes with rounded outputs, by the recipe's placement.

    every               each layer output
    compute             outputs of convolutions, linear layers, products, attention, recurrent layers, embeddings
    compute+activation  and outputs of activations
    group               the last of each group: see _group_ends

    The recipe's include adds outputs, constants too; its exclude takes outputs away. The model's inputs, and outputs
    that it only returns, are rounded if the recipe says so.
    """
    ends = _group_ends(graph) if recipe.placement == "group" else set()
    parts = LAYER_PARTS if recipe.placement == "every" else recipe.placement.split("+")
    returned = is_rounded_where_returned(recipe, scope)
    placed = set()
    for node in graph.nodes:
        part = node.meta[PART]
        if part not in ("input", *LAYER_PARTS, *MEANINGS) or _is_integral(node):
            continue
        name = place(node)
        if part == "input":
            is_number = all(user.meta[PART] == "number" for user in node.users)
            wanted = recipe.quantize_input and scope.enters and not is_number
        else:
            wanted = node in ends or part in parts or recipe.includes(name)  # a constant, only if included
        is_read = _is_read(node) or (returned and bool(node.users))
        if wanted and is_read and not recipe.excludes(name):
            placed.add(node)
    return placed


def _group_ends(graph: Graph) -> set[Node]:
    """The last node of each group: hardware computes a group in one go and writes only its end to memory.

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
    readers = _readers(node)
    if len(readers) != 1:
        return None
    (user,) = readers
    if user.meta[PART] in ("norm", "activation"):
        is_weight = node in user.all_input_nodes[1:]
        return None if is_weight else user
    if user.meta[PART] == "arithmetic" and name_of(user).rstrip("_") in ADDS:
        behind = [reader.meta[PART] for reader in _readers(user)]
        return user if behind == ["activation"] else None
    return None


def _readers(node: Node) -> set[Node]:
    """The readers of ``node``. A layer counts as one reader: its output node."""
    readers = ((_readers(user) if user.meta[PART] == "inside" else {user}) for user in node.users)
    return set().union(*readers)


def _shows_a_write(node: Node, copies: Copies) -> bool:
    """Whether what ``node`` returns would miss a write if it were not the rounded copy."""

    def leaves(reader: Node) -> bool:
        is_kept = reader.op == "output" and (node.meta.get(KEPT) or node.meta.get(CARRIED))
        return reader.meta[PART] in OUT and not is_kept

    return copies.missed(node, leaves) is not None


def _may_be_copied(node: Node, copies: Copies, scope: Scope) -> bool:
    """Whether no write is lost if all readers of ``node`` read a rounded copy of it. Warns of a write that is."""
    is_given = node.op == "placeholder"
    if (writer := copies.writer_into_memory(node) if is_given else copies.missed(node, lambda _: False)) is not None:
        warn((WRITTEN if is_given else UNSEEN).format(place(node), name_of(writer)))
        return False
    if scope.enters and copies.is_given(node) and (writer := copies.writer_into_copy(node)) is not None:
        warn(HIDDEN.format(name_of(writer), place(node)))  # the model's own numbers are right
    return True


def _is_integral(node: Node) -> bool:
    """Whether ``node`` gives integers or truth values, such as indices: no format holds them."""
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and not is_number(value)


def _is_read(node: Node) -> bool:
    """Whether a later layer or a later call reads it. An output that is only returned, as logits are, is not read."""
    return _is_kept(node) or node.meta.get(CARRIED, False) or any(user.meta[PART] not in OUT for user in node.users)


def _is_kept(node: Node) -> bool:
    """Whether a buffer is set to it."""
    return bool(node.meta.get(UPDATE))
