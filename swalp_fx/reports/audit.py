"""One forward of a converted model, watched: output shapes, and the operations inside and outside of its graphs."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Iterable
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from .. import nodes
from ..capture import Conversion, Rewritten, local
from ..capture.trial import untouched
from ..passes.captured import LAYER
from ..passes.facts import is_number
from ..passes.names import NAME
from ..passes.operations import operands_of, operation_of
from ..passes.rounding import Rounding
from ..passes.tables import part_of
from ..recipe import Quantizer
from ..warn import is_own, line_of
from .graphs import inlined

__all__ = ["Audit", "audited"]


def audited(conversion: Conversion, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Audit:
    """The audit of one call of ``module`` in its present mode. The model and the random state stay as they were."""
    audit = Audit()
    with untouched(conversion.root):
        module(*inputs, **keywords)  # makes the graphs: tracing has operations of its own
    before, local.watch = local.watch, audit.watch
    try:
        with untouched(conversion.root), audit:
            module(*inputs, **keywords)
    finally:
        local.watch = before
    return audit


class Audit(TorchDispatchMode):
    """Counts each operation of PyTorch that runs while the mode is active."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # else PyTorch's front end leaves all code alone while a mode is active

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, str] = {}  # place -> "2x4x8x8"
        self.inside: Counter[str] = Counter()  # place -> multiply-adds
        self.rounded: Counter[str] = Counter()  # place -> multiply-adds of operations that read only rounded numbers
        self.outside: dict[str, Counter[str]] = {}  # "model.py:12 forward" -> operation -> multiply-adds
        self.made_rounded: WeakIdKeyDictionary = WeakIdKeyDictionary()  # what a graph rounded -> its version then
        self._running: list[
            tuple[str, bool]
        ] = []  # the running nodes of graphs: place, and whether the node reads only rounded numbers

    def watch(self, made: Rewritten, args: tuple[Any, ...]) -> Any:
        graph_module = inlined(made.graph_module, steps=False)
        inputs = zip(graph_module.graph.find_nodes(op="placeholder"), args, strict=True)
        given = {node for node, value in inputs if isinstance(value, Tensor) and self._is_as_rounded(value)}
        return _Watched(self, graph_module, _rounded(graph_module, given)).run(*args)

    def _is_as_rounded(self, value: Tensor) -> bool:
        """Whether an earlier graph rounded ``value``, and nothing has written into it since."""
        return value in self.made_rounded and self.made_rounded[value] == _version(value)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(function, HigherOrderOperator):  # what its bodies compute is not counted, which the report says
            return function(*args, **kwargs)
        given = function(*args, **kwargs)
        packet = function._overloadpacket
        count = 0
        if packet in flop_registry:  # two a multiply-add
            count = int(flop_registry[packet](*args, **kwargs, out_val=given)) // 2
        if self._running:
            place, reads_rounded = self._running[-1]
            self.inside[place] += count
            self.rounded[place] += count if reads_rounded else 0
        elif count or _is_layer(packet.__name__, given):
            self.outside.setdefault(_line(), Counter())[packet.__name__] += count
        return given


class _Watched(Interpreter):
    """A run of one graph that notes the node it is at."""

    def __init__(self, audit: Audit, graph_module: GraphModule, rounded: set[Node]) -> None:
        super().__init__(graph_module)
        self.audit, self.rounded = audit, rounded
        # All nodes of a layer count under the name of its output, which is the last of them.
        named = [node for node in self.graph.nodes if NAME in node.meta]
        names = {node.meta[LAYER]: node.meta[NAME] for node in named if LAYER in node.meta}
        self.places = {
            node: node.meta.get(NAME) or names.get(node.meta.get(LAYER), node.name) for node in self.graph.nodes
        }

    def run_node(self, n: Node) -> Any:
        self.audit._running.append((self.places[n], self.rounded.issuperset(_floating_inputs(n))))
        try:
            result = self._loop(n) if n.target is nodes.recurrent else super().run_node(n)
        finally:
            self.audit._running.pop()
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if n in self.rounded:
            self.audit.made_rounded.update({each: _version(each) for each in tensors})
        if NAME in n.meta:
            self.audit.shapes[n.meta[NAME]] = ", ".join("x".join(map(str, each.shape)) or "1" for each in tensors)
        return result

    def _loop(self, n: Node) -> Any:
        (body, *args), how = self.fetch_args_kwargs_from_env(n)
        first, later = _rounded_of_steps(body, n, self.rounded)
        steps = itertools.chain([first], itertools.repeat(later))
        return nodes.recurrent(lambda *given: _Watched(self.audit, body, next(steps)).run(*given), *args, **how)


def _rounded(module: GraphModule, given: Iterable[Node] = ()) -> set[Node]:
    """The nodes with rounded outputs, and the nodes that are ``given`` as rounded.

    They are quantize nodes, movement of rounded numbers, products of rounded numbers with a power of two, and loops of
    steps with rounded outputs.
    """
    found = set(given)
    for node in module.graph.nodes:
        if (rounding := Rounding.of(node)) is not None:
            is_rounded = Quantizer.parse(rounding.forward).rounds
        elif node.target is nodes.recurrent:
            body: Any = module.get_submodule(str(node.args[0].target))
            first, _ = _rounded_of_steps(body, node, found)
            _, (output, *_), _ = body.graph.output_node().args[0]
            is_rounded = output in first
        else:
            sources = _floating_inputs(node)
            moves = part_of(operation_of(node)) == "movement" or _is_shift(node)
            is_rounded = moves and bool(sources) and found.issuperset(sources)
        if is_rounded:
            found.add(node)
    return found


def _is_shift(node: Node) -> bool:
    """Whether it is a product with a power of two, such as the scaling of queries."""
    factor = node.args[1] if operation_of(node) == "mul" and len(node.args) == 2 else None
    return isinstance(factor, float) and math.frexp(factor)[0] == 0.5


def _rounded_of_steps(body: GraphModule, loop: Node, rounded: set[Node]) -> tuple[set[Node], set[Node]]:
    """``_rounded`` of the first step of a loop, and of all later steps. Only the first reads the loop's own states."""
    inputs = body.graph.find_nodes(op="placeholder")[1:]  # the key is first
    given = {node for node, operand in zip(inputs, operands_of(loop), strict=True) if operand in rounded}
    first = _rounded(body, given)
    output: Any = body.graph.output_node()
    carried, *_ = output.args[0]
    states = inputs[1 : 1 + len(carried)]
    handed = {node for node, source in zip(states, carried, strict=True) if source in first}
    return first, _rounded(body, given.difference(states) | handed)


def _floating_inputs(node: Node) -> list[Node]:
    return [each for each in node.all_input_nodes if _is_floating(each)]


def _is_floating(node: Node) -> bool:
    values = pytree.tree_leaves(node.meta.get("example_value"))
    return Rounding.of(node) is not None or any(map(is_number, values))


def _version(tensor: Tensor) -> int:
    """The number of writes into ``tensor``, where torch counts them."""
    return 0 if tensor.is_inference() else tensor._version


def _is_layer(name: str, given: Any) -> bool:
    """Whether an operation of aten makes new numbers: in a graph they would have been rounded."""
    name = name.strip("_")
    makes = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in pytree.tree_leaves(given))
    return makes and part_of(name) not in ("movement", "number")


def _line() -> str:
    """The user's line that runs now."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_own(frame):
        frame = frame.f_back
    return "code without a line" if frame is None else line_of(frame)
