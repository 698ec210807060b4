"""Recurrent layers, written out: the step of each kind of cell, and the loops that run it."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Graph, GraphModule, Node

from .. import nodes
from ..recipe import Recipe, Subject
from .captured import ARGUMENT, CALLS, CARRIED, HOLDS, KEPT, LAYER, TWIN, UPDATE, Layer, around
from .expand import rounds
from .facts import Origin
from .names import PART, kinds_of_type
from .operations import operation_of
from .origin import ORIGIN
from .tables import part_of
from .write import VALUE, Writer, value_of

__all__ = ["expand_recurrent", "inside_module", "inside_recurrent", "prepare_step"]


class Weights(NamedTuple):
    """The weights of one layer in one direction; ``hr`` projects the hidden state."""

    ih: Any
    hh: Any
    bias_ih: Any = None
    bias_hh: Any = None
    hr: Any = None


class Step:
    """``step(name, function, *args)`` is one operation of a step. Its output is a place of that name."""

    def __init__(self, write: Callable[..., Any], weights: Weights) -> None:
        self._write, self._weights = write, weights

    def __call__(self, name: str, function: Callable[..., Any], *args: Any) -> Any:
        return self._write(name, function, *args)

    def products(self, x: Any, h: Any) -> tuple[Any, Any]:
        """(input product, hidden product): the input and the hidden state times their weights, with biases."""
        weights = self._weights
        of_input = self("input_product", F.linear, x, weights.ih, weights.bias_ih)
        return of_input, self("hidden_product", F.linear, h, weights.hh, weights.bias_hh)

    def parts(self, x: Any, number: int) -> list[Any]:
        """``x`` in ``number`` parts along its last axis."""
        whole = self("", torch.chunk, x, number, -1)
        return [self("", operator.getitem, whole, i) for i in range(number)]

    def projected(self, h: Any) -> Any:
        return h if self._weights.hr is None else self("projection", F.linear, h, self._weights.hr)


def _lstm(step: Step, x: Any, h: Any, c: Any) -> tuple[Any, ...]:
    i, f, g, o = step.parts(step("gates", operator.add, *step.products(x, h)), 4)
    i = step("input_gate", torch.sigmoid, i)
    f = step("forget_gate", torch.sigmoid, f)
    g = step("cell_gate", torch.tanh, g)
    o = step("output_gate", torch.sigmoid, o)
    c = step("cell", operator.add, step("kept_cell", operator.mul, f, c), step("new_cell", operator.mul, i, g))
    return step.projected(step("hidden", operator.mul, o, step("cell_tanh", torch.tanh, c))), c


def _gru(step: Step, x: Any, h: Any) -> tuple[Any, ...]:
    of_input, of_hidden = step.products(x, h)
    (x_r, x_z, x_n), (h_r, h_z, h_n) = step.parts(of_input, 3), step.parts(of_hidden, 3)
    r = step("reset_gate", torch.sigmoid, step("reset_sum", operator.add, x_r, h_r))
    z = step("update_gate", torch.sigmoid, step("update_sum", operator.add, x_z, h_z))
    n = step("new_gate", torch.tanh, step("new_sum", operator.add, x_n, step("reset_hidden", operator.mul, r, h_n)))
    new = step("new_hidden", operator.mul, step("new_share", operator.sub, 1, z), n)
    return (step("hidden", operator.add, new, step("kept_hidden", operator.mul, z, h)),)


def _rnn(activation: Callable[..., Any], step: Step, x: Any, h: Any) -> tuple[Any, ...]:
    return (step("hidden", activation, step("sum", operator.add, *step.products(x, h))),)


class Kind(NamedTuple):
    """layer, cell: the types of modules that call it.
    states: the names of the states that a step hands to the next one, the output first.
    step: (Step, x, *states) -> the next states.
    """

    layer: type
    cell: type
    states: tuple[str, ...]
    step: Callable[..., tuple[Any, ...]]


KINDS = {
    "lstm": Kind(nn.LSTM, nn.LSTMCell, ("h", "c"), _lstm),
    "gru": Kind(nn.GRU, nn.GRUCell, ("h",), _gru),
    "rnn_tanh": Kind(nn.RNN, nn.RNNCell, ("h",), functools.partial(_rnn, torch.tanh)),
    "rnn_relu": Kind(nn.RNN, nn.RNNCell, ("h",), functools.partial(_rnn, torch.relu)),
}
CELL = "_cell"  # after the name of a kind: the function of a cell
OF_LAYER = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first")
OF_CELL = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")


def expand_recurrent(graph: Graph, recipe: Recipe, bodies: MutableMapping[str, Any], *, twins: bool = False) -> Graph:
    """Writes recurrent layers out where ``recipe`` rounds inside of them; returns ``graph``.

    bodies: gets the graph of each loop's step.
    twins: whether each loop gives its outputs before rounding, too (TWIN).

    Before:

        lstm = lstm(x, (h, c), [weight_ih, weight_hh, bias_ih, bias_hh], True, 1, 0.0, True, False, False)
        y = lstm[0]

    After:

        rnn_l0 = self.rnn_l0                            the graph of one step: see ``_lstm``
        recurrent = recurrent(rnn_l0, None, x, (h_0, c_0), (weight_ih, weight_hh, bias_ih, bias_hh))
        y = recurrent[0]

    Each layer has a loop for each direction. Between layers the directions are concatenated, and dropout is applied. A
    cell is a step without a loop: its operations stand in ``graph``.
    """
    for node in list(graph.nodes):
        if (call := _call(node)) is not None and call.is_rounded_inside(recipe):
            call.write_out(bodies, twins)
    graph.lint()
    return graph


def inside_recurrent(node: Node) -> Iterator[Subject]:
    """The subjects of the places inside ``node``, if it calls a recurrent layer or cell."""
    if (call := _call(node)) is not None:
        yield from call.subjects()


def inside_module(path: str, module: nn.Module) -> Iterator[Subject]:
    """The subjects of the places inside the module at ``path``, if it is recurrent."""
    if isinstance(module, nn.RNNBase):
        weights = Weights(None, None, hr=module.proj_size or None)
        names = runs(module.num_layers, module.bidirectional)
        yield from _subjects(KINDS[module.mode.lower()], type(module), path, ((name, weights) for name in names))
    elif isinstance(module, nn.RNNCellBase):
        kind = next(each for name, each in KINDS.items() if _is_of_cell(module, name, each))
        yield from _subjects(kind, type(module), path, [("", Weights(None, None))])


def _is_of_cell(module: nn.RNNCellBase, name: str, kind: Kind) -> bool:
    return isinstance(module, kind.cell) and name.endswith(getattr(module, "nonlinearity", ""))


def _subjects(kind: Kind, type: type, path: str, steps: Iterable[tuple[str, Weights]]) -> Iterator[Subject]:
    """The subjects of the places in ``steps``, given as (name, weights)."""
    for name, weights in steps:
        found: list[Subject] = []

        def note(place: str, function: Any, *_: Any, name: str = name, found: list[Subject] = found) -> None:
            if place:
                full = ".".join(filter(None, (path, name, place)))
                found.append((full, kinds_of_type(type, part_of(function.__name__))))

        kind.step(Step(note, weights), None, *kind.states)
        yield from found


def _call(node: Node) -> _Call | None:
    name = operation_of(node)
    if name in KINDS:
        return _LayerCall(node, KINDS[name])
    return _CellCall(node, KINDS[name.removesuffix(CELL)]) if name.removesuffix(CELL) in KINDS else None


def prepare_step(loop: Node, body: Graph) -> None:
    """Notes on the graph of a step the origin of its states, and the outputs that do not leave the model (KEPT)."""
    first: Any = loop.args[3]
    following: Any = body.output_node().args[0]
    _, outputs, last = following
    x, *rest = body.find_nodes(op="placeholder")
    states = rest[: len(first)]
    for each in (x, *states):
        each.meta[ARGUMENT] = each.name
    for each in states:  # of the model from the second step on, whatever the first states are
        each.meta |= {HOLDS: "operand", ORIGIN: Origin.MODEL}
    leaving = {item.args[1] for item in loop.users if item.meta[PART] == "exit"}
    twins = {item.meta[TWIN] for item in loop.users if TWIN in item.meta}
    for i, each in enumerate((*outputs, *last)):
        each.meta[KEPT] = i not in (twins or leaving)


class _Call:
    """One call of a recurrent layer or cell."""

    def __init__(self, node: Node, kind: Kind, type: type) -> None:
        self.node, self.kind = node, kind
        self.layer: Layer | None = node.meta.get(LAYER)
        self.path = around(node) if self.layer is None else self.layer.path
        calls = [each.kind for each in node.meta.get(CALLS, ())[-1:] if issubclass(each.kind, type)]  # of a subclass
        self.type = self.layer.kind if self.layer is not None else (*calls, type)[0]

    def is_rounded_inside(self, recipe: Recipe) -> bool:
        """Whether ``recipe`` rounds a place inside. It does not if it calls the layer, or a module around it, whole."""
        is_whole = self.layer is not None and recipe.is_whole(self.path)
        return not is_whole and any(rounds(recipe, *subject) for subject in self.subjects())

    def runs(self) -> Iterator[tuple[str, Weights]]:
        """(name, weights) of each step that it runs; a cell's step is named ""."""
        raise NotImplementedError

    def write_out(self, bodies: MutableMapping[str, Any], twins: bool) -> None:
        raise NotImplementedError

    def subjects(self) -> Iterator[Subject]:
        """The subjects of all places inside."""
        return _subjects(self.kind, self.type, self.path, self.runs())

    def _name(self, *names: str) -> str:
        return ".".join(filter(None, (self.path, *names)))

    def _step(self, write: Writer, name: str, weights: Weights, x: Node, states: list[Node]) -> tuple[Node, ...]:
        """Writes the nodes of a step; returns its next states."""

        def written(place: str, function: Callable[..., Any], *args: Any) -> Node:
            full = self._name(name, place)
            layer = Layer(f"{full} {self.node.name}", full, self.type, part_of(function.__name__))
            return write(function, *args, layer=layer if place else None)

        return self.kind.step(Step(written, weights), x, *states)

    def _cast(self, write: Writer, *given: Node) -> list[Node]:
        """The operands of the call, cast to the dtype of its output, as autocast does."""
        value = self.node.meta[VALUE]
        dtype = (value if isinstance(value, Tensor) else value[0]).dtype
        return [each if value_of(each).dtype == dtype else write("to", each, dtype) for each in given]

    def _replace(self, *results: Node) -> None:
        """Replaces the outputs of the call by ``results``. Its layer's other nodes, mere movement, leave the layer."""
        for node in self.node.graph.nodes if self.layer is not None else ():
            if node.meta.get(LAYER) == self.layer:
                del node.meta[LAYER]
        value = self.node.meta.get(VALUE)
        items = [self.node] if isinstance(value, Tensor) else list(self.node.users)
        for item in items:
            new = results[0] if item is self.node else results[item.args[1]]  # type: ignore[index]
            new.meta |= {key: item.meta[key] for key in (KEPT, UPDATE) if key in item.meta}
            item.replace_all_uses_with(new)
            if item is not self.node:
                item.graph.erase_node(item)
        self.node.graph.erase_node(self.node)
        for new in results:
            _erase_unread(new)


class _CellCall(_Call):
    def __init__(self, node: Node, kind: Kind) -> None:
        super().__init__(node, kind, kind.cell)
        self.given: dict[str, Any] = dict(zip(OF_CELL, node.args, strict=False)) | node.kwargs

    def runs(self) -> Iterator[tuple[str, Weights]]:
        yield "", Weights(*(self.given.get(name) for name in OF_CELL[2:]))

    def write_out(self, bodies: MutableMapping[str, Any], twins: bool) -> None:
        ((name, weights),) = self.runs()
        hx = self.given["hx"]
        write = Writer(self.node)
        x, *states = self._cast(write, self.given["input"], *([hx] if isinstance(hx, Node) else hx))
        self._replace(*self._step(write, name, weights, x, states))


class _LayerCall(_Call):
    def __init__(self, node: Node, kind: Kind) -> None:
        super().__init__(node, kind, kind.layer)
        self.given: dict[str, Any] = dict(zip(OF_LAYER, node.args, strict=False)) | node.kwargs

    def runs(self) -> Iterator[tuple[str, Weights]]:
        params, bidirectional = self.given["params"], self.given["bidirectional"]
        # Between models of other depths num_layers is a symbol. Each run has two matrices with a row for each gate.
        rows = [value_of(each).shape[0] for each in params if value_of(each).dim() == 2]
        names = runs(rows.count(rows[0]) // (2 + 2 * bidirectional), bidirectional)
        size = len(params) // len(names)
        biases = 2 if self.given["has_biases"] else 0
        for i, name in enumerate(names):
            ih, hh, *rest = params[i * size : (i + 1) * size]
            yield name, Weights(ih, hh, *(rest[:biases] or (None, None)), *rest[biases:])

    def write_out(self, bodies: MutableMapping[str, Any], twins: bool) -> None:
        write, given, directions = Writer(self.node), self.given, 1 + self.given["bidirectional"]
        hx = [given["hx"]] if isinstance(given["hx"], Node) else given["hx"]
        x, *hx = self._cast(write, given["input"], *hx)
        last: list[tuple[Node, ...]] = []
        outputs: list[Node] = []
        steps = list(self.runs())
        for i, (name, weights) in enumerate(steps):
            first = [write(torch.select, each, 0, i) for each in hx]
            output, *states = self._loop(write, name, weights, x, first, bodies, twins)
            last.append(tuple(states))
            outputs.append(output)
            if len(outputs) == directions:
                x = outputs[0] if directions == 1 else write(torch.cat, outputs, -1)
                outputs = []
                if given["dropout"] and given["train"] and i + 1 < len(steps):
                    x = write(F.dropout, x, given["dropout"])
        self._replace(x, *(write(torch.stack, each) for each in zip(*last, strict=True)))

    def _loop(
        self,
        write: Writer,
        name: str,
        weights: Weights,
        x: Node,
        first: list[Node],
        bodies: MutableMapping[str, Any],
        twins: bool,
    ) -> list[Node]:
        """Writes the loop of a layer in one direction; returns the output and the last states."""
        axis = 1 if self.given.get("batch_first") else 0
        body, given = self._body(name, weights, x, axis, first, 1 + twins)
        attribute = unique(self._name(name).replace(".", "_"), bodies)
        bodies[attribute] = GraphModule({}, body)
        graph = self.node.graph
        if graph.owning_module is not None:
            graph.owning_module.add_module(attribute, bodies[attribute])
        held = tuple(each for each in weights if each is not None)
        how: dict[str, Any] = {"axis": axis} if axis else {}
        how |= {"reverse": True} if name.endswith("_reverse") else {}
        with graph.inserting_before(self.node):
            step = graph.get_attr(attribute)
            loop = graph.call_function(nodes.recurrent, (step, None, x, tuple(first), held), how)
        step.meta[HOLDS] = "body"
        loop.meta = write.inherited()
        h, *_ = given
        with enable_python_dispatcher():
            output = value_of(h).new_empty((*value_of(x).shape[:-1], value_of(h).shape[-1]))
        times = 1 + twins
        loop.meta[VALUE] = (*[output] * times, *[value_of(each) for each in given for _ in range(times)])
        items = [write(operator.getitem, loop, i * times) for i in range(1 + len(given))]
        for i, item in enumerate(items if twins else ()):
            item.meta[TWIN] = i * times + 1
        return items

    def _body(
        self, name: str, weights: Weights, x: Node, axis: int, first: list[Node], times: int
    ) -> tuple[Graph, list[Node]]:
        """The graph of a step that gives each output this many times, and the nodes of its next states."""
        body = Graph()

        def placeholder(name: str, value: Tensor) -> Node:
            node = body.placeholder(name)
            node.meta[VALUE] = value
            return node

        with enable_python_dispatcher():
            sizes = value_of(x).shape
            now = placeholder("x", value_of(x).new_empty((*sizes[:axis], *sizes[axis + 1 :])))
        states = [placeholder(*each) for each in zip(self.kind.states, map(value_of, first), strict=True)]
        own = Weights(*(each and placeholder(field, value_of(each)) for field, each in weights._asdict().items()))
        output = body.output(None)
        write = Writer(self.node, output)
        following = self._step(write, name, own, now, states)
        # An output that the model only returns is read unrounded; the next step reads it rounded: so each has a node.
        outputs = tuple(write("contiguous", following[0]) for _ in range(times))
        last = tuple(write("contiguous", each) for each in following for _ in range(times))
        for each in following:
            each.meta[CARRIED] = True
        output.args = ((following, outputs, last),)
        return body, list(following)


def _erase_unread(node: Node) -> None:
    if not node.users and node.op.startswith("call") and node.target is not nodes.recurrent:
        sources = node.all_input_nodes
        node.graph.erase_node(node)
        for each in sources:
            _erase_unread(each)


def runs(layers: int, bidirectional: bool) -> list[str]:
    """``l0``, ``l0_reverse``, ``l1``, ...: the names of a layer's loops, as in its parameters' names."""
    return [f"l{i}{direction}" for i in range(layers) for direction in ("", "_reverse")[: 1 + bidirectional]]


def unique(name: str, taken: MutableMapping[str, Any]) -> str:
    names = (name if not number else f"{name}_{number}" for number in range(len(taken) + 1))
    return next(each for each in names if each not in taken)
