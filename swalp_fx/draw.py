"""``draw``: a rewritten module's graph as a picture, laid out by Graphviz."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn
from torch.fx import Node

from . import nodes
from .capture import module_around, name_of
from .drawing.dot import picture
from .drawing.labels import box, chips, moved, port
from .drawing.marks import Call, Mark, seen_from, tree
from .formats import FLOAT
from .passes import RewrittenModule
from .passes.classify import LAYER_PARTS, PART
from .passes.parts import refuse_unrewritten, rewritten_in
from .report import called_module, names_in_report

__all__ = ["draw"]

QUANTIZERS = (nodes.quantize_weight, nodes.quantize_output)  # whose fourth argument is the forward's format
GATHERS = ("cat", "concat", "concatenate", "stack")

TEXT, PICTURES = (".dot", ".gv"), (".svg", ".png", ".pdf")


def draw(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the graph of a rewritten ``module`` to ``path``: .svg, .png or .pdf, or .dot for its Graphviz source.

    Every layer, and beside it what rounds: its parameters (W), its output (A) and its error signal (E), by colour,
    each with its format. What travels on a full line is rounded, on a dashed line it is in float. Modules are frames.
    Sizes and the random key are left out. A model rewritten in parts is drawn part by part.

    A model of more than 16 layers is drawn in panels. Blocks that are alike but for sizes are drawn once, in a panel
    with a number. Where they are called they are boxes with that number: ``layer3.1 … 35`` is one box. A panel shows
    the frames of its outermost modules only.

    Raises ConvertError for a module that is not rewritten, ValueError for another ending, and RuntimeError if a
    picture is wanted and Graphviz is not installed.
    """
    path = Path(path)
    if path.suffix not in TEXT + PICTURES:
        raise ValueError(f"cannot draw to {path}: its name must end in one of {', '.join(PICTURES + TEXT)}")
    refuse_unrewritten(module, "draw")
    source = _dot(module)
    if path.suffix in TEXT:
        path.write_text(source, encoding="utf-8")
        return
    dot = shutil.which("dot")
    if dot is None:
        raise RuntimeError(
            f"cannot draw {path} without Graphviz; install it (apt-get install graphviz, brew install graphviz),"
            f" or draw to {path.with_suffix('.dot')}"
        )
    command = [dot, f"-T{path.suffix[1:]}", "-o", str(path)]
    if path.suffix == ".png":
        command.append("-Gdpi=144")
    done = subprocess.run(command, input=source.encode(), capture_output=True)
    if done.returncode:
        raise RuntimeError(f"Graphviz could not draw {path}: {done.stderr.decode(errors='replace').strip()}")


def _dot(module: nn.Module) -> str:
    recipe = next(part.recipe for _, part in rewritten_in(module))
    return picture(type(module).__name__, str(recipe), _roots(module))


def _roots(module: nn.Module) -> list[Call]:
    """What is drawn of each graph in ``module``."""
    return [
        tree(_marks(part, path, f"p{number}_"), path, type(part._root).__name__)
        for number, (path, part) in enumerate(rewritten_in(module))
    ]


def _names(node: Node, module: RewrittenModule, path: str) -> tuple[str, str]:
    """(qualified name, operation) of a layer in the graph of the part at ``path``."""
    return names_in_report(node, module, path)


def _marks(module: RewrittenModule, path: str, prefix: str) -> Iterator[Mark]:
    """What is drawn of one graph, in its order. ``path`` is where the module stands in the model."""
    drawn: dict[Node, Mark] = {}
    for node in module.graph.nodes:
        part = node.meta.get(PART)
        moves = part in ("movement", "exit")
        together = _together(node)
        sources = list(dict.fromkeys(drawn[source] for source in node.all_input_nodes if source in drawn))
        label = _label(together, module)
        if label is None or (moves and not (sources and node.users)) or node in drawn:
            continue
        rounds = node.target in QUANTIZERS and node.args[3] != str(FLOAT)
        name, operation = _names(node, module, path) if part in LAYER_PARTS else ("", "")
        mark = Mark(
            f"{prefix}{node.name}",
            label,
            rounded=rounds or (moves and all(source.rounded for source in sources)),
            sources=sources,
            around=_around(node, path),
            name=name,
            operation=operation,
            parameter=_join(path, parameter) if (parameter := _parameter(node)) else "",
            rounds=node.target is nodes.quantize_output,
            gathers=moves and name_of(node) in GATHERS,
        )
        drawn |= dict.fromkeys(together, mark)
        yield mark


def _together(node: Node) -> list[Node]:
    """The nodes that one mark stands for: the parameters of a layer that have the same readers; else ``node``."""
    layer = next(iter(node.users), None)
    if node.target is not nodes.quantize_weight or layer is None or layer.target is not nodes.call_layer:
        return [node]
    weights: dict[str, Node] = layer.args[1]  # type: ignore[assignment]
    return [weight for weight in dict.fromkeys(weights.values()) if weight.users.keys() == node.users.keys()]


def _label(together: list[Node], module: RewrittenModule) -> Callable[[str], str] | None:
    """What stands in the nodes' place, given a name; None for what is not drawn."""
    node = together[0]
    part = node.meta.get(PART)
    if _parameter(node):
        return _same(chips([_weight(each) for each in together]))
    if node.target is nodes.quantize_output:
        activation, error = map(str, node.args[3:5])
        return _same(chips([("A", f"A ↓ {activation}", activation), ("E", f"E ↑ {error}", error)]))
    if part in ("input", "output"):
        return _same(port(node.name))
    if part in LAYER_PARTS:
        operation = _names(node, module, "")[1]
        return lambda name: box(operation, name)
    if part in ("movement", "exit") and node.op != "get_attr":
        return _same(moved(_names(node, module, "")[1]))
    return None


def _weight(node: Node) -> tuple[str, str, str]:
    """(role, text, spec) of a parameter."""
    spec = str(node.args[3] if node.target is nodes.quantize_weight else FLOAT)
    return "W", f"{seen_from(_reader(node), _parameter(node))} {spec}", spec


def _same(label: str) -> Callable[[str], str]:
    return lambda name: label


def _parameter(node: Node) -> str:
    """The qualified name of the parameter that ``node`` is, or rounds; "" if it is none."""
    source = node.args[0] if node.target is nodes.quantize_weight else node
    assert isinstance(source, Node)
    if source is node and node.meta.get(PART) != "parameter":
        return ""
    return str(source.target).replace("parametrizations.", "")  # where a parametrization derives a weight


def _reader(parameter: Node) -> str:
    """The qualified name of the module that reads ``parameter`` first."""
    layer = next(iter(parameter.users), parameter)
    called = called_module(layer)
    return module_around(layer) if called is None else called


def _around(node: Node, path: str) -> tuple[tuple[str, str, str], ...]:
    """(key, qualified name, type) of the calls around ``node``, the outermost first. Keys tell calls of one module."""
    layer = node
    if node.target is nodes.quantize_output:
        layer = node.args[0]  # type: ignore[assignment]
    elif node.target is nodes.quantize_weight:
        layer = next(iter(node.users), node)
    stack = [(key, *call) for key, call in layer.meta.get("nn_module_stack", {}).items() if call[0]]
    if called_module(layer) is not None:
        stack = stack[:-1]
    return tuple((key, _join(path, name), getattr(type, "__name__", str(type))) for key, name, type in stack)


def _join(*names: str) -> str:
    return ".".join(filter(None, names))
