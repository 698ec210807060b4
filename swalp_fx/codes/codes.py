"""Integer codes and scales, as hardware would store a tensor, and the way back to the tensor."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .. import reference
from ..formats import FLOAT, Affine, Format, FormatError, Integer, parse
from ..ops import key_of, quantize, require_floating
from . import compiled, stored, tiles
from .codecs import code_of, number_of, pack, unpack
from .stored import whole

__all__ = ["Codes", "decode", "encode"]

WHOLE_NUMBERS = Format(Integer(24, 0, "twos"))  # a wider range than any scaled integer has


@dataclass(frozen=True, eq=False, repr=False)
class Codes:
    """The codes of a tensor's elements, side by side, and the scales of its blocks.

    packed: uint8, the elements in row-major order, ``format.element_bits`` each. Code 0 is in the low bits of byte 0.
        A code that is cut by the end of a byte goes on in the low bits of the next.
    scales: tensors with as many dimensions as x, and an entry for each block; empty without a shared scale.
        A power of two is stored as its exponent: uint8 if biased, as in E8M0, else int8. A real scale is float32.
        An affine scale has a second tensor: the codes of the zero points. A two-level scale has the codes of the
        blocks' floats, then one float32.
    shape, dtype: the tensor's.
    """

    packed: Tensor
    scales: tuple[Tensor, ...]
    format: Format
    shape: torch.Size
    dtype: torch.dtype

    @property
    def integers(self) -> Tensor:
        """Each element's code as an int64 of the tensor's shape, 0 to 2^bits - 1."""
        return unpack(self.packed, self.shape.numel(), self.format.element_bits).view(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and of the scales."""
        return sum(each.nbytes for each in (self.packed, *self.scales))

    def hex(self) -> str:
        """The packed codes in hexadecimal, byte after byte."""
        return bytes(self.packed.tolist()).hex()

    def __repr__(self) -> str:
        return f"Codes({self.format}, shape {tuple(self.shape)}, {self.dtype}, {self.nbytes:,} bytes)"


@cache
def _format(spec: str | Format) -> Format:
    format = parse(spec)
    if format == FLOAT:
        raise FormatError("float rounds nothing, and has no codes; keep the tensor, or use e8m23 for float32's numbers")
    return format


def encode(
    x: Tensor, format: str | Format, rounding: str = "nearest", *, key: Tensor | int | None = None, stream: int = 0
) -> Codes:
    """The codes of ``quantize(x, format, rounding, key=key, stream=stream)``, on x's device.

    ``decode`` gives the same numbers. Zero keeps its sign if the format has two zeros.

    x: float32, float64, bfloat16 or float16, any shape and layout. It gets no gradient.
    Raises the errors of ``quantize``, FormatError for ``float``, and ValueError for an infinity or a NaN without a code
    in the format.
    """
    run = _outside_of_graphs if torch.compiler.is_compiling() else _encode
    return run(x, format, rounding, key, stream)


def _encode(x: Tensor, spec: str | Format, rounding: str, key: Tensor | int | None, stream: int) -> Codes:
    format = _format(spec)
    require_floating(x, "encode")
    shape, dtype = x.shape, x.dtype
    computed = x.detach().contiguous()
    if dtype is not torch.float64:
        computed = computed.float()
    if not computed.numel():
        format.block.sizes(shape)  # raises if there is no such block
        return Codes(torch.empty(0, dtype=torch.uint8, device=x.device), (), format, shape, dtype)
    key = key_of(rounding, key)
    made = compiled.codes_of(computed, dtype, spec, rounding, key, stream)
    packed, scales = made or _by_quotients(computed, dtype, format, rounding, key, stream)
    return Codes(packed, scales, format, shape, dtype)


# torch.compile's division on a GPU is not correctly rounded. Other calls go past this wrapper, which costs them time.
_outside_of_graphs = torch.compiler.disable(_encode)


@torch.no_grad()
def decode(codes: Codes) -> Tensor:
    """The numbers that ``codes`` stand for: contiguous, of the shape, dtype and device of the tensor encoded."""
    dtype = torch.promote_types(codes.dtype, torch.float32)
    if not codes.shape.numel():
        return torch.empty(codes.shape, dtype=codes.dtype, device=codes.packed.device)
    format, sizes = codes.format, codes.format.block.sizes(codes.shape)
    if isinstance(format.scale, Affine):
        lowest = _of_elements(stored.lowest_of(codes.scales, format, dtype), codes.shape, sizes)
        q = number_of(codes.integers, whole(format), dtype) - whole(format).bounds[0] + lowest
    else:
        q = number_of(codes.integers, format.element, dtype)
    return (q * _of_elements(stored.load(codes.scales, format, dtype), codes.shape, sizes)).to(codes.dtype)


def _of_elements(of_blocks: Tensor, shape: torch.Size, sizes: list[int]) -> Tensor:
    return tiles.spread(of_blocks, shape, sizes) if of_blocks.dim() else of_blocks


def _by_quotients(
    x: Tensor, dtype: torch.dtype, format: Format, rounding: str, key: Tensor | None, stream: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The packed codes and the scales, for any ``x``: x divided by its scale is rounded to the bare element.

    dtype: of the tensor whose codes these are; x may be wider.
    """
    sizes = format.block.sizes(x.shape)
    scales = stored.store(tiles.extremes(x, sizes), format)
    scale = stored.load(scales, format, x.dtype)
    y = x
    if format.scale is not None:
        y = reference.divided(x, _of_elements(scale, x.shape, sizes))
        # Of elements with codes, a quarter of the smallest number is a float32. Draws would round it up now and then.
        if not rounding.startswith("stochastic"):
            y = reference.with_sign_of(x, y, min(2.0**-126, format.element.min_subnormal / 4))
    y = torch.where(x.isfinite(), y.clamp(torch.finfo(y.dtype).min, torch.finfo(y.dtype).max), y)
    grid = WHOLE_NUMBERS if isinstance(format.scale, Affine) else Format(format.element, overflow=format.overflow)
    q = quantize(y, grid, rounding, key=key, stream=stream)
    is_affine = isinstance(format.scale, Affine)
    lowest = _of_elements(stored.lowest_of(scales, format, x.dtype), x.shape, sizes) if is_affine else None
    if lowest is not None:
        first, last = whole(format).bounds
        q = torch.minimum(torch.maximum(q, lowest), lowest + (last - first))
    for sign, bound, beyond in reference.bounds_of(_of_elements(scale, x.shape, sizes), lowest, format, dtype):
        q = torch.where((sign * q > sign * bound) & q.isfinite(), beyond, q)
    _refuse_uncoded(x, q, format)
    codes = code_of(q, format.element) if lowest is None else code_of(q - lowest + first, whole(format))
    return pack(codes, format.element_bits), scales


def _refuse_uncoded(x: Tensor, q: Tensor, format: Format) -> None:
    """Raises ValueError for an infinity that becomes a number, and for a NaN without a code."""
    element = format.element
    uncoded = ~x.isfinite() & q.isfinite()
    if getattr(element, "nan_code", None) is None:
        uncoded = uncoded | q.isnan()
    if bool(uncoded.any()):
        at = tuple(uncoded.nonzero()[0].tolist())
        raise ValueError(
            f"encode: x is {x[at].item()} at {list(at)}, and {format} has no code for that; replace it first"
        )
