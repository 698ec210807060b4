"""Insertion of quantize nodes: the only pass that makes a new graph."""

from __future__ import annotations

import copy

from torch.fx import Graph, Node

from .. import nodes
from .assign import SITE, Output, Site
from .captured import CARRIED, KEPT, LAYER, MODULE, TYPE
from .classify import OUT
from .facts import MEANINGS
from .names import PART, place
from .operations import CHECKPOINT
from .rounding import ACTIVATION, ERROR, WEIGHT, Rounding
from .tables import LAYER_PARTS

__all__ = ["KEY", "insert"]

KEY = "key"  # the first placeholder of a rewritten graph: the random key
# Copied to an inserted node from the node that it rounds: its place, for reports, drawings and error messages.
INHERITED = ("nn_module_stack", "stack_trace", MODULE, TYPE, LAYER)


def insert(graph: Graph, *, keyed: bool) -> Graph:
    """A copy of ``graph`` with a quantize node at each assigned site; the old graph is unchanged.

    keyed: its first placeholder is the random key of one run; without a key, stochastic rounds to nearest.
    A weight is rounded just before its first reader: fewer copies live at a time.

    Before:

        def forward(self, x, conv_weight, fc_weight):
            conv = conv2d(x, conv_weight)
            relu = relu(conv)
            fc = linear(relu, fc_weight)
            return fc

    After:

        def forward(self, key, x, conv_weight, fc_weight):
            conv_weight_q = quantize_weight(conv_weight, key, 2750919342, "bfp8", "stochastic")
            conv = conv2d(x, conv_weight_q)
            conv_q = quantize_output(conv, key, 1325632447, "bfp8", "bfp8", "stochastic")
            relu = relu(conv_q)
            relu_q = quantize_output(relu, key, 3041826051, "bfp8", "bfp8", "stochastic")
            fc_weight_q = quantize_weight(fc_weight, key, 1748266309, "bfp8", "stochastic")
            fc = linear(relu_q, fc_weight_q)
            return fc
    """
    return _Insertion(graph, keyed).new


class _Insertion:
    """One run of the pass. For each old node it keeps its copy (``raw``) and the node for its readers (``read``)."""

    def __init__(self, graph: Graph, keyed: bool) -> None:
        self.new = Graph(tracer_cls=graph._tracer_cls)
        self.raw: dict[Node, Node] = {}
        self.read: dict[Node, Node] = {}
        self.key: Node | None = _placeholder(self.new, KEY) if keyed else None
        placeholders = graph.find_nodes(op="placeholder")
        for node in placeholders:
            new = _placeholder(self.new, _spelled(place(node)))
            new.meta = copy.copy(node.meta)
            self.raw[node] = self.read[node] = new
        for node in placeholders:
            self._quantize_output(node)
        for node in graph.nodes:
            if node.op != "placeholder":
                self._visit(node)
                self._quantize_output(node)

    def _visit(self, node: Node) -> None:
        new = self.new.node_copy(node, lambda source: self._source(node, source))
        if node.meta[PART] in ("parameter", *LAYER_PARTS, *MEANINGS):
            new._rename(_spelled(place(node)))
        if node.target is CHECKPOINT:
            body, *operands = new.args
            new.args = (body, self.key, *operands)
            new.target = nodes.checkpointed
        elif node.target is nodes.recurrent:
            new.update_arg(1, self.key)
        self.raw[node] = self.read[node] = new

    def _quantize_output(self, node: Node) -> None:
        output: Output | None = node.meta.get(SITE, Site()).output
        if output is not None:
            new = self.raw[node]
            roles = {ACTIVATION: output.activation, ERROR: output.error}
            self.read[node] = self._rounded(node, new, output.stream, roles, output.rounding)

    def _source(self, reader: Node, source: Node) -> Node:
        site: Site = source.meta.get(SITE, Site())
        part = reader.meta[PART]
        if site.weight is not None:
            if part in ("number", *OUT):
                return self.raw[source]
            if self.read[source] is self.raw[source]:
                weight, roles = site.weight, {WEIGHT: site.weight.quantizer}
                new = self.raw[source]
                self.read[source] = self._rounded(source, new, weight.stream, roles, weight.rounding)
            return self.read[source]
        if reader.op == "output" and (source.meta.get(KEPT) or source.meta.get(CARRIED)):
            return self.read[source]
        returned = site.output is not None and site.output.returned
        return self.raw[source] if part in OUT and not returned else self.read[source]

    def _rounded(self, old: Node, new: Node, stream: int, quantizers: dict[str, str], rounding: str) -> Node:
        """The quantize node of ``new``, which is the copy of ``old``."""
        made = Rounding.insert(new, self.key, stream, quantizers, rounding)
        made.meta = {key: old.meta[key] for key in INHERITED if key in old.meta}
        return made


def _placeholder(graph: Graph, name: str) -> Node:
    """A placeholder. Its argument in the generated code has the node's name."""
    node = graph.placeholder(name)
    node.target = node.name
    return node


def _spelled(name: str) -> str:
    """``layer1.0.conv1`` is layer1_0_conv1 in the generated code."""
    return name.replace(".", "_").replace("@", "_")
