"""Scales as hardware stores them: tensors with one entry for each block, and the numbers that these stand for.

A power of two is stored as its exponent in a byte, a real scale as a float32. ``_ROWS`` has a line for each kind.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..formats import ROWS, Absmax, Affine, Format, Integer, PowerOfTwo, Scale, Static, TwoLevel
from .codecs import code_of, number_of

__all__ = ["load", "lowest_of", "store", "whole"]

Stored = tuple[Tensor, ...]


def store(extremes: Tensor, f: Format) -> Stored:
    """The stored scales of blocks, from ``extremes``: their lowest and largest numbers, of shape [*blocks, 2]."""
    of_rows = _ROWS[type(f.scale)][0](extremes.reshape(-1, 2), _by_rows(f))
    return tuple(each.reshape(extremes.shape[:-1]) if each.dim() else each for each in of_rows)


def load(stored: Stored, f: Format, dtype: torch.dtype) -> Tensor:
    """The scales as float32 or float64, in the blocks' shape; a scalar if all blocks have the same."""
    return _ROWS[type(f.scale)][1](stored, f, dtype)


def lowest_of(stored: Stored, f: Format, dtype: torch.dtype) -> Tensor:
    """The integer that stands for the lowest number of each block, if the scale has a zero point."""
    return whole(f).bounds[0] - number_of(_wide(stored[1], f.element_bits), whole(f), dtype)


def whole(f: Format) -> Integer:
    """The element of a format with a zero point, without its fractional bits."""
    assert isinstance(f.element, Integer)
    return Integer(f.element.wl, 0, f.element.sign)


def _narrow(codes: Tensor, bits: int) -> Tensor:
    """Codes in the smallest dtype that holds them."""
    return codes.to(torch.uint8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32)


def _wide(codes: Tensor, bits: int) -> Tensor:
    return codes.long() & (2**bits - 1)


def _by_rows(f: Format) -> Format:
    """The format with rows as blocks. The two extremes of a block, as a row, have the block's scale."""
    return Format(f.element, f.scale, ROWS if f.scale and f.scale.is_shared else f.block, f.overflow)


def _no_scale(rows: Tensor, f: Format) -> Stored:
    return ()


def _one(stored: Stored, f: Format, dtype: torch.dtype) -> Tensor:
    return torch.tensor(f.scale.value if isinstance(f.scale, Static) else 1.0, dtype=dtype)


def _store_exponents(rows: Tensor, f: Format) -> Stored:
    assert isinstance(f.scale, PowerOfTwo)
    exponents = torch.frexp(reference.scale_of(rows, f).double()).exponent - 1
    return ((exponents + f.scale.bias).to(torch.uint8 if f.scale.biased else torch.int8),)


def _load_exponents(stored: Stored, f: Format, dtype: torch.dtype) -> Tensor:
    assert isinstance(f.scale, PowerOfTwo)
    return reference.power_of_two(stored[0].long() - f.scale.bias).to(dtype)


def _store_real(rows: Tensor, f: Format) -> Stored:
    return (reference.scale_of(rows, f).float(),)


def _load_real(stored: Stored, f: Format, dtype: torch.dtype) -> Tensor:
    return stored[0].to(dtype)


def _store_affine(rows: Tensor, f: Format) -> Stored:
    scale = reference.scale_of(rows, f)
    zero = whole(f).bounds[0] - reference.lowest_beside(rows[:, :1], scale, f)
    return scale.float(), _narrow(code_of(zero, whole(f)), f.element_bits)


def _store_levels(rows: Tensor, f: Format) -> Stored:
    assert isinstance(f.scale, TwoLevel)
    of_block, outer = reference.two_levels(rows, f)
    return _narrow(code_of(of_block, f.scale.inner), f.scale.inner.bits), outer.float()


def _load_levels(stored: Stored, f: Format, dtype: torch.dtype) -> Tensor:
    assert isinstance(f.scale, TwoLevel)
    inner = number_of(_wide(stored[0], f.scale.inner.bits), f.scale.inner, dtype)
    return reference.product_of_levels(inner, stored[1].to(dtype), f)


_ROWS: dict[type[Scale] | type[None], tuple[Callable[..., Stored], Callable[..., Tensor]]] = {
    type(None): (_no_scale, _one),
    Static: (_no_scale, _one),
    PowerOfTwo: (_store_exponents, _load_exponents),
    Absmax: (_store_real, _load_real),
    Affine: (_store_affine, _load_real),
    TwoLevel: (_store_levels, _load_levels),
}
