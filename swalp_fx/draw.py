"""``draw``: a rewritten module's graph as a picture, laid out by Graphviz."""

from __future__ import annotations

import html
import itertools
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from torch.fx import Node

from . import nodes
from .formats import FLOAT
from .passes import RewrittenModule
from .passes.classify import LAYER_PARTS, PART
from .passes.parts import refuse_unrewritten, rewritten_in
from .report import called_module, names_in_report

__all__ = ["draw"]

QUANTIZERS = (nodes.quantize_weight, nodes.quantize_output)  # whose fourth argument is the forward's format

TEXT, PICTURES = (".dot", ".gv"), (".svg", ".png", ".pdf")

# Fill of a role's nodes: three of Okabe and Ito's colours, lightened, which every eye tells apart.
FILLS = {"W": "#9fd3f2", "A": "#f7cd76", "E": "#e8b7d0"}
FLOAT_FILL = "#ffffff"
ROUNDED_EDGE, FLOAT_EDGE = "#c98500", "#8c8c8c"
INK, QUIET = "#222222", "#767676"

STYLE = f"""\
  graph [fontname="Helvetica", fontsize=11, fontcolor="{QUIET}", ranksep=0.22, nodesep=0.2, pad=0.15, labelloc=t]
  node [fontname="Helvetica", fontsize=11, fontcolor="{INK}", shape=plain]
  edge [arrowsize=0.55, color="{FLOAT_EDGE}"]"""

# (fill or ink, sign, meaning)
LEGEND = (
    (FILLS["W"], "W", "a parameter, rounded where it is read"),
    (FILLS["A"], "A ↓", "a layer's output, rounded on its way forward"),
    (FILLS["E"], "E ↑", "its error signal, rounded on its way back"),
    (ROUNDED_EDGE, "━━━", "rounded numbers"),
    (FLOAT_EDGE, "╍╍╍", "numbers in float"),
)


def draw(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes the graph of a rewritten ``module`` to ``path``: .svg, .png or .pdf, or .dot for its Graphviz source.

    Every layer, and beside it what rounds: its parameters (W), its output (A) and its error signal (E), by colour,
    each with its format. What travels on a full line is rounded, on a dashed line it is in float. Modules are frames.
    Sizes and the random key are left out. A model rewritten in parts is drawn part by part.
    Raises ConvertError for a module that is not rewritten, ValueError for another ending, and RuntimeError if a
    picture is wanted and Graphviz is not installed.
    """
    path = Path(path)
    if path.suffix not in TEXT + PICTURES:
        raise ValueError(f"cannot draw to {path}: its name must end in one of {', '.join(PICTURES + TEXT)}")
    refuse_unrewritten(module, "draw")
    source = _dot(module)
    if path.suffix in TEXT:
        path.write_text(source)
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
    parts = list(rewritten_in(module))
    kind, recipe = type(module).__name__, parts[0][1].recipe
    lines = ["digraph {", f"  label=<<b>{_text(kind)}</b>, {_text(recipe)}>", STYLE, _legend()]
    for number, (path, part) in enumerate(parts):
        lines += _frames(_Part(part, path, f"p{number}_"))
    return "\n".join([*lines, "}", ""])


class _Part:
    """One graph: its drawn nodes by frame, and its edges."""

    def __init__(self, module: RewrittenModule, path: str, prefix: str) -> None:
        self.module, self.path, self.prefix = module, path, prefix
        self.frames: dict[tuple[str, ...], list[str]] = defaultdict(list)
        self.edges: list[str] = []
        self.drawn: dict[Node, bool] = {}  # whether it holds rounded numbers
        for node in module.graph.nodes:
            sources = [source for source in node.all_input_nodes if source in self.drawn]
            moves = node.meta.get(PART) in ("movement", "exit")
            label = self._label(node)
            if label is None or (moves and not sources):
                continue
            rounds = node.target in QUANTIZERS and node.args[3] != str(FLOAT)
            self.drawn[node] = rounds or (moves and all(self.drawn[source] for source in sources))
            self.frames[self._frame(node)].append(f"{self._id(node)} [label=<{label}>]")
            self.edges += (self._edge(source, node) for source in sources)

    def _id(self, node: Node) -> str:
        return f'"{self.prefix}{node.name}"'

    def _label(self, node: Node) -> str | None:
        """What stands in ``node``'s place, or None for a node that is not drawn."""
        part = node.meta.get(PART)
        if node.target is nodes.quantize_weight:
            return _chips([("W", f"{_short(node.args[0])} {node.args[3]}", str(node.args[3]))])
        if node.target is nodes.quantize_output:
            activation, error = map(str, node.args[3:5])
            return _chips([("A", f"A ↓ {activation}", activation), ("E", f"E ↑ {error}", error)])
        if part == "parameter":
            return _chips([("W", f"{_short(node)} {FLOAT}", str(FLOAT))])
        if part in ("input", "output"):
            return f"<i>{_text(node.name)}</i>"
        if part in LAYER_PARTS:
            return _box(*reversed(names_in_report(node, self.module, self.path)))
        if part in ("movement", "exit") and node.op != "get_attr":
            return f'<font color="{QUIET}">{_text(names_in_report(node, self.module)[1])}</font>'
        return None

    def _frame(self, node: Node) -> tuple[str, ...]:
        """The qualified names of the modules around ``node``, the outermost first; of a part, the part's own before."""
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
        layer = node.args[0] if node.target is nodes.quantize_output else node
        assert isinstance(layer, Node)
        is_call = called_module(layer) is not None or node.target is nodes.quantize_weight
        names = (".".join(filter(None, (self.path, name))) for name in (stack[:-1] if is_call else stack))
        return (self.path, *names) if self.path else tuple(names)

    def _edge(self, source: Node, node: Node) -> str:
        # Weights keep the path of the activations straight, with parameters and residual paths beside it.
        weight = 20 if next(user for user in source.users if user in self.drawn) is node else 0
        if source.target is nodes.quantize_weight or source.op == "placeholder":
            weight = min(weight, 1)
        style = f'style=solid, color="{ROUNDED_EDGE}"' if self.drawn[source] else "style=dashed"
        width = 1.0 if source.target is nodes.quantize_weight else 1.8 if self.drawn[source] else 1.2
        return f"  {self._id(source)} -> {self._id(node)} [weight={weight}, {style}, penwidth={width}]"


def _frames(part: _Part) -> Iterator[str]:
    """The part's nodes, each inside the frames of its modules, then its edges."""
    ids = itertools.count()

    def inside(around: tuple[str, ...], indent: str) -> Iterator[str]:
        yield from (indent + node for node in part.frames.get(around, ()))
        deeper = dict.fromkeys(path[: len(around) + 1] for path in part.frames if path[: len(around)] == around)
        for frame in deeper:
            if frame != around:
                yield f"{indent}subgraph cluster_{part.prefix}{next(ids)} {{"
                yield f'{indent}  style="rounded"; color="#cccccc"; labeljust=l; label="{frame[-1]}"'
                yield from inside(frame, indent + "  ")
                yield f"{indent}}}"

    yield from inside((), "  ")
    yield from part.edges


def _box(operation: str, name: str) -> str:
    """A layer: what it does, and below it its name."""
    below = f'<br/><font point-size="8" color="{QUIET}">{_text(name)}</font>' if name not in ("", operation) else ""
    return (
        f'<table border="1" cellborder="0" cellpadding="4" style="rounded" color="{INK}" bgcolor="white">'
        f"<tr><td><b>{_text(operation)}</b>{below}</td></tr></table>"
    )


def _chips(chips: list[tuple[str, str, str]]) -> str:
    """Side by side (role, text, spec); a role in float is white."""
    cells = ""
    for role, text, spec in chips:
        fill = FLOAT_FILL if spec == str(FLOAT) else FILLS[role]
        cells += f'<td bgcolor="{fill}"><font point-size="9">{_text(text)}</font></td>'
    return f'<table border="0" cellborder="1" cellspacing="0" cellpadding="3" color="#999999"><tr>{cells}</tr></table>'


def _legend() -> str:
    rows = ""
    for color, sign, meaning in LEGEND:
        is_line = color in (ROUNDED_EDGE, FLOAT_EDGE)
        cell = f'<font color="{color}">{sign}</font>' if is_line else sign
        fill = "" if is_line else f' bgcolor="{color}" border="1" color="#999999"'
        rows += f'<tr><td{fill}>{cell}</td><td align="left">{_text(meaning)}</td></tr>'
    return f'  legend [fontsize=9, label=<<table border="0" cellspacing="3" cellpadding="2">{rows}</table>>]'


def _short(parameter: object) -> str:
    """``weight``, of ``layer1.0.conv1.weight``."""
    assert isinstance(parameter, Node)
    return str(parameter.target).rpartition(".")[2]


def _text(value: object) -> str:
    return html.escape(str(value))
