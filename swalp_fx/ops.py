"""The compiled ops, and ``quantize``: rounding a tensor to a format.

The ops take numbers alone; ``_call`` says which op serves a format, with which numbers. Their gradient
is the identity (the straight-through estimator).
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import random
from .formats import (
    FLOAT,
    Absmax,
    Block,
    Float,
    Format,
    FormatError,
    Integer,
    PowerOfTwo,
    Runs,
    Slices,
    TwoLevel,
    parse,
)
from .recipe import ROUNDINGS, parse_rounding


def _load(module: str) -> Any:
    """A compiled module, whose import registers its ops with torch."""
    try:
        return importlib.import_module(f"swalp_fx.{module}")
    except ImportError as error:
        raise ImportError(
            f"swalp_fx.{module} does not load ({error}); build it: pip install --no-build-isolation -e ."
        ) from error


_C = _load("_C")
# Left out of a build without nvcc, and of use where torch has no CUDA: torch then refuses CUDA tensors by name.
if torch.version.cuda is not None and importlib.util.find_spec("swalp_fx._C_cuda") is not None:
    _load("_C_cuda")

__all__ = ["quantize", "quantize_", "quantize_foreach_"]

OPS = (
    "quantize_fixed",
    "quantize_block",
    "quantize_float",
    "quantize_microscaling",
    "quantize_integer",
    "quantize_nvfp4",
)


def _call(f: Format) -> tuple[str, tuple]:
    """Which op serves a format, with which numbers."""
    e, scale = f.element, f.scale
    blocks = _blocks(f.block)
    if f.overflow == "saturate" and blocks is not None:
        if isinstance(e, Integer):
            symmetric = e.sign in ("sym", "mag")
            if scale is None and e.sign != "unsigned":
                return "quantize_fixed", (e.wl, e.point, symmetric)
            is_fraction = e.point == e.wl - 2 and e.sign != "unsigned"
            if isinstance(scale, PowerOfTwo) and scale.rule == "floor" and is_fraction:
                return "quantize_block", (e.wl, symmetric, *scale.exponents, *blocks)
            if scale == Absmax() and e.sign == "sym":
                return "quantize_integer", (e.wl, *blocks)
        if isinstance(e, Float) and e.top in _TOPS and e == Float(e.exp, e.man, e.top):
            numbers = (e.exp, e.man, _TOPS.index(e.top))
            if scale is None:
                return "quantize_float", numbers
            if scale == PowerOfTwo(biased=True) and e.exp <= 5:
                return "quantize_microscaling", (*numbers, e.max_exponent, *blocks)
            if scale == TwoLevel(Float(4, 3)) and e == Float(2, 1):
                return "quantize_nvfp4", blocks
    raise FormatError(f"the compiled op does not round to {f}; swalp_fx.reference.quantize does, slowly")


_TOPS = ("ieee", "nan", "finite")


def _blocks(block: Block) -> tuple[list[int], int, int] | None:
    if isinstance(block, Slices):
        return list(block.dims), 0, 0
    return ([], *block.runs[0]) if isinstance(block, Runs) and len(block.runs) == 1 else None


@cache
def _form(op: Any, form: str) -> Any:
    """``op`` in another form: "foreach_", "sgd_" or "plan"."""
    name = op.name().removeprefix("swalp_fx::")
    return getattr(torch.ops.swalp_fx, f"{name}_{form}").default


def _register(name: str) -> None:
    """Shape functions for ``name`` and its other forms, and the straight-through gradient."""

    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        return (grad, *[None] * (ctx.inputs - 1))

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.materialize_grads = False
        ctx.inputs = len(inputs)

    def vmap(info: Any, in_dims: tuple, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        """Of each sample what it gives alone; PyTorch's own way knows no empty batch."""
        samples = x.movedim(in_dims[0], 0)
        op = getattr(torch.ops.swalp_fx, name).default
        return torch.stack([op(each, *rest) for each in samples]) if len(samples) else samples.clone(), 0

    torch.library.register_fake(f"swalp_fx::{name}", lambda x, *rest: torch.empty_like(x))
    torch.library.register_vmap(f"swalp_fx::{name}", vmap)
    torch.library.register_fake(f"swalp_fx::{name}_", lambda x, *rest: None)
    torch.library.register_fake(f"swalp_fx::{name}_foreach_", lambda xs, *rest: None)
    torch.library.register_fake(f"swalp_fx::{name}_sgd_", lambda weights, *rest: None)
    torch.library.register_autograd(f"swalp_fx::{name}", backward, setup_context=setup_context)
    _register_for_unusual_memory(name)


# Its registrations last as long as it does.
_LIBRARY = torch.library.Library("swalp_fx", "IMPL")


def _register_for_unusual_memory(name: str) -> None:
    """The forms in place, where memory holds the negatives of the numbers, and for zeros without memory."""
    space = torch.ops.swalp_fx

    def foreach_(xs: list[Tensor], *rest: Any) -> None:
        *numbers, key, streams = rest
        # Every rounding keeps zeros. Negatives are rounded in one copy of each tensor, which may come again.
        given = [(x, stream) for x, stream in zip(xs, streams, strict=True) if not x._is_zerotensor()]
        if not given:
            return
        copies = {id(x): x.resolve_neg() for x, _ in given}
        key = None if key is None else key.clone().resolve_neg()
        of_each = [copies[id(x)] for x, _ in given]
        getattr(space, f"{name}_foreach_").default(of_each, *numbers, key, [stream for _, stream in given])
        for x, _ in given:
            if x.is_neg():
                x.copy_(copies[id(x)])

    def in_place(x: Tensor, *rest: Any) -> None:
        foreach_([x], *rest[:-1], [rest[-1]])

    for dispatch_key in ("ZeroTensor", "Negative"):
        _LIBRARY.impl(f"{name}_", in_place, dispatch_key)
        _LIBRARY.impl(f"{name}_foreach_", foreach_, dispatch_key)


for _name in OPS:
    _register(_name)


@cache
def _lookup(spec: str | Format, rounding: str) -> tuple[Any, Any, tuple, int, int]:
    """(op, in-place op, its numbers, rounding code, random bits); op is None for ``float``."""
    name, bits = parse_rounding(rounding)
    format = parse(spec)
    if format == FLOAT:
        return None, None, (), 0, bits
    op, numbers = _call(format)
    space = torch.ops.swalp_fx
    return (
        getattr(space, op).default,
        getattr(space, op + "_").default,
        numbers,
        ROUNDINGS.index(name),
        bits,
    )


def _find(spec: str | Format, rounding: str) -> tuple[Any, Any, tuple, int, int]:
    # torch.compile traces through a cache with a warning, and needs none.
    return (_lookup.__wrapped__ if torch.compiler.is_compiling() else _lookup)(spec, rounding)


def _beside(x: Tensor, key: Tensor | None) -> Tensor | None:
    """The key, where a graph of torch.compile reads it anew at each replay.

    Kernels take a key on the CPU by value, so a CUDA graph of what was compiled would replay its first value.
    """
    return key.to(x.device) if key is not None and torch.compiler.is_compiling() else key


def _require_floating(x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"quantize takes a tensor, not {type(x).__name__}; wrap the value in torch.tensor")
    if not x.is_floating_point():
        raise TypeError(f"quantize takes a floating-point tensor, not {x.dtype}; convert it with .float() first")
    _require_strided(x)


def _require_strided(x: Tensor) -> None:
    if x.is_nested:
        raise TypeError("quantize takes one tensor, not a nested one; round each of x.unbind()")
    if x.layout is not torch.strided:
        raise TypeError(f"quantize takes a dense tensor, not one in {x.layout}; convert it with .to_dense() first")


def _require_no_gradient(x: Tensor, name: str) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no gradient, and x requires one; call it under torch.no_grad()")


def _draws(code: int, key: Tensor | int | None, generator: torch.Generator | None) -> Tensor | None:
    """The key to draw from, if rounding code ``code`` draws at all."""
    if ROUNDINGS[code] != "stochastic":
        return None
    if key is None:
        return random.draw_key(generator)
    if isinstance(key, int):
        return torch.tensor((key + 2**63) % 2**64 - 2**63)  # the same 64 bits, signed
    return key


class _StraightThrough(torch.autograd.Function):
    """An op and its gradient under torch.func, whose transforms do not take what torch.library registers."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, key: Tensor | None, round: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
        return round(x, key)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.materialize_grads = False

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradient, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return tangent.clone()  # of its own, as the result is


def has_tangents() -> bool:
    """Whether forward-mode derivatives are being computed, by torch.func.jvp or torch.autograd.forward_ad."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether derivatives go another way than backward from a result: forward, or by a transform of torch.func.

    Raises NotImplementedError for the former under torch.compile, where tangents would be zeros. Without fullgraph=True
    torch.compile then runs the code as it is.
    """
    compiles = torch.compiler.is_compiling()
    if forward_ad._current_level >= 0:  # has_tangents, without a call
        if compiles:
            raise NotImplementedError("torch.compile drops the tangents of roundings; leave out fullgraph=True")
        return True
    return not compiles and torch._C._are_functorch_transforms_active()


def quantize(
    x: Tensor,
    format: str | Format,
    rounding: str = "nearest",
    *,
    key: Tensor | int | None = None,
    stream: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``x`` rounded to ``format``: a fresh tensor of x's shape, dtype, device and (if dense) strides.

    Each result is one of the two neighbours of x in the format, or its largest value where x lies
    beyond. NaN stays NaN, and infinities saturate where the format has none. The gradient is that
    of the identity, backward and forward (torch.func.jvp).

    x: float32, float64, bfloat16 or float16, any shape and layout. Half types are computed in
    float32 and stored by rounding to nearest even.
    rounding: "nearest" (ties to even), "stochastic", "toward_zero", "down", "up", "nearest_away", "nearest_up"
    (ties towards +infinity), or "stochastic8" for 8 random bits instead of 16.
    key, stream: what stochastic rounding draws from, see ``random``; an element draws by its row-major
    index, wherever it lies in memory. Without a key, one is drawn from ``generator`` or torch's default.

    Raises FormatError, RecipeError (unknown rounding), TypeError (x is not floating, or not dense) and RuntimeError (x
    has no memory, or no such block dimension).
    """
    op, _, numbers, code, bits = _find(format, rounding)
    _require_floating(x)
    key = _draws(code, key, generator)
    if op is None:
        return x.clone()
    if is_transformed():
        return _StraightThrough.apply(x, key, lambda x, key: op(x, *numbers, code, bits, key, stream))
    return op(x, *numbers, code, bits, _beside(x, key), stream)


# (format, rounding, shape, strides, dtype) -> a plan, or None where there is none: those sizes that come again.
_PLANS: dict[tuple, Any] = {}
MOST_PLANS = 4096


def is_plain(x: Tensor) -> bool:
    """Whether ``x`` is memory on the CPU that holds its numbers as they are; a subclass's memory is its own affair."""
    if type(x) not in (Tensor, torch.nn.Parameter) or not x.is_cpu or x.layout is not torch.strided:
        return False
    return not (x.is_neg() or x._is_zerotensor() or x.is_nested)


def _is_recorded() -> bool:
    """Whether what runs now is to run again with other numbers, or on other tensors than it seems to."""
    if forward_ad._current_level >= 0 or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return is_in_torch_dispatch_mode() or torch.jit.is_tracing()


def _plan(x: Tensor, spec: str | Format, rounding: str, key: Tensor | None) -> Any:
    """How to round tensors like ``x`` past torch's dispatcher, which takes longer than a small tensor's rounding.

    None where that would do something else: off the CPU, for tensors that are not plain, and where calls are recorded.
    """
    if _is_recorded() or not is_plain(x):
        return None
    if key is None and rounding.startswith("stochastic"):
        return None
    if key is not None and not (type(key) is Tensor and key.is_cpu and key.dtype is torch.int64 and key.numel() == 1):
        return None
    alike = spec, rounding, x.shape, x.stride(), x.dtype
    try:
        return _PLANS[alike]
    except KeyError:
        op, _, numbers, code, bits = _find(spec, rounding)
        with torch._C._AutoDispatchBelowAutograd():
            address = _form(op, "plan")(x, *numbers, code, bits, key, 0)
        if len(_PLANS) >= MOST_PLANS:
            _PLANS.clear()
        return _PLANS.setdefault(alike, _C.own(address) if address else None)


def _run(plan: Any, x: Tensor, y: Tensor, key: Tensor | None, stream: int) -> None:
    _C.round(plan, x.data_ptr(), y.data_ptr(), 0 if key is None else key.data_ptr(), stream)


def rounded(x: Tensor, spec: str, rounding: str, key: Tensor | None, stream: int) -> Tensor:
    """``quantize`` of a floating ``x`` for callers that see to the gradient: none is recorded, and nothing checked."""
    op, _, numbers, code, bits = _find(spec, rounding)
    if op is None:
        return x.clone()
    if (plan := _plan(x, spec, rounding, key)) is not None:
        y = torch.empty_like(x)
        _run(plan, x, y, key, stream)
        return y
    if torch.compiler.is_compiling():
        return op(x, *numbers, code, bits, _beside(x, key), stream)
    _require_strided(x)
    # Past the op's own autograd, which is Python, and costs as much as a small tensor's rounding.
    with torch._C._AutoDispatchBelowAutograd():
        return op(x, *numbers, code, bits, key, stream)


def round_(x: Tensor, spec: str, rounding: str, key: Tensor | None, stream: int) -> Tensor:
    """``rounded`` in the memory of ``x``, in every format a write to autograd; returns ``x``."""
    _, op, numbers, code, bits = _find(spec, rounding)
    if op is not None:
        if (plan := _plan(x, spec, rounding, key)) is not None:
            _run(plan, x, x, key, stream)
        else:
            _require_strided(x)
            op(x, *numbers, code, bits, _beside(x, key), stream)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)  # autograd then sees that a tensor saved for backward has changed
    return x


def quantize_(
    x: Tensor,
    format: str | Format,
    rounding: str = "nearest",
    *,
    key: Tensor | int | None = None,
    stream: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """``quantize`` in place; returns ``x``. Not differentiable: call it under ``torch.no_grad()``.

    Raises what ``quantize`` does, and RuntimeError if elements of ``x`` share memory, as in an expanded tensor.
    """
    _, op, numbers, code, bits = _find(format, rounding)
    _require_floating(x)
    _require_no_gradient(x, "quantize_")
    key = _draws(code, key, generator)
    if op is not None:
        op(x, *numbers, code, bits, _beside(x, key), stream)
        torch.autograd.graph.increment_version(x)  # autograd then sees that a tensor saved for backward has changed
    return x


def quantize_foreach_(
    xs: Sequence[Tensor],
    format: str | Format,
    rounding: str = "nearest",
    *,
    streams: Sequence[int],
    key: Tensor | int | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """``quantize_`` of each tensor with its own stream, under one key, in one call for each device: the same bits.

    Tensors that share memory, or are given twice, are rounded in the order of the list. Raises what ``quantize_`` does,
    and ValueError if there is not one stream a tensor, before any tensor on that device is changed.
    """
    op, _, numbers, code, bits = _find(format, rounding)
    if len(xs) != len(streams):
        raise ValueError(f"{len(xs)} tensors but {len(streams)} streams; give each tensor one")
    for x in xs:
        _require_floating(x)
        _require_no_gradient(x, "quantize_foreach_")
    key = _draws(code, key, generator)
    if op is None:
        return
    calls: defaultdict[torch.device, tuple[list[Tensor], list[int]]] = defaultdict(lambda: ([], []))
    for x, stream in zip(xs, streams, strict=True):
        tensors, of_each = calls[x.device]
        tensors.append(x)
        of_each.append(stream)
    for tensors, of_each in calls.values():
        _form(op, "foreach_")(tensors, *numbers, code, bits, key, of_each)
        torch.autograd.graph.increment_version(tensors)


def keeps(x: Tensor, spec: str) -> bool:
    """Whether every rounding to ``spec`` is known to keep ``x`` bit for bit, as it keeps representable numbers.

    False where that is not known: off the CPU, in tensors with gaps, in formats whose scale is no power of two, in
    large tensors whose blocks do not each lie in one piece, and where calls are recorded, to run again with other
    numbers.
    """
    op, *_ = _find(spec, "nearest")
    if op is None:
        return not _is_recorded()
    plan = _plan(x, spec, "nearest", None)
    return plan is not None and _C.keeps(plan, x.data_ptr())


def sgd_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    group: Mapping[str, Any],
    format: str | Format,
    rounding: str,
    *,
    key: Tensor,
    streams: Sequence[Sequence[int]],
) -> None:
    """A step of torch.optim.SGD with the numbers of ``group``, rounded to ``format`` in the same pass over memory.

    Gradients are rounded before the update, weights and momenta after it: the bits of ``quantize_foreach_`` before and
    after torch's own step, on processors with AVX2. All are dense float32 on the CPU, each weight's three tensors alike
    in strides; without momentum there are no momenta.
    streams: of the weights, the gradients and the momenta, one a tensor each, or none if they are not to be rounded.
    """
    op, _, numbers, code, bits = _find(format, rounding)
    of_group = [group["lr"], group["momentum"], 1 - group["dampening"], group["weight_decay"]]
    switches = [group["nesterov"], group["maximize"]]
    tensors = (weights, gradients, momenta)
    _form(op, "sgd_")(*tensors, *of_group, *switches, *numbers, code, bits, _draws(code, key, None), *streams)
    torch.autograd.graph.increment_version([*weights, *gradients, *momenta])
