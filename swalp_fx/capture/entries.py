"""Entries: the ways into a converted model. They are the call and the methods of each of its modules.

The outermost call makes one graph if it can. Code that PyTorch's front end cannot trace runs as Python, and the modules
that it calls enter by themselves. Entries live in the ``__dict__`` of the modules, which keep their types.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils import _pytree as pytree

from .. import fingerprints
from ..copied import deep_copy
from ..errors import NotRewritten
from ..warn import warn
from .compiler import compile_entry, explain
from .conversion import CALL, ENTRY, Conversion, Graphs, conversion_of
from .dynamo import (
    MAX_GRAPHS,
    FailOnRecompileLimitHit,
    TorchDynamoException,
    call_of_module,
    original_code,
    tracer_around,
)
from .gaps import watch
from .methods import PRODUCT, computing, in_class, methods_of, runs_later, set_on
from .packed import refuse_packed
from .places import within
from .running import local
from .ways import Bound, Own, bound, call_of, is_call, share

# (name of a method, or "" for the call; the function; whether the call is the outermost one)
Key = tuple[str, Callable[..., Any], bool]

__all__ = ["adopt_strays", "float_copy", "in_float", "install", "is_floating", "restore", "settled"]


class Entry:
    """A module's ways in. It lives in the module's ``__dict__``: copies and pickles of the module make their own."""

    def __init__(self, conversion: Conversion, module: nn.Module, path: str) -> None:
        self.module = module
        self.taken_out: dict[str, Any] = {}  # the attributes that ``remove`` took out
        self.join(conversion, path)

    def join(self, conversion: Conversion, path: str) -> None:
        """Makes the module a part of ``conversion``; path: its name there, as far as is known."""
        self.conversion, self.path = conversion, path
        self.compiled: dict[Key, Callable[..., Any]] = {}  # filled at each first call
        self.made: set[Key] = set()  # keys that have a graph
        self.making = threading.Lock()  # threads with a first call at the same time make one graph, not one each
        self.attach()

    def attach(self) -> None:
        """Puts the entries into the module's ``__dict__``. Graphs guard them, so it reuses those taken out before."""
        self.kind, own, before = type(self.module), vars(self.module), self.taken_out  # kind: its methods are entries
        self.computing: dict[str, int] | None = None  # see ``_computing``
        own[ENTRY] = self
        if own.get(CALL) in (None, nn.Module._call_impl.__get__(self.module)):
            own[CALL] = before.get(CALL) or call_of(self.module)
        for name, given in [*set_on(self.module)]:
            if not isinstance(given, Bound):
                known = before.get(name)
                is_known = isinstance(known, Own) and known.given is given
                own[name] = known if is_known else Own(given, self.module, name)
        for name in methods_of(self.module):
            if name not in own:
                known = before.get(name)
                own[name] = known if type(known) is Bound else bound(self.module, name)
        for kind, name, value in [*in_class(self.module)]:
            share(kind, name, value)
        for name, value in self.shown().items():
            if self.path and _is_shown(own.get(name)):
                del own[name]
            elif not self.path and not hasattr(self.module, name):
                own[name] = value

    @property
    def is_entered(self) -> bool:
        """Whether this thread called this module from outside of the model. Graphs may guard this."""
        return self.module is local.entered

    @property
    def described(self) -> str:
        return self.conversion.places.path(self.module) or type(self.module).__name__

    def shown(self) -> dict[str, Any]:
        """The attributes that a conversion adds to the model: ``model.graphs``, ``model.print_readable()``."""
        graphs = self.conversion.graphs
        return {"graphs": graphs, "print_readable": graphs.print_readable}

    def remove(self) -> None:
        """Takes the entries out; a function that was set on the instance stays."""
        own = vars(self.module)
        self.taken_out = {name: value for name, value in own.items() if _is_entry(name, value)}
        for name, value in self.taken_out.items():
            del own[name]
            if isinstance(value, Own):
                own[name] = value.given

    def enter_method(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of a method. It is rewritten if it computes; else it runs as Python, and its layers enter."""
        is_outside = local.entered is None
        if not self._is_left_to_python(name, [args, kwargs]):
            if not runs_later(function):
                return self.enter(name, function, args, kwargs)
            if self._computing()[name] == PRODUCT:
                raise NotRewritten(
                    f"{self.described}.{name} would have computed in float: it is a generator, or asynchronous, which "
                    "runs as Python; compute in a method that it calls"
                )
        given = function(self.module, *args, **kwargs)
        if is_outside:
            adopt_strays(settled(self.module))  # the method may have added modules
        return given

    def _is_left_to_python(self, name: str, inputs: Any) -> bool:
        """Whether a method only sets or asks something: no tensor is given, and its code has no product."""
        return name != "forward" and not _holds_tensor(inputs) and self._computing().get(name) != PRODUCT

    def _computing(self) -> dict[str, int]:
        """Name -> NOTHING, READS or PRODUCT, of the module's functions."""
        if self.computing is None:
            self.computing = computing(self.module)
        return self.computing

    def enter(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The result of ``function``, by rewritten graphs. Raises NotRewritten if it would compute in float."""
        is_outside = conversion_of(local.entered) is not self.conversion  # no model runs, or another one
        refuse_packed(self.conversion, self.module, self.described, (*args, *kwargs.values()))
        key = name, function, is_outside
        if is_outside:
            self._refuse_shared()
            conversion = settled(self.module)
            if key not in self.made or conversion.is_changed():
                adopt_strays(conversion)
                conversion.refuse_unwhole()
        if type(self.module) is not self.kind:
            self.attach()
        run = self.compiled.get(key)
        if run is None:
            run = self.compiled[key] = compile_entry(self, name, function)
        calls = self.conversion.graphs.calls if is_outside else 0
        try:
            with local.entering(self.module, is_outside):
                if is_outside and self.conversion.is_watched():
                    watch()
                result = self._given(key, run, args, kwargs)
                if not is_outside:
                    return result
                if not local.ran and calls == self.conversion.graphs.calls:
                    self._refuse_float(function, result, (args, kwargs))
                if local.gaps is not None:
                    local.gaps.tell()
                return self._returned(result, (args, kwargs))
        except FailOnRecompileLimitHit as error:
            if getattr(error, "code", None) is not original_code(run):
                raise NotRewritten(f"{_limit(self)}; make a tensor of it, or leave it out of the forward") from error
            # Nothing of the call has run yet. It begins again, with a new cache.
            warn(f"{_limit(self)}: the graphs are dropped and made anew, which is slow; make a tensor of it")
            del self.compiled[key]
            self.made.discard(key)
            self.conversion.graphs.drop(self.conversion.places.path(self.module))
            return self.enter(name, function, args, kwargs)
        except RuntimeError as error:
            if (tracer := tracer_around()) is not None:
                raise NotRewritten(
                    f"{tracer} would keep the float code of {self.described}; call it outside"
                ) from error
            if not isinstance(error, TorchDynamoException):
                raise
            self.compiled.pop(key, None)  # after an error in a trace, the front end never traces this code again
            with contextlib.suppress(NotRewritten):
                explain(function, self.module, args, kwargs)
            raise

    def _refuse_shared(self) -> None:
        """Raises NotRewritten for a part of this model that is a part of the model that runs now, too."""
        if not self.path or local.entered is None or not self.conversion.holds(self.module):
            return
        other = settled(local.entered).root
        if any(each is self.module for each in within(other, apart=self.conversion.root)):
            name = next(name for name, each in other.named_modules() if each is self.module)
            raise NotRewritten(
                f"{name} of the converted {type(other).__name__} is {self.described} of another converted model too, "
                "and has that one's recipe; put swalp_fx.restore(copy.deepcopy(it)) there, or convert a module that "
                "holds both models"
            )

    def _given(self, key: Key, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if key in self.made:
            return run(*args, **kwargs)
        with local.tracing(self.making):
            result = run(*args, **kwargs)
        self.made.add(key)
        return result

    def _returned(self, result: Any, inputs: Any) -> Any:
        """The result for the caller of the model, from the result of the outermost entry."""
        if not self.conversion.is_proved:
            self.conversion.prove()
        return local.bare.in_place_of_rounded(result, inputs)

    def _refuse_float(self, function: Callable[..., Any], result: Any, inputs: Any) -> None:
        """Raises NotRewritten if a call has computed something, though no graph ran."""
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

    # A copy or a pickle of a part does not hold the whole model: it becomes a model of its own. Each module that is
    # made begins as a model of its own. Its parent is made after it, and takes it in.

    def __getstate__(self) -> dict[str, Any]:
        conversion, children = self.conversion, self.module.named_children()
        return {
            "module": self.module,
            "recipe": conversion.recipe.within(self.path) if self.path else conversion.recipe,
            "identity": conversion.identity,
            "graphs": None if self.path else conversion.graphs,
            "stored": [(each, fingerprints.number_of(each)) for each in self.module.parameters(recurse=False)],
            "children": {name: vars(each)[ENTRY] for name, each in children if conversion_of(each) is conversion},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.module, self.taken_out = state["module"], {}
        fingerprints.put(state["stored"])
        self.children = weakref.WeakValueDictionary(state["children"])  # some may be taken out of the model later
        made = Conversion(self.module, state["recipe"], identity=state["identity"], graphs=state["graphs"])
        self._join_with_children(made, "")

    def _join_with_children(self, conversion: Conversion, path: str) -> None:
        self.join(conversion, path)
        for name, each in self.children.items():
            each._join_with_children(conversion, _joined(path, name))


def _holds_tensor(inputs: Any) -> bool:
    """Whether a container holds a tensor, or an object with a tensor among its attributes."""
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            return True
        is_record = hasattr(leaf, "__dict__") and not isinstance(leaf, nn.Module | type)
        if is_record and any(isinstance(each, Tensor) for each in pytree.tree_leaves(list(vars(leaf).values()))):
            return True
    return False


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _limit(entry: Entry) -> str:
    return f"{entry.described} has more than {MAX_GRAPHS} graphs, since a value that its Python reads keeps changing"


def _is_entry(name: str, value: Any) -> bool:
    """Whether an attribute of a module was put there by its entry."""
    return name == ENTRY or isinstance(value, Bound) or is_call(value) or _is_shown(value)


def _is_shown(value: Any) -> bool:
    """Whether it is one of ``Entry.shown``."""
    return isinstance(value, Graphs) or isinstance(getattr(value, "__self__", None), Graphs)


def install(conversion: Conversion) -> None:
    """Makes entries of all modules of the conversion's model."""
    conversion.forget_places()
    take_in(conversion, conversion.root, "")


def take_in(conversion: Conversion, module: nn.Module, path: str) -> None:
    """Gives entries to ``module``, at ``path`` of the conversion's model, and to its submodules.

    A module that is also in another converted model stays a part of that one. A part that was taken out, or copied,
    comes back.
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
    """The conversion of a converted ``module``.

    A part that was taken out of its model becomes a model of its own, with the same recipe. Patterns go on to match its
    old names.
    """
    entry: Entry = vars(module)[ENTRY]
    before = entry.conversion
    if entry.path and not before.holds(module):
        install(Conversion(module, before.recipe.within(entry.path), identity=before.identity))
    return entry.conversion


def adopt_strays(conversion: Conversion) -> None:
    """Takes in modules that were added without ``__setattr__``: ``model._modules[name] = layer``."""
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
        return deep_copy(module)
    with in_float(module):
        return deep_copy(module)


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
    """A context without the entries of ``module``. Changes that are made inside stay."""
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
