"""The conversion of a model: its recipe, places, graphs and compiler backend."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from .. import nodes
from ..errors import NotRewritten
from ..passes.assign import left_out, subjects
from ..passes.names import kinds_of_type
from ..passes.recurrent import inside_module
from ..passes.tables import layer_part, may_name_function
from ..recipe import Recipe, RecipeError, Subject, shortened
from ..warn import warn
from ..whole import unwhole
from .places import Places, within

__all__ = ["CALL", "ENTRY", "Conversion", "Graphs", "Rewritten", "conversion_of"]


ENTRY = "_swalp"  # the attribute of a module that holds its Entry
CALL = "_compiled_call_impl"  # the attribute of a module that PyTorch calls in place of its forward


def conversion_of(module: nn.Module | None) -> Conversion | None:
    """The conversion that ``module`` belongs to, if it is converted."""
    entry = vars(module).get(ENTRY) if isinstance(module, nn.Module) else None
    return entry.conversion if entry is not None else None


def _is_changed(module: nn.Module) -> bool:
    """Whether a module has no entry or another class than its entry's, hides one of its parameters, or has FSDP's."""
    own = module.__dict__
    entry, parameters = own.get(ENTRY), own["_parameters"]
    if entry is None or type(module) is not entry.kind or "_flat_param" in parameters:
        return True
    return not parameters.keys().isdisjoint(own.keys())


@dataclass
class Rewritten:
    """One rewritten graph."""

    entry: str  # of the frame: the module's name and its function
    captured: Graph  # the computation of the model's own code
    graph_module: GraphModule  # the rewrite, which runs instead
    training: bool  # the model's flag
    broke: str | None  # the reason of the graph break at its end; None if it returns
    calls: int = 0
    path: str = ""  # of its module
    place: str = ""  # of the graph break that it goes on after

    @property
    def graph(self) -> Graph:
        return self.graph_module.graph

    @property
    def code(self) -> str:
        return self.graph_module.code


class Graphs(Sequence[Rewritten]):
    """The rewritten graphs of a model, in the order of their making: ``model.graphs``."""

    def __init__(self) -> None:
        self._made: list[Rewritten] = []

    def add(self, made: Rewritten) -> None:
        self._made.append(made)

    def drop(self, path: str | None) -> None:
        """Forget the graphs of the module at ``path``."""
        self._made = [made for made in self._made if made.path != path]

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]

    @property
    def calls(self) -> int:
        """How often graphs ran, in any thread."""
        return sum(made.calls for made in self._made)

    def print_readable(self) -> None:
        """Print each graph as Python."""
        print(self)

    def __str__(self) -> str:
        if not self._made:
            return "no graph yet: call the module once, or give example_inputs to convert"
        modes = {True: "train", False: "eval"}
        return "\n\n".join(
            f"# {each.entry}, {modes[each.training]} mode{name}\n{text}"
            for each in self._made
            for name, text in _texts(each.graph_module)
        )

    __repr__ = __str__

    # A copy of a model makes graphs of its own.

    def __reduce__(self) -> Any:
        return Graphs, ()


def _texts(module: GraphModule) -> Iterator[tuple[str, str]]:
    """(name, code) of a graph, with an empty name, and of the graphs that it runs."""
    for name, graph in module.named_modules():
        if isinstance(graph, GraphModule):
            # Leave out the "; x = None" that frees a value after its last use.
            code = re.sub(r";  (\w+ = )+None$", "", graph.code, flags=re.MULTILINE)
            yield f", {name}" if name else "", code.strip()


class Conversion:
    """One object for each converted model. The entries of its modules share it, and keep it alive."""

    count = 0  # of all that were made in this process

    def __init__(
        self, root: nn.Module, recipe: Recipe, *, identity: bool = False, graphs: Graphs | None = None
    ) -> None:
        Conversion.count += 1
        self._root = weakref.ref(root)
        self.recipe, self.identity = recipe, identity
        self.graphs = Graphs() if graphs is None else graphs
        self.is_proved = True  # whether every pattern of the recipe has been checked against graphs
        self.has_gaps = False  # whether Python computes between its graphs
        self.told: set[str] = set()  # lines of products in float that a warning has named
        self.between: set[Subject] = set()  # products that Python has run between the graphs
        self._calls_with_gaps = 0
        self._foreigners: dict[str, Subject] = {}
        self._places: Places | None = None
        from .backend import backend  # it imports the front end, which takes a second

        # One object for all entries: the front end looks up the graphs of inner frames by it.
        self.backend: Callable[..., Any] = functools.partial(backend, weakref.ref(self))
        self.backend.__name__ = "swalp_fx"  # type: ignore[attr-defined]

    @property
    def root(self) -> nn.Module:
        root = self._root()
        assert root is not None, "the model that is converted is gone"
        return root

    @property
    def places(self) -> Places:
        places = self._places  # another thread may forget them
        if places is None:
            places = self._places = Places(self.root, self._foreigners)
        return places

    def is_watched(self) -> bool:
        """Whether the call that begins now looks for products outside of graphs: each 2^n-th of a model with gaps."""
        self._calls_with_gaps += self.has_gaps
        calls = self._calls_with_gaps
        return self.has_gaps and calls & (calls - 1) == 0

    def forget_places(self) -> None:
        """Places are read anew at the next use."""
        self._places = None

    def has_stray(self) -> bool:
        """Whether a module of the model has no entry: it was put in without ``__setattr__``."""
        return any(ENTRY not in each.__dict__ for each in within(self.root))

    def is_changed(self) -> bool:
        """Whether a module is a stray or may compute in float, by facts that a call can look at each time."""
        return any(map(_is_changed, within(self.root)))

    def refuse_unwhole(self) -> None:
        """Raises NotRewritten for a model with shards, or with a parameter that is hidden from its forward."""
        root = self.root
        if (shard := unwhole(root)) is not None:
            raise NotRewritten(f"{type(root).__name__} would have computed in float: {shard}")

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` is in the model. It may have been taken out, and the model may be gone."""
        root = self._root()
        return root is not None and any(each is module for each in within(root))

    def gives(self, module: nn.Module, other: Conversion) -> bool:
        """Whether ``module``, now put into the model of ``other``, becomes a part of it. Its recipe does not change."""
        is_alike = (self.recipe, self.identity) == (other.recipe, other.identity)
        return is_alike and (self.recipe.is_within or not self.holds(module))

    @property
    def is_keyed(self) -> bool:
        """Whether graphs are given a random key."""
        return self.recipe.draws

    def refuse_unmatched(self) -> None:
        """Raises RecipeError for a pattern of the recipe that matches no module, parameter or function output.

        Before there are graphs, a pattern that may name a function's output passes. With graphs, a placement that
        rounds nothing raises RecipeError too.
        """
        modules = [path for path, _ in self.root.named_modules()]
        for error in self.recipe.unmatched_whole(modules):
            raise error
        unseen = () if self.graphs else kinds_of_type(type(self.root), None)  # of outputs of the root's own code
        for pattern, error in self.recipe.unmatched(list(self._subjects()), unseen):
            if self.graphs or not may_name_function(pattern, modules):
                raise error
        self.is_proved = bool(self.graphs)
        for error in self._nothing_placed():
            raise error

    def prove(self) -> None:
        """Warns of patterns that match nothing in the first call's graphs, and of a placement that rounds nothing."""
        self.is_proved = True
        for error in self._nothing_placed():
            warn(str(error))
        for _, error in self.recipe.unmatched(list(self._subjects())):
            warn(str(error))

    def _nothing_placed(self) -> Iterator[RecipeError]:
        """An error if outputs have a format, but the graphs of the model's own code round none of them."""
        own = [made.captured for made in self.graphs if not made.path]
        left = [left_out(graph, self.recipe) for graph in own]
        if left and all(left):
            excluded = f" exclude={','.join(self.recipe.exclude)}" if self.recipe.exclude else ""
            names = shortened(list(dict.fromkeys(chain(*left))))
            yield RecipeError(
                f"no output is rounded under placement={self.recipe.placement}{excluded}, which leaves out {names}; "
                "choose another placement or exclude less, or name W, G and M alone"
            )

    def _subjects(self) -> Iterator[Subject]:
        yield from chain(*self.places.subjects.values())
        yield from self.between
        for path, module in self.root.named_modules():
            if path:
                yield path, kinds_of_type(type(module), layer_part(type(module)))
            yield from inside_module(path, module)
        for each in self.graphs:
            yield from subjects(each.captured)
            for name, graph in each.graph_module.named_modules():
                if name and isinstance(graph, GraphModule):
                    yield from subjects(graph.graph)

    def key(self, device: torch.device | None = None) -> Tensor | None:
        """The key of one run; each run has another. None in eval mode, where stochastic rounding is to nearest.

        With ``device`` the key is copied there, without waiting.
        """
        key = nodes.draw_key(self.root.training)
        return key if key is None or device is None else key.to(device, non_blocking=True)
