"""Entries, compiled: traced by PyTorch's front end, or an error that says why not. Never float in silence."""

from __future__ import annotations

import functools
import itertools
import weakref
from collections.abc import Callable
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import ConvertError, NotRewritten
from ..formats import FormatError
from ..recipe import RecipeError
from .backend import backend, chained
from .dynamo import (
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    Frame,
    assume_constant_result,
    compiled,
    innermost_backend,
    is_functorch_active,
    knobs,
    switched_off,
)
from .running import local

if TYPE_CHECKING:
    from .entries import Entry

__all__ = ["ANOTHERS", "APART", "FOREIGN", "PYTHON", "compile_entry", "explain", "is_rewriting"]

FOREIGN = "torch.export or torch.func around the converted model would drop its rewrite; call the model outside of it"
OURS, ANOTHERS, APART = "ours", "another's", "apart"
_NUMBERS = itertools.count()  # of entries that were compiled
PYTHON: dict[CodeType, str] = {}  # frames of models' code that run as they are -> where they stand
REFUSALS = (ConvertError, NotRewritten, RecipeError, FormatError)  # what a pass raises is for the user as it is


def compile_entry(entry: Entry, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` of the entry's module, whose frames the conversion's backend rewrites."""
    conversion, module, is_rewriting = entry.conversion, entry.module, entry.is_rewriting

    def run(*args: Any, **kwargs: Any) -> Any:
        # The front end takes the first test for true, and it is gone from what it makes. So only the original code can
        # get here: compilation is off, past its limit, or swallowed. The check costs nothing.
        if not torch.compiler.is_dynamo_compiling():
            entry.compiled.clear()  # an error in a trace has marked this code to be left alone for good
            return explain(call, module, args, kwargs)
        if not is_rewriting():
            raise NotRewritten(FOREIGN)
        return call(module, *args, **kwargs)

    # A code object of its own has a cache of its own. Its name does too: by that, the front end remembers which sizes
    # change, and makes graphs for any.
    kind = type(module).__name__
    spoken = "_".join(filter(None, (kind, name, str(next(_NUMBERS)))))
    run.__code__ = run.__code__.replace(co_name=spoken)
    return compiled(run, conversion.backend, _Tracing)


class _Tracing:
    """The tracing of a frame, under our knobs; a hit in the cache does not come here."""

    def __init__(self, callback: Callable[..., Any]) -> None:
        self._callback = callback
        self._torchdynamo_orig_backend = callback._torchdynamo_orig_backend  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with knobs():
                result = self._callback(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            error.code = args[0].f_code  # type: ignore[attr-defined]  # whose limit
            raise
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, REFUSALS):
                raise error.inner_exception from None
            raise
        if getattr(result, "guarded_code", None) is None:
            self._note(args[0])
        return result

    def _note(self, frame: Any) -> None:
        """The frame will run as Python."""
        code = frame.f_code
        holds = any(isinstance(value, nn.Module | Tensor) for value in frame.f_locals.values())
        if holds and "/torch/" not in code.co_filename and "/swalp_fx/" not in code.co_filename:
            PYTHON[code] = f"{code.co_filename}:{code.co_firstlineno} {code.co_name}"

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_callback"], name)


def explain(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Raises what the model itself raises, if it does: the user's own error. Else why the call is not rewritten."""
    if local.explaining:
        return call(module, *args, **kwargs)
    local.explaining = True
    try:
        call(module, *args, **kwargs)
    finally:
        local.explaining = False
    raise NotRewritten(f"{type(module).__name__} would have computed in float: {_why()}")


def _why() -> str:
    if (setting := switched_off()) is not None:
        return setting
    if is_functorch_active():
        return "a transform of torch.func is around the call; use torch.autograd"
    if forward_ad._current_level >= 0:
        return "torch.autograd.forward_ad runs the original code; take derivatives backward"
    if torch.compiler.is_exporting():
        return "torch.export runs the original code; export the model before it is converted"
    return (
        "PyTorch ran the original code, as under a dispatch mode whose ignore_compile_internals() is False; call "
        "the model outside of it"
    )


def is_rewriting(entry: Entry) -> Callable[[], str]:
    """Asked while a frame is traced: who gets its graph? OURS; ANOTHERS, with our backend in front; the backend of
    another converted model, so that this one must be run APART from it; or "" for nobody that rewrites."""

    @assume_constant_result
    def asked() -> str:
        conversion, frame = entry.conversion, Frame()
        theirs = frame.backend
        inner = innermost_backend(theirs)
        if frame.is_exported:
            return ""
        if inner is conversion.backend:
            return OURS
        if (rewriter := getattr(inner, "func", None)) in (backend, chained):
            return ANOTHERS if rewriter is chained and inner.args[0]() is conversion else APART
        # functional_call in another's trace gives layers tensors that no source names: their weights would stay float.
        if is_functorch_active():
            return ""
        from .entries import adopt_strays

        adopt_strays(conversion)  # before their calls are traced, which guards what they have
        frame.backend = functools.partial(chained, weakref.ref(conversion), theirs)
        return ANOTHERS

    return asked
