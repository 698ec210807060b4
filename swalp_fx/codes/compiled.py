"""Codes of 8 bits or fewer on the CPU: the compiled op writes them instead of rounded numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from .. import ops
from ..formats import Absmax, Affine, Codebook, Float, Format, Integer, PowerOfTwo, TwoLevel
from .codecs import packed_size

__all__ = ["codes_of"]

NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")  # for scales that are not stored


def codes_of(
    x: Tensor, format: Format, rounding: str, key: Tensor | None, stream: int
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """The packed codes and the scales of a row-major ``x``. None if the op cannot make them, or x is not finite."""
    coding = _coding(format)
    if coding is None or x.dtype is not torch.float32 or not x.is_cpu:
        return None
    packed = torch.empty(packed_size(x.numel(), format.element_bits), dtype=torch.uint8, device="cpu")
    scales = _room(format, format.block.counts(x.shape))
    first, second, *_ = *scales, NOTHING, NOTHING
    if not ops.write_codes(x, format, rounding, key, stream, coding, packed, first, second):
        return None
    is_signed = isinstance(format.scale, PowerOfTwo) and not format.scale.biased
    return packed, tuple(each.view(torch.int8) if is_signed else each for each in scales)


@cache
def _coding(f: Format) -> list[int] | None:
    """The fields of Coding in csrc/codes.h, and the bias of a scale's exponent. None if the op has no such codes."""
    e, bits = f.element, f.element_bits
    inner_bits = f.scale.inner.bits if isinstance(f.scale, TwoLevel) else 0
    if max(bits, inner_bits) > 8 or f.overflow != "saturate":
        return None
    bias = f.scale.bias if isinstance(f.scale, PowerOfTwo) else 0
    if isinstance(e, Codebook):
        return [bits, False, True, e.first_code, bias]
    if isinstance(e, Float):
        return [bits, False, e.has_signed_zero, 0, bias] if e.subnormals else None
    assert isinstance(e, Integer)
    return [bits, not e.has_sign_bit, True, e.bounds[0], bias]


def _room(f: Format, blocks: Sequence[int]) -> tuple[Tensor, ...]:
    """Empty tensors for the stored scales of ``blocks``."""
    if not f.scale_bits:
        return ()
    is_float = isinstance(f.scale, Absmax | Affine)
    scales = torch.empty(blocks, dtype=torch.float32 if is_float else torch.uint8, device="cpu")
    if isinstance(f.scale, TwoLevel):
        return scales, torch.empty((), dtype=torch.float32, device="cpu")
    return (scales, torch.empty(blocks, dtype=torch.uint8, device="cpu")) if isinstance(f.scale, Affine) else (scales,)
