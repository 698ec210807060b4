"""The blocks of a tensor by shape: one number a block, and back to one an element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Block, Runs

__all__ = ["extremes", "per_block", "sizes", "spread"]


def sizes(shape: Sequence[int], block: Block) -> list[int]:
    """How many neighbours along each dimension lie in one block; the last block of a dimension may have fewer.

    Raises FormatError for a dimension that there is not, and for a contraction axis, which a tensor does not know.
    """
    rank, here = len(shape), block.alone()
    here.check(rank)
    if isinstance(here, Runs):
        runs = here.runs if rank else ()
        apart = [1] * rank
    else:
        runs = tuple((d, 1) for d in here.dims) if rank > 1 else ()
        apart = [*shape]
    for axis, size in runs:
        apart[axis] = min(size, shape[axis])
    return apart


def per_block(shape: Sequence[int], sizes: Sequence[int]) -> list[int]:
    """The shape of a tensor that has one number for each block: of each dimension, how many blocks lie along it."""
    return [-(-whole // size) for whole, size in zip(shape, sizes, strict=True)]


def extremes(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The lowest and the largest number of each block, zero among them: of shape [*per_block, 2].

    Infinities and NaNs are left out.
    """
    x = x.where(x.isfinite(), 0.0)
    counts = per_block(x.shape, sizes)
    missing = [count * size - whole for count, size, whole in zip(counts, sizes, x.shape, strict=True)]
    if any(missing):
        x = F.pad(x, [n for each in reversed(missing) for n in (0, each)])
    inside = tuple(range(1, 2 * x.dim(), 2))
    x = x.reshape([n for pair in zip(counts, sizes, strict=True) for n in pair])
    lowest, largest = (x.amin(inside), x.amax(inside)) if inside else (x, x)
    return torch.stack([lowest.clamp(max=0.0), largest.clamp(min=0.0)], -1)


def spread(of_blocks: Tensor, shape: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The number of each element's block: of ``shape``."""
    for d, (whole, size) in enumerate(zip(shape, sizes, strict=True)):
        if of_blocks.shape[d] > 1:
            of_blocks = of_blocks.repeat_interleave(size, d).narrow(d, 0, whole)
    return of_blocks.expand(shape)
