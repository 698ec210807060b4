"""The conversion of a model and its flattened graphs, for report, measure and draw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .. import nodes
from ..capture import Conversion, conversion_of
from ..errors import UNPACK, ConvertError
from ..passes.operations import name_of, operands_of

__all__ = ["conversion_in", "inlined"]


def conversion_in(module: object, who: str) -> Conversion:
    """The conversion of ``module``, or of the one converted model that it wraps.

    Raises ConvertError, in the name of ``who``, if there is none, or more than one.
    """
    if isinstance(module, tuple):
        raise ConvertError(f"{who} takes a module, not a {type(module).__name__}; {UNPACK}")
    found = {id(each): each for each in _outermost(module)} if isinstance(module, nn.Module) else {}
    if not found:
        raise ConvertError(f"{who} takes the module that convert returns, not a {type(module).__name__}")
    if len(found) > 1:
        raise ConvertError(f"{who} takes one converted model, and this {type(module).__name__} holds {len(found)}")
    return next(iter(found.values()))


def _outermost(module: nn.Module) -> Iterator[Conversion]:
    if conversion_of(module) is not None:
        from ..capture.entries import settled

        yield settled(module)
    else:
        for child in module.children():
            yield from _outermost(child)


def inlined(module: GraphModule, *, steps: bool = True) -> GraphModule:
    """The same computation without checkpoints: each graph that a checkpoint runs is inlined into its caller.

    steps: so does a loop's step, once: the graph is then to be read, and not to be run.

    Before:

        x_0 = checkpointed(body_0, key, x, weight_q)
        getitem = x_0[0]

    After:

        linear = linear(x, weight_q)
        linear_q = quantize_output(linear, key, ...)
    """
    graph = Graph()
    graph.output(_Inlining(graph, steps).run(module, "", None)).meta = dict(module.graph.output_node().meta)
    return GraphModule(module, graph)


class _Inlining:
    def __init__(self, graph: Graph, steps: bool) -> None:
        self.graph = graph
        self.runs = nodes.RUNS if steps else (nodes.checkpointed,)

    def run(self, module: GraphModule, prefix: str, given: list[Any] | None) -> Any:
        """Copies the nodes of ``module``, with ``given`` as its inputs; returns its outputs."""
        read: dict[Node, Any] = {}
        for node in module.graph.nodes:
            if node.op == "output":
                return map_arg(node.args[0], read.__getitem__)
            if node.op == "placeholder" and given is not None:
                read[node] = given.pop(0)
            elif node.target in self.runs:
                name = str(node.args[0].target)
                body: Any = module.get_submodule(name)
                operands = map_arg([node.args[1], *operands_of(node)], read.__getitem__)
                read[node] = self.run(body, f"{prefix}{name}.", list(operands))
                if node.target is nodes.recurrent:
                    _, outputs, last = read[node]
                    read[node] = (*outputs, *last)
            elif name_of(node) == "getitem" and not isinstance(read[node.args[0]], Node):
                read[node] = read[node.args[0]][node.args[1]]
            elif not self._is_body(node):
                read[node] = copy = self.graph.node_copy(node, read.__getitem__)
                if node.op == "get_attr":
                    copy.target = f"{prefix}{node.target}"
        raise AssertionError("a graph without an output")

    def _is_body(self, node: Node) -> bool:
        """Whether ``node`` is a graph that only stands where it is run."""
        return node.op == "get_attr" and bool(node.users) and all(user.target in self.runs for user in node.users)
