"""``draw``: the graphs of a converted model as a picture, laid out by Graphviz."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn
from torch.fx import Node

from ...capture import Conversion, Rewritten
from ...errors import ConvertError
from ...formats import FLOAT
from ...passes.captured import LAYER, MODULE, Layer, calls_around
from ...passes.facts import MEANINGS
from ...passes.names import PART, is_derived, place
from ...passes.operations import name_of
from ...passes.rounding import ACTIVATION, ERROR, WEIGHT, Rounding
from ...passes.tables import LAYER_PARTS
from ...recipe.patterns import around
from ..graphs import conversion_in, inlined
from ..rows import operation_of, parameter_of
from .dot import picture
from .kinds import signature
from .labels import box, chips, moved, port
from .marks import Call, Mark, seen_from, tree

__all__ = ["draw"]

MOVES = ("movement", "exit", *MEANINGS)  # parts that are drawn as movement; a constant, which reads nothing, is not
GATHERS = ("cat", "concat", "concatenate", "stack")

TEXT, PICTURES = (".dot", ".gv"), (".svg", ".png", ".pdf")


def draw(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the graphs of a converted ``module`` to ``path``: .svg, .png or .pdf, or .dot for their Graphviz source.

    Each layer has its quantize nodes beside it, in the colours of the roles, with their formats: parameters (W), output
    (A), error signal (E). A full line carries rounded numbers, a dashed line numbers in float. Modules are frames.
    Sizes and the random key are left out. A graph break, or Python between modules, splits a model into several graphs.
    Graphs that look alike are drawn once. If both modes have graphs, the graphs of the present mode are drawn.

    A model of more than 16 layers is drawn in panels. Blocks that differ only in sizes are drawn once, in a panel with
    a number. Each call of such a block is a box with that number: ``layer3.1 … 35`` is one box. A panel shows the
    frames of its outermost modules only.

    Raises ConvertError for a module that is not converted or has no graph yet, and ValueError for another ending.
    Raises RuntimeError for a picture if Graphviz is not installed.
    """
    path = Path(path)
    if path.suffix not in TEXT + PICTURES:
        raise ValueError(f"cannot draw to {path}: its name must end in one of {', '.join(PICTURES + TEXT)}")
    conversion = conversion_in(module, "draw")
    if not conversion.graphs:
        raise ConvertError("draw finds no graph yet; call the module once, or give example_inputs to convert")
    source = picture(type(conversion.root).__name__, str(conversion.recipe), _roots(conversion))
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


def _roots(conversion: Conversion) -> list[Call]:
    """The drawn calls and marks of each graph."""
    graphs = [made for made in conversion.graphs if made.training == conversion.root.training]
    found: dict[object, Call] = {}
    for made in graphs or conversion.graphs:
        root = tree(_Marks(conversion, made, f"p{len(found)}_").drawn(), made.path, _type(conversion, made.path))
        if root.marks:
            found.setdefault((made.path, signature(root)), root)
    return list(found.values())


def _type(conversion: Conversion, path: str) -> str:
    return type(conversion.root.get_submodule(path)).__name__


class _Marks:
    """The marks of one graph."""

    def __init__(self, conversion: Conversion, made: Rewritten, prefix: str) -> None:
        self._places, self._path, self._prefix = conversion.places, made.path, prefix
        self._graph = inlined(made.graph_module).graph
        self._inside: dict[Layer, list[Node]] = {}  # the nodes of a layer's call, without derived weights
        for node in self._graph.nodes:
            if LAYER in node.meta and not is_derived(node) and Rounding.of(node) is None:
                self._inside.setdefault(node.meta[LAYER], []).append(node)
        self._drawn: dict[Node, Mark] = {}

    def drawn(self) -> Iterator[Mark]:
        """The marks, in the order of the graph."""
        for node in self._graph.nodes:
            mark = self._mark(node) if node not in self._drawn else None
            if mark is not None:
                self._drawn |= dict.fromkeys(self._together(node), mark)
                yield mark

    def _mark(self, node: Node) -> Mark | None:
        part = node.meta.get(PART)
        is_layer, moves = part in LAYER_PARTS, part in MOVES
        together = self._together(node)
        read = [source for each in self._sources_of(node) for source in each.all_input_nodes if source not in together]
        sources = list(dict.fromkeys(self._drawn[source] for source in read if source in self._drawn))
        if LAYER in node.meta:
            sources.sort(key=lambda source: not source.parameter)  # parameters first, however its function orders them
        label = self._label(node, together)
        if label is None or (moves and not (sources and node.users)):
            return None
        rounding = Rounding.of(node)
        rounds = rounding is not None and rounding.forward != str(FLOAT)
        return Mark(
            f"{self._prefix}{node.name}",
            label,
            rounded=rounds or (moves and all(source.rounded for source in sources)),
            sources=sources,
            around=self._around(node),
            name=", ".join(dict.fromkeys(map(place, together))) if is_layer else "",
            operation=operation_of(node) if is_layer else "",
            parameter=parameter_of(node),
            rounds=Rounding.of(node, ACTIVATION) is not None,
            gathers=moves and name_of(node) in GATHERS,
        )

    def _together(self, node: Node) -> list[Node]:
        """The nodes that one mark stands for: all outputs of one call of a layer, all parameters of one layer with the
        same readers, or else ``node`` alone."""
        if node.meta.get(PART) in LAYER_PARTS and LAYER in node.meta:
            return [each for each in self._inside[node.meta[LAYER]] if each.meta[PART] in LAYER_PARTS]
        readers = self._readers(node)
        layer = readers[0] if self._is_drawn_parameter(node) else node
        if not isinstance(layer, Layer):
            return [node]
        beside = (source for each in self._inside[layer] for source in each.all_input_nodes)
        return [each for each in dict.fromkeys(beside) if parameter_of(each) and self._readers(each) == readers]

    def _sources_of(self, node: Node) -> list[Node]:
        """The nodes that give the mark of ``node`` its sources."""
        is_layer = node.meta.get(PART) in LAYER_PARTS and LAYER in node.meta
        return self._inside[node.meta[LAYER]] if is_layer else [node]

    def _readers(self, node: Node) -> list[Layer | Node]:
        return list(dict.fromkeys(user.meta[LAYER] if _is_in_layer(user) else user for user in node.users))

    def _is_drawn_parameter(self, node: Node) -> bool:
        """Whether ``node`` is a parameter or derived weight with a mark. A float parameter of a layer gets none."""
        if not parameter_of(node) or not node.users or all(map(is_derived, node.users)):
            return False
        is_rounded = any(Rounding.of(user, WEIGHT) for user in node.users)
        is_own = node.op == "placeholder" and all(map(_is_in_layer, node.users))
        return not is_rounded and not is_own

    def _label(self, node: Node, together: list[Node]) -> Callable[[str], str] | None:
        """A function of a name that gives the nodes' label; None if they are not drawn."""
        part = node.meta.get(PART)
        if parameter_of(node):
            weights = [self._weight(each) for each in together]
            return _same(chips(weights)) if self._is_drawn_parameter(node) else None
        if (rounding := Rounding.of(node, ACTIVATION)) is not None:
            arrows = {ACTIVATION: "↓", ERROR: "↑"}
            roles = rounding.quantizers.items()
            return _same(chips([(role, f"{role} {arrows[role]} {spec}", spec) for role, spec in roles]))
        if part in ("input", "output"):
            return _same(port(node.name))
        if part in LAYER_PARTS:
            return lambda name: box(operation_of(node), name)
        if part in MOVES and node.op != "get_attr":
            return _same(moved(operation_of(node)))
        return None

    def _weight(self, node: Node) -> tuple[str, str, str]:
        """(role, text, spec) of a parameter, named as its first reader names it."""
        rounding = Rounding.of(node, WEIGHT)
        spec = str(FLOAT) if rounding is None else rounding.forward
        reader = self._readers(node)[0]
        path, name = reader.path if isinstance(reader, Layer) else reader.meta.get(MODULE) or "", parameter_of(node)
        holder = next((each for each in around(path) if name.startswith(f"{each}.")), "")
        return "W", f"{seen_from(holder, name)} {spec}", spec

    def _around(self, node: Node) -> tuple[tuple[str, str, str], ...]:
        """(call, qualified name, type) of the calls around ``node``, outermost first."""
        shown = node
        if (rounding := Rounding.of(node, ACTIVATION)) is not None:
            shown = rounding.source
        elif parameter_of(node):
            shown = next(iter(node.users), node)
        if shown.op == "placeholder":
            return ()
        layer: Layer | None = shown.meta.get(LAYER)
        found = []
        for call, key in calls_around(shown):
            known = self._places.module(key)
            if known is None or known[0] == self._path:
                continue
            if layer is not None and call == layer.call:
                break
            found.append((call, known[0], type(known[1]).__name__))
        return tuple(found)


def _is_in_layer(node: Node) -> bool:
    return LAYER in node.meta and not is_derived(node)


def _same(label: str) -> Callable[[str], str]:
    return lambda name: label
