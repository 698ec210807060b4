"""The blocks of a tensor by shape: one number a block, and back to one an element."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["extremes", "spread"]


def extremes(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The lowest and the largest of each block's numbers and zero: shape [*counts, 2].

    sizes: how many neighbours along each dimension lie in one block, see ``Block.sizes``.

    Infinities and NaNs count as zero.
    """
    x = x.where(x.isfinite(), 0.0)
    counts = [-(-whole // size) for whole, size in zip(x.shape, sizes, strict=True)]
    missing = [count * size - whole for count, size, whole in zip(counts, sizes, x.shape, strict=True)]
    if any(missing):
        x = F.pad(x, [n for each in reversed(missing) for n in (0, each)])
    inside = tuple(range(1, 2 * x.dim(), 2))
    x = x.reshape([n for pair in zip(counts, sizes, strict=True) for n in pair])
    lowest, largest = (x.amin(inside), x.amax(inside)) if inside else (x, x)
    return torch.stack([lowest.clamp(max=0.0), largest.clamp(min=0.0)], -1)


def spread(of_blocks: Tensor, shape: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """Each element's entry of ``of_blocks``: shape ``shape``."""
    for d, (whole, size) in enumerate(zip(shape, sizes, strict=True)):
        if of_blocks.shape[d] > 1:
            of_blocks = of_blocks.repeat_interleave(size, d).narrow(d, 0, whole)
    return of_blocks.expand(shape)
