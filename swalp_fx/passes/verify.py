"""Proof that a rewritten graph is right, by rules and tables that the passes which made it do not share."""

from __future__ import annotations

import re
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.nn.utils import parametrize

from .. import nodes
from ..capture import ROOT, place_of_inplace
from ..formats import FLOAT, Format, parse
from ..recipe import Recipe
from .assign import Scope

__all__ = ["VerifyError", "verify"]


class VerifyError(AssertionError):
    """A rewritten graph that is wrong: a defect of the passes, not of the model."""


# What makes no new number, by the names of functions, methods, attributes and module types. All else must be quantized.
MOVES = re.compile(
    r"(?:.*flatten|.*squeeze|.*reshape|view|view_as|ravel|permute|Permute|transpose|t|T|mT|H|mH|swap(?:axes|dims)"
    r"|move(?:dim|axis)|expand(?:_as)?|broadcast_to|repeat|repeat_interleave|tile|.*split|(?:unsafe_)?chunk|unbind|narrow"
    r"|Flatten|Unflatten|[sg]etitem|cat|concat|concatenate|[hvd]?stack|select|(?:masked|index)_(?:select|fill)"
    r"|index_copy|fill|zero|(?:masked_)?scatter|gather|take_along_dim|roll|flip|rot90|pad|_\w+PadNd"
    r"|(?i:.*dropout.*)|(?i:stochastic_?depth)|(?i:drop_?block[23]d)|(?i:(?:pixel_?(?:un)?|channel_?)shuffle)|[uU]nfold|[fF]old"
    r"|Identity|contiguous|clone|detach|copy|where|to|type|type_as|float|double|half|bfloat16|cpu|cuda|requires_grad_"
    r"|real|imag|data|diagonal|tri[lu]|topk|sort|atleast_[123]d)"
)
MEASURES = re.compile(
    r"(?:size|Size|n?dim|ndimension|numel|nelement|shape|stride|len|item|dtype|device|get_device|layout|requires_grad"
    r"|is_\w+|is_?|is_not|training|eq|ne|lt|le|gt|ge|not_|and_|or_|xor|invert|logical_\w+|is(?:nan|inf|finite)|any|all"
    r"|arg(?:max|min|sort)|nonzero|bucketize|searchsorted|one_hot|bincount|long|int|bool|zeros|ones|full|empty|arange"
    r"|linspace|eye|(?:zeros|ones|full|empty|rand|randn|randint)_like|rand|randn|randint|randperm|bernoulli|normal"
    r"|uniform|new_\w+|(?:as_)?tensor|_assert|warn|_set_grad_enabled|_(?:enter|exit)_(?:autocast|inference_mode))"
)
SWITCHES = re.compile(r"_set_grad_enabled|_(?:enter|exit)_\w+")  # what holds for all that follows
WRITES = re.compile(r"[a-z0-9_]*[a-z0-9]_|i(?:add|sub|mul|truediv|floordiv|mod|pow|and|or|xor)")

# The parts that a placement or a rule may name; of what makes numbers, the rest is arithmetic.
PARTS = {
    "compute": re.compile(
        r"Linear|Bilinear|_ConvNd|(?:Deform)?Conv(?:Transpose)?[123]d|Embedding(?:Bag)?|MultiheadAttention|RNN(?:Cell)?Base"
        r"|Transformer(?:(?:En|De)coder(?:Layer)?)?|(?:bi)?linear|(?:deform_)?conv(?:_transpose)?[123]d|embedding(?:_bag)?"
        r"|matmul|b?mm|mv|dot|inner|outer|einsum|tensordot|add(?:mm|mv|bmm)|baddbmm|scaled_dot_product_attention"
        r"|multi_head_attention_forward"
    ),
    "norm": re.compile(
        r"_NormBase|(?:Layer|Group|RMS|LocalResponse)Norm|CrossMapLRN2d|FrozenBatchNorm2d"
        r"|(?:batch|layer|group|instance|rms|local_response)_norm|normalize"
    ),
    "activation": re.compile(
        r"(?i:r?relu6?|(?:leaky_?|p)relu|[sc]?elu|[gs]e?lu|glu|silu|mish|soft(?:plus|sign|min|shrink)|(?:log_?)?softmax"
        r"|softmax2d|(?:log_?)?sigmoid|tanh(?:shrink)?|hard(?:tanh|sigmoid|swish|shrink)|threshold)|clamp|clip"
    ),
    "pooling": re.compile(
        r"_(?:Adaptive)?(?:Max|Avg)PoolNd|_LPPoolNd|FractionalMaxPool[23]d|Upsample|(?:PS)?RoI(?:Align|Pool)"
        r"|MultiScaleRoIAlign|(?:adaptive_)?(?:max|avg)_pool[123]d|lp_pool[12]d|interpolate|upsample|grid_sample"
        r"|mean|sum|a?max|a?min"
    ),
}

# What computes its output in new memory, and needs it no more to differentiate.
FORGETS = re.compile(
    r"[lL]inear|[bB]ilinear|[cC]onv(?:_?[tT]ranspose)?[123]d|[eE]mbedding|matmul|b?mm|mv|_BatchNorm|(?:Layer|Group)Norm"
    r"|(?:batch|layer|group)_norm|GELU|gelu|SiLU|Mish|Hardswish|LeakyReLU|add|sub|mul"
    r"|(?:Adaptive)?AvgPool[123]d|(?:adaptive_)?avg_pool[123]d"
)
ADDS_INTO = re.compile(r"i(?:add|sub)|(?:add|sub)_")
# What differentiates into new memory, by its first input.
REMAKES = re.compile(
    r"[lL]inear|[cC]onv(?:_?[tT]ranspose)?[123]d|matmul|b?mm|_BatchNorm|(?:Layer|Group)Norm|(?:batch|layer|group)_norm"
    r"|ReLU6?|relu_?|GELU|gelu|SiLU|silu|Mish|Hardswish|LeakyReLU|[sS]igmoid|[tT]anh|mul|(?:Max|Avg)Pool[123]d"
    r"|(?:max|avg)_pool[123]d"
)

# What passes numbers on, zeros in place of the others, where each was; and what passes on some, each within the index
# of the first dimension that it had.
MASKS = re.compile(r"ReLU|relu_?")
SELECTS = re.compile(r"(?:Adaptive)?MaxPool[12]d|(?:adaptive_)?max_pool[12]d")
ANY = re.compile(r".+")
GLOBAL_HOOKS = [f"_global_{way}{before}_hooks" for way in ("forward", "backward") for before in ("", "_pre")]

_OURS = (nodes.draw_key, nodes.quantize_weight, nodes.quantize_output)


def verify(
    graph: Graph,
    captured: Graph,
    root: nn.Module,
    recipe: Recipe,
    *,
    scope: Scope | None = None,
    identity: bool = False,
) -> Graph:
    """``graph``, proved to be ``captured`` with every number of ``recipe`` quantized exactly once, and nothing else.

    Raises VerifyError, naming the node, unless

    1. without its quantize nodes, the graph is the captured one, node for node and argument for argument;
    2. every floating parameter that is read is read through one quantize node, the same for each of its readers; where
       a parametrization derives a weight, the weight is, and not what it is derived from;
    3. every output that the recipe's placement names is read through one quantize node, and only the model's own
       output reads it bare, unless the recipe rounds that too;
    4. nothing else is quantized: no movement, size, buffer or quantized tensor, and no input but by the recipe;
    5. formats and rounding are the recipe's at that place, its rules applied, and roles in float have no node;
    6. no two nodes share a stream, and all draw from the one key of this forward;
    7. an output that is rounded in place is in memory of its own that nothing else reads, autograd included, and so is
       an error signal; and the recipe allows it;
    8. no mode (autocast, gradients, inference) is switched between an output and its quantize node;
    9. an activation that is left as it is has all its numbers from a tensor rounded to that format, and nothing writes
       into it; an error signal, from an error signal rounded to that format; and the recipe allows it.
    """
    _Proof(graph, captured, root, recipe, scope or Scope.of(root), identity).run()
    return graph


class _Proof:
    def __init__(
        self, graph: Graph, captured: Graph, root: nn.Module, recipe: Recipe, scope: Scope, identity: bool
    ) -> None:
        self.graph, self.captured, self.root, self.recipe = graph, captured, root, recipe
        self.scope, self.identity = scope, identity
        self.parameters = {id(parameter): name for name, parameter in root.named_parameters()}
        self.kinds = _kinds(graph, root)
        self.places = _places(graph, self.kinds, scope.path)

    def run(self) -> None:
        self._same_computation()
        self._weights_once()
        self._outputs_once()
        self._formats()
        self._randomness()
        self._memory()
        self._kept()
        self._modes()

    def _same_computation(self) -> None:
        before = _listing(self.captured, self.root)
        after = _listing(self.graph, self.root)
        for (node, old), (_, new) in zip(before, after, strict=False):
            _require(old == new, node, f"was {old} and became {new}")
        _require(
            len(before) == len(after), self.graph.output_node(), f"comes after {len(after)} nodes, not {len(before)}"
        )

    def _weights_once(self) -> None:
        quantized: dict[int, Node] = {}
        for node in self.graph.find_nodes(op="call_function", target=nodes.quantize_weight):
            if _derivation(node.args[0], self.root) is not None:
                continue
            parameter = _value(node.args[0], self.root)
            _require(id(parameter) in self.parameters, node, "quantizes what is no parameter")
            _require(quantized.setdefault(id(parameter), node) is node, node, "quantizes a parameter a second time")
        for node in self.graph.nodes:
            if node.op == "get_attr" and self._is_quantizable(_value(node, self.root)):
                for reader in node.users:
                    _require(reader.target is nodes.quantize_weight, reader, f"reads parameter {node.target} bare")
            if (derivation := _derivation(node, self.root)) is not None:
                is_rounded = any(self._is_quantizable(p) for p in derivation.parameters())
                readers = [user.target for user in node.users]
                _require(not is_rounded or readers == [nodes.quantize_weight], node, f"is a weight read by {readers}")
            elif node.op == "call_module":
                layer = self.root.get_submodule(node.target)
                bare = [name for name, p in layer.named_parameters() if self._is_quantizable(p)]
                _require(not bare, node, f"reads its parameters {bare} bare")
            if node.target is nodes.call_layer:
                module, bound = _value(node.args[0], self.root), node.args[1]
                own = module.named_parameters(remove_duplicate=False)
                wanted = {name: quantized.get(id(p)) for name, p in own if self._is_quantizable(p)}
                _require(bound == wanted, node, f"binds {bound}, where its parameters are {wanted}")

    def _is_quantizable(self, value: Any) -> bool:
        if id(value) not in self.parameters or not value.is_floating_point():
            return False
        return self.identity or self._recipe_of(value).weight != FLOAT

    def _recipe_of(self, parameter: Any) -> Recipe:
        return self.recipe.at(*self.scope.parameters[self.parameters[id(parameter)]])

    def _recipe_at(self, node: Node) -> Recipe:
        return self.recipe.at((self.places[node], _spoken_kinds(node, self.root, self.kinds)))

    def _outputs_once(self) -> None:
        exits = _exits(self.graph, self.kinds)
        ends = self._group_ends()
        for node in self.graph.nodes:
            quantizers = [u for u in node.users if u.target is nodes.quantize_output and u.args[0] is node]
            readers = [u for u in node.users if u not in quantizers]
            inner = [u for u in readers if u not in exits and u.op != "output"]
            bare = readers if self.recipe.quantize_logits else inner
            if (quantizers or bare) and self._is_eligible(node, ends, bool(quantizers or inner)):
                _require(len(quantizers) == 1, node, f"is quantized {len(quantizers)} times")
                _require(not bare, node, f"is read bare by {bare}")
            else:
                _require(not quantizers, node, f"is quantized by {quantizers}, and should not be")

    def _is_eligible(self, node: Node, ends: set[Node], is_read: bool) -> bool:
        """Whether the recipe wants ``node``'s output rounded."""
        part, placement = _part(node, self.root, self.kinds), self.recipe.placement
        if node.op == "placeholder":
            sizes = all(self.kinds[user] == "number" for user in node.users)
            wanted = self.recipe.quantize_input and not sizes
        elif self.kinds[node] == "layer":
            placed = {
                "every": True,
                "compute": part == "compute",
                "compute+activation": part in ("compute", "activation"),
                "group": node in ends,
            }
            wanted = placed[placement] or self.recipe.includes(self.places[node])
        else:
            return False
        if not wanted or self.recipe.excludes(self.places[node]):
            return False
        here = self._recipe_at(node)
        return self.identity or here.activation != FLOAT or here.error != FLOAT

    def _group_ends(self) -> set[Node]:
        """The last node of each group, found in the captured graph reader by reader: each node joins the group that
        ends in the one node it continues, the earliest-begun of two."""
        if self.recipe.placement != "group":
            return set()
        kinds = _kinds(self.captured, self.root)
        group: dict[Node, int] = {}
        last: dict[int, Node] = {}
        for number, node in enumerate(self.captured.nodes):
            part = _part(node, self.root, kinds)
            sources = [s for s in node.all_input_nodes if s in group and last[group[s]] is s and len(s.users) == 1]
            if part in ("norm", "activation"):
                sources = [source for source in sources if source is node.all_input_nodes[0]]
            elif part == "arithmetic":
                readers = [_part(reader, self.root, kinds) for reader in node.users]
                is_sum = any(name.rstrip("_") in ("add", "iadd") for name in _names(node, self.root))
                if not sources or not is_sum or readers != ["activation"]:
                    continue
            elif part == "compute":
                sources = []
            else:
                continue
            group[node] = min((group[source] for source in sources), default=number)
            last[group[node]] = node
        ends = set(last.values())
        pairs = zip(_listing(self.captured, self.root), _listing(self.graph, self.root), strict=True)
        return {new for (old, _), (new, _) in pairs if old in ends}

    def _formats(self) -> None:
        for node in self.graph.nodes:
            formats: tuple[str, ...]
            if node.target is nodes.quantize_weight:
                derivation = _derivation(node.args[0], self.root)
                parameter = _value(node.args[0], self.root) if derivation is None else next(derivation.parameters())
                here = self._recipe_of(parameter)
                formats = str(here.weight), here.rounding
            elif node.target is nodes.quantize_output:
                here = self._recipe_at(node.args[0])
                formats = str(here.activation), str(here.error), here.rounding
            else:
                continue
            _require(node.args[3:] == formats, node, f"rounds by {node.args[3:]} where the recipe says {formats}")

    def _randomness(self) -> None:
        keys = self.graph.find_nodes(op="call_function", target=nodes.draw_key)
        _require(len(keys) <= 1, keys[-1] if keys else None, "draws a second key")
        key = keys[0] if keys else None
        if key is not None:
            _require(_is_flag(key.args[0]), key, "is not drawn by the model's training flag")
        seen: dict[int, Node] = {}
        for node in self.graph.nodes:
            if node.target in (nodes.quantize_weight, nodes.quantize_output):
                _, drawn_from, stream, *_, rounding = node.args
                _require(seen.setdefault(stream, node) is node, node, f"shares stream {stream} with {seen[stream]}")
                _require(0 <= stream < nodes.ERROR_STREAM, node, f"has stream {stream}, which is no site's")
                _require(drawn_from is key, node, f"draws from {drawn_from}, not from the key of this forward")
                _require(key is not None or "stochastic" not in rounding, node, "rounds stochastically without a key")

    def _memory(self) -> None:
        for node in self.graph.find_nodes(op="call_function", target=nodes.quantize_output):
            letters = node.kwargs.get("in_place", "")
            _require(not letters or self.recipe.in_place, node, "rounds in place where the recipe says not to")
            if "A" in letters:
                _require(self._is_owned(node.args[0]), node, f"overwrites {node.args[0]}, which may be read again")
            if "E" in letters:
                readers = list(node.users)
                owned = len(readers) == 1 and _takes_first(readers[0], node) and self._runs(readers[0], REMAKES)
                _require(owned, node, f"overwrites the gradient of {readers}, which may be read again")

    def _is_owned(self, node: Any) -> bool:
        """Whether ``node``'s output lies in memory that its one reader alone will read."""
        while len(node.users) == 1 and self._runs(node, ADDS_INTO):
            node = node.args[0]
        if len(node.users) != 1 or "out" in node.kwargs:
            return False
        is_copied = node.target is nodes.quantize_output and "A" not in node.kwargs.get("kept", "")
        return is_copied or self._runs(node, FORGETS)

    def _kept(self) -> None:
        made_after = self._made_after()
        for node in self.graph.find_nodes(op="call_function", target=nodes.quantize_output):
            letters, source = node.kwargs.get("kept", ""), node.args[0]
            _require(not letters or self.recipe.in_place, node, "leaves out a rounding where the recipe says not to")
            both = set(letters) & set(node.kwargs.get("in_place", ""))
            _require(not both, node, f"is both to round in place and not to round ({letters})")
            if "A" in letters:
                format = parse(node.args[3])
                passes = self._runs(source, MASKS) or (_is_of_rows(format) and self._selects(source))
                known = passes and format.keeps_subsets and self._first_is_rounded(source, node.args[3])
                _require(known, node, f"does not round {source}, which may not be rounded")
                _require(list(source.users) == [node], node, f"shares the memory of {source}, which others read")
                found = self._writer(node) or self._writer(_inputs(source)[0], source)
                _require(found is None, node, f"shares the memory of {source} with {found}")
            if "E" in letters:
                readers = list(node.users)
                passes = len(readers) == 1 and (self._runs(readers[0], MASKS) or self._runs(readers[0], ADDS_INTO))
                known = passes and parse(node.args[4]).keeps_subsets and _takes_first(readers[0], node)
                known = known and _reads_once(readers[0], node) and self._all_rounded(readers[0], node.args[4])
                known = known and made_after[node] == made_after[next(iter(readers[0].users))]
                _require(known, node, f"does not round the gradient of {readers}, which may not be rounded")

    def _first_is_rounded(self, reader: Node, format: str) -> bool:
        """Whether the first input of ``reader`` is an activation rounded to this format."""
        source: Any = (*_inputs(reader), None)[0]
        is_rounded = isinstance(source, Node) and source.target is nodes.quantize_output
        return is_rounded and source.args[3] == format != str(FLOAT)

    def _all_rounded(self, node: Node, format: str) -> bool:
        """Whether all of the gradient that ``node``'s output gets is one error signal rounded to this format."""
        behind = [(user.target, user.args[4:5]) for user in node.users]
        return behind == [(nodes.quantize_output, (format,))] and format != str(FLOAT)

    def _selects(self, node: Node) -> bool:
        """Whether ``node`` is a pool whose windows all meet its input, as they may not if they have gaps."""
        gaps = getattr(_module(node, self.root), "dilation", node.kwargs.get("dilation", (*node.args, 1, 1, 1, 1)[4]))
        return self._runs(node, SELECTS) and gaps in (1, (1,), (1, 1))

    def _writer(self, node: Node, but: Node | None = None) -> Node | None:
        """Who, ``but`` one, may write into ``node``'s output or a view of it: all that are not known not to."""
        for reader in node.users:
            if reader is but:
                continue
            place = place_of_inplace(reader.target) if reader.op == "call_function" else None
            in_place = reader.args[place] if place is not None and place < len(reader.args) else False
            in_place = in_place or reader.kwargs.get("inplace") or getattr(_module(reader, self.root), "inplace", False)
            names = _names(reader, self.root)
            into = [reader.kwargs["out"]] if "out" in reader.kwargs else []
            if in_place or any(name == "setitem" or WRITES.fullmatch(name) is not None for name in names):
                into.append(reader.args[0])
            if any(not isinstance(written, Node) or written is node for written in into):
                return reader
            kind = self.kinds[reader]
            if kind not in ("moves", "number", "layer") or (kind == "layer" and not self._runs(reader, ANY)):
                return reader
            if kind == "moves" and (found := self._writer(reader)) is not None:
                return found
        return None

    def _runs(self, node: Node, pattern: re.Pattern[str]) -> bool:
        """Whether ``node`` runs code of PyTorch's own of such a name, that nobody watches."""
        module = _module(node, self.root)
        if module is None:
            is_call = node.op in ("call_function", "call_method")
            by_others = re.match(r"torch\._ops\.(?!aten$)", getattr(node.target, "__module__", None) or "")
            return is_call and not by_others and any(pattern.fullmatch(name) for name in _names(node, self.root))
        hooks = {name: value for name, value in vars(module).items() if name.endswith("_hooks") and value}
        watchers = [name for name in hooks if name.startswith(("_forward", "_backward"))]
        overwrites = pattern is FORGETS and getattr(module, "inplace", False)
        of_all = any(getattr(nn.modules.module, name) for name in GLOBAL_HOOKS)
        if watchers or of_all or overwrites or "forward" in vars(module):
            return False
        own = next(base for base in type(module).__mro__ if "forward" in vars(base))
        return own.__module__.startswith("torch.nn.") and pattern.fullmatch(own.__name__) is not None

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
            switches += any(SWITCHES.fullmatch(name) for name in _names(node, self.root))
            made_after[node] = switches
        return made_after


def _takes_first(reader: Node, node: Node) -> bool:
    """Whether ``node`` is the first input of ``reader``."""
    inputs = _inputs(reader)
    return bool(inputs) and inputs[0] is node


def _reads_once(reader: Node, node: Node) -> bool:
    return [*_inputs(reader), *reader.kwargs.values()].count(node) == 1


def _inputs(node: Node) -> tuple[Any, ...]:
    """What ``node`` calls its function or layer with, by place."""
    return node.args[2:] if node.target is nodes.call_layer else node.args


def _is_of_rows(format: Format) -> bool:
    """Whether what shares a scale has the same first index, or is the whole tensor."""
    return getattr(format, "tile", None) is None and not any(getattr(format, "dims", None) or ())


def _require(ok: bool, node: Node | None, complaint: str) -> None:
    if not ok:
        raise VerifyError(f"the rewritten graph is wrong at node {node}: it {complaint}; please report this model")


def _listing(graph: Graph, root: nn.Module) -> list[tuple[Node, str]]:
    """The graph as text, without quantize nodes: a read of one is a read of what it quantizes."""
    names: dict[Node, str] = {}
    lines: list[tuple[Node, str]] = []
    for node in graph.nodes:
        if node.target in (nodes.quantize_weight, nodes.quantize_output):
            names[node] = names[node.args[0]]
            continue
        if node.target is nodes.draw_key:
            continue
        value = _value(node, root)
        if node.op == "get_attr" and (isinstance(value, (nn.Parameter, nn.Module)) or _is_flag(node)):
            # Where these are read is the insertion's affair; what reads them is compared by what they are.
            names[node] = f"<{'training' if _is_flag(node) else id(value)}>"
            continue
        names[node] = f"%{len(lines)}"
        lines.append((node, _line(node, names)))
    return lines


def _line(node: Node, names: dict[Node, str]) -> str:
    op, target, arguments = node.op, node.target, node.args
    if target is nodes.call_layer:
        module, _, *rest = arguments
        assert isinstance(module, Node)
        op, target, arguments = "call_module", str(_path(node)), tuple(rest)
    return f"{op} {target} {map_arg((arguments, node.kwargs), lambda source: names[source])}"


def _value(node: Any, root: nn.Module) -> Any:
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    if node.target == ROOT:
        return root
    value: Any = root
    for name in str(node.target).split("."):
        value = getattr(value, name, None)
    return value


def _derivation(node: Any, root: nn.Module) -> parametrize.ParametrizationList | None:
    """What derives the weight that ``node`` is, if it is one."""
    if not isinstance(node, Node) or node.op != "call_module":
        return None
    module = root.get_submodule(str(node.target))
    is_weight = isinstance(module, parametrize.ParametrizationList) and any(True for _ in module.parameters())
    return module if is_weight else None  # type: ignore[return-value]


def _is_flag(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr" and node.target == "training"


def _kinds(graph: Graph, root: nn.Module) -> dict[Node, str]:
    """Each node's kind: "layer", "moves", "number", "buffer", or "other" (inputs, parameters, the output, our own)."""
    kinds: dict[Node, str] = {}
    updates = _updates(graph, root)
    for node in graph.nodes:
        kinds[node] = _kind(node, root, kinds)
        if kinds[node] == "layer" and node in updates and "buffer" in [kinds[s] for s in node.all_input_nodes]:
            kinds[node] = "buffer"
    return kinds


def _places(graph: Graph, kinds: dict[Node, str], path: str) -> dict[Node, str]:
    """The name of each input and layer output in the model in which the graph's root stands at ``path``."""
    named: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if kinds[node] == "layer":
            named.setdefault(_unnumbered(node, path), []).append(node)
    places: dict[Node, str] = {}
    for name, nodes_of in named.items():
        free = (number for number in count(1) if f"{name}@{number}" not in named)
        places |= {node: name if len(nodes_of) == 1 else f"{name}@{next(free)}" for node in nodes_of}
    for node in graph.find_nodes(op="placeholder"):
        name = _unnumbered(node, path)
        places[node] = f"{name}@0" if name in named else name
    return places


def _unnumbered(node: Node, path: str) -> str:
    if (called := _path(node)) is not None:
        names = [called]
    elif node.op == "placeholder":
        names = [str(node.target)]
    else:
        stack = [around for around, _ in node.meta.get("nn_module_stack", {}).values()]
        names = [*stack[-1:], _called(node)]
    return ".".join(name for name in (path, *names) if name) or node.name


def _updates(graph: Graph, root: nn.Module) -> set[Node]:
    """The arithmetic that serves nothing but what a buffer is set to; and the last of it, whatever else it serves."""
    updates: set[Node] = set()
    found = [node.args[2] for node in graph.nodes if node.target is setattr]
    while found:
        node = found.pop()
        if isinstance(node, Node) and node not in updates:
            # Movement may stand last, and nowhere else. A quantize node, which is no arithmetic of PyTorch's, may stand
            # anywhere: whether it should is what this is to find out.
            is_last = any(user.target is setattr for user in node.users)
            if is_last or _is_arithmetic(node, root):
                updates.add(node)
                found += [source for source in node.all_input_nodes if updates.issuperset(source.users)]
    return {node for node in updates if _is_arithmetic(node, root)}


def _is_arithmetic(node: Node, root: nn.Module) -> bool:
    patterns = (MOVES, MEASURES, *PARTS.values())
    names = {name for full in _names(node, root) for name in (full, full.rstrip("_"))}
    is_call = node.op in ("call_function", "call_method") and _module(node, root) is None
    return is_call and not any(pattern.fullmatch(name) for pattern in patterns for name in names)


def _kind(node: Node, root: nn.Module, kinds: dict[Node, str]) -> str:
    if node.op == "get_attr":
        value = _value(node, root)
        if isinstance(value, (nn.Parameter, nn.Module)):
            return "other"
        return "buffer" if isinstance(value, torch.Tensor) else "number"
    if node.op in ("placeholder", "output") or node.target in _OURS or _derivation(node, root) is not None:
        return "other"
    if node.target is setattr or _writes_buffer(node, root, kinds):
        return "buffer"
    inputs, module = node.all_input_nodes, _module(node, root)
    has_parameters = module is not None and any(True for _ in module.parameters())
    if inputs and not has_parameters and all(kinds[source] == "number" for source in inputs):
        return "moves" if _is_filled(node, root) else "number"
    if isinstance(node.target, type) and not _is_torch(node.target):
        return "moves"  # a tuple or a record, whose fields have names
    names = {name for full in _names(node, root) for name in (full, full.rstrip("_"))}
    if any(MOVES.fullmatch(name) for name in names):
        return "moves"
    if any(MEASURES.fullmatch(name) for name in names):
        return "moves" if _is_filled(node, root) else "number"
    return "layer"


def _is_filled(node: Node, root: nn.Module) -> bool:
    """Whether another tensor is written into ``node``, or into a part of it."""
    for user in node.users:
        names = _names(user, root)
        is_first = bool(user.args) and user.args[0] is node
        if is_first and names == ["getitem"] and _is_filled(user, root):
            return True
        is_write = any(name == "setitem" or WRITES.fullmatch(name) for name in names)
        if is_first and is_write and len(user.all_input_nodes) > 1:
            return True
    return False


def _part(node: Node, root: nn.Module, kinds: dict[Node, str]) -> str:
    """The finer part of a layer output; of anything else, its kind."""
    if kinds[node] != "layer":
        return "input" if node.op == "placeholder" else kinds[node]
    names = {name for full in _names(node, root) for name in (full, full.rstrip("_"))}
    for part, pattern in PARTS.items():
        if any(pattern.fullmatch(name) for name in names):
            return part
    module = _module(node, root)
    return "compute" if module is not None and any(True for _ in module.parameters()) else "arithmetic"


def _spoken_kinds(node: Node, root: nn.Module, kinds: dict[Node, str]) -> list[str]:
    """All that a rule may call ``node``."""
    part = _part(node, root, kinds)
    if (module := _module(node, root)) is not None:
        return [part, *(base.__name__ for base in type(module).__mro__)]
    return [part] if node.op == "placeholder" else [part, _called(node), _called(node).rstrip("_")]


def _called(node: Node) -> str:
    """What ``node`` calls, whoever wrote it."""
    if node.target is getattr:
        return str(node.args[1])
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _path(node: Node) -> str | None:
    """The qualified name of the module that ``node`` calls, by either kind of call."""
    if node.op == "call_module":
        return str(node.target)
    if node.target is nodes.call_layer:
        assert isinstance(node.args[0], Node)
        return "" if node.args[0].target == ROOT else str(node.args[0].target)
    return None


def _module(node: Node, root: nn.Module) -> nn.Module | None:
    """The layer that ``node`` calls, by either kind of call."""
    if node.op == "call_module":
        return root.get_submodule(str(node.target))
    return _value(node.args[0], root) if node.target is nodes.call_layer else None


def _names(node: Node, root: nn.Module) -> list[str]:
    """What PyTorch calls the operation: one name, or the names of a layer's type and its bases."""
    if (module := _module(node, root)) is not None:
        return [base.__name__ for base in type(module).__mro__ if _is_torch(base)]
    if node.target is getattr:
        return [str(node.args[1])]
    if isinstance(node.target, str):
        return [node.target]
    return [getattr(node.target, "__name__", "")] if _is_torch(node.target) else []


def _is_torch(thing: Any) -> bool:
    return re.match(r"(torch|torchvision|_operator|builtins|math)(\.|$)", thing.__module__ or "torch") is not None


def _writes_buffer(node: Node, root: nn.Module, kinds: dict[Node, str]) -> bool:
    """``buffer.add_(x)``, ``buffer += x``, ``buffer[i].add_(x)``."""
    if not node.args or not any(WRITES.fullmatch(name) for name in _names(node, root)):
        return False
    written = node.args[0]
    while isinstance(written, Node) and _names(written, root) == ["getitem"]:
        written = written.args[0]
    return isinstance(written, Node) and kinds[written] == "buffer"


def _exits(graph: Graph, kinds: dict[Node, str]) -> set[Node]:
    """Movement and sizes that nothing but the model's output reads."""
    exits: set[Node] = set()
    for node in reversed(graph.nodes):
        leaves = node.users and all(user.op == "output" or user in exits for user in node.users)
        if leaves and kinds[node] in ("moves", "number"):
            exits.add(node)
    return exits
