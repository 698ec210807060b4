"""What a converted model has besides its modules: its recipe, its places, its graphs, its compiler."""

from __future__ import annotations

import copy
import functools
import re
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from .. import nodes
from ..passes.assign import subjects
from ..passes.names import parameter_subject, parameter_subjects
from ..passes.tables import layer_part, may_name_function
from ..recipe import Recipe, Subject
from ..warn import warn

__all__ = ["ENTRY", "Conversion", "Graphs", "Places", "Rewritten", "conversion_of"]


ENTRY = "_swalp"  # the attribute of a module that holds its Entry


def conversion_of(module: nn.Module | None) -> Conversion | None:
    """The conversion that ``module`` belongs to, if it is converted."""
    entry = vars(module).get(ENTRY) if isinstance(module, nn.Module) else None
    return entry.conversion if entry is not None else None


class Places:
    """The names of a model's modules, parameters and buffers, by identity."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self.foreigners: set[str] = set()  # the names of parameters of modules that are none of the model's
        self.refresh()

    def refresh(self) -> None:
        """Read the model again. After surgery it has other modules and parameters."""
        self._modules = {id(module): (path, module) for path, module in self._root.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in self._root.named_parameters()}
        self._buffers = {id(buffer): name for name, buffer in self._root.named_buffers()}
        self.subjects: dict[str, tuple[Subject, ...]] = parameter_subjects(self._root)
        self._loose: dict[int, tuple[str, weakref.ref[Tensor]]] = {}
        for name, tensor, owner in _loose(self._modules.values(), self._parameters):
            self._loose[id(tensor)] = name, weakref.ref(tensor)
            self.subjects[name] = (parameter_subject(name, owner),)
        self.words = {word for path, _ in self._modules.values() for word in path.split(".")}  # that name modules

    def path(self, module: nn.Module) -> str | None:
        known = self._modules.get(id(module))
        return known[0] if known is not None else None

    def module(self, key: str) -> tuple[str, nn.Module] | None:
        """(path, module) of an entry of nn_module_stack, whose key is ``ID`` or ``ID@CALL``."""
        ident = key.partition("@")[0]
        return self._modules.get(int(ident)) if ident.isdigit() else None

    def parameter(self, value: Tensor) -> str | None:
        """Its first name; the name of a plain tensor too, if that stands in a weight's place."""
        name = self._parameters.get(id(value))
        return self.loose_name(value) if name is None else name

    def loose_name(self, value: Tensor) -> str | None:
        name, loose = self._loose.get(id(value), ("", None))
        return name if loose is not None and loose() is value else None

    @property
    def loose(self) -> list[str]:
        """The names of what stands in a weight's place in the model, and is no parameter of it."""
        return [name for name, _ in self._loose.values()]

    def foreign(self, name: str, owner: nn.Module) -> str:
        """The name of a parameter of a module that is none of the model's, but an argument of a forward, say."""
        while name in self.subjects and name not in self.foreigners:
            name = f"{name}@0"
        self.foreigners.add(name)
        self.subjects[name] = (parameter_subject(name, owner),)
        return name

    def buffer(self, value: Tensor) -> str | None:
        return self._buffers.get(id(value))

    def knows(self, values: Any) -> bool:
        return all(self.parameter(value) is not None for value in values if _is_trained(value))


def _is_trained(value: Any) -> bool:
    return isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and value.requires_grad and value.is_leaf)


def _loose(
    modules: Iterable[tuple[str, nn.Module]], parameters: Container[int]
) -> Iterator[tuple[str, Tensor, nn.Module]]:
    """(name, tensor, module that holds it) of what stands in a weight's place, and is no parameter of the model.

    It is a plain tensor that requires grad, or a parameter of a module that none registers, as one in a plain list.
    """
    for path, module in modules:
        for attribute, value in vars(module).items():
            if attribute in _BARE or not isinstance(value, Tensor | list | tuple | dict):
                continue
            for keys, leaf in pytree.tree_flatten_with_path(value)[0]:
                name = ".".join(filter(None, (path, f"{attribute}{pytree.keystr(keys)}")))
                named = leaf.named_parameters() if isinstance(leaf, nn.Module) else [("", leaf)]
                for own, each in named:
                    if _is_trained(each) and id(each) not in parameters:
                        owner = leaf.get_submodule(own.rpartition(".")[0]) if own else module
                        yield (f"{name}.{own}" if own else name), each, owner


_BARE = vars(nn.Module()).keys()


@dataclass
class Rewritten:
    """One rewritten graph."""

    entry: str  # of the frame: the module's name and its function
    captured: Graph  # what the model's own code computes
    graph_module: GraphModule  # what runs instead
    training: bool  # the model's flag
    broke: str | None  # why the code goes on behind it, if it does not return there
    calls: int = 0
    path: str = ""  # of the module whose code it is
    place: str = ""  # of code that goes on behind a break: where that was

    @property
    def graph(self) -> Graph:
        return self.graph_module.graph

    @property
    def code(self) -> str:
        return self.graph_module.code


class Graphs(Sequence[Rewritten]):
    """The rewritten graphs of a model, in the order in which they were made: ``model.graphs``."""

    def __init__(self, conversion: Conversion) -> None:
        self._conversion = conversion
        self._made: list[Rewritten] = []

    def add(self, made: Rewritten) -> None:
        self._made.append(made)

    def drop(self, path: str | None) -> None:
        """Forget those of the module at ``path``."""
        self._made = [made for made in self._made if made.path != path]

    def __len__(self) -> int:
        return len(self._made)

    def __getitem__(self, index: Any) -> Any:
        return self._made[index]

    def print_readable(self) -> None:
        """Print each graph as Python."""
        print(self)

    def __str__(self) -> str:
        if not self._made:
            return "no graph yet: call the module once, or give example_inputs to convert"
        modes = {True: "train", False: "eval"}
        # Without what frees a value behind its last use: "; x = None".
        texts = ((each, re.sub(r";  (\w+ = )+None$", "", each.code, flags=re.MULTILINE)) for each in self._made)
        return "\n\n".join(f"# {each.entry}, {modes[each.training]} mode\n{text.strip()}" for each, text in texts)

    __repr__ = __str__

    # A copy of a model makes graphs of its own.

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return copy.deepcopy(self._conversion, memo).graphs

    def __reduce__(self) -> Any:
        return getattr, (self._conversion, "graphs")


class Conversion:
    """One for a converted model; its modules' entries share it."""

    def __init__(self, root: nn.Module, recipe: Recipe, *, identity: bool = False) -> None:
        self.root, self.recipe, self.identity = root, recipe, identity
        self._begin()

    def _begin(self) -> None:
        self.graphs = Graphs(self)
        self.making = threading.RLock()  # threads that call a model for the first time make one graph, not one each
        self.breaks = False  # whether Python runs between graphs, and calls what it finds
        self.is_proved = True  # whether all patterns of the recipe are known to name something
        self._places: Places | None = None
        from .backend import backend  # and with it the front end, a second's import

        # One object for all entries: the graphs of inner frames are looked up by it.
        self.backend: Callable[..., Any] = functools.partial(backend, weakref.ref(self))
        self.backend.__name__ = "swalp_fx"  # type: ignore[attr-defined]

    @property
    def places(self) -> Places:
        if self._places is None:
            self._places = Places(self.root)
        return self._places

    @property
    def is_keyed(self) -> bool:
        """Whether graphs are given a random key."""
        return self.recipe.rounding.startswith("stochastic")

    def refuse_unmatched(self) -> None:
        """Raises RecipeError for a pattern of the recipe that names no module, no parameter, and nothing that a
        function may give."""
        modules = [path for path, _ in self.root.named_modules()]
        for pattern, error in self.recipe.unmatched(list(self._subjects())):
            if self.graphs or not may_name_function(pattern, modules):
                raise error
            self.is_proved = False

    def prove(self) -> None:
        """Warns of patterns of the recipe that the graphs of a first call show to name nothing."""
        self.is_proved = True
        for _, error in self.recipe.unmatched(list(self._subjects())):
            warn(str(error))

    def _subjects(self) -> Iterator[Subject]:
        yield from chain(*self.places.subjects.values())
        for path, module in self.root.named_modules():
            if path:
                part = layer_part(type(module))
                yield path, [*([part] if part else []), *(base.__name__ for base in type(module).__mro__)]
        for each in self.graphs:
            yield from subjects(each.captured)

    def key(self) -> Tensor | None:
        """The key of one run: distinct runs, distinct keys. None in eval mode, where stochastic rounds to nearest."""
        return nodes.draw_key(self.root.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversion:
        new = object.__new__(Conversion)
        memo[id(self)] = new
        new.recipe, new.identity = self.recipe, self.identity
        new.root = self.root  # until there is a copy: entries look at it while that is made
        new._begin()
        # While the whole model is copied, the copy in progress; where only a part is, that part's copy has its own.
        root = memo.get(id(self.root))
        new.root = copy.deepcopy(self.root, memo) if root is None else root
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "recipe": self.recipe, "identity": self.identity}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()

    def stray(self) -> Iterator[nn.Module]:
        """Modules of the model that have no entry yet, since they were put there after the conversion."""
        return (module for module in self.root.modules() if ENTRY not in vars(module))
