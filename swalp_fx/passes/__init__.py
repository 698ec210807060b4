"""The rewrite: classify, assign, insert, elide, reuse, verify, and the module that they make."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Graph, GraphModule

from .. import nodes
from ..capture import Captured, ConvertError, capture, refuse_unfit
from ..formats import FLOAT
from ..modes import SWITCHES, held
from ..recipe import Recipe
from ..watch import Calls
from .assign import Scope, assign, subjects
from .classify import classify, originals, parameter_subjects
from .elide import elide
from .insert import insert
from .reuse import reuse
from .verify import verify

__all__ = [
    "RewrittenModule",
    "assign",
    "classify",
    "elide",
    "insert",
    "recipes_of_parameters",
    "reuse",
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
    graphs = [version.captured.graph for version in module._versions]
    named = chain(*(subjects(graph, model, scope) for graph in graphs), *scope.parameters.values())
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
    options = {"scope": scope, "leaves": leaves, "identity": identity}
    versions = [_version(root, recipe, options)]
    for mode in (True, False):
        if any(flag != mode for flag in versions[0].captured.flags.values()):
            versions.append(_version(root, recipe, options, training=mode))
    return RewrittenModule(root, versions, recipe, options)


@dataclass(frozen=True)
class Version:
    """A module's forward as a graph. One that branches on training flags has one for each branch it was called in."""

    captured: Captured
    graph: Graph

    def copy(self, memo: dict[int, Any] | None = None) -> Version:
        """Its own graph and constants."""
        constants = dict(self.captured.constants) if memo is None else copy.deepcopy(self.captured.constants, memo)
        return Version(replace(self.captured, constants=constants), copy.deepcopy(self.graph))

    def is_of(self, root: nn.Module) -> bool:
        """Whether it holds the branches that ``root`` would take now."""
        return all(root.get_submodule(path).training == value for path, value in self.captured.flags.items())


def _version(root: nn.Module, recipe: Recipe, options: dict[str, Any], training: bool | None = None) -> Version:
    captured = capture(root, options["leaves"], training=training)
    where = {name: options[name] for name in ("scope", "identity")}
    plan = assign(classify(captured.graph, root), root, recipe, **where)
    graph = insert(plan)
    if recipe.in_place:
        graph = reuse(elide(graph, root), root)
    return Version(captured, verify(graph, captured.graph, root, recipe, **where))


def refuse_rewritten(model: nn.Module) -> None:
    """Raises ConvertError if ``model`` is rewritten, or a module in it."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, RewrittenModule):
            raise ConvertError(f"{path or 'the model'} is already converted; convert the float model it was made from")


def recipes_of_parameters(model: nn.Module, recipe: Recipe) -> dict[str, Recipe]:
    """First name -> the recipe of each parameter, its rule applied.

    What a parametrization derives a weight from is no weight: the graph rounds what is derived, the step does not.
    """
    recipes = {name: recipe.at(*subjects) for name, subjects in parameter_subjects(model).items()}
    floats = dict.fromkeys(originals(model), FLOAT)
    return {name: replace(each, weight=floats.get(name, each.weight)) for name, each in recipes.items()}


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
    _root: nn.Module
    _versions: list[Version]
    _present: Version  # the one that the graph is of
    _switches: bool  # whether it switches a mode, such as autocast
    _options: dict[str, Any]  # of rewrite_at
    _calls: Calls  # which convert shares with the optimizer pass

    def __init__(self, root: nn.Module, versions: list[Version], recipe: Recipe, options: dict[str, Any]) -> None:
        # torch.fx would copy what the graph reads, in the order in which it is read: it gets nothing to copy.
        super().__init__(nn.Module(), Graph(), type(root).__name__)
        state = vars(self)
        state |= {name: vars(root)[name] for name in SHARED}
        if not versions[0].captured.bare:  # a layer that the graph calls runs its own
            state |= {name: copy.copy(vars(root)[name]) for name in HOOKS}
        # Beside the graph, what a copy and a pickle need. Written here, the root is no submodule.
        state |= {"recipe": recipe, "_root": root, "_versions": versions, "_options": options, "_calls": Calls()}
        self._become(versions[0])

    def _become(self, version: Version) -> None:
        """Computes by ``version`` from now on."""
        switches = any(node.target in SWITCHES for node in version.graph.nodes)
        vars(self).update({"_present": version, "_switches": switches, **version.captured.constants})
        self.graph = version.graph

    def _follow_flags(self) -> None:
        """Computes by the version of the branches that the training flags ask for, made if there is none yet."""
        if self._present.captured.flags and not self._present.is_of(self):
            version = next((each for each in self._versions if each.is_of(self)), None)
            if version is None:
                version = _version(self._root, self.recipe, self._options)
                self._versions.append(version)
            self._become(version)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._follow_flags()
        if not self._switches or torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        with held():
            return super().__call__(*args, **kwargs)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        # Of a GraphModule within what it compiles, torch.compile calls this, and not __call__.
        self._calls.add()
        return super()._call_impl(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # A model that is rewritten in parts reads what its parts know of themselves: channels, sizes, flags.
            value = getattr(vars(self).get("_root"), name, None)
            if value is None or callable(value):
                raise
            return value

    def __repr__(self) -> str:
        weights = len(self.graph.find_nodes(op="call_function", target=nodes.quantize_weight))
        outputs = [node.args[3:5] for node in self.graph.find_nodes(op="call_function", target=nodes.quantize_output)]
        activations, errors = (sum(each[i] != str(FLOAT) for each in outputs) for i in (0, 1))
        return (
            f"{type(self).__name__} rewritten for {self.recipe}: {weights} weights, {activations} outputs and {errors} "
            f"error signals are rounded, in {'train' if self.training else 'eval'} mode"
        )

    def __str__(self) -> str:
        return "\n".join([repr(self), nn.Module.__repr__(self), self.code])

    def __iter__(self) -> NoReturn:
        raise ConvertError(
            f"this {type(self).__name__} is rewritten whole, and its layers by themselves would compute in float; "
            "call it, or make it a ModuleList"
        )

    def __getitem__(self, index: Any) -> NoReturn:
        iter(self)

    def train(self, mode: bool = True) -> RewrittenModule:
        super().train(mode)
        self._follow_flags()
        return self

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
        for version in self._versions:
            constants = version.captured.constants
            constants |= {name: fn(constant) for name, constant in constants.items()}
        vars(self).update(self._present.captured.constants)
        return self

    def _own_state(self) -> dict[str, Any]:
        """What the root and the recipe do not say, beside constants."""
        return {name: vars(self)[name] for name in (*HOOKS, "_calls")}

    def __copy__(self) -> RewrittenModule:
        return self._copy(self._root, self._own_state(), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> RewrittenModule:
        root = copy.deepcopy(self._root, memo)
        memo[id(self)] = new = self._copy(root, {}, memo)
        vars(new).update(copy.deepcopy(self._own_state(), memo))
        return new

    def _copy(self, root: nn.Module, state: dict[str, Any], memo: dict[int, Any] | None) -> RewrittenModule:
        copies = {id(version): version.copy(memo) for version in self._versions}
        new = RewrittenModule(root, list(copies.values()), self.recipe, self._options)
        new._become(copies[id(self._present)])
        vars(new).update(state)
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        constants = [(version.captured.flags, version.captured.constants) for version in self._versions]
        return _rebuild, (self._root, self.recipe, self._options, constants), self._own_state()


def _rebuild(
    root: nn.Module, recipe: Recipe, options: dict[str, Any], constants: list[tuple[dict[str, bool], dict[str, Any]]]
) -> RewrittenModule:
    module = rewrite_at(root, recipe, **options)
    for version in module._versions:
        # As they were: moved with the module, in its dtype.
        own = (each for flags, each in constants if flags == version.captured.flags)
        version.captured.constants.update(next(own, {}))
    module._become(module._present)
    return module
