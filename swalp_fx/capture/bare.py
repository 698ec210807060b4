"""The outputs of a model stay in float, also if Python runs between its graphs.

With Python between them, no graph knows whether the model returns its output. So each graph returns its rounded
outputs, and after them their bare twins: the same tensors before rounding. When the outermost call returns, the twins
replace the rounded tensors. Movement keeps the pair: a graph that only moves an input moves its twin too, and a view
that Python makes is found by its memory.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.fx import Graph, Node

from ..passes.captured import HOLDS, TWIN
from ..passes.names import PART
from ..passes.operations import is_view, name_of, written
from ..passes.rounding import ACTIVATION, Rounding
from ..passes.tables import part_of
from .walk import replaced

__all__ = ["Bare", "Twins", "give_bare"]


class Twins(NamedTuple):
    """The indices of a graph's inputs and outputs that have a bare twin. Twins come after all others."""

    inputs: Sequence[int] = ()
    outputs: Sequence[int] = ()


def give_bare(graph: Graph) -> Twins:
    """Adds the bare twins of a rewritten ``graph``'s outputs after its outputs: see the module's docstring.

    A tensor with a twin is not rounded in place.
    """
    output = graph.output_node()
    given: Any = output.args[0]
    inputs = [node for node in graph.find_nodes(op="placeholder") if HOLDS in node.meta]  # all but the key
    bare: dict[Node, Node] = {}
    twins: list[Node] = []  # inputs that have a twin
    for node in _moved_to(output):
        if (rounding := Rounding.of(node, ACTIVATION)) is not None:
            bare[node] = rounding.source
            rounding.mark(in_place=rounding.in_place.replace(ACTIVATION, ""))
        elif node.op == "placeholder":
            with graph.inserting_after(bare[twins[-1]] if twins else inputs[-1]):
                bare[node] = graph.placeholder(f"{node.name}_bare")
            twins.append(node)
        elif TWIN in node.meta:
            with graph.inserting_after(node):
                bare[node] = graph.call_function(operator.getitem, (node.args[0], node.meta[TWIN]))
        elif any(source in bare for source in node.all_input_nodes):
            with graph.inserting_after(node):
                bare[node] = graph.node_copy(node, lambda source: bare.get(source, source))
    places = [i for i, each in enumerate(given) if each in bare]
    output.args = ((*given, *(bare[given[i]] for i in places)),)
    return Twins([inputs.index(node) for node in twins], places)


def _moved_to(output: Node) -> Iterator[Node]:
    """The nodes, in order, that make outputs by movement alone: quantize nodes, outputs of loops, inputs, movement."""
    changed = set(_written(output.graph))
    moved, sources = [], set(output.all_input_nodes)
    for node in reversed(output.graph.nodes):
        if node not in sources or node in changed:
            continue
        if Rounding.of(node, ACTIVATION) is not None or node.meta.get(HOLDS) == "input" or TWIN in node.meta:
            moved.append(node)
        elif _is_moved(node):
            moved.append(node)
            sources.update(node.all_input_nodes)
    return reversed(moved)


def _is_moved(node: Node) -> bool:
    """Whether a node is movement that may run twice: it draws no random bits, and registers no hook."""
    if node.op not in ("call_function", "call_method") or node.meta.get(PART) not in ("movement", "exit"):
        return False
    name = name_of(node)
    draws = "drop" in name and True in (*node.args, *node.kwargs.values())  # training
    return part_of(name) != "number" and name != "register_hook" and not draws


def _written(graph: Graph) -> Iterator[Node]:
    """The nodes that a graph writes into. Their twins would miss the write."""
    for node in graph.nodes:
        for target in written(node):
            each: Any = target
            while isinstance(each, Node):
                yield each
                each = each.args[0] if is_view(each) and each.args else None


class Bare:
    """The bare twins in this thread's outermost call, as long as the memory of their rounded tensors lives."""

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[weakref.ref[torch.UntypedStorage], list[_Pair]]] = {}

    def keep(self, given: tuple[Any, ...], places: Sequence[int]) -> tuple[Any, ...]:
        """``given`` without the twins at its end, which are kept; ``places``: the indices of their rounded tensors."""
        given, bare = given[: -len(places)], given[-len(places) :]
        for place, before in zip(places, bare, strict=True):
            if isinstance(before, Tensor) and before.layout is torch.strided:
                self._keep(given[place], before)
        return given

    def _keep(self, rounded: Tensor, before: Tensor) -> None:
        memory = rounded.untyped_storage()
        if memory is before.untyped_storage():
            return
        if (kept := self._pairs.get(id(memory))) is None:
            forget = functools.partial(_forget, self._pairs, id(memory))
            kept = self._pairs[id(memory)] = weakref.ref(memory, forget), []
        kept[1].append(_Pair.of(rounded, before))

    def of(self, tensor: Any) -> Any:
        """``tensor`` as it was before it was rounded; itself if it was not rounded."""
        if not self._pairs or not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return tensor
        _, pairs = self._pairs.get(id(tensor.untyped_storage()), (None, ()))
        if not pairs or tensor._backward_hooks or tensor.retains_grad:
            return tensor
        # The newest pair comes first. A view that Python made is looked for in tensors that fill their memory.
        fits = (pair for whole in (False, True) for pair in reversed(pairs) if pair.fits(tensor, whole))
        found = next((pair.seen_as(tensor) for pair in fits), tensor)
        return found.detach() if found.requires_grad and not tensor.requires_grad else found

    def in_place_of_rounded(self, result: Any, given: Any) -> Any:
        """``result`` of the model, with twins in place of rounded tensors; objects in ``given`` stay as they are."""
        return replaced(result, self.of, given) if self._pairs else result

    def clear(self) -> None:
        self._pairs.clear()


def _forget(pairs: dict[int, Any], key: int, _: Any) -> None:
    pairs.pop(key, None)


class _Pair(NamedTuple):
    where: tuple[Any, ...]  # size, stride and offset of the rounded tensor in its memory
    as_made: Any  # shows a later write: its version, or a copy of its numbers under inference mode
    step: int  # the number of the autograd step that made it
    bare: Tensor

    @classmethod
    def of(cls, rounded: Tensor, bare: Tensor) -> _Pair:
        as_made = rounded.clone() if rounded.is_inference() else rounded._version
        step = rounded.grad_fn._sequence_nr() if rounded.grad_fn is not None else 0
        return cls(_where(rounded), as_made, step, bare)

    def fits(self, tensor: Tensor, whole: bool) -> bool:
        """Whether ``tensor`` is the rounded tensor, unchanged; with ``whole``, any view of it."""
        if tensor.dtype != self.bare.dtype or tensor.is_conj() or tensor.is_neg():
            return False
        if tensor.requires_grad > self.bare.requires_grad or _is_of_function(tensor, self.step):
            return False
        if not (self._fills(tensor.untyped_storage()) if whole else self.where == _where(tensor)):
            return False
        if isinstance(self.as_made, Tensor):
            return torch.equal(self._laid_out(self.as_made, tensor) if whole else self.as_made, tensor)
        return bool(self.as_made == tensor._version)

    def _fills(self, memory: torch.UntypedStorage) -> bool:
        size, stride, _ = self.where
        rounded = torch.empty_strided(size, stride, dtype=self.bare.dtype, device="meta")
        is_dense = torch.empty_like(rounded).stride() == stride
        return is_dense and rounded.numel() * rounded.element_size() == memory.nbytes()

    def seen_as(self, tensor: Tensor) -> Tensor:
        return self.bare if self.where == _where(tensor) else self._laid_out(self.bare, tensor)

    def _laid_out(self, source: Tensor, tensor: Tensor) -> Tensor:
        """The view of ``source`` that corresponds to ``tensor``, a view of the rounded tensor."""
        size, stride, offset = self.where
        if source.stride() != stride:
            source = torch.empty_strided(size, stride, dtype=source.dtype, device=source.device).copy_(source)
        where = tensor.storage_offset() - offset + source.storage_offset()
        return source.as_strided(tensor.size(), tensor.stride(), where)


def _is_of_function(tensor: Tensor, since: int) -> bool:
    """Whether a function with a backward of its own made ``tensor`` after that step, as full backward hooks do."""
    step: Any = tensor.grad_fn
    while step is not None and step._sequence_nr() > since:
        if isinstance(step, BackwardCFunction):
            return True
        step = step.next_functions[0][0] if step.next_functions else None
    return False


def _where(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.size(), tensor.stride(), tensor.storage_offset()
