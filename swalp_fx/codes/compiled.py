"""Codes of 16 bits or fewer on the CPU: the compiled op writes them instead of rounded numbers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..formats import Affine, Codebook, Float, Format, Integer, PowerOfTwo, TwoLevel, parse
from .codecs import packed_size

__all__ = ["codes_of"]

CPU = torch.device("cpu")
NOTHING = torch.empty(0, dtype=torch.uint8, device=CPU)  # for scales that are not stored


# In the order of csrc/ops.cpp: the index is the code there.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Room(NamedTuple):
    """What the codes of a tensor take."""

    coding: tuple[int, ...]
    packed: int  # bytes
    scales: tuple[tuple[Sequence[int], torch.dtype], ...]  # shape and dtype of each tensor of stored scales


def codes_of(
    x: Tensor, dtype: torch.dtype, spec: str | Format, rounding: str, key: Tensor | None, stream: int
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """The packed codes and the scales of a row-major ``x``. None if the op cannot make them, or x is not finite.

    dtype: of the tensor whose codes these are; x may be wider.
    """
    if x.dtype is not torch.float32 or not x.is_cpu or (room := _room(spec, dtype, x.shape)) is None:
        return None
    packed = torch.empty(room.packed, dtype=torch.uint8, device=CPU)
    scales = tuple([torch.empty(shape, dtype=kind, device=CPU) for shape, kind in room.scales])
    first, second, *_ = *scales, NOTHING, NOTHING
    if not ops.write_codes(x, spec, rounding, key, stream, room.coding, packed, first, second):
        return None
    return packed, scales


@lru_cache(maxsize=4096)
def _room(spec: str | Format, dtype: torch.dtype, shape: torch.Size) -> _Room | None:
    f = parse(spec)
    coding = _coding(f, dtype)
    if coding is None:
        return None
    return _Room(coding, packed_size(shape.numel(), f.element_bits), _scales(f, f.block.counts(shape)))


def _coding(f: Format, dtype: torch.dtype) -> tuple[int, ...] | None:
    """The fields of Coding in csrc/codes.h, the bias of a scale's exponent, and the code of ``dtype``.

    None if the op has no such codes.
    """
    e, bits = f.element, f.element_bits
    inner_bits = f.scale.inner.bits if isinstance(f.scale, TwoLevel) else 0
    if bits > 16 or inner_bits > 8:
        return None
    behind = (f.scale.bias if isinstance(f.scale, PowerOfTwo) else 0), DTYPES.index(dtype)
    if isinstance(e, Codebook):
        return bits, False, True, e.first_code, 0, 0, *behind
    if isinstance(e, Float):
        return bits, False, e.has_signed_zero, 0, e.infinity_code or 0, e.nan_code or 0, *behind
    assert isinstance(e, Integer)
    return bits, not e.has_sign_bit, True, e.bounds[0], 0, 0, *behind


def _scales(f: Format, blocks: Sequence[int]) -> tuple[tuple[Sequence[int], torch.dtype], ...]:
    """Shape and dtype of each tensor of stored scales."""
    if not f.scale_bits:
        return ()
    if isinstance(f.scale, PowerOfTwo):
        return ((blocks, torch.uint8 if f.scale.biased else torch.int8),)
    if isinstance(f.scale, TwoLevel):
        return (blocks, torch.uint8), ((), torch.float32)
    of_zero = torch.uint8 if f.element_bits <= 8 else torch.int16
    return ((blocks, torch.float32), (blocks, of_zero)) if isinstance(f.scale, Affine) else ((blocks, torch.float32),)
