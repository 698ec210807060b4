"""Which functions of a module become entries, judged by the names that their code reads."""

from __future__ import annotations

import contextlib
import dis
import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..passes.tables import part_of
from .places import within

__all__ = ["PRODUCT", "READS", "computing", "in_class", "methods_of", "products_named", "runs_later", "set_on"]

OF_SELF = "self."
# What an attribute is of -> how its name begins: as an attribute of the module, or as graphs name torch's functions.
BEGINNINGS = {"self": OF_SELF, "linalg": "linalg_", "sparse": "sparse_"}
NAMED = ("GLOBAL", "NAME", "ATTR", "METHOD")  # words in the opcodes of instructions that have a name as argument
NOTHING, READS, PRODUCT = range(3)  # code computes nothing; it reads a parameter of its module; it has a product


def methods_of(module: nn.Module) -> Iterator[str]:
    """The names of the functions of a module's class that get entries in the module's ``__dict__``.

    They are forward, the public functions (decode, forward_features) of the class that defines forward and of its
    subclasses, and any other function that computes. The rest of a framework's base class (generate, save_pretrained)
    is left to Python.
    """
    # A forward in the instance stops the front end from skipping the module's call: another's trace would miss it.
    names = {"forward": None} if type(module).forward is not nn.Module.forward else {}
    for name, function, is_own in _functions(module):
        is_plain = isinstance(inspect.getattr_static(type(module), name), FunctionType)
        if (is_own and is_plain and not name.startswith("_")) or computes(function, module):
            names[name] = None
    yield from names
    if isinstance(module, nn.Sequential | nn.ModuleList):
        yield "insert"  # it adds layers without ``__setattr__``: they are taken in at once, not at the next call


def in_class(module: nn.Module) -> Iterator[tuple[type, str, Any]]:
    """(class, name, value) of calls, operators and properties that compute. Python finds them in the class alone."""
    for base in _bases(module):
        for name, value in vars(base).items():
            is_property = isinstance(value, property)
            function = value.fget if is_property else value if _is_operator(name) else None
            needed = NOTHING if name == "__call__" else PRODUCT if is_property else READS
            if isinstance(function, FunctionType) and computes(function, module) >= needed:
                yield base, name, value


def set_on(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """(name, function) of the functions that were set on the module: those that compute, and its forward."""
    for name, value in vars(module).items():
        is_function = isinstance(value, FunctionType | MethodType)
        if name == "forward" or (is_function and computes(value, module)):
            yield name, value


def computing(module: nn.Module) -> dict[str, int]:
    """Name -> NOTHING, READS or PRODUCT, for each function of a module and its classes."""
    found: dict[str, int] = {}
    offered: list[tuple[str, Any, bool]] = list(_functions(module))
    offered += [(name, getattr(value, "fget", value), True) for _, name, value in in_class(module)]
    offered += [(name, value.given, True) for name, value in vars(module).items() if hasattr(value, "given")]
    for name, function, is_own in offered:
        computed = computes(function, module)
        if not is_own and not _reads(function, [module]):  # a product in a base class initialises weights
            computed = min(computed, READS)
        found[name] = max(found.get(name, NOTHING), computed)
    return {**found, "__call__": PRODUCT}


def computes(function: Any, module: nn.Module) -> int:
    """READS, PRODUCT (``@``, or the name of a function that computes one), or NOTHING."""
    found = _words(function)
    if "@" in found or any(map(_is_product, found)):
        return PRODUCT
    return READS if _reads(function, within(module)) else NOTHING


def _reads(function: Any, modules: Iterable[nn.Module]) -> bool:
    """Whether ``function`` names a parameter of ``modules``. A copy in the making has none yet."""
    names = {name for each in modules for name in vars(each).get("_parameters", ())}
    return any(word.removeprefix(OF_SELF) in names for word in _words(function))


@lru_cache(maxsize=256)
def products_named(code: CodeType, line: int) -> tuple[str, ...]:
    """The products that a line of ``code`` names, by the names that a recipe has for them: ``matmul`` for ``@``."""
    starts, at = dict(dis.findlinestarts(code)), None
    here = [each for each in dis.get_instructions(code) if (at := starts.get(each.offset, at)) == line]
    words = dict.fromkeys(word for word in _named(here) if word == "@" or _is_product(word))
    return tuple("matmul" if word == "@" else word for word in words)


def _is_product(name: str) -> bool:
    if name.startswith(OF_SELF):  # ``self.linear`` is a layer, an entry of its own
        return False
    return part_of(name) == "compute" and name[0].islower()  # the types of layers are as often asked for


def runs_later(function: Callable[..., Any]) -> bool:
    """Whether a call of ``function`` does not run its code yet: a generator or a coroutine."""
    function = inspect.unwrap(function)
    return inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function)


def _bases(module: nn.Module) -> Iterator[type]:
    """The classes of a module that are not PyTorch's."""
    return (base for base in type(module).__mro__ if not base.__module__.startswith("torch.") and base is not object)


def _functions(module: nn.Module) -> Iterator[tuple[str, FunctionType, bool]]:
    """(name, function, is own) of a module's classes; not own are bases above the class that defines forward."""
    kinds = type(module).__mro__
    forwards = [i for i, base in enumerate(kinds) if "forward" in vars(base) and base is not nn.Module]
    last = max(forwards, default=len(kinds))
    for base in _bases(module):
        for name, value in vars(base).items():
            function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            if isinstance(function, FunctionType) and not name.startswith("__") and name not in vars(nn.Module):
                yield name, function, kinds.index(base) <= last


def _is_operator(name: str) -> bool:
    is_special = name.startswith("__") and name.endswith("__")
    return name == "__call__" or (is_special and name not in vars(nn.Module) and name not in vars(object))


_WORDS: WeakKeyDictionary[Any, frozenset[str]] = WeakKeyDictionary()


def _words(function: Any) -> frozenset[str]:
    """The names, and "@", in the code of ``function`` and of the functions of its file that it calls."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not isinstance(function, FunctionType):
        return frozenset()
    if function not in _WORDS:
        found: set[str] = set()
        seen: set[CodeType] = set()
        waiting = [function]
        while waiting:
            each = inspect.unwrap(waiting.pop())
            if isinstance(each, FunctionType) and each.__code__ not in seen and not _is_torchs(each):
                seen.add(each.__code__)
                names = set(_names(each.__code__))
                found |= names
                waiting += _called(each, names)
        _WORDS[function] = frozenset(found)
    return _WORDS[function]


def _is_torchs(function: FunctionType) -> bool:
    return str(function.__globals__.get("__name__")).partition(".")[0] == "torch"


def _names(code: CodeType) -> Iterator[str]:
    """The names that ``code`` reads, those of its inner functions too: see ``_named``."""
    yield from _named(dis.get_instructions(code))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _named(instructions: Iterable[dis.Instruction]) -> Iterator[str]:
    """The names in code: ``self.fc``, ``linalg_vecdot`` for ``torch.linalg.vecdot``, "@" for a matrix product."""
    before: Any = None
    for instruction in instructions:
        if instruction.argrepr in ("@", "@=") or "MATRIX_MULTIPLY" in instruction.opname:
            yield "@"
        elif isinstance(instruction.argval, str) and any(kind in instruction.opname for kind in NAMED):
            of = before.argval if before is not None and before.opname.startswith("LOAD") else ""
            yield BEGINNINGS.get(of, "") + instruction.argval
        before = instruction


def _called(function: FunctionType, names: set[str]) -> Iterator[FunctionType]:
    """The functions of the same file that ``names`` may mean, and the functions in its closure."""
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType) and value.__globals__ is function.__globals__:
            yield value
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # it is not set yet
            if isinstance(cell.cell_contents, FunctionType):
                yield cell.cell_contents
