"""Proof that a rewritten graph is right, by rules and tables that the passes which made it do not share.

Of ``node.meta`` it reads what the capture has written, and nothing that a pass writes.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from .. import nodes
from ..formats import FLOAT, Format, Slices, parse
from ..recipe import Recipe, Subject
from .captured import ARGUMENT, CARRIED, HOLDS, KEPT, LAYER, MODULE, PARAMETER, UPDATE, Scope
from .facts import FACTS, MEANINGS, Facts, Origin
from .fit import contraction_axes, fitted, of_parameter

__all__ = ["VerifyError", "verify"]


class VerifyError(AssertionError):
    """A rewritten graph that is wrong: a defect of the passes, not of the model."""


SWITCHES = re.compile(r"_set_grad_enabled|_(?:enter|exit)_\w+")  # what holds for all that follows
WRITES = re.compile(r"[a-z0-9_]*[a-z0-9]_|i(?:add|sub|mul|truediv|floordiv|mod|pow|and|or|xor)")

LAYERS = ("compute", "norm", "activation", "arithmetic", "pooling")

# What takes masks out, and what turns angles into numbers.
ENDS = {
    "mask": re.compile(r"(?:log_|_?safe_)?softmax|logsumexp|cross_entropy|exp|a?max|scaled_dot_product_attention"),
    "angle": re.compile(r"(?:sin|cos)_?"),
}

# What a call of a recurrent layer or cell computes in each step, by its part.
INSIDE = {
    "lstm": {
        "compute": "input_product hidden_product",
        "arithmetic": "gates kept_cell new_cell cell hidden",
        "activation": "input_gate forget_gate cell_gate output_gate cell_tanh",
    },
    "gru": {
        "compute": "input_product hidden_product",
        "arithmetic": "reset_sum update_sum new_sum reset_hidden new_share new_hidden kept_hidden hidden",
        "activation": "reset_gate update_gate new_gate",
    },
    "rnn_tanh": {"compute": "input_product hidden_product", "arithmetic": "sum", "activation": "hidden"},
    "rnn_relu": {"compute": "input_product hidden_product", "arithmetic": "sum", "activation": "hidden"},
}

OURS = (nodes.quantize_weight, nodes.quantize_output)
DERIVES = re.compile(r"(?:.+\.)?parametrizations\.")  # the names of parameters that weights are derived from
NOT_MADE = ("parameter", "input", "operand", "number", "state", "body", "nested", "movement", "inside", "outside")
NO_LAYERS = (*MEANINGS, *NOT_MADE)


def verify(
    graph: Graph,
    captured: Graph,
    recipe: Recipe,
    scope: Scope,
    *,
    keyed: bool = True,
    identity: bool = False,
) -> Graph:
    """``graph``, proved to be ``captured`` with every number of ``recipe`` quantized exactly once, and nothing else.

    Raises VerifyError, naming the node, unless

    1. without its key and its quantize nodes, the graph is the captured one, node for node, argument for argument;
    2. every floating parameter is read through one quantize node, the same for each of its readers; where a
       parametrization derives a weight, the weight is, and not what it is derived from;
    3. every output that the recipe's placement names is read through one quantize node, and only what the model
       returns is read bare, unless the recipe rounds that too; what a buffer is set to is rounded;
    4. nothing else is quantized: no movement, size, buffer or quantized tensor, and no input but by the recipe;
    5. formats and rounding are the recipe's at that place, its rules applied, and roles in float have no node;
    6. no two nodes share a stream, in a checkpoint's graph and around it, and all draw from the one key of this run,
       the first input;
    7. an output that is rounded in place is in memory of its own that nothing else reads, autograd included, and so is
       an error signal; and the recipe allows it;
    8. no mode (autocast, gradients, inference) is switched between an output and its quantize node;
    9. an activation that is left as it is has all its numbers from a tensor rounded to that format, and nothing writes
       into it; an error signal, from an error signal rounded to that format; and the recipe allows it;
    10. an attention product, or a recurrent layer, is one call only where nothing that it computes inside would be
       rounded;
    11. what is not rounded as a constant is made of no parameter and no floating input, as a mask or an angle read by
       nothing else than what takes it; and a norm that is one operation holds no product.
    """
    graph.lint()
    _Proof(graph, captured, recipe, scope, keyed, identity).run()
    return graph


class _Model:
    """What the captured graph computes."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.kinds = _kinds(graph)
        self.exits = _exits(graph, self.kinds)
        self.places = _places(graph, self.kinds)

    def is_layer(self, node: Node) -> bool:
        return self.kinds[node] not in NO_LAYERS and node.op != "output"

    def subject(self, node: Node) -> Subject:
        """The name of an input or output, and all that a rule may call it."""
        layer, kinds = node.meta.get(LAYER), [self.kinds[node]]
        if layer is not None:
            kinds += [base.__name__ for base in layer.kind.__mro__]
        elif node.op != "placeholder":
            kinds += [_called(node), _called(node).rstrip("_")]
        return self.places[node], kinds

    def sources(self, node: Node) -> list[Node]:
        """What ``node`` reads, or, where it ends a layer, what the layer reads."""
        inner = [(self.sources(each) if self.kinds[each] == "inside" else [each]) for each in node.all_input_nodes]
        return list(dict.fromkeys(source for each in inner for source in each))

    def readers(self, node: Node) -> set[Node]:
        """Who reads ``node``; a layer is one reader, whatever it does inside."""
        inner = [(self.readers(user) if self.kinds[user] == "inside" else {user}) for user in node.users]
        return set().union(*inner)

    def group_ends(self) -> set[Node]:
        """The last node of each group, found reader by reader: each node joins the group that ends in the one node it
        continues, the earliest-begun of two."""
        group: dict[Node, int] = {}
        last: dict[int, Node] = {}
        for number, node in enumerate(self.graph.nodes):
            kind, every = self.kinds[node], self.sources(node)
            sources = [s for s in every if s in group and last[group[s]] is s and len(self.readers(s)) == 1]
            if kind in ("norm", "activation"):
                sources = [source for source in sources if source is every[0] or source not in node.all_input_nodes]
            elif kind == "arithmetic":
                readers = [self.kinds.get(reader) for reader in self.readers(node)]
                is_sum = _called(node).rstrip("_") in ("add", "iadd")
                if not sources or not is_sum or readers != ["activation"]:
                    continue
            elif kind == "compute":
                sources = []
            else:
                continue
            group[node] = min((group[source] for source in sources), default=number)
            last[group[node]] = node
        return set(last.values())


class _Proof:
    def __init__(
        self, graph: Graph, captured: Graph, recipe: Recipe, scope: Scope, keyed: bool, identity: bool
    ) -> None:
        self.graph, self.recipe, self.scope, self.identity = graph, recipe, scope, identity
        self.model = _Model(captured)
        self.key = next(iter(graph.nodes)) if keyed else None
        self.old: dict[Node, Node] = {}  # node of the graph -> what it was
        self.axes = contraction_axes(captured)
        self.returns_rounded = recipe.quantize_logits or not scope.returns

    def run(self) -> None:
        self._same_computation()
        self._meanings()
        self._fused()
        self._recurrent()
        self._weights_and_outputs()
        self._randomness()
        self._memory()
        self._kept()
        self._modes()

    def _same_computation(self) -> None:
        before, after = list(_listing(self.model.graph, None)), list(_listing(self.graph, self.key))
        for (old, was), (new, became) in zip(before, after, strict=False):
            _require(was == became, new, f"was {was} and became {became}")
            self.old[new] = old
        _require(
            len(before) == len(after), self.graph.output_node(), f"comes after {len(after)} nodes, not {len(before)}"
        )

    def _meanings(self) -> None:
        """What is left as it is since it is a constant, a mask or an angle is one; a norm holds no product."""
        for new, old in self.old.items():
            kind, layer = self.model.kinds[old], old.meta.get(LAYER)
            if kind == "constant":
                found = self._made_of(old)
                _require(found is None, new, f"is no constant: it is made of {found}")
            elif kind in ENDS:
                found = self._read_by_other(old, kind)
                _require(found is None, new, f"is no {kind}: {found} reads it")
            elif layer is not None and layer.part == "norm":
                _require(old.meta[FACTS].category != "compute", new, f"is a product in {layer.path}, which is no norm")

    def _fused(self) -> None:
        """No product of queries and keys is hidden in a fused call that ``Recipe.at`` would have rounded."""
        for node in self.model.graph.nodes:
            given = [source.meta.get("example_value") for source in node.all_input_nodes]
            is_plain = all(isinstance(each, torch.Tensor) and not each.is_nested for each in given)
            if _called(node) != "scaled_dot_product_attention" or LAYER in node.meta or not is_plain:
                continue
            if not all(isinstance(size, int) for size in (given[0].shape[-1], *given[0].shape[-3:-2])):
                continue  # no number to scale by, or of heads to share
            for name, kind in (("attn_scores", "compute"), ("attn_probabilities", "activation")):
                full = ".".join(filter(None, (node.meta.get(MODULE), name)))
                self._hides_nothing(node, full, (kind, name))

    def _recurrent(self) -> None:
        """No step of a recurrent layer is hidden in a call of PyTorch's that ``Recipe.at`` would have rounded."""
        for node in self.model.graph.nodes:
            name, layer = _called(node), node.meta.get(LAYER)
            inside = INSIDE.get(name.removesuffix("_cell")) if node.op == "call_function" else None
            if inside is None or (layer is not None and self.recipe.is_whole(layer.path)):
                continue
            path = node.meta.get(MODULE) if layer is None else layer.path
            types = [] if layer is None else [base.__name__ for base in layer.kind.__mro__]
            for run in [""] if name.endswith("_cell") else _runs(node):
                for kind, places in inside.items():
                    for place in places.split():
                        full = ".".join(filter(None, (path, run, place)))
                        self._hides_nothing(node, full, (kind, *types))

    def _hides_nothing(self, node: Node, place: str, kinds: tuple[str, ...]) -> None:
        here = self.recipe.at((place, kinds))
        is_float = not (here.activation.rounds or here.error.rounds) or self.recipe.excludes(place)
        is_placed = self.recipe.placement != "compute" or "compute" in kinds or self.recipe.includes(place)
        _require(is_float or not is_placed, node, f"hides {place}, which is to be rounded")

    def _made_of(self, node: Node) -> Node | None:
        """A parameter, or a floating input, that ``node``'s numbers are made of."""
        waiting, seen = [node], {node}
        for each in waiting:
            value, kind = each.meta.get("example_value"), self.model.kinds[each]
            is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            if kind == "parameter" or (kind == "input" and is_floating):
                return each
            if each.meta[FACTS].category != "number":
                given = each.all_input_nodes[:1] if _called(each).endswith("_as") else each.all_input_nodes
                new = [source for source in given if source not in seen]
                seen.update(new)
                waiting += new
        return None

    def _read_by_other(self, node: Node, kind: str) -> Node | None:
        """Who reads ``node``, through movement, and is none of the ends of such a kind."""
        for user in node.users:
            is_read = user.op != "output" and user.meta[FACTS].category != "number"
            if not is_read or ENDS[kind].fullmatch(_called(user)):
                continue
            # Scaled scores may meet a table of positions, and a mask behind it; what a mask takes out is in a layer.
            passed = ("movement", "exit", kind, *(("arithmetic", "inside") if kind == "mask" else ()))
            is_passed = self.model.kinds[user] in passed
            found = self._read_by_other(user, kind) if is_passed else user
            if found is not None:
                return found
        return None

    def _weights_and_outputs(self) -> None:
        ends = self.model.group_ends() if self.recipe.placement == "group" else set()
        for new, old in self.old.items():
            weight = self._weight_formats(old)
            formats = weight or self._output_formats(old, ends)
            function = nodes.quantize_weight if weight else nodes.quantize_output
            quantizers = [user for user in new.users if user.target in OURS and user.args[0] is new]
            bare = [user for user in new.users if user not in quantizers]
            rounded = [user for each in quantizers for user in each.users]
            if formats is None or all(self._reads_bare(user, old) for user in old.users):
                _require(not quantizers, new, f"is quantized by {quantizers}, and should not be")
                continue
            _require(len(quantizers) == 1, new, f"is quantized {len(quantizers)} times")
            wrong = [user for user in bare if user not in self.old or not self._reads_bare(self.old[user], old)]
            _require(not wrong, new, f"is read bare by {wrong}")
            wrong = [user for user in rounded if user not in self.old or self._reads_bare(self.old[user], old)]
            _require(not wrong, new, f"is read rounded by {wrong}")
            (node,) = quantizers
            _require(node.target is function, node, f"is no {function.__name__}")
            _require(node.args[3:] == formats, node, f"rounds by {node.args[3:]} where the recipe says {formats}")

    def _reads_bare(self, reader: Node, node: Node) -> bool:
        """Whether ``reader`` reads ``node`` as it is, though it is rounded for others."""
        if reader.op == "output" and node.meta.get(CARRIED, False):  # the next step reads it
            return False
        is_weight = self.model.kinds[node] == "parameter"
        if (
            reader.op == "output" and node.meta.get(KEPT, False) and not is_weight
        ):  # kept as a layer reads it, if one does
            return not self.returns_rounded and all(
                user.op == "output" or self._reads_bare(user, node) for user in node.users
            )
        if reader in self.model.exits:
            return is_weight or not (self.returns_rounded or node.meta.get(UPDATE, False))
        return is_weight and self.model.kinds[reader] == "number"

    def _weight_formats(self, node: Node) -> tuple[str, ...] | None:
        """What the recipe says of a parameter, or of a weight that is derived."""
        value = node.meta.get("example_value")
        if self.model.kinds[node] != "parameter" or (value is not None and not value.is_floating_point()):
            return None
        name = node.meta.get(PARAMETER, "")
        if node.op != "placeholder":
            name = next((each for each in self.scope.parameters if each.startswith(f"{node.meta[LAYER].path}.")), "")
        elif DERIVES.match(name):
            return None
        if name not in self.scope.parameters:
            return None
        rank = 2 if value is None else value.dim()
        here = of_parameter(self.recipe, self.scope.parameters[name], rank)
        return (str(here.weight), here.rounding) if self.identity or here.weight.rounds else None

    def _output_formats(self, node: Node, ends: set[Node]) -> tuple[str, ...] | None:
        """What the recipe says of an input or an output, if it wants that rounded."""
        kind, placement = self.model.kinds[node], self.recipe.placement
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
            return None
        if kind == "input":
            sizes = all(self.model.kinds[user] == "number" for user in node.users)
            wanted = self.recipe.quantize_input and self.scope.enters and not sizes
        elif self.model.is_layer(node):
            placed = {
                "every": True,
                "compute": kind == "compute",
                "compute+activation": kind in ("compute", "activation"),
                "group": node in ends,
            }
            wanted = placed[placement] or self.recipe.includes(self.model.places[node])
        elif kind in MEANINGS:
            wanted = self.recipe.includes(self.model.places[node])
        else:
            return None
        if not wanted or self.recipe.excludes(self.model.places[node]):
            return None
        here = self.recipe.at(self.model.subject(node))
        if not (here.activation.rounds or here.error.rounds or self.identity):
            return None
        activation, error = (fitted(each, node, self.axes[node]) for each in (here.activation, here.error))
        return activation, error, here.rounding

    def _randomness(self) -> None:
        seen: dict[int, Node] = {}
        for node in self._all_nodes(self.graph, self.scope.bodies):
            if node.target in OURS:
                stream: Any = node.args[2]
                _require(seen.setdefault(stream, node) is node, node, f"shares stream {stream} with {seen[stream]}")
                _require(0 <= stream < nodes.ERROR_STREAM, node, f"has stream {stream}, which is no site's")
        for node in self.graph.nodes:
            if node.target in (*OURS, *nodes.RUNS):
                _require(node.args[1] is self.key, node, f"draws from {node.args[1]}, not from the key of this run")
            if node.target in OURS:
                _require(node.args[0] in self.old, node, f"quantizes {node.args[0]}, which is quantized")

    def _all_nodes(self, graph: Graph, bodies: Any) -> Iterator[Node]:
        """The nodes of ``graph``, and of the graphs that it runs."""
        for node in graph.nodes:
            yield node
            if node.target in nodes.RUNS:
                body = bodies[node.args[0].target]
                yield from self._all_nodes(body.graph, dict(body.named_children()))

    def _memory(self) -> None:
        for node in self.graph.find_nodes(op="call_function", target=nodes.quantize_output):
            letters = node.kwargs.get("in_place", "")
            _require(not letters or self.recipe.in_place, node, "rounds in place where the recipe says not to")
            if "A" in letters:
                _require(self._is_owned(node.args[0]), node, f"overwrites {node.args[0]}, which may be read again")
            if "E" in letters:
                readers = list(node.users)
                owned = len(readers) == 1 and _takes_first(readers[0], node) and _does(readers[0], "regrad")
                _require(owned, node, f"overwrites the gradient of {readers}, which may be read again")

    def _is_owned(self, node: Any) -> bool:
        """Whether ``node``'s output lies in memory that its one reader alone will read."""
        while len(node.users) == 1 and _does(node, "adds"):
            node = node.args[0]
        if len(node.users) != 1 or _written_by(node):
            return False
        is_copied = node.target is nodes.quantize_output and "A" not in node.kwargs.get("kept", "")
        return is_copied or _does(node, "own")

    def _kept(self) -> None:
        made_after = self._made_after()
        for node in self.graph.find_nodes(op="call_function", target=nodes.quantize_output):
            letters, source = node.kwargs.get("kept", ""), node.args[0]
            _require(not letters or self.recipe.in_place, node, "leaves out a rounding where the recipe says not to")
            both = set(letters) & set(node.kwargs.get("in_place", ""))
            _require(not both, node, f"is both to round in place and not to round ({letters})")
            if "A" in letters:
                format = _to(node, 3)
                passes = _does(source, "masks") or (_is_of_rows(format) and _selects(source))
                known = passes and format.keeps_subsets and self._first_is_rounded(source, format)
                _require(known, node, f"does not round {source}, which may not be rounded")
                _require(list(source.users) == [node], node, f"shares the memory of {source}, which others read")
                found = self._writer(node) or self._writer(source.args[0], source)
                _require(found is None, node, f"shares the memory of {source} with {found}")
            if "E" in letters:
                readers = list(node.users)
                passes = len(readers) == 1 and (_does(readers[0], "masks") or _does(readers[0], "adds"))
                known = passes and _to(node, 4).keeps_subsets and _takes_first(readers[0], node)
                known = known and _reads_once(readers[0], node) and self._all_rounded(readers[0], _to(node, 4))
                known = known and made_after[node] == made_after[next(iter(readers[0].users))]
                _require(known, node, f"does not round the gradient of {readers}, which may not be rounded")

    def _first_is_rounded(self, reader: Node, format: Format) -> bool:
        """Whether the first input of ``reader`` is an activation rounded to this format."""
        source: Any = (*reader.args, None)[0]
        is_rounded = isinstance(source, Node) and source.target is nodes.quantize_output
        return is_rounded and _to(source, 3) == format != FLOAT

    def _all_rounded(self, node: Node, format: Format) -> bool:
        """Whether all of the gradient that ``node``'s output gets is one error signal rounded to this format."""
        behind = [user for user in node.users if user.target is nodes.quantize_output and _to(user, 4) == format]
        return behind == list(node.users) and len(behind) == 1 and format != FLOAT

    def _writer(self, node: Node, but: Node | None = None) -> Node | None:
        """Who, ``but`` one, may write into ``node``'s output or a view of it: all that are not known not to."""
        for reader in node.users:
            if reader is but:
                continue
            if any(not isinstance(written, Node) or written is node for written in _written_by(reader)):
                return reader
            kind = self.model.kinds.get(self.old.get(reader, reader))
            if kind == "movement" or (kind == "inside" and self.old[reader].meta[FACTS].category == "movement"):
                if (found := self._writer(reader)) is not None:
                    return found
            elif kind != "number" and not (kind in (*LAYERS, *MEANINGS, "inside") and _is_own_code(reader)):
                return reader
        return None

    def _modes(self) -> None:
        made_after = self._made_after()
        for node in self.graph.find_nodes(op="call_function", target=nodes.quantize_output):
            source, here = node.args[0], made_after[node]
            _require(made_after[source] == here, node, f"is in another mode than {source}, which it quantizes")

    def _made_after(self) -> dict[Node, int]:
        """How many switches of a mode come before each node."""
        made_after: dict[Node, int] = {}
        switches = 0
        for node in self.graph.nodes:
            switches += SWITCHES.fullmatch(_called(node)) is not None
            made_after[node] = switches
        return made_after


def _runs(node: Node) -> Iterator[str]:
    """``l0``, ``l0_reverse``, ``l1``, ...: what a call of a recurrent layer runs."""
    names = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    for number in range(given["num_layers"]):
        yield f"l{number}"
        if given["bidirectional"]:
            yield f"l{number}_reverse"


def _takes_first(reader: Node, node: Node) -> bool:
    """Whether ``node`` is the first input of ``reader``."""
    return bool(reader.args) and reader.args[0] is node


def _reads_once(reader: Node, node: Node) -> bool:
    return [*reader.args, *reader.kwargs.values()].count(node) == 1


def _selects(node: Node) -> bool:
    """Whether ``node`` is a pool whose windows all meet its input, as they may not if they have gaps."""
    gaps = node.kwargs.get("dilation", (*node.args, 1, 1, 1, 1)[4])
    return _does(node, "selects") and gaps in (1, (1,), (1, 1))


def _to(node: Node, place: int) -> Format:
    """The format that ``node`` rounds to by the text in that place; what stands behind ~ is how."""
    return parse(str(node.args[place]).split("~")[0])


def _is_of_rows(format: Format) -> bool:
    """Whether what shares a scale has the same first index, or is the whole tensor."""
    return isinstance(format.block, Slices) and not any(format.block.dims)


def _require(ok: bool, node: Node | None, complaint: str) -> None:
    if not ok:
        raise VerifyError(f"the rewritten graph is wrong at node {node}: it {complaint}; please report this model")


def _listing(graph: Graph, key: Node | None) -> Iterator[tuple[Node, str]]:
    """The graph as text, without its key and its quantize nodes: a read of one is a read of what it quantizes."""
    names: dict[Node, str] = {key: "<key>"} if key is not None else {}
    number = 0
    for node in graph.nodes:
        if node.target in OURS:
            names[node] = names[node.args[0]]
        elif node is not key:
            names[node] = f"%{number}"
            number += 1
            yield node, _line(node, names)


def _line(node: Node, names: dict[Node, str]) -> str:
    target, arguments = node.target, node.args
    if node.op == "placeholder":
        target = f"{node.meta[HOLDS]} {node.meta.get(PARAMETER)}"
    elif target is nodes.checkpointed:
        target, arguments = torch.ops.higher_order.tag_activation_checkpoint, (arguments[0], *arguments[2:])
    elif target is nodes.recurrent:
        arguments = (arguments[0], None, *arguments[2:])
    return f"{node.op} {target} {map_arg((arguments, node.kwargs), lambda source: names[source])}"


def _kinds(graph: Graph) -> dict[Node, str]:
    """Each node's kind: that of PARTS, or "arithmetic", of what makes numbers; one of NO_LAYERS of all else."""
    kinds: dict[Node, str] = {}
    updates = _updates(graph)
    for node in graph.nodes:
        kinds[node] = _kind(node, kinds)
        reads_state = "state" in [kinds[source] for source in node.all_input_nodes]
        if kinds[node] in ("arithmetic", "norm", "constant", "inside") and node in updates and reads_state:
            kinds[node] = "state"
    return kinds


def _kind(node: Node, kinds: dict[Node, str]) -> str:
    if node.op == "output" or HOLDS in node.meta:
        return node.meta.get(HOLDS, "output")
    if node.meta.get(MODULE, "") is None:
        return "outside"
    if node.target in (torch.ops.higher_order.tag_activation_checkpoint, nodes.recurrent):
        return "nested"
    if any(kinds.get(_whole(written)) == "state" for written in _written_by(node)):
        return "state"
    known: Facts = node.meta[FACTS]
    kind = known.category if node.meta.get(LAYER) is None else _kind_in_layer(node, node.meta[LAYER])
    if known.origin is Origin.CONSTANT:
        if known.meaning == "constant" and kind in LAYERS:
            return "constant"
        if kind == "inside" or known.meaning == "constant":
            return kind
        return "state" if "state" in {kinds[source] for source in node.all_input_nodes} else "number"
    value = node.meta.get("example_value")
    if kind in LAYERS and isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
        return "number"
    if known.meaning and kind != "inside":
        return "arithmetic" if known.meaning == "mixes" else known.meaning
    return "movement" if kind == "number" and _is_filled(node) else kind


def _kind_in_layer(node: Node, layer: Any) -> str:
    """What a layer gives is of the layer's kind, all else in it is inside, what its hooks keep of that too."""
    value = node.meta.get("example_value")
    inner = {user for user in node.users if user.meta.get(LAYER) == layer}
    outer = {user for user in node.users if not inner or (user.op != "output" and not _reads_sizes(user))} - inner
    if not outer or not (value is None or isinstance(value, torch.Tensor)):
        return "number" if node.meta[FACTS].category == "number" else "inside"
    return layer.part


def _reads_sizes(user: Node) -> bool:
    return user.meta[FACTS].category == "number" and not _does(user, "reads")


def _places(graph: Graph, kinds: dict[Node, str]) -> dict[Node, str]:
    """The name of each input and layer output."""
    named: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if kinds[node] in (*LAYERS, *MEANINGS):
            named.setdefault(_unnumbered(node), []).append(node)
    places: dict[Node, str] = {}
    for name, nodes_of in named.items():
        free = (number for number in count(1) if f"{name}@{number}" not in named)
        places |= {node: name if len(nodes_of) == 1 else f"{name}@{next(free)}" for node in nodes_of}
    for node in graph.find_nodes(op="placeholder"):
        name = node.meta.get(ARGUMENT, node.name)
        places[node] = f"{name}@0" if name in named else name
    return places


def _unnumbered(node: Node) -> str:
    if (layer := node.meta.get(LAYER)) is not None:
        return layer.path or layer.kind.__name__.lower()
    return ".".join(name for name in (node.meta.get(MODULE), _called(node).strip("_")) if name)


def _updates(graph: Graph) -> set[Node]:
    """The arithmetic that serves nothing but what a buffer is set to; and the last of it, whatever else it serves."""
    updates: set[Node] = set()
    found = [node for node in graph.nodes if node.meta.get(UPDATE)]
    while found:
        node = found.pop()
        # Movement may stand last, and nowhere else.
        if node not in updates and (node.meta.get(UPDATE) or _is_arithmetic(node)):
            updates.add(node)
            found += [source for source in node.all_input_nodes if updates.issuperset(source.users)]
    return {node for node in updates if _is_arithmetic(node)}


def _is_arithmetic(node: Node) -> bool:
    return node.meta[FACTS].category == "arithmetic"


def _is_filled(node: Node) -> bool:
    """Whether another tensor is written into ``node``, or into a part of it."""
    for user in node.users:
        is_first = bool(user.args) and user.args[0] is node
        if is_first and _called(user) == "getitem" and _is_filled(user):
            return True
        if _written_by(user) == [node] and len(user.all_input_nodes) > 1:
            return True
    return False


def _written_by(node: Node) -> list[Any]:
    """What ``node`` writes into."""
    if not node.op.startswith("call"):
        return []
    parameters: list[str] = []
    if node.op == "call_function":
        with contextlib.suppress(TypeError, ValueError):
            parameters = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
    by_place = dict(zip(parameters, node.args, strict=False))
    in_place = {**by_place, **node.kwargs}.get("inplace", False)
    written = [node.kwargs["out"]] if "out" in node.kwargs else []
    if in_place or _called(node) == "setitem" or WRITES.fullmatch(_called(node)):
        written.append(node.args[0] if node.args else node.all_input_nodes[0])
    return written


def _whole(node: Any) -> Any:
    """What ``node`` is an item of."""
    while isinstance(node, Node) and _called(node) == "getitem":
        node = node.args[0]
    return node


def _called(node: Node) -> str:
    """What ``node`` calls, whoever wrote it."""
    if node.target is getattr:
        return str(node.args[1])
    if isinstance(node.target, OpOverload):
        return node.target._schema.name.rpartition("::")[2].lstrip("_")
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _does(node: Node, what: str) -> bool:
    """Whether the table of operations says so of ``node``."""
    return FACTS in node.meta and what in node.meta[FACTS].does


def _is_own_code(node: Node) -> bool:
    """Whether ``node`` runs code of PyTorch's own."""
    if node.op not in ("call_function", "call_method") or isinstance(node.target, HigherOrderOperator):
        return False
    is_registered = re.match(r"torch\._ops\.(?!aten$)", getattr(node.target, "__module__", None) or "")
    return not is_registered and _is_torch(node.target)


def _is_torch(thing: Any) -> bool:
    return (
        re.match(r"(torch|torchvision|_operator|builtins|math)(\.|$)", getattr(thing, "__module__", None) or "torch")
        is not None
    )


def _exits(graph: Graph, kinds: dict[Node, str]) -> set[Node]:
    """What the model gives, with movement and sizes that serve nothing else; and what is around the model."""
    exits: set[Node] = set()
    for node in reversed(graph.nodes):
        kept = node.meta.get(UPDATE) or node.meta.get(KEPT)
        leaves = node.users and all(user in exits for user in node.users) and not kept
        if kinds[node] in ("output", "outside") or (leaves and kinds[node] in ("movement", "number")):
            exits.add(node)
    return exits
