"""Fallback: a model that cannot be captured whole, with its largest capturable submodules rewritten."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from torch import nn

from ..capture import UNPACK, CaptureError, ConvertError
from ..recipe import Recipe, Subject
from . import RewrittenModule, rewrite, rewrite_at
from .assign import SITE, Scope, subjects
from .classify import LAYER_PARTS, PART, parameter_subjects

__all__ = ["Parts", "parts_of", "refuse_unrewritten", "rewrite_what_can_be", "rewritten_in"]

PARAMETRIZATIONS = "parametrizations"  # where torch.nn.utils.parametrize keeps what derives a weight: no layer
PARTS = "swalp_fx_parts"  # the attribute of a model rewritten in parts that holds its Parts


@dataclass(frozen=True)
class Parts:
    """What is rewritten in a model that could not be captured whole, and what stayed float."""

    recipe: Recipe
    rewritten: tuple[str, ...]  # qualified names
    floats: dict[str, str]  # qualified name of a module that computes in float, outside of its parts -> why


def parts_of(module: nn.Module) -> Parts | None:
    """The parts of a module that ``rewrite_what_can_be`` rewrote in parts, or None."""
    return vars(module).get(PARTS)


def rewrite_what_can_be(
    model: nn.Module, recipe: Recipe, *, leaves: tuple[type[nn.Module], ...] = (), identity: bool = False
) -> nn.Module:
    """``rewrite(model)``; or, where its forward cannot be traced, a copy of its structure with the largest submodules
    that can be traced rewritten in place of themselves, bare layers included.

    The copy is of the model's own type, shares its parameters and buffers, and leaves the model as it was. A part
    rounds what it returns, since the model reads it; which of it are the model's logits no graph says, so ``exclude``
    names those. Each part draws its own key.

    Raises as ``rewrite`` does; CaptureError only if there is no submodule to rewrite either.
    """
    try:
        return rewrite(model, recipe, leaves=leaves, identity=identity)
    except CaptureError as error:
        search = _Search(model, recipe, leaves, identity)
        search.visit(model, "", error)
        if not search.seen:
            raise
        recipe.refuse_unmatched([*search.seen, *chain(*parameter_subjects(model).values())])
        return search.copy()


class _Search:
    """One walk over a model, from the root down, that rewrites what can be captured."""

    def __init__(self, model: nn.Module, recipe: Recipe, leaves: tuple[type[nn.Module], ...], identity: bool) -> None:
        self.model, self.recipe = model, recipe
        self.options: dict[str, Any] = {"leaves": leaves, "identity": identity}
        by_name = parameter_subjects(model)
        self.parameters = {id(parameter): by_name[name] for name, parameter in model.named_parameters()}
        self.parts: dict[str, RewrittenModule] = {}
        self.floats: dict[str, str] = {}
        self.seen: list[Subject] = []
        self.visited: set[int] = set()

    def visit(self, module: nn.Module, path: str, error: ConvertError) -> None:
        """Records why ``module`` is not rewritten, and goes on to its children."""
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            self.floats[path] = str(error)
        for name, child in module.named_children():
            if id(child) in self.visited or name == PARAMETRIZATIONS:
                continue
            self.visited.add(id(child))
            child_path = f"{path}.{name}" if path else name
            try:
                self._rewrite(child, child_path)
            except ConvertError as reason:
                self.visit(child, child_path, reason)

    def _rewrite(self, module: nn.Module, path: str) -> None:
        scope = Scope(path, {name: self.parameters[id(p)] for name, p in module.named_parameters()})
        # Whatever a part returns, the model reads; what comes in, another part has rounded.
        recipe = replace(self.recipe, quantize_input=False, quantize_logits=True)
        part = rewrite_at(module, recipe, scope=scope, **self.options)
        graphs = [version.captured.graph for version in part._versions]
        nodes = list(chain(*(graph.nodes for graph in graphs)))
        if any(node.meta[PART] in (*LAYER_PARTS, "parameter") for node in nodes):
            self.seen += chain(*(subjects(graph, module, scope) for graph in graphs))
        if any(SITE in node.meta for node in nodes):
            self.parts[path] = part

    def copy(self) -> nn.Module:
        """The model's structure with the parts in it, over the model's own tensors."""
        memo: dict[int, Any] = {id(self.model.get_submodule(path)): part for path, part in self.parts.items()}
        for tensor in chain(self.model.parameters(), self.model.buffers()):
            memo[id(tensor)] = tensor
        for module in self.model.modules():
            # The very dictionaries, so that a tensor replaced in one is replaced in both: .to(), a buffer's update.
            memo |= {id(each): each for each in (module._parameters, module._buffers)}
        try:
            new = copy.deepcopy(self.model, memo)
        except Exception as error:  # the model may hold anything
            kind = type(self.model).__name__
            raise ConvertError(f"cannot copy the structure of {kind}, to rewrite parts of it: {error}") from error
        vars(new)[PARTS] = Parts(self.recipe, tuple(self.parts), self.floats)
        return new


def rewritten_in(module: nn.Module) -> Iterator[tuple[str, RewrittenModule]]:
    """(qualified name, part) of every rewritten module in ``module``, itself included."""
    return ((path, each) for path, each in module.named_modules() if isinstance(each, RewrittenModule))


def refuse_unrewritten(module: object, who: str) -> None:
    """Raises ConvertError, on behalf of ``who``, for what is no module that convert returned, nor holds one."""
    if isinstance(module, tuple):
        raise ConvertError(f"{who} takes a module, not a {type(module).__name__}; {UNPACK}")
    if not isinstance(module, nn.Module) or not any(True for _ in rewritten_in(module)):
        raise ConvertError(f"{who} takes the module that convert returns, not a {type(module).__name__}")
