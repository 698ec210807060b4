"""``report``: a rewritten module as a table: who got which format, and why."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from . import nodes
from .capture import ConvertError
from .formats import FLOAT, parse
from .passes import RewrittenModule, recipes_of_parameters
from .passes.classify import LAYER_PARTS, PART, name_of
from .recipe import ROLES

__all__ = ["report"]

# Layers that compute much on their own, out of the graph's sight.
WHOLE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def report(module: RewrittenModule, *inputs: Any) -> str:
    """One row a layer: its name, operation, output shape, the formats of W A E G M, and parameters; then totals.

    With ``inputs``, a copy of the module runs on them once, in eval mode, to fill in the shapes. A ``-`` is a role
    that stays in float or that the layer has not; the lines below the table say why. A parameter that several layers
    read is counted at the first.
    Raises ConvertError for a module that is not rewritten.
    """
    if not isinstance(module, RewrittenModule):
        raise ConvertError(f"report takes the module that convert returns, not a {type(module).__name__}")
    layers = list(_layers(module))
    shapes = _shapes(module, inputs) if inputs else {}
    header = ["layer", "operation", *(["output"] if inputs else []), "W", "A", "E", "G", "M", "parameters"]
    rows = [
        [
            layer.name,
            layer.operation,
            *([shapes.get(layer.node, "")] if inputs else []),
            *("-" if spec in ("", str(FLOAT)) else spec for spec in layer.formats),
            f"{layer.size:,}" if layer.size else "",
        ]
        for layer in layers
    ]
    table = tabulate(rows, header, colalign=["left"] * (len(header) - 1) + ["right"], disable_numparse=True)
    return "\n".join([table, "", *_totals(module, layers), "", "in float:", *_floats(module, layers)])


@dataclass(frozen=True)
class _Layer:
    """One row of the table."""

    node: str  # its name in the graph
    name: str  # qualified; of the module around it, if it is a function
    operation: str
    formats: tuple[str, str, str, str, str]  # specs of W A E G M; "" for a role that it has not
    weights: dict[str, str]  # qualified name -> spec, of every parameter that it reads
    size: int  # values in the parameters that no earlier row has read
    unrounded: str  # why its output is in float, if it is


def _layers(module: RewrittenModule) -> Iterator[_Layer]:
    counted: set[int] = set()
    recipes = {
        id(module.get_parameter(name)): each for name, each in recipes_of_parameters(module, module.recipe).items()
    }
    for node in module.graph.nodes:
        if node.meta.get(PART) not in LAYER_PARTS and not _is_bare_parameter(node):
            continue
        weights = _weights(node, module)
        parameters = {id(p): p for p in map(module.get_parameter, weights)}
        output = next((user for user in node.users if user.target is nodes.quantize_output), None)
        local = [recipes[key] for key in parameters]
        yield _Layer(
            node.name,
            *_names(node, module),
            (
                "/".join(dict.fromkeys(weights.values())),
                *(map(str, output.args[3:5]) if output is not None else ("", "")),
                *(
                    "/".join(dict.fromkeys(str(getattr(each, role)) for each in local))
                    for role in ("gradient", "momentum")
                ),
            ),
            weights,
            sum(parameter.numel() for key, parameter in parameters.items() if key not in counted),
            _why_unrounded(node, module),
        )
        counted |= parameters.keys()


def _why_unrounded(node: Node, module: RewrittenModule) -> str:
    recipe = module.recipe
    if all(user.meta.get(PART) in ("exit", "output") for user in node.users) and not recipe.quantize_logits:
        return "the model's output"
    path = _called(node)
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    name = path if path is not None else ".".join(filter(None, [*stack[-1:], name_of(node)]))
    if recipe.excludes(name):
        return "the recipe excludes it"
    return f"not in placement {recipe.placement}" if recipe.placement != "every" else "a rule says so"


def _is_bare_parameter(node: Node) -> bool:
    """Whether ``node`` is a parameter that something else than a layer reads: in float, or quantized."""
    if node.target is nodes.quantize_weight:
        return any(user.target is not nodes.call_layer for user in node.users)
    return node.meta.get(PART) == "parameter"


def _called(node: Node) -> str | None:
    """The qualified name of the module that ``node`` calls."""
    if node.target is nodes.call_layer:
        return str(node.args[0].target)  # type: ignore[union-attr]
    return str(node.target) if node.op == "call_module" else None


def _weights(node: Node, module: RewrittenModule) -> dict[str, str]:
    """Qualified name -> spec, of every parameter that ``node`` reads."""
    if node.target is nodes.quantize_weight:
        return {str(node.args[0].target): str(node.args[3])}  # type: ignore[union-attr]
    if node.op == "get_attr":
        return {str(node.target): str(FLOAT)}
    path = _called(node)
    if path is None:
        return {}
    bound: Any = node.args[1] if node.target is nodes.call_layer else {}
    names = [name for name, _ in module.get_submodule(path).named_parameters()]
    return {f"{path}.{name}": str(bound[name].args[3] if name in bound else FLOAT) for name in names}


def _names(node: Node, module: RewrittenModule) -> tuple[str, str]:
    """(layer, operation) of the row."""
    if (path := _called(node)) is not None:
        return path, type(module.get_submodule(path)).__name__
    if _is_bare_parameter(node):
        return next(iter(_weights(node, module))), "parameter"
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return (stack[-1] if stack else "") or node.name, name_of(node)


def _shapes(module: RewrittenModule, inputs: tuple[Any, ...]) -> dict[str, str]:
    """Each node's output shape, by its name in the graph."""
    shapes: dict[str, str] = {}

    class Shapes(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            shapes[n.name] = ", ".join("x".join(map(str, tensor.shape)) or "1" for tensor in tensors)
            return result

    with torch.no_grad():
        Shapes(copy.deepcopy(module).eval()).run(*inputs)
    return shapes


def _totals(module: RewrittenModule, layers: list[_Layer]) -> Iterator[str]:
    specs = {id(module.get_parameter(name)): spec for layer in layers for name, spec in layer.weights.items()}
    parameters = list(module.parameters())
    bits = sum(p.numel() * _bits(specs.get(id(p), str(FLOAT)), p) for p in parameters)
    values = sum(p.numel() for p in parameters)
    outputs = len(module.graph.find_nodes(op="call_function", target=nodes.quantize_output))
    formats = ", ".join(f"{number} in {spec}" for spec, number in Counter(specs.values()).items()) or "none"
    yield f"parameters  {values:,} values in {len(parameters)} tensors: {formats}"
    if values:
        share = bits / (32 * values)
        yield f"bits        {bits:,.0f}, {share:.1%} of {32 * values:,} in float32 (shared exponents not counted)"
    yield f"outputs     {outputs} of {sum(layer.operation != 'parameter' for layer in layers)} rounded"
    yield f"rounding    {module.recipe.rounding}"


def _bits(spec: str, parameter: Tensor) -> float:
    format = parse(spec)
    return 8 * parameter.element_size() if format == FLOAT else format.bits


def _floats(module: RewrittenModule, layers: list[_Layer]) -> Iterator[str]:
    """Why what is in float is in float, a line a reason."""
    graph, recipe = module.graph, module.recipe
    if by_recipe := [role for role in ROLES.values() if getattr(recipe, role) == FLOAT]:
        yield f"  {', '.join(by_recipe)}: the recipe says so"
    yield f"  {', '.join(node.name for node in graph.nodes if node.op == 'placeholder')}: the model's input"
    bare = [layer for layer in layers if layer.operation != "parameter" and layer.formats[1] == ""]
    if recipe.activation != FLOAT or recipe.error != FLOAT or len(bare) < len(layers):
        for reason in dict.fromkeys(layer.unrounded for layer in bare):
            yield f"  {', '.join(layer.name for layer in bare if layer.unrounded == reason)}: {reason}"
    moves = Counter(_names(node, module)[1] for node in graph.nodes if node.meta.get(PART) in ("movement", "exit"))
    if moves:
        yield f"  {', '.join(f'{name} x {n}' if n > 1 else name for name, n in moves.items())}: no new numbers"
    paths = dict.fromkeys(path for node in graph.nodes if (path := _called(node)) is not None)
    if whole := [path for path in paths if _is_whole(module.get_submodule(path))]:
        yield f"  inside {', '.join(whole)}: called whole, with quantized weights"
    read = {id(module.get_parameter(name)) for layer in layers for name in layer.weights}
    if unread := [name for name, parameter in module.named_parameters() if id(parameter) not in read]:
        yield f"  {', '.join(unread)}: never read"
    if module.frozen:
        names = ", ".join(path or "the model" for path in module.frozen)
        yield f"frozen: {names} branched on the training flag; the branch of the traced mode is kept in both modes"


def _is_whole(module: nn.Module) -> bool:
    return isinstance(module, WHOLE) or any(True for _ in module.children())
