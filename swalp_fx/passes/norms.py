"""Operations of several nodes: norms written by hand, and modules that the recipe calls whole.

A norm divides a tensor by its measured size. If its steps were rounded one by one, small variances would become zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.fx import Graph, Node

from .captured import CALLS, HOLDS, LAYER, MODULE, STEPS, Layer
from .facts import Origin, is_floating
from .operations import CASTS, category, stem_of

__all__ = ["Norm", "mark_wholes"]

STATISTICS = ("var", "std", "var_mean", "std_mean", "norm", "linalg_norm", "linalg_vector_norm")
ROOTS = ("sqrt", "rsqrt", "std", "std_mean", "norm", "linalg_norm", "linalg_vector_norm")
WRITTEN = ("normalize", "layer_norm", "rms_norm", "group_norm")  # fused norms; a module may add a weight and a bias
PLAIN = (*CASTS, "contiguous")  # the same numbers, perhaps in another type
ALIKE = (*PLAIN, "unsqueeze", "expand", "expand_as", "view", "reshape", "getitem")
ONE_INPUT = ("sqrt", "rsqrt", "reciprocal", "clamp", "clamp_min", "clip", "pow", "abs")
BETWEEN = ("add", "sub", "mul", "div", "truediv", "maximum", "max")
IN_A_NORM = ("norm", "arithmetic", "pooling", "movement", "number")


class Norm(nn.Module):
    """The type of a norm that is written in functions, in no module of its own: ``Rule("*", kind="Norm", ...)``."""


def mark_wholes(graph: Graph, origins: dict[Node, Origin]) -> None:
    """Writes ``node.meta[LAYER]`` on the nodes of each operation that is written by hand.

    A module is a norm if its own code divides by a measured mean, variance or norm, its parameters are vectors, and it
    holds no product and no activation. Elsewhere a norm is a known pattern of functions.

        pow_1 = x.pow(2)                 LAYER norm
        mean = pow_1.mean(-1)            LAYER norm
        add = mean + 1e-06               LAYER norm
        rsqrt = torch.rsqrt(add)         LAYER norm
        mul = x * rsqrt                  LAYER norm
        mul_1 = weight * mul             LAYER norm, its output
    """
    calls: dict[Layer, list[Node]] = {}
    for node in graph.nodes:
        for call in node.meta.get(CALLS, ()):
            calls.setdefault(call, []).append(node)
        if (layer := node.meta.get(LAYER)) is not None and not layer.part:
            calls.setdefault(layer, []).append(node)
    marked: set[Node] = set()
    for call, nodes in sorted(calls.items(), key=lambda each: -len(each[1])):  # the outer before the inner
        is_named = nodes[0].meta.get(LAYER) == call
        if is_named or (marked.isdisjoint(nodes) and _is_norm(call, nodes)):
            marked.update(nodes)
            for node in nodes:
                node.meta[LAYER] = call._replace(part=_part(nodes) if is_named else "norm")
    for node in graph.nodes:
        if LAYER not in node.meta and not node.meta.get(STEPS) and (found := _Pattern(node, origins).nodes):
            path = ".".join(filter(None, (node.meta.get(MODULE), "norm")))
            for each in found:
                each.meta[LAYER] = Layer(f"norm {node.name}", path, Norm, "norm")


def _name(node: Node) -> str:
    """``add``, of ``add_`` and ``iadd`` too."""
    name = stem_of(node)
    return name[1:] if name in ("iadd", "isub", "imul", "itruediv") else name


def _part(nodes: Sequence[Node]) -> str:
    """The part of a module that a recipe calls whole: compute, norm, activation, arithmetic; the first it holds."""
    parts = {category(node) for node in nodes}
    if "compute" not in parts and any(_name(node) in STATISTICS for node in nodes):
        return "norm"
    return next((part for part in ("compute", "norm", "activation") if part in parts), "arithmetic")


def _is_norm(call: Layer, nodes: Sequence[Node]) -> bool:
    own = [node for node in nodes if node.meta[CALLS][-1] == call and LAYER not in node.meta]
    inner = set(nodes)
    given = [source for node in nodes for source in node.all_input_nodes if source not in inner]
    names = {_name(node) for node in own}
    # In eval mode the measures are read from buffers.
    measures = names.intersection(("mean", "sum", *STATISTICS)) or any(map(_is_buffer, given))
    if not (names.intersection(WRITTEN) or (measures and any(map(_is_root, own)))):
        return False
    parts = {category(node) for node in nodes if _name(node) not in ONE_INPUT}
    parts.update(node.meta[LAYER].part for node in nodes if LAYER in node.meta)
    if not parts.issubset(IN_A_NORM):
        return False
    if not all(_is_vector(source) for source in given if _is_parameter(source)):
        return False
    shapes = [_shape(source) for source in given if not _is_parameter(source)]
    return any(_shape(node) in shapes for node in nodes if not inner.issuperset(node.users))


def _is_root(node: Node) -> bool:
    return _name(node) in ROOTS or (_name(node) == "pow" and node.args[1:] in ((0.5,), (-0.5,)))


def _shape(node: Node) -> tuple[int, ...] | None:
    value = node.meta.get("example_value")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _is_buffer(node: Node) -> bool:
    return node.meta.get(HOLDS) == "state" and is_floating(node)


def _is_parameter(node: Node) -> bool:
    return node.meta.get(HOLDS) == "parameter"


def _is_vector(node: Node) -> bool:
    """Whether at most one axis is longer than one."""
    return sum(length != 1 for length in _shape(node) or ()) <= 1


class _Pattern:
    """The norm that divides at ``scale``, with its weight and bias. ``nodes`` is empty if there is none."""

    def __init__(self, scale: Node, origins: dict[Node, Origin]) -> None:
        self.origins = origins
        self.nodes: set[Node] = set()
        name = _name(scale)
        if name not in ("mul", "div", "truediv") or len(scale.args) < 2:
            return
        pairs = [scale.args, scale.args[::-1]] if name == "mul" else [scale.args]
        for scaled, size in pairs:
            both = isinstance(scaled, Node) and isinstance(size, Node)
            if both and (x := self._normalised(scaled, size)) is not None:  # type: ignore[arg-type]
                self.nodes = self._all(scale, x)
                return

    def _normalised(self, scaled: Node, size: Node) -> Node | None:
        """The tensor that a division of ``scaled`` by ``size`` normalises; None if it is no norm."""
        found = self._measured(size)
        if found is None or not found[1]:
            return None
        measured, base = found[0], _plain(scaled)
        centred = _centred(base)
        if base is measured or centred is measured:
            return centred or measured
        return None

    def _measured(self, node: Node) -> tuple[Node, bool] | None:
        """(the tensor that ``node`` measures, whether a root has been taken), or None."""
        name, first = _name(node), (*node.args, None)[0]
        if not isinstance(first, Node) and name not in BETWEEN:
            return None
        if name in STATISTICS:
            return _plain(first), name in ROOTS  # type: ignore[arg-type]
        if name in ("mean", "sum"):
            squared = _squared(first)  # type: ignore[arg-type]
            return (squared, False) if squared is not None else None
        if name in (*ALIKE, *ONE_INPUT):
            found = self._measured(first)  # type: ignore[arg-type]
            return (found[0], found[1] or _is_root(node)) if found is not None else None
        if name not in BETWEEN:
            return None
        sized = [each for each in node.all_input_nodes if self.origins[each] is not Origin.CONSTANT]
        if name == "sub" and len(sized) == 2 and (found := self._measured(sized[0])) is not None:
            mean = _squared(sized[1])  # the mean of squares without the square of the mean
            return found if mean is not None and _is_mean(mean, found[0]) else None
        return self._measured(sized[0]) if len(sized) == 1 else None

    def _all(self, scale: Node, x: Node) -> set[Node]:
        found, waiting = {scale}, [scale]
        while waiting:
            for source in waiting.pop().all_input_nodes:
                if source is not x and source not in found and self.origins[source] is not Origin.CONSTANT:
                    found.add(source)
                    waiting.append(source)
        for node in self._affine(scale):
            found |= node
        if any(LAYER in node.meta or not node.op.startswith("call") for node in found):
            return set()
        # Movement with readers outside, such as a cast of x, is not part of the norm.
        moved = [node for node in found if category(node) == "movement" and not found.issuperset(node.users)]
        return found.difference(moved)

    def _affine(self, last: Node) -> Iterator[set[Node]]:
        """The nodes of each step behind a division: a product with a weight, a sum with a bias, casts."""
        casts: set[Node] = set()
        while len(last.users) == 1:
            (user,) = last.users
            if _name(user) in PLAIN:
                casts.add(user)
            elif _name(user) in ("mul", "add") and (weight := self._weight(user, last)) is not None:
                yield {user, *casts, *weight}
                casts = set()
            else:
                return
            last = user

    def _weight(self, reader: Node, last: Node) -> set[Node] | None:
        """The nodes from a parameter to ``reader``, as in ``1 + weight``; None if its other operand is no weight."""
        others = [each for each in reader.all_input_nodes if each is not last]
        between: set[Node] = set()
        while len(others) == 1 and not _is_parameter(others[0]):
            (node,) = others
            is_step = _name(node) in (*ALIKE, *BETWEEN) and len(node.users) == 1
            others = [each for each in node.all_input_nodes if self.origins[each] is not Origin.CONSTANT]
            if not is_step:
                return None
            between.add(node)
        return between if len(others) == 1 and _is_vector(others[0]) else None


def _plain(node: Node) -> Node:
    """``node`` before its casts."""
    while _name(node) in PLAIN and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _squared(node: Node) -> Node | None:
    """The tensor that ``node`` is the square of; None if it is no square."""
    node = _plain(node)
    is_power = _name(node) == "pow" and node.args[1:] == (2,)
    is_product = _name(node) == "mul" and len(node.args) == 2 and node.args[0] is node.args[1]
    is_square = is_power or is_product or _name(node) == "square"
    return _plain(node.args[0]) if is_square and isinstance(node.args[0], Node) else None


def _centred(node: Node) -> Node | None:
    """The tensor that ``node`` subtracts its own mean from; None if it does not."""
    if _name(node) != "sub" or len(node.args) != 2 or not all(isinstance(each, Node) for each in node.args):
        return None
    x, mean = map(_plain, node.args)  # type: ignore[arg-type]
    return x if _is_mean(mean, x) else None


def _is_mean(node: Node, x: Node) -> bool:
    """Whether ``node`` is a mean of ``x``, perhaps as a sum divided by the length."""
    while _name(node) in (*ALIKE, "div", "truediv", "mul") and isinstance(node.args[0], Node):
        node = node.args[0]
    return _name(node) in ("mean", "sum", "var_mean", "std_mean") and _plain(node.args[0]) is x  # type: ignore[arg-type]
