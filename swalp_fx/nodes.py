"""The functions of a rewritten graph: draw the key, quantize a weight or output, run a checkpoint or recurrent layer.

Their arguments are tensors, integers and texts of quantizers, so the generated code can be read. Given a torch.fx
proxy, each function records itself instead of running, so a rewritten module can be traced again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.autograd import Function
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from . import random
from .fingerprints import is_rounded, rounded_once
from .ops import has_tangents, is_transformed, quantize, round_, rounded
from .recipe import MARK, split

__all__ = ["checkpointed", "draw_key", "quantize_output", "quantize_weight", "recurrent"]

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _public(function: _Function) -> _Function:
    # Generated code and pickles name the function by its public place, swalp_fx.<name>.
    function.__module__ = "swalp_fx"
    return function


def how(quantizer: str, rounding: str, key: Tensor | None) -> tuple[str, str]:
    """(format, rounding) of a quantizer's text: its own rounding, or else ``rounding``.

    Without a key, stochastic rounding becomes nearest.
    """
    if MARK in quantizer:
        quantizer, rounding = split(quantizer)
    return quantizer, "nearest" if key is None and rounding.startswith("stochastic") else rounding


class _QuantizeWeight(Function):
    """Q_W forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
        ctx.materialize_grads = False
        return rounded_once(x, *how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradient, None, None, None, None


class _QuantizeOutput(Function):
    """Q_A forward, Q_E backward.

    Each rounds in the memory of its input if ``in_place`` has its letter, and is left out if ``kept`` has it.
    Its context is set in forward. A setup_context, as torch.func wants it, costs 15 us more a call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        key: Tensor | None,
        stream: int,
        activation: str,
        rounding: str,
        error: str,
        error_rounding: str,
        in_place: str,
        kept: str,
    ) -> Tensor:
        ctx.materialize_grads = False
        ctx.how = ("float" if "E" in kept else error, error_rounding, key, random.error_stream(stream))
        ctx.in_place = "E" in in_place
        if "A" in kept:
            return x.detach()
        if "A" in in_place:
            # A new tensor over the same memory: autograd lets later layers write into it.
            return round_(x.detach(), activation, rounding, key, stream)
        return rounded(x, activation, rounding, key, stream)

    @staticmethod
    def backward(ctx: Any, error: Tensor | None) -> tuple[Tensor | None, ...]:
        if error is None:
            return (None,) * 9
        if torch.is_grad_enabled() or has_tangents():  # a derivative of the gradient is wanted too
            spec, rounding, key, stream = ctx.how
            error = quantize(error, spec, rounding, key=key, stream=stream)
        # An expanded signal has fewer places than elements, and one of a batched backward has no memory of its own.
        elif ctx.in_place and torch._C._has_storage(error) and 0 not in error.stride():
            error = round_(error, *ctx.how)
        elif ctx.how[0] != "float":
            error = rounded(error, *ctx.how)
        return error, None, None, None, None, None, None, None, None


class _QuantizeOutputApart(Function):
    """``_QuantizeOutput`` for forward-mode derivatives and the transforms of torch.func; nothing is in place.

    It is a class of its own, because torch.compile takes no function with a ``jvp``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, key: Tensor | None, stream: int, activation: str, rounding: str, error: str, error_rounding: str
    ) -> Tensor:
        return quantize(x, activation, rounding, key=key, stream=stream)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, key, ctx.stream, _, _, ctx.error, ctx.rounding = inputs
        ctx.materialize_grads = False
        ctx.save_for_backward(key)

    @staticmethod
    def backward(ctx: Any, error: Tensor | None) -> tuple[Tensor | None, ...]:
        if error is not None:
            (key,) = ctx.saved_tensors
            error = quantize(error, ctx.error, ctx.rounding, key=key, stream=random.error_stream(ctx.stream))
        return error, None, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return tangent.clone()  # in memory of its own, like the result


@_public
def draw_key(training: bool) -> Tensor | None:
    """The key of one forward, int64 of shape []; None in eval mode, so that stochastic rounds to nearest.

    In a process group each rank has keys of its own, even if all have one seed.
    """
    if has_torch_function((training,)):
        return handle_torch_function(draw_key, (training,), training)
    if training and is_fx_symbolic_tracing():
        raise RuntimeError(
            "torch.fx would freeze the random key of this low-precision module into the trace; trace it in eval mode"
        )
    if not training:
        return None
    key = random.draw_key()
    is_in_group = distributed.is_available() and distributed.is_initialized()
    return random.rank_key(key, distributed.get_rank()) if is_in_group else key


@_public
def quantize_weight(x: Tensor, key: Tensor | None, stream: int, weight: str, rounding: str) -> Tensor:
    """Q_W(x) for the text of a quantizer; ``rounding`` is for a text without one.

    It is x itself if x is known to be rounded, as after a step; else, and always under a tracer, a new tensor. What a
    step stored is never rounded again. The gradient passes unrounded: the optimizer pass rounds it once, when it is
    whole. The result requires its gradient in every mode, like the parameter itself: it may be read first in a no_grad
    block, and again outside of it.
    """
    if has_torch_function((x, key)):
        return handle_torch_function(quantize_weight, (x, key), x, key, stream, weight, rounding)
    format, rounding = how(weight, rounding, key)
    # A copy's memory, page faults and random words cost a forward more than reading the weight.
    if is_rounded(x, format):
        return x
    if torch.is_grad_enabled():
        return _straight_through(x, format, rounding, key, stream)
    with torch.inference_mode(False):  # which enables gradients
        return _straight_through(x, format, rounding, key, stream)


def _straight_through(x: Tensor, format: str, rounding: str, key: Tensor | None, stream: int) -> Tensor:
    if is_transformed():
        return rounded_once(x, format, rounding, key, stream)
    return _QuantizeWeight.apply(x, format, rounding, key, stream)


@_public
def quantize_output(
    x: Any,
    key: Tensor | None,
    stream: int,
    activation: str,
    error: str,
    rounding: str,
    in_place: str = "",
    kept: str = "",
) -> Any:
    """Q_A(x) forward and Q_E of the error signal backward, for the texts of two quantizers.

    ``rounding`` is for a text without one. ``x`` is a layer's output: a tensor, or any nest of tensors, each with a
    stream of its own. Without letters in ``in_place`` and ``kept``, a floating tensor gives a new tensor, never itself
    or a view. A complex tensor is rounded by its real and its imaginary part. Anything else (indices, sizes, None)
    passes unchanged.

    in_place: "A" rounds the activation in the memory of ``x``, and nothing else may read that. "E" rounds the error
        signal in the memory that it arrives in. "AE" does both. The numbers are the same, without the page faults of
        new memory.
    kept: "A" if the activation is known to be on its format's grid already, "E" if the error signal is, "AE" for both.
        The rounding is left out: the same numbers, without the work.
    Both have no effect in a nest, nor under torch.compile, which plans its work by itself.
    """
    if has_torch_function((x, key)):
        arguments = (x, key, stream, activation, error, rounding)
        return handle_torch_function(quantize_output, (x, key), *arguments, in_place=in_place, kept=kept)
    roles = *how(activation, rounding, key), *how(error, rounding, key)
    if isinstance(x, Tensor):
        if x.requires_grad and not torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            with torch.enable_grad():  # a write in a no_grad block: x has a gradient all the same
                return _quantized(x, key, stream, *roles, in_place, kept)
        return _quantized(x, key, stream, *roles, in_place, kept)
    leaves, structure = pytree.tree_flatten(x)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaves[i] = _quantized(leaf, key, random.tensor_stream(stream, i), *roles, "", "")
    return pytree.tree_unflatten(leaves, structure)


def _quantized(
    x: Tensor,
    key: Tensor | None,
    stream: int,
    activation: str,
    rounding: str,
    error: str,
    error_rounding: str,
    in_place: str,
    kept: str,
) -> Tensor:
    if x.is_complex():
        roles = activation, rounding, error, error_rounding, "", ""
        imaginary = random.imaginary_stream(stream)
        return torch.complex(_quantized(x.real, key, stream, *roles), _quantized(x.imag, key, imaginary, *roles))
    if not x.is_floating_point():
        return x
    if is_transformed():
        return _QuantizeOutputApart.apply(x, key, stream, activation, rounding, error, error_rounding)
    if (in_place or kept) and torch.compiler.is_compiling():
        in_place = kept = ""
    if "E" in kept and ("A" in kept or "A" in in_place) and not x._is_view():  # nothing for autograd to see
        if "A" not in kept:
            round_(x.detach(), activation, rounding, key, stream)
        return x
    return _QuantizeOutput.apply(x, key, stream, activation, rounding, error, error_rounding, in_place, kept)


@_public
def checkpointed(body: Callable[..., Any], key: Tensor | None, /, *operands: Any, **how: Any) -> Any:
    """``body(key, *operands)``, computed again by backward: torch.utils.checkpoint, with ``how`` as its options.

    Both runs have the same key, so the second draws the bits of the first.
    """
    tracked = [i for i, each in enumerate(operands) if isinstance(each, Tensor) and each.requires_grad]

    def run(*given: Any) -> Any:
        return body(key, *({**dict(enumerate(operands)), **dict(zip(tracked, given, strict=True))}.values()))

    # checkpoint refuses an argument that was written into since. So buffers do not pass through it: ``run`` reads them.
    return checkpoint(run, *(operands[i] for i in tracked), **{"use_reentrant": False, **how})


@_public
def recurrent(
    step: Callable[..., Any],
    key: Tensor | None,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    *,
    axis: int = 0,
    reverse: bool = False,
) -> tuple[Tensor, ...]:
    """(*outputs, *last states) of a recurrent layer that runs ``step`` for each index of ``x`` along ``axis``.

    step: (key, x, *states, *weights) -> (next states, outputs of this time, states to return after the last step).
    key: of one run. Each step makes a key of its own from it, so no two steps share a random word.
    """
    given: list[Sequence[Tensor]] = []
    last: Sequence[Tensor] = ()
    steps = list(enumerate(x.unbind(axis)))
    if not steps:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # PyTorch's own words
    for time, now in reversed(steps) if reverse else steps:
        own = None if key is None else random.step_key(key, time)
        states, outputs, last = step(own, now, *states, *weights)
        given.append(outputs)
    in_order = given[::-1] if reverse else given
    return *(torch.stack(each, axis) for each in zip(*in_order, strict=True)), *last


RUNS = (checkpointed, recurrent)  # functions that run a graph of their own, with the key
