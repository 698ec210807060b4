"""The rewrite itself: the only pass that makes a graph."""

from __future__ import annotations

import copy
from typing import Any

from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .. import nodes
from ..capture import ROOT
from .assign import SITE, Site, Weight
from .classify import PART

__all__ = ["insert"]

INHERITED = ("nn_module_stack", "stack_trace")  # what an inserted node keeps of the node it serves


def insert(graph: Graph) -> Graph:
    """A new graph that quantizes at every site of ``graph``, which stays as it is.

    A parameter is quantized where it is first read, and once; whoever reads a layer's output reads it quantized,
    except the model's own output. A key is drawn only if something rounds stochastically.

    Before:

        conv = self.conv(x)
        relu = torch.relu(conv)
        fc = self.fc(relu)
        return fc

    After:

        training = self.training
        key = draw_key(training)
        conv_module = self.conv
        conv_weight = self.conv.weight
        conv_weight_q = quantize_weight(conv_weight, key, 0, "bfp8", "stochastic")
        conv = call_layer(conv_module, {"weight": conv_weight_q}, x)
        conv_q = quantize_output(conv, key, 1, "bfp8", "bfp8", "stochastic")
        relu = torch.relu(conv_q)
        relu_q = quantize_output(relu, key, 2, "bfp8", "bfp8", "stochastic")
        fc_module = self.fc
        fc_weight = self.fc.weight
        fc_weight_q = quantize_weight(fc_weight, key, 3, "bfp8", "stochastic")
        fc = call_layer(fc_module, {"weight": fc_weight_q}, relu_q)
        return fc
    """
    return _Insertion(graph).new


class _Insertion:
    """One run of the pass. For each node of the old graph it keeps the node of the new one, and what readers read."""

    def __init__(self, graph: Graph) -> None:
        self.new = Graph(tracer_cls=graph._tracer_cls)
        self.new.set_codegen(copy.deepcopy(graph._codegen))
        self.raw: dict[Node, Node] = {}
        self.read: dict[Node, Node] = {}
        self.weights: dict[str, Node] = {}
        self.modules: dict[str, Node] = {}
        self.key: Node | None = None
        wants_key = any(_is_stochastic(node.meta.get(SITE, Site())) for node in graph.nodes)
        begun = False
        for node in graph.nodes:
            if not begun and node.op != "placeholder" and node.target != "training":
                begun = True
                self.key = self._draw_key() if wants_key else None
                for placeholder in self.raw:  # behind the key, and all placeholders
                    self._quantize_output(placeholder)
            self._visit(node)
            if begun:
                self._quantize_output(node)

    def _visit(self, node: Node) -> None:
        site: Site = node.meta.get(SITE, Site())
        if node.meta[PART] == "parameter" and site.weights:
            ((_, weight),) = site.weights
            if node.op == "call_module":  # derived anew by each call, and so rounded anew
                derived = self.new.node_copy(node, lambda source: self._source(node, source))
                self.raw[node] = self.read[node] = self._quantize_weight(derived, weight, node)
            else:
                self.raw[node] = self.read[node] = self._weight(weight, node)
            return
        if site.weights or node.target == "":  # a bare layer is called by name, even with nothing to bind
            new = self._call_layer(node, site)
        else:
            new = self.new.node_copy(node, lambda source: self._source(node, source))
        self.raw[node] = self.read[node] = new

    def _quantize_output(self, node: Node) -> None:
        output = node.meta.get(SITE, Site()).output
        if output is not None:
            new = self.raw[node]
            arguments = (new, self.key, output.stream, output.activation, output.error, output.rounding)
            self.read[node] = self._call(nodes.quantize_output, arguments, f"{new.name}_q", node)

    def _source(self, reader: Node, source: Node) -> Node:
        output = source.meta.get(SITE, Site()).output
        returned = output is not None and output.returned
        return self.raw[source] if reader.meta[PART] in ("exit", "output") and not returned else self.read[source]

    def _draw_key(self) -> Node:
        # The flag of the root, which the captured graph reads behind its placeholders if anything uses it.
        training = next(iter(self.new.find_nodes(op="get_attr", target="training")), None)
        if training is None:
            training = self.new.create_node("get_attr", "training")
        return self.new.create_node("call_function", nodes.draw_key, (training,), name="key")

    def _weight(self, weight: Weight, node: Node) -> Node:
        if weight.parameter not in self.weights:
            parameter = self._attribute(weight.parameter, weight.parameter, node)
            self.weights[weight.parameter] = self._quantize_weight(parameter, weight, node)
        return self.weights[weight.parameter]

    def _quantize_weight(self, source: Node, weight: Weight, node: Node) -> Node:
        arguments = (source, self.key, weight.stream, weight.format, weight.rounding)
        return self._call(nodes.quantize_weight, arguments, f"{source.name}_q", node)

    def _call_layer(self, node: Node, site: Site) -> Node:
        path = str(node.target)
        if path not in self.modules:
            self.modules[path] = self._attribute(path or ROOT, f"{path or 'layer'}_module", node)
        weights = {name: self._weight(weight, node) for name, weight in site.weights}
        arguments, keywords = map_arg((node.args, node.kwargs), lambda source: self._source(node, source))
        arguments = (self.modules[path], weights, *arguments)
        new = self.new.create_node("call_function", nodes.call_layer, arguments, keywords, name=node.name)
        new.meta = copy.copy(node.meta)
        return new

    def _attribute(self, target: str, name: str, node: Node) -> Node:
        new = self.new.create_node("get_attr", target, name=name.replace(".", "_"))
        return _inherit(new, node)

    def _call(self, function: Any, arguments: tuple, name: str, node: Node) -> Node:
        return _inherit(self.new.create_node("call_function", function, arguments, name=name), node)


def _inherit(new: Node, node: Node) -> Node:
    new.meta = {name: node.meta[name] for name in INHERITED if name in node.meta}
    return new


def _is_stochastic(site: Site) -> bool:
    roundings = [weight.rounding for _, weight in site.weights]
    if site.output is not None:
        roundings.append(site.output.rounding)
    return any(rounding.startswith("stochastic") for rounding in roundings)
