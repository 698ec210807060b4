"""``report``: a rewritten module as a table: who got which format, and why."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.nn.utils.parametrize import ParametrizationList
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from . import nodes
from .capture import ROOT, name_of
from .formats import FLOAT, parse
from .passes import RewrittenModule
from .passes.classify import LAYER_PARTS, PART, PARTS, is_derived, is_torch, place
from .passes.parts import parts_of, refuse_unrewritten, rewritten_in
from .recipe import ROLES
from .table import WIDTH, folded_rows, listed, paragraph, table

__all__ = ["called_module", "names_in_report", "report"]

# Operations of rows that are no layer's output.
DERIVED = "derived weight"
PARAMETERS = ("parameter", DERIVED)
# Layers and functions that compute much on their own, out of the graph's sight. So may a layer that holds others, and
# what is not PyTorch's own.
WHOLE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
WHOLE_FUNCTIONS = ("scaled_dot_product_attention", "multi_head_attention_forward")


def report(module: nn.Module, *inputs: Any, fold: bool = False) -> str:
    """A table of at most 100 columns, one row a layer: its name, operation, output shape, the formats of W A E G M, and
    parameters. Below it totals, and what stays in float and why.

    The names are those that a recipe's rules, ``include`` and ``exclude`` take, and that ``measure`` is indexed by:
    ``layer1.0.conv1``, a function as ``layer1.0.iadd``, and the calls of a module that is called twice as
    ``layer1.0.relu@1`` and ``layer1.0.relu@2``. A name that is too long goes on in the next line. Long lists below the
    table fold names that differ in their numbers: ``layer*.*.relu@* (16)``.

    With ``inputs``, a copy of the module runs on them once, in eval mode, to fill in the shapes. A role that stays in
    float, or that the layer has not, is left out of its formats; ``-`` stands for none at all. A parameter that several
    layers read is counted at the first. With ``fold``, the layers of equal blocks have one row, where the first of them
    stood: ``layer1.*.conv2 (3)``.
    A model rewritten in parts gives one table of all its parts, and the reasons why the rest computes in float; with
    ``inputs``, also the parameters that this rest was seen to read, in float though a part may round them.
    Raises ConvertError for a module that is not rewritten.
    """
    refuse_unrewritten(module, "report")
    layers = list(_layers(module))
    shapes, bare = _run(module, inputs) if inputs else ({}, {})
    header = ["layer", "operation", *(["output"] if inputs else []), "formats", "parameters"]
    rows = [
        [
            layer.name,
            layer.operation,
            *([shapes.get(layer.node, "")] if inputs else []),
            _formats(layer),
            f"{layer.size:,}" if layer.size else "",
        ]
        for layer in layers
    ]
    rows = folded_rows(rows) if fold else rows
    totals = (paragraph(line, 12) for line in _totals(module, layers))
    floats = (paragraph(line, 4) for line in _floats(module, layers, bare))
    return "\n".join([table(header, rows, numbers=1), "", *totals, "", "in float:", *floats])


@dataclass(frozen=True)
class _Layer:
    """One row of the table."""

    node: tuple[str, str]  # the part, and the name in its graph
    name: str  # of its place
    operation: str
    formats: tuple[str, str, str, str, str]  # specs of W A E G M; "" for a role that it has not
    weights: dict[str, str]  # qualified name -> spec, of every parameter that it reads
    size: int  # values in the parameters that no earlier row has read
    unrounded: str  # why its output is in float, if it is
    whole: bool  # whether what it computes inside is out of the graph's sight

    @property
    def has_output(self) -> bool:
        return self.operation not in PARAMETERS


def _formats(layer: _Layer) -> str:
    """``WGM bfp8[0], A e4m3, E e5m2``."""
    letters: dict[str, str] = {}
    for letter, spec in zip(ROLES, layer.formats, strict=True):
        if spec not in ("", str(FLOAT)):
            letters[spec] = letters.get(spec, "") + letter
    return ", ".join(f"{roles} {spec}" for spec, roles in letters.items()) or "-"


def _layers(module: nn.Module) -> Iterator[_Layer]:
    counted: set[int] = set()
    for path, part in rewritten_in(module):
        yield from _layers_of(part, path, counted)


def _layers_of(module: RewrittenModule, path: str, counted: set[int]) -> Iterator[_Layer]:
    scope = module._options["scope"]
    recipes = {
        id(module.get_parameter(name)): module.recipe.at(*subjects) for name, subjects in scope.parameters.items()
    }
    listed_already: set[str] = set()
    for node in module.graph.nodes:
        if node.meta.get(PART) not in LAYER_PARTS and not _is_bare_parameter(node):
            continue
        name, operation = names_in_report(node, module, path)
        if operation in PARAMETERS:
            if name in listed_already:  # a weight is derived anew for each reader
                continue
            listed_already.add(name)
        weights = _weights(node, module)
        parameters = {id(p): p for p in map(module.get_parameter, weights)}
        output = next((user for user in node.users if user.target is nodes.quantize_output), None)
        local = [recipes[key] for key, parameter in parameters.items() if parameter.is_floating_point()]
        yield _Layer(
            (path, node.name),
            name,
            operation,
            (
                "/".join(dict.fromkeys(_specs(node, weights))),
                *(map(str, output.args[3:5]) if output is not None else ("", "")),
                *(
                    "/".join(dict.fromkeys(str(getattr(each, role)) for each in local))
                    for role in ("gradient", "momentum")
                ),
            ),
            {_join(path, name): spec for name, spec in weights.items()},
            sum(parameter.numel() for key, parameter in parameters.items() if key not in counted),
            _why_unrounded(node, module),
            _is_whole(node, module),
        )
        counted |= parameters.keys()


def _why_unrounded(node: Node, module: RewrittenModule) -> str:
    recipe, scope = module.recipe, module._options["scope"]
    if all(user.meta.get(PART) in ("exit", "output") for user in node.users) and not recipe.quantize_logits:
        return "the model's output"
    if recipe.excludes(place(node, scope.path)):
        return "the recipe excludes it"
    return f"not in placement {recipe.placement}" if recipe.placement != "every" else "a rule says so"


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def _is_bare_parameter(node: Node) -> bool:
    """Whether ``node`` is a parameter, or a derived weight, that something else than a layer reads: in float, or
    quantized."""
    if node.target is nodes.quantize_weight:
        return any(user.target is not nodes.call_layer for user in node.users)
    return node.meta.get(PART) == "parameter" and all(user.target is not nodes.quantize_weight for user in node.users)


def _derivation(node: Node, module: RewrittenModule) -> str | None:
    """The qualified name of the parametrization that derives the weight that ``node`` is, or rounds."""
    source = node.args[0] if node.target is nodes.quantize_weight else node
    return str(source.target) if isinstance(source, Node) and is_derived(source, module._root) else None


def called_module(node: Node) -> str | None:
    """The qualified name of the module that ``node`` calls."""
    if node.target is nodes.call_layer:
        target = str(node.args[0].target)  # type: ignore[union-attr]
        return "" if target == ROOT else target
    return str(node.target) if node.op == "call_module" else None


def _weights(node: Node, module: RewrittenModule) -> dict[str, str]:
    """Qualified name -> spec, of every parameter that ``node`` reads."""
    if (path := _derivation(node, module)) is not None:
        originals = module._root.get_submodule(path).named_parameters()
        return {_join(path, name): str(FLOAT) for name, _ in originals}
    if node.target is nodes.quantize_weight:
        return {str(node.args[0].target): str(node.args[3])}  # type: ignore[union-attr]
    if node.op == "get_attr":
        return {str(node.target): str(FLOAT)}
    path = called_module(node)
    if path is None:
        return {}
    bound: Any = node.args[1] if node.target is nodes.call_layer else {}
    names = [name for name, _ in module._root.get_submodule(path).named_parameters()]
    return {_join(path, name): str(bound[name].args[3] if name in bound else FLOAT) for name in names}


def _specs(node: Node, weights: dict[str, str]) -> list[str]:
    """What the weights that ``node`` rounds, or is given, are rounded to."""
    return [str(node.args[3])] if node.target is nodes.quantize_weight else list(weights.values())


def names_in_report(node: Node, module: RewrittenModule, path: str = "") -> tuple[str, str]:
    """(name of the place, operation) of the row, where ``module`` stands at ``path``."""
    name = place(node.args[0] if node.target is nodes.quantize_weight else node, path)  # type: ignore[arg-type]
    if _derivation(node, module) is not None:
        return name, DERIVED
    if (called := called_module(node)) is not None:
        return name, type(module._root.get_submodule(called)).__name__
    return name, "parameter" if _is_bare_parameter(node) else name_of(node)


class _Shapes(Interpreter):
    """A run of one part, which notes each node's output shape."""

    def __init__(self, part: RewrittenModule, path: str, shapes: dict[tuple[str, str], str]) -> None:
        super().__init__(part)
        self.path, self.shapes = path, shapes

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self.shapes[self.path, n.name] = ", ".join("x".join(map(str, tensor.shape)) or "1" for tensor in tensors)
        return result

    def on_call(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = [node.target for node in self.graph.nodes if node.op == "placeholder"]
        given = dict(zip(names, args, strict=False)) | kwargs
        self.run(*(given[name] for name in names if name in given))


class _BareReads(TorchFunctionMode):
    """Notes the functions that read a parameter while no part runs: qualified name -> names of functions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.running = 0
        self.found: dict[str, dict[str, None]] = {}

    def enter_part(self, *_: Any) -> None:
        self.running += 1

    def leave_part(self, *_: Any) -> None:
        self.running -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if not self.running and name not in ("__get__", *PARTS["number"].split()):  # x.shape is no number of x
            for leaf in pytree.tree_leaves((args, kwargs)):
                if id(leaf) in self.names:
                    self.found.setdefault(self.names[id(leaf)], {})[name] = None
        return func(*args, **(kwargs or {}))


def _run(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[dict[tuple[str, str], str], dict[str, dict[str, None]]]:
    """Each node's output shape, by its part and its name in the part's graph; and the parameters read outside of the
    parts, with the functions that read them."""
    shapes: dict[tuple[str, str], str] = {}
    copied = copy.deepcopy(module).eval()
    reads = _BareReads(copied)
    for path, part in rewritten_in(copied):
        part.register_forward_pre_hook(reads.enter_part)
        part.register_forward_pre_hook(_Shapes(part, path, shapes).on_call, with_kwargs=True)
        part.register_forward_hook(reads.leave_part)
    with torch.no_grad(), reads:
        copied(*inputs)
    return shapes, reads.found


def _totals(module: nn.Module, layers: list[_Layer]) -> Iterator[str]:
    specs = {id(module.get_parameter(name)): spec for layer in layers for name, spec in layer.weights.items()}
    parameters = list(module.parameters())
    bits = sum(p.numel() * _bits(specs.get(id(p), str(FLOAT)), p) for p in parameters)
    values = sum(p.numel() for p in parameters)
    formats = ", ".join(f"{number} in {spec}" for spec, number in Counter(specs.values()).items()) or "none"
    yield f"roles       {', '.join(f'{letter} {role}' for letter, role in ROLES.items())}; one not named is in float"
    yield f"parameters  {values:,} values in {len(parameters)} tensors: {formats}"
    if values:
        share = bits / (32 * values)
        yield f"bits        {bits:,.0f}, {share:.1%} of {32 * values:,} in float32 (shared exponents not counted)"
    yield f"outputs     {_outputs(module, layers)}"
    yield f"rounding    {next(part.recipe.rounding for _, part in rewritten_in(module))}"


def _outputs(module: nn.Module, layers: list[_Layer]) -> str:
    """How many outputs are rounded, of those that a graph sees; and what none sees."""
    outputs = [layer for layer in layers if layer.has_output]
    activations, errors = (sum(each.formats[i] not in ("", str(FLOAT)) for each in outputs) for i in (1, 2))
    text = f"{activations} of {len(outputs)} rounded"
    if errors != activations:
        text += f", {errors} of their error signals"
    if whole := Counter(layer.operation for layer in outputs if layer.whole):
        text += f"; inside {_counted(whole)}, called whole, none (not counted)"
    if not isinstance(module, RewrittenModule):
        text += "; outside of the rewritten modules none (not counted)"
    return text


def _counted(numbers: Counter[str]) -> str:
    return ", ".join(f"{name} x {n}" if n > 1 else name for name, n in numbers.items())


def _bits(spec: str, parameter: Tensor) -> float:
    format = parse(spec)
    return 8 * parameter.element_size() if format == FLOAT else format.bits


def _floats(module: nn.Module, layers: list[_Layer], bare_reads: dict[str, dict[str, None]]) -> Iterator[str]:
    """Why what is in float is in float, a line a reason."""
    parts = list(rewritten_in(module))
    recipe = parts[0][1].recipe
    nodes_of = [(node, part) for _, part in parts for node in part.graph.nodes]
    rows, parameters = [layer.name for layer in layers], [name for name, _ in module.named_parameters()]

    def line(names: Iterable[str], reason: str, among: list[str], before: str = "") -> str:
        room = max(WIDTH - 2 - len(before + reason), WIDTH // 2)
        return f"  {before}{listed(names, among, room)}{reason}"

    if by_recipe := [role for role in ROLES.values() if getattr(recipe, role) == FLOAT]:
        yield f"  {', '.join(by_recipe)}: the recipe says so"
    if isinstance(module, RewrittenModule) and not recipe.quantize_input:
        inputs = [place(node) for node, _ in nodes_of if node.op == "placeholder"]
        yield line(inputs, ": the model's input", inputs)
    bare = [layer for layer in layers if layer.has_output and layer.formats[1] == ""]
    if recipe.activation != FLOAT or recipe.error != FLOAT or len(bare) < len(layers):
        for reason in dict.fromkeys(layer.unrounded for layer in bare):
            yield line((layer.name for layer in bare if layer.unrounded == reason), f": {reason}", rows)
    moves = Counter(
        names_in_report(node, part)[1] for node, part in nodes_of if node.meta.get(PART) in ("movement", "exit")
    )
    if moves:
        yield f"  {_counted(moves)}: no new numbers"
    if whole := [layer.name for layer in layers if layer.whole]:
        yield line(whole, ": called whole, only weights are rounded", rows, before="inside ")
    if derived := [name for layer in layers if layer.operation == DERIVED for name in layer.weights]:
        yield line(dict.fromkeys(derived), ": a weight is derived from them, and rounded", parameters)
    read = {id(module.get_parameter(name)) for layer in layers for name in layer.weights}
    if unread := [name for name, parameter in module.named_parameters() if id(parameter) not in read]:
        by = "" if isinstance(module, RewrittenModule) else " by a graph"
        yield line(unread, f": never read{by}", parameters)
    if (rewritten := parts_of(module)) is not None:
        for why, paths in _by_value(rewritten.floats).items():
            named = [path or "the model itself" for path in paths]
            yield line(named, f", outside of {'its' if len(paths) == 1 else 'their'} rewritten modules: {why}", named)
    for functions, names in _by_value({name: ", ".join(found) for name, found in bare_reads.items()}).items():
        it = "it" if len(names) == 1 else "them"
        yield line(names, f", where {functions} reads {it} outside of the rewritten modules", parameters)
    if flags := [_join(path, each) for path, part in parts for each in part._present.captured.flags]:
        names = [path or "the model" for path in flags]
        yield (
            f"branches: {listed(names, names, 0)} on the training flag; each branch has a graph, and this table is of "
            "the present one"
        )


def _by_value(table: Mapping[str, str]) -> dict[str, list[str]]:
    """Value -> the keys that have it."""
    keys: dict[str, list[str]] = {}
    for key, value in table.items():
        keys.setdefault(value, []).append(key)
    return keys


def _is_whole(node: Node, module: RewrittenModule) -> bool:
    """Whether ``node`` calls what computes much on its own, of which no graph sees the inside."""
    path = called_module(node)
    if path is None:
        is_foreign = node.op == "call_function" and not is_torch(node.target)
        return name_of(node) in WHOLE_FUNCTIONS or (is_foreign and node.meta.get(PART) in LAYER_PARTS)
    layer = module._root.get_submodule(path)
    if isinstance(layer, ParametrizationList):
        return False
    runs = next(base for base in type(layer).__mro__ if "forward" in vars(base)).__module__
    has_children = any(True for _ in layer.children())
    return isinstance(layer, WHOLE) or has_children or not runs.startswith(("torch.", "torchvision.ops"))
