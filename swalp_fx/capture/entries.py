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
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils import _pytree as pytree

from ..errors import NotRewritten
from ..warn import warn
from .bare import Bare
from .compiler import ANOTHERS, APART, FOREIGN, compile_entry, explain, is_rewriting
from .conversion import ENTRY, Conversion, Graphs, conversion_of
from .dynamo import (
    MAX_GRAPHS,
    FailOnRecompileLimitHit,
    TorchDynamoException,
    call_of_module,
    original_code,
    tracer_around,
)
from .running import local

CALL = "_compiled_call_impl"  # the attribute of a module that PyTorch calls in place of its forward
# A way in: the name of a method, or "" for the call; the function; whether it is the outermost call.
Key = tuple[str, Callable[..., Any], bool]

__all__ = ["adopt_strays", "float_copy", "in_float", "install", "is_floating", "restore", "settled"]


class Entry:
    """A module's ways in. It lives in the module's ``__dict__``: copies and pickles of the module make their own."""

    def __init__(self, conversion: Conversion, module: nn.Module, path: str) -> None:
        self.module = module
        self.taken_out: dict[str, Any] = {}  # what ``remove`` has taken out
        self.join(conversion, path)

    def join(self, conversion: Conversion, path: str) -> None:
        """Makes the module one of ``conversion``'s; path: its name there, as far as is known."""
        self.conversion, self.path = conversion, path
        self.is_entered = False  # whether the module is what was called from outside; graphs are guarded by it
        self.compiled: dict[Key, Callable[..., Any]] = {}  # made when first called
        self.made: set[Key] = set()  # those that have a graph
        self.is_rewriting = is_rewriting(self)
        self.attach()

    def attach(self) -> None:
        """Puts the entries into the module's ``__dict__``: graphs guard them, so those that ``remove`` took out."""
        self.kind, own, before = type(self.module), vars(self.module), self.taken_out  # the type that has the methods
        own[ENTRY] = self
        if own.get(CALL) is None:
            own[CALL] = before.get(CALL) or Call(self.module)
        for name in methods_of(self.kind):
            if name not in own:
                known = before.get(name)
                own[name] = known if type(known) is Bound else _bound(self.kind, name, self.module)
        if not isinstance(forward := own.get("forward"), Bound | None):  # it was set on the instance
            known = before.get("forward")
            is_known = isinstance(known, Own) and known.function is forward
            own["forward"] = known if is_known else Own(forward, self.module)
        for name, value in self.shown().items():
            if self.path and _is_shown(own.get(name)):
                del own[name]
            elif not self.path and not hasattr(self.module, name):
                own[name] = value

    @property
    def described(self) -> str:
        return self.conversion.places.path(self.module) or type(self.module).__name__

    def shown(self) -> dict[str, Any]:
        """What the model has besides its own attributes: ``model.graphs``, ``model.print_readable()``."""
        graphs = self.conversion.graphs
        return {"graphs": graphs, "print_readable": graphs.print_readable}

    def remove(self) -> None:
        """Takes the entries out; a forward that was set on the instance stays."""
        own = vars(self.module)
        self.taken_out = {name: value for name, value in own.items() if _is_entry(name, value)}
        for name, value in self.taken_out.items():
            del own[name]
            if isinstance(value, Own):
                own[name] = value.function

    def enter(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        around = local.entered
        is_outside = conversion_of(around) is not self.conversion  # nothing runs, or another converted model does
        if is_outside:
            adopt_strays(settled(self.module))
        if type(self.module) is not self.kind:
            self.attach()
        key = name, function, is_outside or around is self.module
        run = self.compiled.get(key)
        if run is None:
            run = self.compiled[key] = compile_entry(self, name, function)
        if is_outside:
            others, local.bare = local.bare, Bare()
            local.entered, self.is_entered, local.ran = self.module, True, False
        try:
            if key in self.made:
                result = run(*args, **kwargs)
            else:
                with self.conversion.making:
                    result = run(*args, **kwargs)
                self.made.add(key)
            if not is_outside:
                return result
            if not local.ran:
                self._refuse_float(result, (args, kwargs))
            if not self.conversion.is_proved:
                self.conversion.prove()
            return local.bare.in_place_of_rounded(result)
        except FailOnRecompileLimitHit as error:
            if getattr(error, "code", None) is not original_code(run):
                raise NotRewritten(f"{_limit(self)}; make a tensor of it, or leave it out of the forward") from error
            # Nothing of the call has run yet. It begins again, with a cache of its own.
            warn(f"{_limit(self)}: the graphs are dropped and made anew, which is slow; make a tensor of it")
            del self.compiled[key]
            self.made.discard(key)
            self.conversion.graphs.drop(self.conversion.places.path(self.module))
            local.entered = around
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
            if is_outside:
                local.entered, self.is_entered, local.ran, local.bare = around, False, True, others

    def _refuse_float(self, result: Any, inputs: Any) -> None:
        """Raises NotRewritten if a call in which no graph ran has computed something."""
        if next(self.module.parameters(), None) is None:
            return
        held = [list(vars(each).values()) for each in self.module.modules()]
        known = {id(leaf) for leaf in pytree.tree_leaves((inputs, held))}
        if any(isinstance(leaf, Tensor) and id(leaf) not in known for leaf in pytree.tree_leaves(result)):
            code = inspect.unwrap(type(self.module).forward).__code__
            raise NotRewritten(
                f"{self.described} computed in float, since no graph holds anything of its forward "
                f"({code.co_filename}:{code.co_firstlineno}); take torch.compiler.disable or the like away from it"
            )

    # A copy of a part of a model, or its pickle, does not hold the whole model: it is a model of its own. Each module
    # that is made is at first its own; then its parent, which is made after it, makes it one of its own.

    def __getstate__(self) -> dict[str, Any]:
        conversion, children = self.conversion, self.module.named_children()
        return {
            "module": self.module,
            "recipe": conversion.recipe.within(self.path) if self.path else conversion.recipe,
            "identity": conversion.identity,
            "graphs": None if self.path else conversion.graphs,
            "children": {name: vars(each)[ENTRY] for name, each in children if conversion_of(each) is conversion},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module, self.taken_out = state["module"], {}
        self.children = weakref.WeakValueDictionary(state["children"])  # some may be taken out of the model later
        made = Conversion(self.module, state["recipe"], identity=state["identity"], graphs=state["graphs"])
        self._join_with_children(made, "")

    def _join_with_children(self, conversion: Conversion, path: str) -> None:
        self.join(conversion, path)
        for name, each in self.children.items():
            each._join_with_children(conversion, _joined(path, name))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _limit(entry: Entry) -> str:
    return f"{entry.described} has more than {MAX_GRAPHS} graphs, since what its Python reads keeps changing"


def _is_entry(name: str, value: Any) -> bool:
    """Whether an attribute of a module is its entry's."""
    return name == ENTRY or isinstance(value, Bound | Call) or _is_shown(value)


def _is_shown(value: Any) -> bool:
    """Whether it is one of ``Entry.shown``."""
    return isinstance(value, Graphs) or isinstance(getattr(value, "__self__", None), Graphs)


class Call(functools.partial):
    """The call of a module, as its entry. RNNs pickle it too."""

    def __new__(cls, module: nn.Module) -> Call:
        own = types.FunctionType(_call.__code__.replace(), globals(), "call")  # a code object, so a cache, of its own
        return super().__new__(cls, own, module)

    def __reduce__(self) -> Any:
        return Call, self.args


class Bound(functools.partial):
    """A method of an instance. A bound one would be pickled as what the class has by its name; this is, as it is."""

    def __reduce__(self) -> Any:
        return _bound, (type(self.args[0]), self.func.name, self.args[0])  # type: ignore[attr-defined]


def _bound(kind: type, name: str, module: nn.Module) -> Bound:
    return Bound(_method(name, getattr(kind, name)), module)


class Own(Bound):
    """A forward that was set on the instance, behind an entry."""

    function: Callable[..., Any]

    def __new__(cls, function: Callable[..., Any], module: nn.Module) -> Own:
        def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        @functools.wraps(function)
        def entry(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return _entered(self, "forward", forward, args, kwargs)

        new = super().__new__(cls, entry, module)
        new.function = function
        return new

    def __reduce__(self) -> Any:
        return Own, (self.function, self.args[0])


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    # Called by what is being traced, it is part of that graph: it calls self.forward, an entry.
    if torch.compiler.is_dynamo_compiling() or local.explaining:
        return call_of_module(self, *args, **kwargs)
    if local.entered is None:
        _refuse_traced(self, sys._getframe(2))  # what calls the module
    return self._swalp.enter("", call_of_module, args, kwargs)


def _refuse_traced(module: Any, caller: types.FrameType) -> None:
    """Raises NotRewritten for a layer that a graph of torch.fx calls: what is between its layers is in float."""
    if not caller.f_code.co_filename.startswith("<eval_with_key>"):
        return
    if (root := settled(module).root) is not module:
        raise NotRewritten(
            f"torch.fx.symbolic_trace of a converted {type(root).__name__} leaves what is between its layers in float; "
            "look at its own graphs, model.graphs, or trace a float copy"
        )


def _refuse_shallow(module: nn.Module, caller: types.FrameType) -> None:
    """Raises NotRewritten for the call of a shallow copy, whose entries are those of ``module``."""
    is_pytorchs = caller.f_code.co_filename == call_of_module.__code__.co_filename
    if is_pytorchs and caller.f_locals.get("self", module) is not module:
        raise NotRewritten(
            f"a shallow copy of a converted {type(module).__name__} would run the {type(module).__name__} itself; use "
            "copy.deepcopy"
        )


@functools.cache
def _method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The method ``name`` of a module's type as an entry: what the type has by that name when it is called.

    Its signature is that of ``function``, what the type has now: models look at that of their own methods.
    """

    @functools.wraps(function)
    def entry(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _entered(self, name, getattr(type(self), name), args, kwargs)

    entry.__code__ = entry.__code__.replace()  # type: ignore[attr-defined]  # a cache of its own
    entry.name = name  # type: ignore[attr-defined]
    return entry


def _entered(self: Any, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling():
        by = self._swalp.is_rewriting()
        if not by:
            raise NotRewritten(FOREIGN)
        if by == APART:
            return _enter_apart(self, name, function, args, kwargs)
        if by == ANOTHERS and self._swalp.conversion.root.training:  # read, so that it is a guard
            return function(self, *args, **kwargs)
        return function(self, *args, **kwargs)
    if local.explaining:
        return function(self, *args, **kwargs)
    _refuse_shallow(self, sys._getframe(2))  # what calls the method
    if name != "forward" and not any(isinstance(each, Tensor) for each in (*args, *kwargs.values())):
        given = function(self, *args, **kwargs)  # a setting, a question; what layers it calls are entries
        if local.entered is None:
            adopt_strays(settled(self))  # which it may have put in
        return given
    return self._swalp.enter(name, function, args, kwargs)


@torch.compiler.disable(reason="a converted model is called while another's graph is made")
def _enter_apart(self: Any, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    return self._swalp.enter(name, function, args, kwargs)


def methods_of(kind: type) -> list[str]:
    """forward, and the public functions beside it of the class that defines it and of what derives from that: decode,
    forward_features. What a framework's base offers (generate, save_pretrained) is left to Python."""
    bases = kind.__mro__
    last = max((i for i, base in enumerate(bases) if "forward" in vars(base) and base is not nn.Module), default=-1)
    # An own forward turns off a short cut of the front end, past the module's call: another's trace would miss it.
    names = {"forward": None} if last >= 0 else {}
    for base in bases[: last + 1]:
        if base.__module__.startswith("torch."):
            break
        for name, value in vars(base).items():
            if isinstance(value, types.FunctionType) and not name.startswith("_") and name not in vars(nn.Module):
                names[name] = None
    # It puts layers in past ``__setattr__``: they are taken in at once, not by the model's next call.
    return [*names, *(["insert"] if issubclass(kind, nn.Sequential | nn.ModuleList) else [])]


def install(conversion: Conversion) -> None:
    """Makes entries of all modules of the conversion's model."""
    conversion.forget_places()
    take_in(conversion, conversion.root, "")


def take_in(conversion: Conversion, module: nn.Module, path: str) -> None:
    """Makes entries of ``module``, which is ``path`` in the conversion's model, and of what is in it.

    What is in another converted model too stays part of that. A part that was taken out, or copied, comes back.
    """
    for name, each in module.named_modules(prefix=path):
        entry = vars(each).get(ENTRY)
        if entry is None:
            vars(each)[ENTRY] = Entry(conversion, each, name)
        elif entry.conversion is conversion:
            entry.path = name
        elif entry.conversion.gives(each, conversion):
            entry.join(conversion, name)


def settled(module: nn.Module) -> Conversion:
    """The conversion of a converted ``module``. What was taken out of its model is a model of its own from now on: of
    the same recipe, whose patterns see the names that it had."""
    entry: Entry = vars(module)[ENTRY]
    before = entry.conversion
    if entry.path and not before.holds(module):
        install(Conversion(module, before.recipe.within(entry.path), identity=before.identity))
    return entry.conversion


def adopt_strays(conversion: Conversion) -> None:
    """Takes in what was put into the model past its ``__setattr__``: ``model._modules[name] = layer``."""
    if conversion.has_stray():
        install(conversion)


def _adopt_registered(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    conversion = conversion_of(module)
    if conversion is not None and submodule is not None:
        take_in(conversion, submodule, _joined(vars(module)[ENTRY].path, name))


register_module_module_registration_hook(_adopt_registered)


def float_copy(module: nn.Module) -> nn.Module:
    """A deep copy of ``module`` that computes in float."""
    if conversion_of(module) is None:
        return copy.deepcopy(module)
    with in_float(module):
        return copy.deepcopy(module)


def restore(module: nn.Module) -> nn.Module:
    """Takes all entries of ``module`` out; returns it."""
    for entry in _entries(module):
        entry.remove()
    _FLOATING.pop(id(module), None)
    return module


@dataclass
class _Floating:
    """A model that is ``in_float``."""

    module: nn.Module
    entries: list[Entry]
    times: int = 0  # how often it has been entered, by any thread


_FLOATING: dict[int, _Floating] = {}
_SWITCHING = threading.Lock()


def is_floating(module: nn.Module) -> bool:
    """Whether ``module`` is ``in_float``."""
    return id(module) in _FLOATING


@contextlib.contextmanager
def in_float(module: nn.Module) -> Iterator[nn.Module]:
    """While it holds, the entries of ``module`` are out. What is changed in the meantime stays."""
    with _SWITCHING:
        floating = _FLOATING.setdefault(id(module), _Floating(module, _entries(module)))
        floating.times += 1
        for entry in floating.entries if floating.times == 1 else ():
            entry.remove()
    try:
        yield module
    finally:
        with _SWITCHING:
            floating.times -= 1
            if floating.times == 0 and _FLOATING.get(id(module)) is floating:  # it was not restored
                del _FLOATING[id(module)]
                for entry in floating.entries:
                    if ENTRY not in vars(entry.module):  # nor converted anew
                        entry.attach()
                install(floating.entries[0].conversion)


def _entries(module: nn.Module) -> list[Entry]:
    return [vars(each)[ENTRY] for each in module.modules() if ENTRY in vars(each)]
