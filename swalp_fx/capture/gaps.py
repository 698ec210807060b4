"""Products that Python runs between graphs, in float: a call warns of each line of them, once.

A mode of PyTorch's sees each operation that no graph runs. It costs time at each of them. So it is on from the moment
that something is traced, and in some later calls of a model that is not captured whole: see ``Conversion.is_watched``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..passes.facts import is_number
from ..passes.names import kinds_of_type
from ..passes.tables import does, is_product
from ..warn import is_own, line_of, warn
from .conversion import Conversion, conversion_of
from .methods import products_named
from .modes import push, stacked
from .running import local
from .sources import CONSTANT, Sources

__all__ = ["Watch", "watch"]

OPTIMIZERS = str(Path(torch.optim.__file__).parent)


def watch() -> None:
    """From now on, the call that runs in this thread sees the operations that no graph runs.

    Not if the model's own code has a mode on now: modes end in the reverse order in which they began.
    """
    if local.gaps is None and local.entered is not None and stacked() == local.stacked:
        local.gaps = Watch()
        push(local.gaps)


class Watch(TorchDispatchMode):
    """The operations of a call that no graph runs."""

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # to skip it would cost more than the rest

    def __init__(self) -> None:
        super().__init__()
        self._found: dict[tuple[Conversion, str], str] = {}  # (model, line) -> the warning of it
        self.is_inside = False  # whether a graph runs
        self._sources = Sources()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """A context for the run of a graph."""
        self.is_inside = True
        try:
            yield
        finally:
            self.is_inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = function(*args, **(kwargs or {}))
        if isinstance(function, OpOverload) and torch._C._current_graph_task_id() < 0 and not local.explaining:
            conversion = conversion_of(local.entered)
            if conversion is not None:
                self._sources.add(conversion)
                if not self.is_inside:
                    self._see(conversion, function, pytree.tree_leaves((args, kwargs)), given)
                self._sources.note(function, args, kwargs or {}, given)
        return given

    def _see(self, conversion: Conversion, function: OpOverload, given: list[Any], result: Any) -> None:
        numbers = [each for each in given if is_number(each) and self._sources.of(each) != CONSTANT]
        if not numbers:
            return
        conversion.has_gaps = True
        kernel = str(function.overloadpacket.__name__)
        if is_product(kernel):
            self._note(conversion, kernel, numbers)
        elif kernel in ("mul", "mul_"):
            self._note(conversion, kernel, numbers, "spreads" if _is_spread(given, result) else "multiplies")

    def _note(self, conversion: Conversion, kernel: str, operands: list[Tensor], may: str | None = None) -> None:
        """Notes a product, unless it is meant to be in float. may: it is one if its line names one that does this."""
        frame = _own_frame()
        line = line_of(frame) if frame is not None else "code without a line"
        named = products_named(frame.f_code, frame.f_lineno) if frame is not None else ()
        if may is not None:
            named = tuple(name for name in named if may in does(name))
            if not named:
                return
        module = _module(conversion)
        if module is None or line in conversion.told or (conversion, line) in self._found:
            return
        path = conversion.places.path(module) or ""
        parameters = {each for operand in operands for each in self._sources.of(operand) or ()}
        known = [name for owner, name in parameters if owner is conversion]
        if _is_rounded(conversion, path, module, named or (kernel,), known):
            rule = f", or leave {path} in float by a rule" if path else ""
            self._found[conversion, line] = (
                f"{line}: {', '.join(named) or kernel} computed in float, since Python runs this line; take away "
                f"what breaks the graph there, or compute it in a layer or a method of its own{rule}"
            )

    def tell(self) -> None:
        """Warns, at the line that called the model, of the lines found. A call that raises leaves it to a later one."""
        found, self._found = self._found, {}
        for (conversion, line), text in found.items():
            conversion.told.add(line)
            warn(text)


def _own_frame() -> FrameType | None:
    """The innermost frame of the user's code."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_own(frame):
        frame = frame.f_back
    return frame


def _module(conversion: Conversion) -> nn.Module | None:
    """The module that the running code belongs to; None if an optimizer's step or a model in float runs it."""
    from .entries import Entry, is_floating

    module: nn.Module | None = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OPTIMIZERS):
            return None
        own = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(own, Entry) and code is Entry.enter.__code__:
            module = module or own.module
            if frame.f_locals["is_outside"]:  # here the model's code begins
                break
        elif isinstance(own, nn.Module):
            if is_floating(own):
                return None
            if module is None and conversion_of(own) is not None:
                module = own
        frame = frame.f_back
    return module or conversion.root


def _is_rounded(
    conversion: Conversion, path: str, module: nn.Module, names: tuple[str, ...], parameters: list[str]
) -> bool:
    """Whether the recipe rounds an operand or the result of a product in ``module``, under one of its ``names``."""
    recipe, subjects = conversion.recipe, conversion.places.subjects
    found = [(".".join(filter(None, (path, name))), [*kinds_of_type(type(module), "compute"), name]) for name in names]
    conversion.between.update((name, tuple(kinds)) for name, kinds in found)
    if any(recipe.at(*subjects[name]).weight.rounds for name in parameters):
        return True
    here = (recipe.at(subject) for subject in found if not recipe.excludes(subject[0]))
    return any(each.activation.rounds or each.error.rounds for each in here)


def _is_spread(operands: list[Any], result: Tensor) -> bool:
    """Whether each operand of a multiplication is spread over axes of the other."""
    return all(isinstance(each, Tensor) and each.shape != result.shape for each in operands)
