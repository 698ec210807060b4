"""``verify``: the check of each rule of ``rules.py`` on every node of a rewritten graph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from ... import nodes
from ...formats import FLOAT, Format, Slices, parse
from ...random import SITES
from ...recipe import Recipe
from ..captured import CARRIED, HOLDS, KEPT, LAYER, MODULE, PARAMETER, UPDATE, Scope
from ..facts import FACTS, MEANINGS
from ..fit import contraction_axes, fitted, of_parameter
from .model import LAYERS, Model
from .reading import argument, called, does, is_own_code, types_around, written_by
from .rules import require

__all__ = ["verify"]

SWITCHES = re.compile(r"_set_grad_enabled|_(?:enter|exit)_\w+")  # modes of all later nodes

# The operations that may read a mask, and an angle.
ENDS = {
    "mask": re.compile(r"(?:log_|_?safe_)?softmax|logsumexp|cross_entropy|exp|a?max|scaled_dot_product_attention"),
    "angle": re.compile(r"(?:sin|cos)_?"),
}

# The places in each step of a recurrent layer or cell, by part.
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


def verify(
    graph: Graph,
    captured: Graph,
    recipe: Recipe,
    scope: Scope,
    *,
    keyed: bool = True,
    identity: bool = False,
) -> Graph:
    """Returns ``graph`` after a proof: it is ``captured``, with every number of ``recipe`` quantized exactly once.

    Raises VerifyError, with the node and the rule, if ``graph`` breaks one of RULES.
    """
    graph.lint()
    _Proof(graph, captured, recipe, scope, keyed, identity).run()
    return graph


class _Proof:
    def __init__(
        self, graph: Graph, captured: Graph, recipe: Recipe, scope: Scope, keyed: bool, identity: bool
    ) -> None:
        self.graph, self.recipe, self.scope, self.identity = graph, recipe, scope, identity
        self.model = Model(captured)
        self.key = next(iter(graph.nodes)) if keyed else None
        self.old: dict[Node, Node] = {}  # node of the graph -> its node in ``captured``
        self.axes = contraction_axes(captured)
        self.returns_rounded = recipe.quantize_logits or not scope.returns
        self.shown: set[Node] = set()
        self.shown = set(self._shown())

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
        self._writes()

    def _same_computation(self) -> None:
        before, after = list(_listing(self.model.graph, None)), list(_listing(self.graph, self.key))
        for (old, was), (new, became) in zip(before, after, strict=False):
            require(1, was == became, new, f"was {was} and became {became}")
            self.old[new] = old
        require(
            1, len(before) == len(after), self.graph.output_node(), f"comes after {len(after)} nodes, not {len(before)}"
        )

    def _meanings(self) -> None:
        """Requires that each constant, mask and angle, left unrounded as such, is one, and no norm holds a product."""
        for new, old in self.old.items():
            kind, layer = self.model.kinds[old], old.meta.get(LAYER)
            if kind == "constant":
                found = self._made_of(old)
                require(11, found is None, new, f"is no constant: it is made of {found}")
            elif kind in ENDS:
                found = self._read_by_other(old, kind)
                require(11, found is None, new, f"is no {kind}: {found} reads it")
            elif layer is not None and layer.part == "norm":
                require(
                    11, old.meta[FACTS].category != "compute", new, f"is a product in {layer.path}, which is no norm"
                )

    def _fused(self) -> None:
        """Requires that no fused attention hides scores or probabilities that the recipe rounds."""
        for node in self.model.graph.nodes:
            given = [source.meta.get("example_value") for source in node.all_input_nodes]
            is_plain = all(isinstance(each, torch.Tensor) and not each.is_nested for each in given)
            if called(node) != "scaled_dot_product_attention" or LAYER in node.meta or not is_plain:
                continue
            if not all(isinstance(size, int) for size in (given[0].shape[-1], *given[0].shape[-3:-2])):
                continue  # the scale or the number of heads is no number
            for name, kind in (("attn_scores", "compute"), ("attn_probabilities", "activation")):
                full = ".".join(filter(None, (node.meta.get(MODULE), name)))
                self._hides_nothing(node, full, (kind, name, *types_around(node)))

    def _recurrent(self) -> None:
        """Requires that no call of a recurrent layer or cell hides a place that the recipe rounds."""
        for node in self.model.graph.nodes:
            name, layer = called(node), node.meta.get(LAYER)
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
        require(10, is_float or not is_placed, node, f"hides {place}, which is to be rounded")

    def _made_of(self, node: Node) -> Node | None:
        """A parameter, or a floating input, among the sources of ``node``'s numbers; None if there is none."""
        waiting, seen = [node], {node}
        for each in waiting:
            value, kind = each.meta.get("example_value"), self.model.kinds[each]
            is_floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            if kind == "parameter" or (kind == "input" and is_floating):
                return each
            if each.meta[FACTS].category != "number":
                given = each.all_input_nodes[:1] if called(each).endswith("_as") else each.all_input_nodes
                new = [source for source in given if source not in seen]
                seen.update(new)
                waiting += new
        return None

    def _read_by_other(self, node: Node, kind: str) -> Node | None:
        """A reader of ``node``, perhaps through movement, that is not among ENDS of this kind; None without one."""
        for user in node.users:
            is_read = user.op != "output" and user.meta[FACTS].category != "number"
            if not is_read or ENDS[kind].fullmatch(called(user)):
                continue
            # Scaled scores may meet a table of positions, with a mask behind it; a layer's own nodes apply the mask.
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
            rule = 2 if weight else 3
            formats = weight or self._output_formats(old, ends)
            function = nodes.quantize_weight if weight else nodes.quantize_output
            quantizers = [user for user in new.users if user.target in OURS and argument(user, "x") is new]
            bare = [user for user in new.users if user not in quantizers]
            rounded = [user for each in quantizers for user in each.users]
            if formats is None or all(self._reads_bare(user, old) for user in old.users):
                require(4, not quantizers, new, f"is quantized by {quantizers}, and should not be")
                continue
            require(rule, len(quantizers) == 1, new, f"is quantized {len(quantizers)} times")
            wrong = [user for user in bare if user not in self.old or not self._reads_bare(self.old[user], old)]
            require(rule, not wrong, new, f"is read bare by {wrong}")
            wrong = [user for user in rounded if user not in self.old or self._reads_bare(self.old[user], old)]
            require(rule, not wrong, new, f"is read rounded by {wrong}")
            (node,) = quantizers
            require(rule, node.target is function, node, f"is no {function.__name__}")
            names = ("weight", "rounding") if weight else ("activation", "error", "rounding")
            by = tuple(argument(node, name) for name in names)
            require(5, by == formats, node, f"rounds by {by} where the recipe says {formats}")

    def _reads_bare(self, reader: Node, node: Node) -> bool:
        """Whether ``reader`` reads ``node`` unrounded, though others read it rounded."""
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
            is_rounded = self.returns_rounded or node.meta.get(UPDATE, False) or node in self.shown
            return is_weight or not is_rounded
        return is_weight and self.model.kinds[reader] == "number"

    def _shown(self) -> Iterator[Node]:
        """The nodes whose returned numbers would miss a write, or a layer would, if a return read them bare."""
        for node in self.model.graph.nodes:
            if self.model.writes.are_into(node):
                rounded = {user for user in node.users if not self._reads_bare(user, node)}
                if next(self.model.writes.unseen({node: rounded}), None) is not None:
                    yield node

    def _may_not_be_copied(self, node: Node) -> bool:
        """Whether a copy of ``node`` for all of its readers would miss a write, or keep one from others."""
        if self.model.kinds[node] == "input":  # the caller reads it
            return self.model.writes.are_into(node)
        return next(self.model.writes.unseen({node: set(node.users)}), None) is not None

    def _writes(self) -> None:
        """Requires that each reader sees the writes into what it reads, whichever of the copies it reads."""
        copied: dict[Node, set[Node]] = {}
        for node in self.graph.find_nodes(op="call_function", target=nodes.quantize_output):
            copied[self.old[argument(node, "x")]] = {self.old[user] for user in node.users}
        new = {old: node for node, old in self.old.items()}
        for reader, operand, write in self.model.writes.unseen(copied):
            require(12, False, new[reader], f"reads {new[operand]} without what {new[write]} has written")

    def _weight_formats(self, node: Node) -> tuple[str, ...] | None:
        """(weight, rounding) of a parameter or a derived weight, by the recipe; None if it is not rounded."""
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
        """(activation, error, rounding) of an input or an output, by the recipe; None if it is not rounded."""
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
        if not wanted or self.recipe.excludes(self.model.places[node]) or self._may_not_be_copied(node):
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
                stream: int = argument(node, "stream")
                require(6, seen.setdefault(stream, node) is node, node, f"shares stream {stream} with {seen[stream]}")
                require(6, 0 <= stream < SITES, node, f"has stream {stream}, which is no site's")
        for node in self.graph.nodes:
            if node.target in (*OURS, *nodes.RUNS):
                key = argument(node, "key")
                require(6, key is self.key, node, f"draws from {key}, not from the key of this run")
            if node.target in OURS:
                source = argument(node, "x")
                require(4, source in self.old, node, f"quantizes {source}, which is quantized")

    def _all_nodes(self, graph: Graph, bodies: Any) -> Iterator[Node]:
        """The nodes of ``graph`` and of the graphs that it runs."""
        for node in graph.nodes:
            yield node
            if node.target in nodes.RUNS:
                body = bodies[node.args[0].target]
                yield from self._all_nodes(body.graph, dict(body.named_children()))

    def _memory(self) -> None:
        for node in self.graph.find_nodes(op="call_function", target=nodes.quantize_output):
            letters, source = argument(node, "in_place"), argument(node, "x")
            require(7, not letters or self.recipe.in_place, node, "rounds in place where the recipe says not to")
            if "A" in letters:
                require(7, self._is_owned(source), node, f"overwrites {source}, which may be read again")
            if "E" in letters:
                readers = list(node.users)
                owned = len(readers) == 1 and _takes_first(readers[0], node) and does(readers[0], "regrad")
                require(7, owned, node, f"overwrites the gradient of {readers}, which may be read again")

    def _is_owned(self, node: Any) -> bool:
        """Whether only the one reader of ``node`` will read the memory of its output."""
        while len(node.users) == 1 and does(node, "adds"):
            node = node.args[0]
        if len(node.users) != 1 or written_by(node):
            return False
        is_copied = node.target is nodes.quantize_output and "A" not in argument(node, "kept")
        return is_copied or does(node, "own")

    def _kept(self) -> None:
        made_after = self._made_after()
        for node in self.graph.find_nodes(op="call_function", target=nodes.quantize_output):
            letters, source = argument(node, "kept"), argument(node, "x")
            require(9, not letters or self.recipe.in_place, node, "leaves out a rounding where the recipe says not to")
            both = set(letters) & set(argument(node, "in_place"))
            require(9, not both, node, f"is both to round in place and not to round ({letters})")
            if "A" in letters:
                format = _to(node, "activation")
                passes = does(source, "masks") or (_is_of_rows(format) and _selects(source))
                known = passes and format.keeps_subsets and self._first_is_rounded(source, format)
                require(9, known, node, f"does not round {source}, which may not be rounded")
                require(9, list(source.users) == [node], node, f"shares the memory of {source}, which others read")
                found = self._writer(node) or self._writer(source.args[0], source)
                require(9, found is None, node, f"shares the memory of {source} with {found}")
            if "E" in letters:
                readers = list(node.users)
                passes = len(readers) == 1 and (does(readers[0], "masks") or does(readers[0], "adds"))
                known = passes and _to(node, "error").keeps_subsets and _takes_first(readers[0], node)
                known = known and _reads_once(readers[0], node) and self._all_rounded(readers[0], _to(node, "error"))
                known = known and made_after[node] == made_after[next(iter(readers[0].users))]
                require(9, known, node, f"does not round the gradient of {readers}, which may not be rounded")

    def _first_is_rounded(self, reader: Node, format: Format) -> bool:
        """Whether the first input of ``reader`` is an activation rounded to this format."""
        source: Any = (*reader.args, None)[0]
        is_rounded = isinstance(source, Node) and source.target is nodes.quantize_output
        return is_rounded and _to(source, "activation") == format != FLOAT

    def _all_rounded(self, node: Node, format: Format) -> bool:
        """Whether the gradient of ``node``'s output is one error signal, rounded to this format."""
        behind = [user for user in node.users if user.target is nodes.quantize_output and _to(user, "error") == format]
        return behind == list(node.users) and len(behind) == 1 and format != FLOAT

    def _writer(self, node: Node, but: Node | None = None) -> Node | None:
        """A reader that may write into ``node``'s output or a view of it; None if all are known not to.

        ``but`` is not asked.
        """
        for reader in node.users:
            if reader is but:
                continue
            if any(not isinstance(written, Node) or written is node for written in written_by(reader)):
                return reader
            kind = self.model.kinds.get(self.old.get(reader, reader))
            if kind == "movement" or (kind == "inside" and self.old[reader].meta[FACTS].category == "movement"):
                if (found := self._writer(reader)) is not None:
                    return found
            elif kind != "number" and not (kind in (*LAYERS, *MEANINGS, "inside") and is_own_code(reader)):
                return reader
        return None

    def _modes(self) -> None:
        made_after = self._made_after()
        for node in self.graph.find_nodes(op="call_function", target=nodes.quantize_output):
            source, here = argument(node, "x"), made_after[node]
            require(8, made_after[source] == here, node, f"is in another mode than {source}, which it quantizes")

    def _made_after(self) -> dict[Node, int]:
        """The number of switches of a mode before each node."""
        made_after: dict[Node, int] = {}
        switches = 0
        for node in self.graph.nodes:
            switches += SWITCHES.fullmatch(called(node)) is not None
            made_after[node] = switches
        return made_after


def _runs(node: Node) -> Iterator[str]:
    """``l0``, ``l0_reverse``, ``l1``, ...: the names of the loops that a recurrent layer runs."""
    names = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
    given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    weights = [each.meta["example_value"] for each in given["params"]]
    per_gate = sum(each.dim() == 2 and each.shape[0] == weights[0].shape[0] for each in weights)  # of input and state
    for number in range(per_gate // (4 if given["bidirectional"] else 2)):
        yield f"l{number}"
        if given["bidirectional"]:
            yield f"l{number}_reverse"


def _takes_first(reader: Node, node: Node) -> bool:
    """Whether ``node`` is the first input of ``reader``."""
    return bool(reader.args) and reader.args[0] is node


def _reads_once(reader: Node, node: Node) -> bool:
    return [*reader.args, *reader.kwargs.values()].count(node) == 1


def _selects(node: Node) -> bool:
    """Whether ``node`` is a pool with no window outside of its input. A window with gaps may miss it."""
    gaps = node.kwargs.get("dilation", (*node.args, 1, 1, 1, 1)[4])
    return does(node, "selects") and gaps in (1, (1,), (1, 1))


def _to(node: Node, role: str) -> Format:
    """The format that ``node`` rounds to by its argument ``role``. The text after ~ is the rounding."""
    return parse(argument(node, role).split("~")[0])


def _is_of_rows(format: Format) -> bool:
    """Whether a block is a row (one first index) or the whole tensor."""
    return isinstance(format.block, Slices) and not any(format.block.dims)


def _listing(graph: Graph, key: Node | None) -> Iterator[tuple[Node, str]]:
    """(node, text) of each node, without the key and the quantize nodes: their readers read their input instead."""
    names: dict[Node, str] = {key: "<key>"} if key is not None else {}
    number = 0
    for node in graph.nodes:
        if node.target in OURS:
            names[node] = names[argument(node, "x")]
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
