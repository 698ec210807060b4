"""Every way into a converted model: the call of each of its modules, and their methods.

The outermost call makes one graph of all that it can; what PyTorch's front end cannot trace runs as Python, and the
modules that it calls are entries of their own. Entries live in the ``__dict__`` of the modules, which keep their types.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils import _pytree as pytree

from ..errors import NotRewritten
from ..warn import warn
from .compiler import FOREIGN, compile_entry, explain, goes_straight, is_rewriting
from .conversion import ENTRY, Conversion, Graphs, conversion_of
from .dynamo import (
    MAX_GRAPHS,
    FailOnRecompileLimitHit,
    TorchDynamoException,
    call_of_module,
    original_code,
    skip_code,
    tracer_around,
)
from .methods import PRODUCT, READS, computing, in_class, methods_of, runs_later, set_on
from .running import local

__all__ = ["adopt", "float_copy", "in_float", "install", "restore"]


class Entry:
    """A module's ways in. It lives in the module's ``__dict__``: copies and pickles of the module make their own."""

    def __init__(self, conversion: Conversion, module: nn.Module) -> None:
        self.conversion, self.module = conversion, module
        self.install()

    def install(self) -> None:
        self.compiled: dict[tuple[Any, bool], Callable[..., Any]] = {}  # made when first called
        self.made: set[tuple[Any, bool]] = set()  # those that have a graph
        own = vars(self.module)
        own["_compiled_call_impl"] = Call(self.module)
        own |= {name: Own(value, self.module, name) for name, value in set_on(self.module) if type(value) is not Own}
        own |= {name: bound(self.module, name) for name in methods_of(self.module) if name not in own}
        for kind, name, value in [*in_class(self.module)]:
            share(kind, name, value)
        if self.module is self.conversion.root:
            for name, value in self.shown().items():
                if not hasattr(self.module, name):
                    own[name] = value

    @property
    def is_entered(self) -> bool:
        """Whether the module is what was called from outside, in this thread; graphs may be guarded by it."""
        return self.module is local.entered

    @property
    def described(self) -> str:
        return self.conversion.places.path(self.module) or type(self.module).__name__

    @functools.cached_property
    def computing(self) -> dict[str, int]:
        """Name -> what it computes, of the module's ways in."""
        return computing(self.module, self.conversion.places.words)

    def is_left_to_python(self, name: str, inputs: Any) -> bool:
        """Whether a method is a setting, or a question; what layers it calls are entries."""
        args, kwargs = inputs
        if name == "forward" or any(isinstance(each, Tensor) for each in (*args, *kwargs.values())):
            return False
        computed = self.computing.get(name)
        is_given = computed == READS and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(inputs))
        return computed != PRODUCT and not is_given

    def run_later(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A generator, which runs between what its caller does, as Python."""
        if self.computing.get(name) == PRODUCT:
            raise NotRewritten(
                f"{self.described}.{name} would have computed in float: it is a generator, or asynchronous, which runs "
                "as Python; compute in a method that it calls"
            )
        return function(self.module, *args, **kwargs)

    def shown(self) -> dict[str, Any]:
        """What the model has besides its own attributes: ``model.graphs``, ``model.print_readable()``."""
        graphs = self.conversion.graphs
        return {"graphs": graphs, "print_readable": graphs.print_readable}

    def remove(self) -> None:
        own = vars(self.module)
        own.pop("_compiled_call_impl", None)
        own.pop(ENTRY, None)
        for name, value in list(own.items()):
            if is_shown(name, value):
                del own[name]
            elif isinstance(value, Own):
                own[name] = value.given
            elif isinstance(value, Bound):
                del own[name]

    def enter(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before, nested = local.entered, local.nested
        outermost = before is None
        key = function, outermost
        run = self.compiled.get(key)
        if run is None:
            run = self.compiled[key] = compile_entry(self, name, function)
        if before is None:
            local.entered, local.ran = self.module, False
            if self.conversion.breaks:
                adopt_strays(self.conversion)
        else:
            local.nested = self.conversion.breaks = True
        try:
            if key in self.made:
                result = run(*args, **kwargs)
            else:
                with self.conversion.making:
                    result = run(*args, **kwargs)
                self.made.add(key)
            if before is not None:
                return result
            if not local.ran:
                self._refuse_float(function, result, (args, kwargs))
            if not self.conversion.is_proved:
                self.conversion.prove()
            return local.bare.in_place_of_rounded(result, (args, kwargs))
        except FailOnRecompileLimitHit as error:
            if getattr(error, "code", None) is not original_code(run):
                raise NotRewritten(f"{_limit(self)}; make a tensor of it, or leave it out of the forward") from error
            # Nothing of the call has run yet. It begins again, with a cache of its own.
            warn(f"{_limit(self)}: the graphs are dropped and made anew, which is slow; make a tensor of it")
            del self.compiled[key]
            self.made.discard(key)
            self.conversion.graphs.drop(self.conversion.places.path(self.module))
            local.entered, local.nested = before, nested
            return self.enter(name, function, args, kwargs)
        except RuntimeError as error:
            if (tracer := tracer_around()) is not None:
                raise NotRewritten(
                    f"{tracer} would keep the float code of {self.described}; call it outside"
                ) from error
            if not isinstance(error, TorchDynamoException):
                raise
            self.compiled.pop(key, None)  # an error in a trace marks the code to be left alone for good
            with contextlib.suppress(NotRewritten):
                explain(function, self.module, args, kwargs)
            raise
        finally:
            local.entered, local.nested = before, nested
            if before is None:
                local.bare.clear()

    def _refuse_float(self, function: Callable[..., Any], result: Any, inputs: Any) -> None:
        """Raises NotRewritten if a call in which no graph ran has computed something."""
        if next(self.module.parameters(), None) is None:
            return
        held = [list(vars(each).values()) for each in self.module.modules()]
        known = {id(leaf) for leaf in pytree.tree_leaves((inputs, held))}
        if any(isinstance(leaf, Tensor) and id(leaf) not in known for leaf in pytree.tree_leaves(result)):
            called = inspect.unwrap(type(self.module).forward if function is call_of_module else function)
            code = called.__code__
            raise NotRewritten(
                f"{self.described} computed in float, since no graph holds anything of its {called.__name__} "
                f"({code.co_filename}:{code.co_firstlineno}); take torch.compiler.disable or the like away from it"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"conversion": self.conversion, "module": self.module}

    def __deepcopy__(self, memo: dict[int, Any]) -> Entry:
        new = object.__new__(Entry)
        memo[id(self)] = new
        new.conversion = copy.deepcopy(self.conversion, memo)
        new.module = memo[id(self.module)]  # empty as yet; what fills it only adds to its __dict__
        new.install()
        return new

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.install()


def _limit(entry: Entry) -> str:
    return f"{entry.described} has more than {MAX_GRAPHS} graphs, since what its Python reads keeps changing"


def is_shown(name: str, value: Any) -> bool:
    """Whether an attribute is one of ``Entry.shown``."""
    return isinstance(value, Graphs) or isinstance(getattr(value, "__self__", None), Graphs)


class Call:
    """The call of a module, as its entry."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.run = types.FunctionType(_call.__code__.replace(), globals(), "call")  # its own code has its own cache

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if torch.compiler.is_dynamo_compiling() and goes_straight():
            return type(module).forward(module, *args, **kwargs)
        return self.run(module, *args, **kwargs)

    def __reduce__(self) -> Any:
        return Call, (self.module,)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    # Called by what is being traced, it is part of that graph: it calls self.forward, an entry.
    if torch.compiler.is_dynamo_compiling() or local.explaining:
        return call_of_module(self, *args, **kwargs)
    if local.entered is None:
        _refuse_traced(self, sys._getframe(3))  # what calls the module
    return self._swalp.enter("", call_of_module, args, kwargs)


class Bound:
    """A method of an instance. A bound one would be pickled as what the class has by its name; this is, as it is."""

    def __init__(self, function: Callable[..., Any], module: nn.Module, name: str) -> None:
        self.function, self.module, self.name = function, module, name
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    @property
    def __code__(self) -> types.CodeType:
        code: types.CodeType = inspect.unwrap(self.function).__code__
        return code

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.function)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __reduce__(self) -> Any:
        return bound, (self.module, self.name)


def bound(module: nn.Module, name: str) -> Bound:
    """What the class of ``module`` has by this name, as an entry."""
    function = inspect.getattr_static(type(module), name)
    if not isinstance(function, types.FunctionType):  # it takes no self
        function = _free(getattr(type(module), name))
    return Bound(_method(function, name), module, name)


class Own(Bound):
    """A function that was set on the instance, its forward for example, behind an entry."""

    def __init__(self, given: Callable[..., Any], module: nn.Module, name: str) -> None:
        # Nothing may hold the function for good, which may hold the model.
        super().__init__(_method.__wrapped__(_free.__wrapped__(given), name), module, name)
        self.given = given

    def __reduce__(self) -> Any:
        return Own, (self.given, self.module, self.name)


@functools.cache
def _free(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which takes no self, as one that does."""

    @functools.wraps(function)
    def free(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    with contextlib.suppress(ValueError, TypeError):  # it may have none
        signature = inspect.signature(function)
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        free.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]
    return free


# Frames of what they call are traced. These are not: all modules share their code, and would share its limit.
skip_code(Call.__call__.__code__)
skip_code(Bound.__call__.__code__)


def _refuse_traced(module: Any, caller: types.FrameType) -> None:
    """Raises NotRewritten for a layer that a graph of torch.fx calls: what is between its layers is in float."""
    root = module._swalp.conversion.root
    if caller.f_code.co_filename.startswith("<eval_with_key>") and module is not root:
        raise NotRewritten(
            f"torch.fx.symbolic_trace of a converted {type(root).__name__} leaves what is between its layers in float; "
            "look at its own graphs, model.graphs, or trace a float copy"
        )


@functools.cache
def _method(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """``function`` of a module's class as an entry. Its signature stays: models look at that of their own methods."""
    later = runs_later(function)

    @functools.wraps(function)
    def entry(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            if not is_rewriting():
                raise NotRewritten(FOREIGN)
            return function(self, *args, **kwargs)
        if local.explaining or self._swalp.is_left_to_python(name, (args, kwargs)):
            return function(self, *args, **kwargs)
        if later:
            return self._swalp.run_later(name, function, args, kwargs)
        return self._swalp.enter(name, function, args, kwargs)

    return entry


_SHARED: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()


def share(kind: type, name: str, value: Any) -> None:
    """Makes what a class has by this name, a function or a property, an entry of those instances that are converted."""
    function: Any = value.fget if isinstance(value, property) else value
    if function in _SHARED:
        return

    @functools.wraps(function)
    def shared(self: Any, *args: Any, **kwargs: Any) -> Any:
        if ENTRY not in self.__dict__:
            return function(self, *args, **kwargs)
        return entry(self, *args, **kwargs)

    entry = _method(function, name)
    _SHARED.add(shared)
    setattr(kind, name, value.getter(shared) if isinstance(value, property) else shared)


def install(conversion: Conversion) -> None:
    """Makes entries of all modules of the conversion's model."""
    for module in conversion.root.modules():
        if ENTRY not in vars(module):
            vars(module)[ENTRY] = Entry(conversion, module)


def adopt(conversion: Conversion) -> None:
    """Takes in what was put into the model after its conversion."""
    conversion.places.refresh()
    install(conversion)


def adopt_strays(conversion: Conversion) -> None:
    """Takes in what was put into the model past its ``__setattr__``, as ``Sequential.insert`` does."""
    if any(True for _ in conversion.stray()):
        adopt(conversion)


def _adopt_registered(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    conversion = conversion_of(module)
    if conversion is None or submodule is None:
        return
    for each in submodule.modules():
        if ENTRY not in vars(each):
            vars(each)[ENTRY] = Entry(conversion, each)


register_module_module_registration_hook(_adopt_registered)


def float_copy(module: nn.Module) -> nn.Module:
    """A deep copy of ``module`` that computes in float."""
    if conversion_of(module) is None:
        return copy.deepcopy(module)
    with in_float(module):
        return copy.deepcopy(module)


def restore(module: nn.Module) -> nn.Module:
    """Takes all entries of ``module`` out; returns it."""
    for each in module.modules():
        if (entry := vars(each).get(ENTRY)) is not None:
            entry.remove()
    return module


@contextlib.contextmanager
def in_float(module: nn.Module) -> Iterator[nn.Module]:
    """While it holds, the entries of ``module`` are out."""
    entries = [(each, vars(each)[ENTRY]) for each in module.modules() if ENTRY in vars(each)]
    kept = [
        (each, {name: value for name, value in vars(each).items() if _is_entry(name, value)}) for each, _ in entries
    ]
    for _, entry in entries:
        entry.remove()
    try:
        yield module
    finally:
        for each, attributes in kept:
            vars(each).update(attributes)


def _is_entry(name: str, value: Any) -> bool:
    return name in (ENTRY, "_compiled_call_impl") or isinstance(value, Bound) or is_shown(name, value)
