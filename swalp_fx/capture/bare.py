"""What a model returns stays float, also where its own forward runs as Python.

Then its children's graphs cannot know which of them makes the logits: each gives what it rounds to whoever reads it,
and beside it the number before rounding. When the outermost call returns, those take the place of the rounded ones.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from .. import nodes

__all__ = ["Bare", "give_bare"]


def give_bare(graph: Graph) -> list[int]:
    """Makes a rewritten ``graph`` give, behind all that it gives, what it rounded of that; which those are.

    Those are not rounded in place.
    """
    output = graph.output_node()
    given: Any = output.args[0]
    places = [i for i, each in enumerate(given) if isinstance(each, Node) and each.target is nodes.quantize_output]
    for i in places:
        letters = str(given[i].kwargs.get("in_place", "")).replace("A", "")
        kwargs = {name: value for name, value in given[i].kwargs.items() if name != "in_place"}
        given[i].kwargs = {**kwargs, "in_place": letters} if letters else kwargs
    output.args = ((*given, *(given[i].args[0] for i in places)),)
    return places


class Bare:
    """Of this thread's outermost call: rounded tensors that are alive, and what they were before."""

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def kept(self, given: tuple[Any, ...], places: list[int]) -> tuple[Any, ...]:
        """``given`` without the bare tensors behind it, which are kept as long as those at ``places`` live."""
        given, bare = given[: -len(places)], given[-len(places) :]
        for place, before in zip(places, bare, strict=True):
            rounded = given[place]
            if isinstance(rounded, Tensor) and rounded is not before:
                forget = functools.partial(_forget, self._pairs, id(rounded))
                self._pairs[id(rounded)] = weakref.ref(rounded, forget), before
        return given

    def in_place_of_rounded(self, result: Any) -> Any:
        """``result``, which the model returns, with the bare tensors in it; nothing is kept any more."""
        pairs, self._pairs = self._pairs, {}
        if not pairs:
            return result

        def bare(tensor: Tensor) -> Tensor:
            rounded, before = pairs.get(id(tensor), (None, tensor))
            return before if rounded is not None and rounded() is tensor else tensor

        leaves, structure = pytree.tree_flatten(result)
        found = [bare(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        return result if all(map(_is, leaves, found)) else pytree.tree_unflatten(found, structure)


def _forget(pairs: dict[int, Any], key: int, _: Any) -> None:
    pairs.pop(key, None)


def _is(one: Any, other: Any) -> bool:
    return one is other
