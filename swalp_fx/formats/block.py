"""Blocks: which elements share a scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import FormatError, require

__all__ = ["ROWS", "WHOLE", "Block", "Channel", "Rectangle", "Runs", "Slices"]


class Block:
    """Which elements share a scale: immutable, hashable, printed as the brackets of a spec."""

    @property
    def size(self) -> int | None:
        """Elements of a block, if that does not depend on the tensor."""
        return None

    @property
    def rank(self) -> int:
        """Axes that a tensor has at least."""
        raise NotImplementedError

    def along(self, axis: int) -> Block:
        """This block with ``axis`` as the contraction axis."""
        return self

    def alone(self) -> Runs | Slices:
        """This block for a tensor that no operation reads. The contraction axis of a rectangle is then the last one.

        Raises FormatError for a Channel, since the tensor does not know its axis.
        """
        raise NotImplementedError

    def sizes(self, shape: Sequence[int]) -> list[int]:
        """How many neighbours along each dimension lie in one block; the last block of a dimension may have fewer.

        Raises FormatError for a dimension that does not exist, and for a Channel.
        """
        rank, here = len(shape), self.alone()
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

    def counts(self, shape: Sequence[int]) -> list[int]:
        """How many blocks lie along each dimension. Raises FormatError like ``sizes``."""
        return [-(-whole // size) if whole else 0 for whole, size in zip(shape, self.sizes(shape), strict=True)]

    def of_tensor(self, rank: int, axis: int) -> Block:
        """This block for a tensor of ``rank`` axes; a vector or scalar with too few axes for it is one block."""
        return WHOLE if rank < min(2, self.rank) else self.along(axis)


@dataclass(frozen=True)
class Slices(Block):
    """One block for each index of ``dims``; without any, the whole tensor. ``[0,1]``, ``[]``.

    A tensor of one dimension or none has no slices: it is one block, whatever ``dims`` says.
    """

    dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))
        require(
            all(isinstance(d, int) for d in self.dims) and len(set(self.dims)) == len(self.dims),
            f"blocks: dims {self.dims!r} must be distinct integers; leave them out for one block a tensor",
        )

    @property
    def rank(self) -> int:
        return _rank(self.dims)

    def alone(self) -> Slices:
        return self

    def check(self, rank: int) -> None:
        """Raises FormatError for a dimension that a tensor of ``rank`` axes does not have."""
        _check_dimensions(self.dims if rank > 1 else (), rank)

    def __str__(self) -> str:
        return f"[{','.join(map(str, self.dims))}]"


WHOLE = Slices()  # the tensor
ROWS = Slices((0,))


@dataclass(frozen=True)
class Runs(Block):
    """Runs of a given size along some axes; each index of any other axis is apart: ``[-1:32]``, ``[0:128,1:128]``.

    The last run of an axis may be short.
    """

    runs: tuple[tuple[int, int], ...]  # (axis, size)

    def __post_init__(self) -> None:
        object.__setattr__(self, "runs", tuple((axis, size) for axis, size in self.runs))
        axes = [axis for axis, _ in self.runs]
        require(
            bool(axes) and all(isinstance(n, int) for run in self.runs for n in run) and len(set(axes)) == len(axes),
            f"blocks: runs {self.runs!r} must be pairs of an axis and a size, of distinct axes",
        )
        for _, size in self.runs:
            _check_size(size)

    @property
    def size(self) -> int:
        return math.prod(size for _, size in self.runs)

    @property
    def rank(self) -> int:
        return max(len(self.runs), _rank([axis for axis, _ in self.runs]))

    def alone(self) -> Runs:
        return self

    def check(self, rank: int) -> None:
        """Raises FormatError for a dimension that a tensor of ``rank`` axes does not have, and for too few of them."""
        if rank < len(self.runs) > 1:
            raise FormatError(
                f"{self} is a block of {len(self.runs)} axes, and the tensor has {rank}; use one with more"
            )
        _check_dimensions([axis for axis, _ in self.runs] if rank else (), rank)

    def __str__(self) -> str:
        return f"[{','.join(f'{axis}:{size}' for axis, size in self.runs)}]"


@dataclass(frozen=True)
class Rectangle(Block):
    """``rows`` of dimension 0 by ``columns`` of the contraction axis; any other axis is apart: ``[128x128]``.

    A graph knows the contraction axis, and makes Runs of the rectangle. Elsewhere it is the last axis. If the
    contraction axis is dimension 0, as in a transposed convolution's weight, rows are of dimension 1.
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        _check_size(self.rows)
        _check_size(self.columns)

    rank = 2

    @property
    def size(self) -> int:
        return self.rows * self.columns

    def along(self, axis: int) -> Runs:
        return Runs(((0 if axis else 1, self.rows), (axis, self.columns)))

    def alone(self) -> Runs:
        return self.along(-1)

    def __str__(self) -> str:
        return f"[{self.rows}x{self.columns}]"


@dataclass(frozen=True)
class Channel(Block):
    """Runs of ``count`` along the contraction axis, which a graph knows and a tensor does not: ``[c:32]``."""

    count: int

    def __post_init__(self) -> None:
        _check_size(self.count)

    rank = 2

    @property
    def size(self) -> int:
        return self.count

    def along(self, axis: int) -> Runs:
        return Runs(((axis, self.count),))

    def alone(self) -> Runs:
        raise FormatError(f"{self} is along an axis that a tensor does not know; name it: {self.along(-1)}")

    def __str__(self) -> str:
        return f"[c:{self.count}]"


def _rank(dims: Iterable[int]) -> int:
    return max((d + 1 if d >= 0 else -d for d in dims), default=0)


def _check_dimensions(dims: Iterable[int], rank: int) -> None:
    for d in dims:
        if not -rank <= d < rank:
            raise FormatError(f"block dimension {d} does not exist in a tensor of {rank} dimensions")


def _check_size(size: int) -> None:
    require(isinstance(size, int) and size >= 1, f"blocks: size {size!r} is out of range; use 1 or more")
