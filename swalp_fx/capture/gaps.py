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
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..passes.names import kinds_of_type
from ..passes.tables import part_of
from ..warn import is_own, line_of, warn
from .conversion import Conversion, conversion_of
from .modes import push, stacked
from .running import local

__all__ = ["Watch", "watch"]

OPTIMIZERS = str(Path(torch.optim.__file__).parent)
# Words in the names of PyTorch's kernels that compute products, beside those of the table of operations.
KERNELS = ("attention", "rnn", "trilinear")


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
        # Storages of tensors that are made of no parameter, and of nothing floating that the model is given.
        self._constants: dict[int, Any] = {}
        self._known: dict[Conversion, dict[int, str]] = {}  # storage -> name, of the parameters of each model

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
        if not self.is_inside and isinstance(function, OpOverload) and torch._C._current_graph_task_id() < 0:
            self._see(function, pytree.tree_leaves((args, kwargs)), given)
        return given

    def _see(self, function: OpOverload, operands: list[Any], given: Any) -> None:
        conversion = conversion_of(local.entered)
        if conversion is None or local.explaining:
            return
        if conversion not in self._known:
            self._known[conversion] = {_memory(each): name for name, each in conversion.root.named_parameters()}
            self._constants |= {_memory(each): each for each in conversion.root.buffers()}
        results = [each for each in pytree.tree_leaves(given) if isinstance(each, Tensor)]
        numbers = [each for each in operands if _is_number(each) and _memory(each) not in self._constants]
        if not numbers:
            self._constants |= {_memory(each): _held(each) for each in results if _is_number(each)}
            return
        for each in results:
            self._constants.pop(_memory(each), None)  # a write has put numbers into it
        conversion.has_gaps = True
        if _is_product(function):
            self._note(conversion, str(function.overloadpacket.__name__), numbers)

    def _note(self, conversion: Conversion, operation: str, operands: list[Tensor]) -> None:
        where = _where()
        if where is None or where.line in conversion.told or (conversion, where.line) in self._found:
            return
        module = where.module or conversion.root
        path = conversion.places.path(module) or ""
        known = self._known[conversion]
        parameters = [known[memory] for each in operands if (memory := _memory(each)) in known]
        if _is_rounded(conversion, path, module, operation, parameters):
            rule = f", or leave {path} in float by a rule" if path else ""
            self._found[conversion, where.line] = (
                f"{where.line}: {operation} computed in float, since Python runs this line; take away what breaks the "
                f"graph there, or compute it in a layer or a method of its own{rule}"
            )

    def tell(self) -> None:
        """Warns, at the line that called the model, of the lines found. A call that raises leaves it to a later one."""
        found, self._found = self._found, {}
        for (conversion, line), text in found.items():
            conversion.told.add(line)
            warn(text)


class _Where(NamedTuple):
    line: str  # "model.py:12 forward"
    module: nn.Module | None  # that the line belongs to


def _where() -> _Where | None:
    """The user's line that runs now; None if an optimizer's step or a model in float runs it."""
    from .entries import Entry, is_floating

    line, module = "", None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OPTIMIZERS):
            return None
        if not line and is_own(frame):
            line = line_of(frame)
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
    return _Where(line or "code without a line", module)


def _is_rounded(conversion: Conversion, path: str, module: nn.Module, operation: str, parameters: list[str]) -> bool:
    """Whether the recipe rounds an operand or the result of a product in ``module``."""
    recipe, subjects = conversion.recipe, conversion.places.subjects
    if any(recipe.at(*subjects[name]).weight.rounds for name in parameters):
        return True
    name = ".".join(filter(None, (path, operation)))
    here = recipe.at((name, [*kinds_of_type(type(module), "compute"), operation]))
    return not recipe.excludes(name) and (here.activation.rounds or here.error.rounds)


def _is_product(function: OpOverload) -> bool:
    words = function.overloadpacket.__name__.strip("_").split("_")
    return any(word in KERNELS or part_of(word) == "compute" for word in words)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _held(tensor: Tensor) -> Any:
    """The object to hold, so that the address of ``_memory`` is not used again."""
    return tensor.untyped_storage() if tensor.layout is torch.strided else tensor


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
