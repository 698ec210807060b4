"""The rows of ``report``: each place of a converted model once, also if several graphs have it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Node

from ..capture import Conversion, Rewritten
from ..formats import FLOAT
from ..passes import recipes_of_parameters
from ..passes.captured import LAYER, PARAMETER
from ..passes.classify import OUT
from ..passes.names import PART, is_derived, parameter_subjects, place
from ..passes.operations import is_torch, name_of
from ..passes.purpose import Attention
from ..passes.rounding import ACTIVATION, WEIGHT, Rounding
from ..passes.tables import LAYER_PARTS, layer_part
from ..recipe import Quantizer, Recipe
from .graphs import inlined

__all__ = ["DERIVED", "Row", "operation_of", "parameter_of", "rows", "stored_bits"]

# The operation of a row that is no layer's output.
PARAMETER_ROW, DERIVED = "parameter", "derived weight"
# Functions that compute several steps in one node: the graph does not see these steps.
WHOLE_FUNCTIONS = (
    "scaled_dot_product_attention", "_native_multi_head_attention", "_transformer_encoder_layer_fwd",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    name: str  # of its place
    operation: str
    formats: tuple[str, str, str, str, str]  # specs of W A E G M; "" for a role that it does not have
    weights: dict[str, str]  # qualified name -> spec, of every parameter that it reads
    size: int = 0  # values in the parameters that no earlier row has read
    bits: int = 0  # stored bits of these
    unrounded: str = ""  # why its output is in float, if it is
    whole: str = ""  # the name of the layer or function, if the graph does not see its inner steps
    is_written_norm: bool = False  # whether it is a norm of the model's own code, no layer of PyTorch's
    # If another graph rounds its output: each graph that leaves it in float -> why.
    exceptions: dict[str, str] = field(default_factory=dict)

    @property
    def has_output(self) -> bool:
        return self.operation not in (PARAMETER_ROW, DERIVED)


def rows(conversion: Conversion) -> list[Row]:
    """A row for each layer's output, and for each parameter that is read outside of a layer, in the order of the
    graphs. Before the first call: a row for each parameter."""
    parameters = _Parameters(conversion)
    found: dict[tuple[str, bool], Row] = {}
    for made in conversion.graphs:
        for row in _rows_of(made, conversion.recipe, parameters):
            key = row.name, row.has_output
            found[key] = _merged(found[key], row, made) if key in found else row
    if not conversion.graphs:
        found = {(name, False): parameters.row(name, {name: spec}) for name, spec in parameters.specs().items()}
    return list(parameters.counted(found.values()))


class _Parameters:
    """The parameters of a model, by their first names, with their formats."""

    def __init__(self, conversion: Conversion) -> None:
        self._parameters = dict(conversion.root.named_parameters())
        self._recipes = recipes_of_parameters(conversion.root, conversion.recipe)
        self._written = {
            name: conversion.recipe.at(*each) for name, each in parameter_subjects(conversion.root).items()
        }
        self._floating = {name for name, parameter in self._parameters.items() if parameter.is_floating_point()}

    def specs(self) -> dict[str, str]:
        """Name -> the quantizer of W, as text."""
        return {name: str(each.weight if name in self._floating else FLOAT) for name, each in self._recipes.items()}

    def row(self, name: str, weights: dict[str, str], operation: str = PARAMETER_ROW, spec: str | None = None) -> Row:
        """A row of parameters; ``spec`` replaces their own format of W."""
        return Row(name, operation, self.formats(weights, spec=spec), weights)

    def formats(
        self, weights: dict[str, str], activation: str = "", error: str = "", spec: str | None = None
    ) -> tuple[str, str, str, str, str]:
        local = {name: self._recipes[name] for name in weights if name in self._floating}
        gradient, momentum = (
            self._one(role, {name: str(getattr(each, role)) for name, each in local.items()})
            for role in ("gradient", "momentum")
        )
        return self._one("weight", weights) if spec is None else spec, activation, error, gradient, momentum

    def _one(self, role: str, specs: dict[str, str]) -> str:
        """The specs as one text: each of the recipe's once, resolved for the parameter with the most axes."""
        found: dict[str, str] = {}
        for name in sorted(specs, key=lambda name: -self._parameters[name].dim() if name in self._parameters else 0):
            written = str(getattr(self._written[name], role)) if name in self._written else specs[name]
            found.setdefault(written, specs[name])
        return "/".join(dict.fromkeys(found.values()))

    def counted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows with their sizes: a parameter counts at the first row that reads it."""
        counted: set[str] = set()
        for row in rows:
            new = row.weights.keys() - counted
            counted |= new
            own = {name: self._parameters[name] for name in new if name in self._parameters}
            bits = sum(stored_bits(row.weights[name], parameter) for name, parameter in own.items())
            yield replace(row, size=sum(parameter.numel() for parameter in own.values()), bits=bits)


def stored_bits(spec: str, parameter: Tensor) -> int:
    """Bits of a parameter in the format of the quantizer ``spec``, scales included; in ``float``, bits of its dtype."""
    quantizer = Quantizer.parse(spec)
    if quantizer.rounds:
        return quantizer.format.stored_bits(parameter.shape)
    return 8 * parameter.element_size() * parameter.numel()


def _merged(first: Row, again: Row, made: Rewritten) -> Row:
    """One row for the same place in two graphs: rounded, if one of them rounds it."""
    weights = first.weights | again.weights
    if first.unrounded and not again.unrounded:
        first, again = again, first
    exceptions = dict(first.exceptions)
    if again.unrounded and not first.unrounded:
        exceptions[made.entry] = again.unrounded
    return replace(first, weights=weights, exceptions=exceptions)


def _rows_of(made: Rewritten, recipe: Recipe, parameters: _Parameters) -> Iterator[Row]:
    graph = inlined(made.graph_module).graph
    in_layer: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if LAYER in node.meta and not is_derived(node):
            in_layer.setdefault(node.meta[LAYER].call, []).append(node)
    for node in graph.nodes:
        if LAYER not in node.meta and node.op.startswith("call") and Rounding.of(node, WEIGHT) is None:
            yield from _bare(node, parameters)
        elif not is_derived(node):
            yield from (row for row in _bare(node, parameters) if row.operation == DERIVED)
        if node.meta.get(PART) not in LAYER_PARTS:
            continue
        together = in_layer[node.meta[LAYER].call] if LAYER in node.meta else []
        weights = dict(each for one in together for each in _read(one))
        output = next((found for user in node.users if (found := Rounding.of(user, ACTIVATION)) is not None), None)
        activation, error = output.quantizers.values() if output is not None else ("", "")
        yield Row(
            place(node),
            operation_of(node),
            parameters.formats(weights, activation, error),
            weights,
            unrounded="" if output is not None else _why_unrounded(node, recipe),
            whole=_whole(node, together),
            is_written_norm=_is_written(node) and node.meta[PART] == "norm",
        )


def _bare(reader: Node, parameters: _Parameters) -> Iterator[Row]:
    """A row for each parameter, or derived weight, that ``reader`` reads."""
    for source in reader.all_input_nodes:
        read, spec = _weight(source)
        if read.meta.get(PART) != "parameter" or reader.meta.get(PART) == "number":
            continue
        if not is_derived(read):
            yield parameters.row(place(read), {place(read): spec})
        else:
            beginning = f"{read.meta[LAYER].path}."
            derived = {name: str(FLOAT) for name in parameters.specs() if name.startswith(beginning)}
            yield parameters.row(place(read), derived, DERIVED, spec)


def parameter_of(node: Node) -> str:
    """The qualified name of the parameter, or derived weight, that ``node`` is or rounds; "" if there is none."""
    read, _ = _weight(node)
    return place(read) if read.meta.get(PART) == "parameter" else ""


def _read(node: Node) -> Iterator[tuple[str, str]]:
    """(name, spec) of each parameter that ``node`` reads."""
    for source in node.all_input_nodes:
        read, spec = _weight(source)
        if PARAMETER in read.meta:
            yield read.meta[PARAMETER], spec


def _weight(node: Node) -> tuple[Node, str]:
    """(the weight that ``node`` rounds, its quantizer); ``node`` itself, in float, if it rounds none."""
    rounding = Rounding.of(node, WEIGHT)
    return (node, str(FLOAT)) if rounding is None else (rounding.source, rounding.forward)


def operation_of(node: Node) -> str:
    """The type of a layer, or the name of a function: ``Conv2d``, ``relu``."""
    if is_derived(node):
        return DERIVED
    return node.meta[LAYER].kind.__name__ if LAYER in node.meta else name_of(_called(node))


def _called(node: Node) -> Node:
    """``node``; or, if it is one output of a function with a backward of its own, the call of that function."""
    source = node.args[0] if name_of(node) == "getitem" and node.args else None
    if (rounding := Rounding.of(source, ACTIVATION)) is not None:
        source = rounding.source
    return source if isinstance(source, Node) and isinstance(source.target, HigherOrderOperator) else node


def _why_unrounded(node: Node, recipe: Recipe) -> str:
    if all(user.meta.get(PART) in OUT for user in node.users) and not recipe.quantize_logits:
        return "the model's output"
    if recipe.excludes(place(node)):
        return "the recipe excludes it"
    return f"not in placement {recipe.placement}" if recipe.placement != "every" else "a rule says so"


def _is_written(node: Node) -> bool:
    """Whether ``node`` is of a user's module that counts as one operation: a norm, or whole by the recipe."""
    kind = node.meta[LAYER].kind if LAYER in node.meta else Attention
    return not issubclass(kind, Attention) and layer_part(kind) is None


def _whole(node: Node, layer: list[Node]) -> str:
    """The name of the layer or function with inner steps that no graph sees; "" if ``node`` is none."""
    if layer:
        is_whole = any(name_of(each) in WHOLE_FUNCTIONS for each in layer)
        is_whole = is_whole or (_is_written(node) and node.meta[PART] != "norm")
        return (node.meta[LAYER].path or place(node)) if is_whole else ""
    called = _called(node)
    is_foreign = isinstance(called.target, HigherOrderOperator) or (
        called.op == "call_function" and not is_torch(called.target)
    )
    return place(called) if name_of(called) in WHOLE_FUNCTIONS or is_foreign else ""
