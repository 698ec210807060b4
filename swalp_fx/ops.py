"""The compiled op, and ``quantize``: rounding a tensor to a format.

``torch.ops.swalp_fx.quantize`` takes a format as numbers, made by ``_numbers``: the element's grid, the rule of the
scale, and the block. Its gradient is the identity (the straight-through estimator).
"""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Callable, Sequence
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
    Affine,
    Block,
    Codebook,
    Format,
    Grid,
    PowerOfTwo,
    Runs,
    Scale,
    Static,
    TwoLevel,
    parse,
)
from .formats.scale import RULES
from .recipe import ROUNDINGS, parse_rounding


def _load(module: str) -> Any:
    """A compiled module. Its import registers its ops with torch."""
    try:
        return importlib.import_module(f"swalp_fx.{module}")
    except ImportError as error:
        raise ImportError(
            f"swalp_fx.{module} does not load ({error}); build it: pip install --no-build-isolation -e ."
        ) from error


_C = _load("_C")
# A build without nvcc has no CUDA module, and a torch without CUDA cannot use one. Torch then refuses CUDA tensors.
if torch.version.cuda is not None and importlib.util.find_spec("swalp_fx._C_cuda") is not None:
    _load("_C_cuda")

__all__ = ["quantize", "quantize_", "quantize_foreach_"]

# In the order of csrc/formats.h and csrc/elements.h: the index is the code there.
SCALES: tuple[type[Scale] | type[None], ...] = (type(None), PowerOfTwo, Absmax, Static, TwoLevel, Affine)
BEYOND = ("saturate", "saturate but infinity", "infinity", "nan")
NO_GRID = Grid(0, 0, 0.0, 1.0)  # of a codebook


def _numbers(f: Format) -> tuple[Any, ...]:
    """A format as arguments of the op, from ``man`` to ``sizes`` (csrc/ops.cpp)."""
    e = f.element
    grid = NO_GRID if isinstance(e, Codebook) else e.grid
    table = list(e.values) if isinstance(e, Codebook) else []
    beyond = "saturate but infinity" if f.overflow == "saturate" and f.keeps_infinity else f.overflow
    return (*grid, BEYOND.index(beyond), table, SCALES.index(type(f.scale)), _of_scale(f), *_blocks(f.block))


def _of_scale(f: Format) -> list[float]:
    """The numbers of a scale, as Numbers in csrc/numbers.h names them."""
    if isinstance(f.scale, PowerOfTwo):
        return [*map(float, f.scale.exponents), RULES[f.scale.rule](f.element)]
    if isinstance(f.scale, Static):
        return [f.scale.value]
    if isinstance(f.scale, TwoLevel):
        inner = f.scale.inner
        return [float(inner.man), float(inner.min_exponent), inner.max]
    return []


def _blocks(block: Block) -> tuple[list[int], list[int]]:
    """(dims, sizes); slices have no sizes."""
    here = block.alone()
    if isinstance(here, Runs):
        return [axis for axis, _ in here.runs], [size for _, size in here.runs]
    return list(here.dims), []


_OP = torch.ops.swalp_fx.quantize.default
_OP_ = torch.ops.swalp_fx.quantize_.default
_FOREACH = torch.ops.swalp_fx.quantize_foreach_.default
_UPDATE = torch.ops.swalp_fx.quantize_update_.default


def _register() -> None:
    """Shape functions for the op and its other forms, and the straight-through gradient."""

    def backward(ctx: Any, grad: Tensor | None) -> tuple:
        return (grad, *[None] * (ctx.inputs - 1))

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.materialize_grads = False
        ctx.inputs = len(inputs)

    def vmap(info: Any, in_dims: tuple, x: Tensor, *rest: Any) -> tuple[Tensor, int]:
        """The op of each sample by itself. PyTorch's default vmap fails on an empty batch."""
        samples, op = x.movedim(in_dims[0], 0), torch.ops.swalp_fx.quantize.default
        return torch.stack([op(each, *rest) for each in samples]) if len(samples) else samples.clone(), 0

    torch.library.register_fake("swalp_fx::quantize", lambda x, *rest: torch.empty_like(x))
    torch.library.register_vmap("swalp_fx::quantize", vmap)
    torch.library.register_fake("swalp_fx::quantize_", lambda x, *rest: None)
    torch.library.register_fake("swalp_fx::quantize_foreach_", lambda xs, *rest: None)
    torch.library.register_fake("swalp_fx::quantize_update_", lambda kernel, *rest: False)
    torch.library.register_autograd("swalp_fx::quantize", backward, setup_context=setup_context)


# The registrations last as long as this object.
_LIBRARY = torch.library.Library("swalp_fx", "IMPL")


def _register_for_unusual_memory() -> None:
    """The in-place ops for tensors that store the negatives of their numbers, and for zeros without memory."""

    def foreach_(xs: list[Tensor], *rest: Any) -> None:
        *numbers, key, streams = rest
        # Every rounding keeps zeros. A negated tensor is rounded in a copy: one copy, even if it is given twice.
        given = [(x, stream) for x, stream in zip(xs, streams, strict=True) if not x._is_zerotensor()]
        if not given:
            return
        copies = {id(x): x.resolve_neg() for x, _ in given}
        key = None if key is None else key.clone().resolve_neg()
        of_each = [copies[id(x)] for x, _ in given]
        _FOREACH(of_each, *numbers, key, [stream for _, stream in given])
        for x, _ in given:
            if x.is_neg():
                x.copy_(copies[id(x)])

    def in_place(x: Tensor, *rest: Any) -> None:
        foreach_([x], *rest[:-1], [rest[-1]])

    for dispatch_key in ("ZeroTensor", "Negative"):
        _LIBRARY.impl("quantize_", in_place, dispatch_key)
        _LIBRARY.impl("quantize_foreach_", foreach_, dispatch_key)


def _register_refusals() -> None:
    """``quantize_update_`` takes no tensors but plain ones on the CPU, which have a kernel of their own."""
    for dispatch_key in ("CompositeExplicitAutograd", "ZeroTensor", "Negative"):
        _LIBRARY.impl("quantize_update_", lambda *rest: False, dispatch_key)


_register()
_register_for_unusual_memory()
_register_refusals()


@cache
def _lookup(spec: str | Format, rounding: str) -> tuple[Any, ...] | None:
    """The op's arguments from ``man`` to ``random_bits``; None for ``float``, since it rounds nothing."""
    name, bits = parse_rounding(rounding)
    format = parse(spec)
    return None if format == FLOAT else (*_numbers(format), ROUNDINGS.index(name), bits)


def _find(spec: str | Format, rounding: str) -> tuple[Any, ...] | None:
    # torch.compile warns when it traces through a cache, and does not need one.
    return (_lookup.__wrapped__ if torch.compiler.is_compiling() else _lookup)(spec, rounding)


def _beside(x: Tensor, key: Tensor | None) -> Tensor | None:
    """The key; under torch.compile on x's device, so that a CUDA graph reads it anew at each replay.

    Kernels take a key on the CPU by value: a CUDA graph would replay its first value.
    """
    return key.to(x.device) if key is not None and torch.compiler.is_compiling() else key


def require_floating(x: Tensor, name: str = "quantize") -> None:
    """Raises TypeError, in the name of ``name``, unless ``x`` is one dense floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} takes a tensor, not {type(x).__name__}; wrap the value in torch.tensor")
    if not x.is_floating_point():
        raise TypeError(f"{name} takes a floating-point tensor, not {x.dtype}; convert it with .float() first")
    _require_strided(x, name)


def _require_strided(x: Tensor, name: str = "quantize") -> None:
    if x.is_nested:
        raise TypeError(f"{name} takes one tensor, not a nested one; round each of x.unbind()")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} takes a dense tensor, not one in {x.layout}; convert it with .to_dense() first")


def _require_no_gradient(x: Tensor, name: str) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no gradient, and x requires one; call it under torch.no_grad()")


def key_of(rounding: str, key: Tensor | int | None, generator: torch.Generator | None = None) -> Tensor | None:
    """The key for the draws of ``rounding``; None if it draws nothing."""
    if not rounding.startswith("stochastic"):
        return None
    if key is None:
        return random.draw_key(generator)
    if isinstance(key, int):
        return torch.tensor((key + 2**63) % 2**64 - 2**63)  # the same 64 bits, signed
    return key


class _StraightThrough(torch.autograd.Function):
    """An op and its gradient under torch.func: its transforms ignore the gradient registered with torch.library."""

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
        return tangent.clone()  # a fresh tensor, like the result


def has_tangents() -> bool:
    """Whether forward-mode derivatives are being computed, by torch.func.jvp or torch.autograd.forward_ad."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether derivatives are taken in forward mode, or by a transform of torch.func.

    Raises NotImplementedError for forward mode under torch.compile: tangents would be zeros. Without fullgraph=True,
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

    Each result is one of the two neighbours of x in the format. Beyond the largest number it is the largest. NaN stays
    NaN, and infinities saturate if the format has none. The gradient is the identity, backward and forward
    (torch.func.jvp).

    x: float32, float64, bfloat16 or float16, any shape and layout. Half types are computed in float32 and stored by
        rounding to nearest even.

    rounding: "nearest" (ties to even), "stochastic", "toward_zero", "down", "up", "nearest_away", "nearest_up" (ties
        towards +infinity), or "stochastic8" for 8 random bits instead of 16.

    key, stream: the source of stochastic draws, see ``random``. An element draws by its row-major index, wherever it
        lies in memory. Without a key, one is drawn from ``generator`` or torch's default.

    Raises FormatError, RecipeError (unknown rounding), TypeError (x is not floating, or not dense) and RuntimeError (x
    has no memory, or no such block dimension).
    """
    how = _find(format, rounding)
    require_floating(x)
    key = key_of(rounding, key, generator)
    if how is None:
        return x.clone()
    if is_transformed():
        return _StraightThrough.apply(x, key, lambda x, key: _OP(x, *how, key, stream))
    if x.requires_grad and torch.is_grad_enabled():
        return _OP(x, *how, _beside(x, key), stream)
    return rounded(x, format, rounding, key, stream)


# (format, rounding, shape, strides, dtype, device, coding) -> a plan, or None if there can be none.
_PLANS: dict[tuple, Any] = {}
MOST_PLANS = 4096


_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_plain(x: Tensor) -> bool:
    """Whether the memory of ``x`` holds its numbers unchanged. A tensor subclass may store anything else."""
    if type(x) not in _PLAIN or x.layout is not torch.strided or not (x.is_cpu or x.is_cuda):
        return False
    # A batched backward's tensors have no memory of their own (is_grads_batched=True).
    return torch._C._has_storage(x) and not (x.is_neg() or x._is_zerotensor() or x.is_nested)


def is_recorded() -> bool:
    """Whether a trace or a transform is active: the call may run again on other numbers, or on hidden tensors."""
    if forward_ad._current_level >= 0 or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return is_in_torch_dispatch_mode() or torch.jit.is_tracing()


def _plan(
    x: Tensor, spec: str | Format, rounding: str, key: Tensor | None, coding: tuple[int, ...] | None = None
) -> Any:
    """A plan that rounds tensors like ``x`` without torch's dispatcher: for a small tensor, dispatch takes longer.

    None if the result would differ: for a tensor that is not plain, and while calls are recorded.
    coding: for a plan of codes, see csrc/codes.h.
    """
    if is_recorded() or not is_plain(x):
        return None
    if key is None and rounding.startswith("stochastic"):
        return None
    if key is not None and not (type(key) is Tensor and key.is_cpu and key.dtype is torch.int64 and key.numel() == 1):
        return None
    alike = spec, rounding, x.shape, x.stride(), x.dtype, x.get_device(), coding
    try:
        return _PLANS[alike]
    except KeyError:
        if len(_PLANS) >= MOST_PLANS:
            _PLANS.clear()
        return _PLANS.setdefault(alike, _new_plan(x, spec, rounding, key, coding))


def _new_plan(x: Tensor, spec: str | Format, rounding: str, key: Tensor | None, coding: tuple[int, ...] | None) -> Any:
    how = _find(spec, rounding)
    assert how is not None
    with torch._C._AutoDispatchBelowAutograd():
        if coding is None:
            address = torch.ops.swalp_fx.quantize_plan.default(x, *how, key, 0)
        else:
            address = torch.ops.swalp_fx.quantize_code_plan.default(x, *how, key, coding)
    return _C.own(address) if address else None


def _run(plan: Any, x: Tensor, y: Tensor, key: Tensor | None, stream: int) -> None:
    _C.round(plan, x.data_ptr(), y.data_ptr(), 0 if key is None else key.data_ptr(), stream)


def rounded(x: Tensor, spec: str | Format, rounding: str, key: Tensor | None, stream: int) -> Tensor:
    """``quantize`` of a floating ``x``, without checks and without a gradient: the caller sees to both."""
    how = _find(spec, rounding)
    if how is None:
        return x.clone()
    if (plan := _plan(x, spec, rounding, key)) is not None:
        y = torch.empty_like(x)
        _run(plan, x, y, key, stream)
        return y
    if torch.compiler.is_compiling():
        return _OP(x, *how, _beside(x, key), stream)
    _require_strided(x)
    # Skip the op's autograd: it is Python, and takes as long as the rounding of a small tensor.
    with torch._C._AutoDispatchBelowAutograd():
        return _OP(x, *how, key, stream)


def round_(x: Tensor, spec: str | Format, rounding: str, key: Tensor | None, stream: int) -> Tensor:
    """``rounded`` in the memory of ``x``; returns ``x``. Autograd sees a write, even for ``float``."""
    how = _find(spec, rounding)
    if how is not None:
        if (plan := _plan(x, spec, rounding, key)) is not None:
            _run(plan, x, x, key, stream)
        else:
            _require_strided(x)
            _OP_(x, *how, _beside(x, key), stream)
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

    Raises the errors of ``quantize``, and RuntimeError if elements of ``x`` share memory, as in an expanded tensor.
    """
    how = _find(format, rounding)
    require_floating(x)
    _require_no_gradient(x, "quantize_")
    key = key_of(rounding, key, generator)
    return x if how is None else round_(x, format, rounding, key, stream)


def quantize_foreach_(
    xs: Sequence[Tensor],
    format: str | Format,
    rounding: str = "nearest",
    *,
    streams: Sequence[int],
    key: Tensor | int | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """``quantize_`` of each tensor with its own stream, under one key: the same bits, in one call for each device.

    Tensors that share memory, or are given twice, are rounded in the order of the list. Raises the errors of
    ``quantize_``, and ValueError unless there is one stream a tensor. Then no tensor on that device has changed.
    """
    how = _find(format, rounding)
    if len(xs) != len(streams):
        raise ValueError(f"{len(xs)} tensors but {len(streams)} streams; give each tensor one")
    for x in xs:
        require_floating(x)
        _require_no_gradient(x, "quantize_foreach_")
    key = key_of(rounding, key, generator)
    if how is None:
        return
    calls: defaultdict[torch.device, tuple[list[Tensor], list[int]]] = defaultdict(lambda: ([], []))
    for x, stream in zip(xs, streams, strict=True):
        tensors, of_each = calls[x.device]
        tensors.append(x)
        of_each.append(stream)
    for tensors, of_each in calls.values():
        _FOREACH(tensors, *how, key, of_each)
        torch.autograd.graph.increment_version(tensors)


def write_codes(
    x: Tensor,
    spec: str | Format,
    rounding: str,
    key: Tensor | None,
    stream: int,
    coding: tuple[int, ...],
    packed: Tensor,
    scales: Tensor,
    second: Tensor,
) -> bool:
    """Writes the codes and the stored scales of a contiguous float32 ``x``. False if it cannot, or x is not finite.

    coding: see csrc/ops.cpp. packed, scales, second: the tensors of codes.Codes, which it fills; they have the room.
    """
    plan = _plan(x, spec, rounding, key, coding)
    if plan is None:
        return False
    of_key = 0 if key is None else key.data_ptr()
    return _C.codes(plan, x.data_ptr(), packed.data_ptr(), scales.data_ptr(), second.data_ptr(), of_key, stream)


def keeps(x: Tensor, spec: str) -> bool:
    """Whether ``x`` is known to be representable: then every rounding to ``spec`` keeps it bit for bit.

    False if that is not known:

    - off the CPU, and while calls are recorded;
    - for a scale that is no power of two;
    - for a tensor with gaps, and for a large tensor with blocks in several pieces of memory.
    """
    if _find(spec, "nearest") is None:
        return not is_recorded()
    plan = _plan(x, spec, "nearest", None)
    return plan is not None and _C.keeps(plan, x.data_ptr())


def fingerprint(x: Tensor) -> int:
    """A hash of 64 bits of the memory of ``x``, contiguous and on the CPU: csrc/fingerprint.h."""
    return _C.fingerprint(x.data_ptr(), x.nbytes)


def update_(
    kernel: int,
    numbers: Sequence[float],
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    states: Sequence[Tensor],
    masters: Sequence[Tensor],
    format: str | Format,
    rounding: str,
    *,
    key: Tensor | None,
    streams: Sequence[int],
    roles: Sequence[int | None],
    dry: bool = False,
) -> bool:
    """A step of an optimizer, rounded to ``format`` in the same pass over memory; whether it could.

    Gradients are rounded before the update, weights and states after it: the bits of ``quantize_foreach_`` before and
    after torch's own step, see optimizer/kernels.py. It takes dense float32 tensors on the CPU that share no memory,
    those of a weight in the same strides. Otherwise nothing has changed.

    kernel, numbers: see csrc/cpu/updates.h.
    states: those of the first weight, then those of the next.
    masters: none, or those that the step updates, unrounded; the weights become rounded copies of them.
    streams, roles: the stream of a number is that of its weight, plus that of its role: the weight, the gradient, each
        state. None: the role is not rounded.
    dry: only says whether it could.
    """
    how = _find(format, rounding)
    assert how is not None
    every = [*weights, *gradients, *states, *masters]
    if not _PLAIN.issuperset(map(type, every)):
        return False
    of_roles = [-1 if each is None else each for each in roles]
    key = None if key is None else key_of(rounding, key)
    if not _UPDATE(kernel, numbers, weights, gradients, states, masters, *how, key, streams, of_roles, dry):
        return False
    if dry:
        return True
    torch.autograd.graph.increment_version(every)
    return True
