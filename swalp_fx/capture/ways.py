"""The callables in the ``__dict__`` of a converted model's modules, and in their classes. Each enters by an Entry."""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from ..errors import NotRewritten
from .compiler import APART, FOREIGN, is_given_packed, rewriting
from .conversion import ENTRY
from .dynamo import call_of_module, named_like, skip_code
from .running import local

__all__ = ["Bound", "Own", "bound", "call_of", "is_call", "share"]


def call_of(module: nn.Module) -> types.MethodType:
    """The entry for the call of a module. It is a bound function: the front end traces it faster than an object.

    PyTorch leaves it out of a module's state. A model's own ``__getstate__`` may leave it in. Then pickle finds
    PyTorch's call by its name, and the unpickled Entry replaces that.
    """
    run = types.FunctionType(_call.__code__.replace(), globals(), "_call_impl")  # its own code has its own cache
    return types.MethodType(run, module)


def is_call(value: Any) -> bool:
    """Whether ``value`` was made by ``call_of``."""
    return isinstance(value, types.MethodType) and value.__code__ == _call.__code__


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    # In a trace, the call becomes part of that graph: it calls self.forward, which is an entry.
    if is_dynamo_compiling() and is_given_packed():
        return _enter_apart(self, "", call_of_module, args, kwargs)
    if is_dynamo_compiling() or local.explaining:
        return call_of_module(self, *args, **kwargs)
    if local.entered is None:
        _refuse_traced(self, sys._getframe(2))  # the caller of the module
    return self._swalp.enter("", call_of_module, args, kwargs)


class Bound:
    """A method of an instance. Pickle would save a bound method by its name in the class; it saves this object."""

    def __init__(self, function: Callable[..., Any], module: nn.Module, name: str) -> None:
        self.function, self.module, self.name = function, module, name
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:  # a method has the attributes of its function
        if name in ("function", "module"):
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return inspect.unwrap(self.function)

    @property
    def __self__(self) -> nn.Module:
        return self.module

    @property
    def __func__(self) -> Any:
        return inspect.getattr_static(type(self.module), self.name)

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.function)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __reduce__(self) -> Any:
        return bound, (self.module, self.name)


def bound(module: nn.Module, name: str) -> Bound:
    """The attribute ``name`` of the module's class, as an entry."""
    function = inspect.getattr_static(type(module), name)
    if isinstance(function, types.FunctionType):
        return Bound(_method(name, function), module, name)
    return Bound(_fixed(name, _with_self(getattr(type(module), name))), module, name)


class Own(Bound):
    """The entry for a function that was set on the instance, such as its forward."""

    def __init__(self, given: Callable[..., Any], module: nn.Module, name: str) -> None:
        super().__init__(_fixed(name, _with_self(given)), module, name)
        self.given = given

    @property
    def __func__(self) -> Any:
        return self.given.__func__  # type: ignore[attr-defined]  # a plain function has none

    def __reduce__(self) -> Any:
        return Own, (self.given, self.module, self.name)


# This frame is not traced, only the frames that it calls: all modules share its code, and would share one limit.
skip_code(Bound.__call__.__code__)


def _with_self(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which takes no self, as one that does."""

    @named_like(function)
    def free(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    with contextlib.suppress(ValueError, TypeError):  # it may have no signature
        signature = inspect.signature(function)
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        free.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]
    return free


def _method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The method ``name`` of a module's type as an entry. Each call looks the method up in the type.

    It has the signature of ``function``, the present method: models inspect their own methods.
    """

    @named_like(function)
    def entry(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _entered(self, name, getattr(type(self), name), args, kwargs)

    entry.__code__ = entry.__code__.replace()  # a cache of its own
    return entry


def _fixed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` itself as the entry ``name``."""

    @named_like(function)
    def entry(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _entered(self, name, function, args, kwargs)

    entry.__code__ = entry.__code__.replace()
    return entry


def _entered(self: Any, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if is_dynamo_compiling():
        where = rewriting()
        if not where:
            raise NotRewritten(FOREIGN)
        if where == APART:
            return _enter_apart(self, name, function, args, kwargs)
        return function(self, *args, **kwargs)
    if local.explaining:
        return function(self, *args, **kwargs)
    _refuse_shallow(self, sys._getframe(3))  # the caller of the method
    return self._swalp.enter_method(name, function, args, kwargs)


@torch.compiler.disable(reason="a converted module is called while another's graph is made")
def _enter_apart(self: Any, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return self._swalp.enter(name, function, args, kwargs)


_SHARED: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


def share(kind: type, name: str, value: Any) -> None:
    """Makes a function or a property of a class an entry, for its converted instances.

    Python looks it up in the class alone, never in an instance. For other instances it works as before.
    """
    function: Any = value.fget if isinstance(value, property) else value
    if function in _SHARED:
        return

    @named_like(function)
    def shared(self: Any, *args: Any, **kwargs: Any) -> Any:
        if ENTRY not in self.__dict__:
            return function(self, *args, **kwargs)
        return entry(self, *args, **kwargs)

    entry = _fixed(name, function)
    _SHARED.add(shared)
    setattr(kind, name, value.getter(shared) if isinstance(value, property) else shared)


def _refuse_traced(module: Any, caller: types.FrameType) -> None:
    """Raises NotRewritten for a layer that a torch.fx graph calls: the code between layers would be in float."""
    from .entries import settled

    if not caller.f_code.co_filename.startswith("<eval_with_key>"):
        return
    if (root := settled(module).root) is not module:
        raise NotRewritten(
            f"torch.fx.symbolic_trace of a converted {type(root).__name__} leaves the code between its layers in "
            "float; look at its own graphs, model.graphs, or trace a float copy"
        )


def _refuse_shallow(module: nn.Module, caller: types.FrameType) -> None:
    """Raises NotRewritten for a call of a shallow copy: its entries belong to ``module``."""
    is_pytorchs = caller.f_code.co_filename == call_of_module.__code__.co_filename
    if is_pytorchs and caller.f_locals.get("self", module) is not module:
        raise NotRewritten(
            f"a shallow copy of a converted {type(module).__name__} would run the {type(module).__name__} itself; use "
            "copy.deepcopy"
        )
