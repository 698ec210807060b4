"""The rewrite: classify, assign, insert, verify, and the module that they make."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from ..capture import Captured, ConvertError, capture, refuse_unfit
from ..recipe import Recipe
from .assign import Scope, assign, subjects
from .classify import classify, parameter_subjects
from .insert import insert
from .verify import verify

__all__ = [
    "RewrittenModule",
    "assign",
    "classify",
    "insert",
    "recipes_of_parameters",
    "rewrite",
    "rewrite_at",
    "verify",
]


def rewrite(
    model: nn.Module, recipe: Recipe, *, leaves: tuple[type[nn.Module], ...] = (), identity: bool = False
) -> RewrittenModule:
    """``model`` as a module that quantizes what ``recipe`` says; it shares the model's parameters and layers.

    ``leaves`` are module types to call whole: their weights are quantized, what happens inside them is not.
    ``identity`` inserts nodes for roles in ``float`` too.
    Raises, before anything is changed, CaptureError for a model that cannot be traced, ConvertError for one that is
    already rewritten, wrapped, compiled or no float model, and RecipeError for a rule, an include or an exclude that
    matches nothing.
    """
    refuse_rewritten(model)
    refuse_unfit(model)
    scope = Scope.of(model)
    module = rewrite_at(model, recipe, scope=scope, leaves=leaves, identity=identity)
    named = chain(subjects(module._captured.graph, model, scope), *scope.parameters.values())
    recipe.refuse_unmatched(list(named))
    return module


def rewrite_at(
    root: nn.Module,
    recipe: Recipe,
    *,
    scope: Scope,
    leaves: tuple[type[nn.Module], ...] = (),
    identity: bool = False,
) -> RewrittenModule:
    """``rewrite`` of the ``root`` that stands at ``scope`` in the model whose names the recipe uses."""
    captured = capture(root, leaves)
    plan = assign(classify(captured.graph, root), root, recipe, scope=scope, identity=identity)
    graph = verify(insert(plan), captured.graph, root, recipe, scope=scope, identity=identity)
    return RewrittenModule(root, graph, captured, recipe, {"scope": scope, "leaves": leaves, "identity": identity})


def refuse_rewritten(model: nn.Module) -> None:
    """Raises ConvertError if ``model`` is rewritten, or a module in it."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, RewrittenModule):
            raise ConvertError(f"{path or 'the model'} is already converted; convert the float model it was made from")


def recipes_of_parameters(model: nn.Module, recipe: Recipe) -> dict[str, Recipe]:
    """First name -> the recipe of each parameter, its rule applied."""
    return {name: recipe.at(*subjects) for name, subjects in parameter_subjects(model).items()}


# What a rewritten module shares with the model: the very dictionaries, so that both stay one set of layers, wherever
# either is moved. Its hooks are copies, so that one registered later stays its own.
SHARED = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks") or "_hooks_" in name)


class RewrittenModule(GraphModule):
    """A graph over a model's own parameters, buffers and layers: keys, order and tying are the model's.

    The training flag is the model's own, as the layers are: ``train()`` and ``eval()`` of either switch both. A deep
    copy holds a copy of the model. A pickle holds the model and the recipe, and is traced again when it is loaded.
    """

    recipe: Recipe
    frozen: tuple[str, ...]  # modules that branched on their training flag: the branch taken is all there is
    _root: nn.Module
    _captured: Captured
    _options: dict[str, Any]  # of rewrite_at

    def __init__(
        self, root: nn.Module, graph: Graph, captured: Captured, recipe: Recipe, options: dict[str, Any]
    ) -> None:
        # torch.fx would copy what the graph reads, in the order in which it is read: it gets nothing to copy.
        super().__init__(nn.Module(), Graph(), type(root).__name__)
        state = vars(self)
        state |= {name: vars(root)[name] for name in SHARED}
        if not captured.bare:  # a layer that the graph calls runs its own
            state |= {name: copy.copy(vars(root)[name]) for name in HOOKS}
        state |= {"recipe": recipe, "frozen": captured.frozen, **captured.constants}
        # Beside the graph, what a copy and a pickle need. Written here, the root is no submodule.
        state |= {"_root": root, "_captured": captured, "_options": options}
        self.graph = graph

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A model that is rewritten in parts reads what its parts know of themselves: channels, sizes, flags.
            value = getattr(vars(self).get("_root"), name, None)
            if value is None or callable(value):
                raise
            return value

    def __iter__(self) -> NoReturn:
        raise ConvertError(
            f"this {type(self).__name__} is rewritten whole, and its layers by themselves would compute in float; "
            "call it, or make it a ModuleList"
        )

    def __getitem__(self, index: Any) -> NoReturn:
        iter(self)

    @property
    def training(self) -> bool:
        # Another trace puts a flag of its own in the dictionary.
        return vars(self).get("training", self._root.training)

    @training.setter
    def training(self, mode: bool) -> None:
        if "_root" in vars(self):  # torch.nn.Module sets the flag before there is one
            self._root.training = mode

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RewrittenModule:
        super()._apply(fn, recurse)
        for name in self._captured.constants:
            vars(self)[name] = fn(vars(self)[name])
        return self

    def _own_state(self) -> dict[str, Any]:
        """What the root and the recipe do not say."""
        return {name: vars(self)[name] for name in (*HOOKS, *self._captured.constants)}

    def __copy__(self) -> RewrittenModule:
        graph = copy.deepcopy(self.graph)
        new = RewrittenModule(self._root, graph, self._captured, self.recipe, self._options)
        vars(new).update(self._own_state())
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        root = copy.deepcopy(self._root, memo)
        graph = copy.deepcopy(self.graph)
        memo[id(self)] = new = RewrittenModule(root, graph, self._captured, self.recipe, self._options)
        vars(new).update(copy.deepcopy(self._own_state(), memo))
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._root, self.recipe, self._options), self._own_state()


def _rebuild(root: nn.Module, recipe: Recipe, options: dict[str, Any]) -> RewrittenModule:
    return rewrite_at(root, recipe, **options)
