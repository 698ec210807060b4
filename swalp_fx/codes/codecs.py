"""Codes of elements as tensors: an integer's are binary, a float's sign, exponent and mantissa, a codebook's an index.

``Element.number`` defines the codes. This module computes the same codes for all numbers of a tensor, and packs them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import Codebook, Element, Float, Integer

__all__ = ["code_of", "number_of", "pack", "packed_size", "unpack"]


# ---- codes: int64, of the element's bits, without a sign -------------------------------------------------------------


def code_of(q: Tensor, element: Element) -> Tensor:
    """The codes of ``q``, float32 or float64, which are numbers of ``element``, or infinities and NaNs with a code."""
    if isinstance(element, Integer):
        return _code_of_integer(q * 2.0**element.point, element)
    if isinstance(element, Float):
        return _code_of_float(q.float(), element)
    assert isinstance(element, Codebook)
    index = torch.searchsorted(_table(element, q), q.contiguous())
    return (index + element.first_code) % 2**element.bits


def number_of(codes: Tensor, element: Element, dtype: torch.dtype) -> Tensor:
    """The numbers that the int64 ``codes`` stand for, as float32 or float64; both hold them exactly.

    Raises ValueError for a code of a codebook without a number.
    """
    if isinstance(element, Integer):
        return _integer_of(codes, element).to(dtype) * 2.0**-element.point
    if isinstance(element, Float):
        return _float_of(codes, element).to(dtype)
    assert isinstance(element, Codebook)
    index = (codes - element.first_code) % 2**element.bits
    if bool((index >= len(element.values)).any()):
        raise ValueError(f"a code of {element} goes beyond its last number; decode codes that encode gave")
    return _table(element, codes).to(dtype)[index]


def _table(element: Codebook, beside: Tensor) -> Tensor:
    dtype = beside.dtype if beside.is_floating_point() else torch.float32
    return torch.tensor(element.values, dtype=dtype, device=beside.device)


def _code_of_integer(q: Tensor, element: Integer) -> Tensor:
    if element.has_sign_bit:
        return q.abs().long() | q.signbit().long() << (element.wl - 1)
    return q.long() & (2**element.wl - 1)


def _integer_of(codes: Tensor, element: Integer) -> Tensor:
    """The integers as float64, since -0 has a code in sign and magnitude."""
    top = element.wl - 1
    if element.sign == "unsigned":
        return codes.double()
    rest = codes & (2**top - 1)
    if element.has_sign_bit:
        return torch.where(codes >> top > 0, -rest.double(), rest.double())
    return (rest - (codes >> top << top)).double()


def _code_of_float(q: Tensor, element: Float) -> Tensor:
    """The codes, from the bits of float32: its exponent bias is 127, and its mantissa has 23 bits."""
    dropped, bias = 23 - element.man, 127 - element.bias
    magnitude = q.abs()
    code = (magnitude.view(torch.int32) >> dropped) - (bias << element.man)
    if bias:  # an element with float32's bias has float32's subnormals
        # Added to the smallest normal number, a subnormal is a whole number of steps.
        raised = (magnitude + element.min_normal).view(torch.int32) >> dropped
        code = torch.where(magnitude < element.min_normal, raised - ((bias + 1) << element.man), code)
    if element.infinity_code is not None:
        code = code.where(~q.isinf(), element.infinity_code)
    sign = q.signbit()
    if not element.has_signed_zero:
        sign = sign & (magnitude > 0)
    code = code.long() | sign.long() << (element.bits - 1)
    return code if element.nan_code is None else code.where(~q.isnan(), element.nan_code)


def _float_of(codes: Tensor, element: Float) -> Tensor:
    dropped, bias = 23 - element.man, 127 - element.bias
    top = element.bits - 1
    code, negative = codes & (2**top - 1), codes >> top > 0
    magnitude = ((code << dropped) + (bias << 23)).int().view(torch.float32)
    if bias:
        step = 2.0 ** (element.min_exponent - element.man) if element.subnormals else 0.0
        magnitude = torch.where(code < 2**element.man, code.float() * step, magnitude)
    is_nan = code > element.largest_code
    if element.infinity_code is not None:
        magnitude = magnitude.where(code != element.infinity_code, torch.inf)
        is_nan = code > element.infinity_code
    if not element.has_signed_zero:
        is_nan = is_nan | (negative & (code == 0))
    return torch.where(negative, -magnitude, magnitude).where(~is_nan, torch.nan)


# ---- packing: code 0 in the low bits, little-endian ------------------------------------------------------------------

_OF_EIGHT = 8  # eight codes take as many bytes as a code has bits


def packed_size(count: int, bits: int) -> int:
    """The bytes of ``count`` codes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """``codes``, int64 below 2^bits, side by side in a uint8 tensor: the first in the lowest bits of the first byte."""
    codes = codes.flatten()
    count = codes.numel()
    if bits % 8 == 0:
        return codes.view(torch.uint8).view(count, 8)[:, : bits // 8].flatten().contiguous()
    groups = torch.nn.functional.pad(codes, (0, -count % _OF_EIGHT)).view(-1, _OF_EIGHT)
    packed = torch.zeros(len(groups), bits, dtype=torch.uint8, device=codes.device)
    for i in range(_OF_EIGHT):
        first, shift = divmod(bits * i, 8)
        word = groups[:, i] << shift
        for j in range(-(-(shift + bits) // 8)):
            packed[:, first + j] |= (word >> 8 * j & 0xFF).to(torch.uint8)
    return packed.flatten()[: packed_size(count, bits)]


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The ``count`` int64 codes that ``pack`` packed."""
    groups = torch.nn.functional.pad(packed, (0, packed_size(-(-count // _OF_EIGHT) * _OF_EIGHT, bits) - len(packed)))
    groups = groups.view(-1, bits)
    codes = torch.zeros(len(groups), _OF_EIGHT, dtype=torch.int64, device=packed.device)
    for i in range(_OF_EIGHT):
        first, shift = divmod(bits * i, 8)
        for j in range(-(-(shift + bits) // 8)):
            codes[:, i] |= groups[:, first + j].long() << 8 * j
        codes[:, i] = codes[:, i] >> shift & (2**bits - 1)
    return codes.flatten()[:count]
