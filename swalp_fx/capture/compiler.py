"""Compiled entries: PyTorch's front end traces them, or an error says why not. They never run in float in silence."""

from __future__ import annotations

import functools
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from ..errors import ConvertError, NotRewritten
from ..formats import FormatError
from ..recipe import RecipeError
from .backend import backend, chained
from .conversion import CALL, ENTRY, Conversion, conversion_of
from .dynamo import (
    LEFT,
    MAX_GRAPHS,
    BackendCompilerFailed,
    FailOnRecompileLimitHit,
    Frame,
    Inner,
    assume_constant_result,
    compiled,
    functional_call,
    innermost_backend,
    is_functorch_active,
    knobs,
    original,
    skip_code,
    straighten,
    switched_off,
    trace_apart,
    trace_instead,
    trace_into,
    trace_number,
)
from .gaps import watch
from .running import local

if TYPE_CHECKING:
    from .entries import Entry

__all__ = ["APART", "FOREIGN", "PYTHON", "compile_entry", "explain", "is_given_packed", "rewriting"]

FOREIGN = "torch.export or torch.func around the converted model would drop its rewrite; call the model outside of it"
HERE, APART = "here", "apart"
CAPTURE = str(Path(__file__).parent)
PACKAGE = str(Path(__file__).parents[1])
OPTIMIZERS = str(Path(torch.optim.__file__).parent)
_NUMBERS = itertools.count()  # of entries that were compiled
TRACED = frozenset(("_call", "entry", "free", "shared", "_entered"))  # functions of ways.py
LATER = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR  # the front end may not be able to go on behind a break
PYTHON: dict[CodeType, str] = {}  # code of models that runs as Python -> file, line and name
REFUSALS = (ConvertError, NotRewritten, RecipeError, FormatError)  # errors of passes that users see unchanged


def compile_entry(entry: Entry, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` of the entry's module, compiled: the conversion's backend rewrites its frames."""
    conversion, module = entry.conversion, entry.module

    @assume_constant_result
    def is_rewritten() -> bool:
        return _rewriting(conversion, Frame()) == HERE

    def run(*args: Any, **kwargs: Any) -> Any:
        # In a trace this test is a constant, and compiled code does not have it. So only the original code gets here:
        # compilation is off, past its limit, or its error was swallowed. The check costs nothing.
        if not torch.compiler.is_dynamo_compiling():
            entry.compiled.clear()  # after an error in a trace, the front end never traces this code again
            return explain(call, module, args, kwargs)
        if not is_rewritten():
            raise NotRewritten(FOREIGN)
        return call(module, *args, **kwargs)

    # A code object of its own gives the entry a cache of its own. So does its name: by name the front end remembers
    # the sizes that change, and makes them symbolic.
    kind = type(module).__name__
    spoken = "_".join(filter(None, (kind, name, str(next(_NUMBERS)))))
    run.__code__ = run.__code__.replace(co_name=spoken)
    return compiled(run, conversion.backend, _Tracing)


def _is_never_traced(code: CodeType) -> bool:
    """Whether ``code`` is of this folder, but none of an entry: where a forward copies a layer, it attaches entries."""
    is_here = code.co_filename.startswith(CAPTURE) and code.co_filename != __file__
    return is_here and original(code).co_name not in TRACED


def _is_no_models(code: CodeType) -> bool:
    """Whether ``code`` is an optimizer's, or of this package: a model may call it, but it is no code of the model."""
    if code.co_filename == __file__:  # the entry itself, which may be called in a closure of an optimizer's step
        return False
    if code.co_filename.startswith(PACKAGE) and not code.co_filename.startswith(CAPTURE):
        return True
    around: FrameType | None = sys._getframe(2)
    while around is not None and around.f_code.co_filename != __file__:  # up to the entry
        if around.f_code.co_filename.startswith(OPTIMIZERS):
            return True
        around = around.f_back
    return code.co_filename.startswith(OPTIMIZERS)


class _Tracing:
    """The tracing of a frame, under our settings. A hit in the cache does not come here."""

    def __init__(self, callback: Callable[..., Any]) -> None:
        self._callback = callback
        self._torchdynamo_orig_backend = callback._torchdynamo_orig_backend  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        code = args[0].f_code
        if _is_never_traced(code):
            skip_code(code)
            return LEFT
        if _is_no_models(code):
            return LEFT
        if code.co_flags & LATER:
            self._note(args[0])
            watch()
            return LEFT
        try:
            with knobs(self._limit(code)):
                result = self._callback(*args, **kwargs)
        except FailOnRecompileLimitHit as error:
            error.code = code  # type: ignore[attr-defined]  # the code that has too many graphs
            raise
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, REFUSALS):
                raise error.inner_exception from None
            raise
        finally:
            local.traced()
        watch()
        if getattr(result, "guarded_code", None) is None:
            self._note(args[0])
        return result

    @staticmethod
    def _limit(code: CodeType) -> int:
        """The limit of graphs. All models share their classes' code, and graphs of deleted models count too."""
        return MAX_GRAPHS if code.co_filename == __file__ else MAX_GRAPHS * Conversion.count

    def _note(self, frame: Any) -> None:
        """Notes that the frame will run as Python."""
        code = frame.f_code
        holds = any(isinstance(value, nn.Module | Tensor) for value in frame.f_locals.values())
        if holds and "/torch/" not in code.co_filename and "/swalp_fx/" not in code.co_filename:
            PYTHON[code] = f"{code.co_filename}:{code.co_firstlineno} {code.co_name}"
            if (conversion := conversion_of(local.entered)) is not None:
                conversion.has_gaps = True

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_callback"], name)


def explain(call: Callable[..., Any], module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Raises the user's own error, if the model itself fails; else NotRewritten, with the reason."""
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
        "PyTorch ran the original code, as under a dispatch mode whose ignore_compile_internals() is False, or where a "
        "forward that asks whether it is compiled fails then; TORCH_LOGS=graph_breaks shows where"
    )


@assume_constant_result
def rewriting() -> str:
    """Where the method that is being traced is rewritten: see ``_rewriting``. It is called in the trace."""
    frame = Frame()
    inner = frame.inner
    inner.stand_in()
    # A method that is no part of its caller's trace: a graph breaks in it. Another compiler does not know its frames.
    if not frame.is_inlining and not _is_ours(frame):
        return APART
    return _rewritten_where(frame, inner)


def _goes_straight(inner: Inner) -> bool:
    """Whether a module call that is being traced runs the forward of its class, and nothing else.

    Then the trace can skip the call's own code, which would double its cost. All facts read here are guarded.
    """
    from .ways import Bound, is_call

    if _is_given_packed(inner):
        return False
    own = vars(inner.module)
    if type(own.get("forward")) is not Bound or not is_call(own.get(CALL)) or inner.is_set("forward"):
        return False
    if inner.has_hooks() or _rewritten_where(Frame(), inner) != HERE:
        return False
    inner.guard_identity("forward", CALL)
    return True


straighten(_goes_straight)


@assume_constant_result
def is_given_packed() -> bool:
    """Asked by the call of a module while it is traced: whether a recurrent layer is given a PackedSequence. The front
    end would run PyTorch's code on it as it is."""
    return _is_given_packed(Frame().inner)


def _is_given_packed(inner: Inner) -> bool:
    return isinstance(inner.module, nn.RNNBase) and inner.is_given(PackedSequence)


def _is_ours(frame: Frame) -> bool:
    """Whether our backend gets the graph of ``frame``, alone: its rewrite then runs eagerly."""
    return getattr(innermost_backend(frame.backend), "func", None) is backend


# A BatchNorm with momentum=None reads its count of batches: the momentum is one over that.
trace_number(nn.functional.batch_norm, "momentum", 0.0, lambda: _is_ours(Frame()))
trace_into(nn.functional.multi_head_attention_forward)  # its products are rounded
# Every optimizer's step has the code of this function around it.
STEP: Callable[..., Any] = torch.optim.Optimizer.profile_hook_step(torch.optim.Optimizer.step)
trace_apart(STEP, "an optimizer's step is no code of the model", lambda: _is_ours(Frame()))


@trace_instead(torch.backends.mha.get_fastpath_enabled)
def get_fastpath_enabled() -> bool:
    """False for PyTorch's Transformer layers if their outputs are rounded: then they compute step by step."""
    return torch.backends.mha._is_fastpath_enabled and not _rounds_outputs()


@trace_instead(nn.functional._check_key_padding_mask)  # type: ignore[attr-defined]
def _check_key_padding_mask(key_padding_mask: Tensor, src_len: int, bsz: int) -> None:
    """The same check as PyTorch's, which would break the graph."""
    if key_padding_mask.size(0) != bsz or key_padding_mask.size(1) != src_len:
        raise AssertionError("key_padding_mask has another shape")  # the model then runs by itself, and says which


@trace_instead(nn.modules.transformer._detect_is_causal_mask)
def _detect_is_causal_mask(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """PyTorch's answer; but if outputs are rounded, no mask is compared with a causal one.

    That would only be a hint for the fused product, and a branch on it ends a graph in each layer.
    """
    if is_causal is not None or mask is None or _rounds_outputs():
        return is_causal is True
    side = mask.size(-2) if size is None else size
    causal = nn.Transformer.generate_square_subsequent_mask(side, mask.device, mask.dtype)
    return mask.size() == causal.size() and bool((mask == causal).all())


@assume_constant_result
def _rounds_outputs() -> bool:
    inner = innermost_backend(Frame().backend)
    conversion = inner.args[0]() if getattr(inner, "func", None) in (backend, chained) else None
    return conversion is not None and conversion.recipe.rounds_outputs


def _rewritten_where(frame: Frame, inner: Inner) -> str:
    """``_rewriting`` for the module of ``inner``."""
    conversion = conversion_of(inner.module)
    where = _rewriting(conversion, frame) if conversion is not None else ""
    if conversion is not None and where == HERE and innermost_backend(frame.backend) is not conversion.backend:
        inner.guard(ENTRY, "conversion", "root", "training")  # a graph for another backend is for one mode
    return where


def _rewriting(conversion: Conversion, frame: Frame) -> str:
    """Which backend gets the graph of ``frame``.

    HERE: the backend of ``conversion``, alone or in front of another one. APART: the backend of another converted
    model. "": no backend that rewrites.
    """
    theirs = frame.backend
    inner = innermost_backend(theirs)
    if frame.is_exported:
        return ""
    if inner is conversion.backend:
        return HERE
    if (rewriter := getattr(inner, "func", None)) in (backend, chained):
        return HERE if rewriter is chained and inner.args[0]() is conversion else APART
    # In another compiler's trace, functional_call gives layers unnamed tensors: their weights would stay in float.
    if is_functorch_active() or frame.is_inside(functional_call):
        return ""
    from .entries import adopt_strays

    adopt_strays(conversion)  # before a trace of their calls guards their attributes
    frame.backend = functools.partial(chained, weakref.ref(conversion), theirs)
    return HERE
