"""The functions a rewritten graph calls: draw the key, quantize a weight, quantize a layer's output, call a layer.

Their arguments are tensors, integers and specs, so that the generated code reads as it runs. Each function notices a
torch.fx proxy and records itself instead of running, so a rewritten module can be traced again.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.fx._symbolic_trace import is_fx_symbolic_tracing
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

from . import random
from .ops import quantize

__all__ = ["call_layer", "draw_key", "quantize_output", "quantize_weight"]

# The 64 bits of a stream id: the site in the graph (32 bits), its error signal (1 bit), and which tensor of an output
# that holds several (from bit 40). Distinct sites, signals and tensors therefore never share a random word.
ERROR_STREAM = 1 << 32
TENSOR_STREAM = 1 << 40

# A layer's parameters are replaced while it runs, and it may be running in another thread.
_REPLACING = threading.RLock()

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _public(function: _Function) -> _Function:
    # Generated code and pickles name the function by its public place, swalp_fx.<name>.
    function.__module__ = "swalp_fx"
    return function


def _rounding(rounding: str, key: Tensor | None) -> str:
    return "nearest" if key is None and rounding.startswith("stochastic") else rounding


@_public
def draw_key(training: bool) -> Tensor | None:
    """The key of one forward, int64 of shape []; None in eval mode, where stochastic rounds to nearest.

    In a process group each rank has keys of its own, even where all are seeded alike.
    """
    if has_torch_function((training,)):
        return handle_torch_function(draw_key, (training,), training)
    if training and is_fx_symbolic_tracing():
        raise RuntimeError(
            "torch.fx would freeze the random key of this low-precision module into the trace; "
            "trace it with swalp_fx.capture, or in eval mode"
        )
    if not training:
        return None
    key = random.draw_key()
    # Distinct ranks give distinct keys, which is all that philox asks of them.
    return key ^ distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else key


@_public
def quantize_weight(x: Tensor, key: Tensor | None, stream: int, weight: str, rounding: str) -> Tensor:
    """Q_W(x), in a new tensor. The gradient passes as it is: the optimizer pass rounds it, once, when it is whole."""
    if has_torch_function((x, key)):
        return handle_torch_function(quantize_weight, (x, key), x, key, stream, weight, rounding)
    return quantize(x, weight, _rounding(rounding, key), key=key, stream=stream)


class _QuantizeOutput(torch.autograd.Function):
    """Q_A forward, Q_E backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, key: Tensor | None, stream: int, activation: str, error: str, rounding: str) -> Tensor:
        return quantize(x, activation, rounding, key=key, stream=stream)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, key, ctx.stream, _, ctx.error, ctx.rounding = inputs
        ctx.save_for_backward(key)

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor | None, ...]:
        (key,) = ctx.saved_tensors
        if ctx.error != "float":
            error = quantize(error, ctx.error, ctx.rounding, key=key, stream=ctx.stream | ERROR_STREAM)
        return error, None, None, None, None, None


@_public
def quantize_output(x: Any, key: Tensor | None, stream: int, activation: str, error: str, rounding: str) -> Any:
    """Q_A(x) forward and Q_E of the error signal backward.

    ``x`` is a layer's output: a tensor, or any nest of tensors, each then under a stream of its own. A floating
    tensor gives a new one, never itself or a view; anything else (indices, sizes, None) passes as it is.
    """
    if has_torch_function((x, key)):
        return handle_torch_function(quantize_output, (x, key), x, key, stream, activation, error, rounding)
    rounding = _rounding(rounding, key)
    if isinstance(x, Tensor):
        return _QuantizeOutput.apply(x, key, stream, activation, error, rounding) if x.is_floating_point() else x
    leaves, structure = pytree.tree_flatten(x)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            tensor_stream = stream + i * TENSOR_STREAM
            leaves[i] = _QuantizeOutput.apply(leaf, key, tensor_stream, activation, error, rounding)
    return pytree.tree_unflatten(leaves, structure)


@_public
def call_layer(module: nn.Module, weights: dict[str, Tensor], /, *args: Any, **kwargs: Any) -> Any:
    """``module(*args, **kwargs)`` with ``weights``, by their names in it, in place of its own parameters.

    Hooks run, buffers are updated and the training flag is followed as in a plain call; the module keeps its own
    parameters. One thread at a time.
    """
    tensors = tuple(weights.values())
    if has_torch_function(tensors):
        return handle_torch_function(call_layer, tensors, module, weights, *args, **kwargs)
    # A tied weight arrives by each of its names, so there is no tie to look for. functional_call writes into the
    # dictionary, which may be the graph's own: hence the copy.
    with contextlib.nullcontext() if torch.compiler.is_compiling() else _REPLACING:
        return torch.func.functional_call(module, dict(weights), args, kwargs, tie_weights=False)
