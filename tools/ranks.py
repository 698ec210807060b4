"""The processes that train one network together, started by torchrun, or this one alone.

Every rank has the same order of samples. A training batch is cut into a part for each rank. So the batch of a step, and
the learning rate for it, do not depend on the number of ranks. Elsewhere, each rank has whole batches. A rank reads no
image that it has no use for.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Union

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from swalp_fx.random import fold_in

if TYPE_CHECKING:
    import data
    import folders

__all__ = [
    "COUNT",
    "RANK",
    "group",
    "joined",
    "local_device",
    "own",
    "parts",
    "refuse_orphan",
    "replica",
    "share",
    "total",
]

Batches = Union["data.Batches", "folders.Loaded"]

IS_ONE_OF_MANY = distributed.is_available() and distributed.is_torchelastic_launched()
LAUNCHER = os.getppid()
RANK, COUNT = (int(os.environ[name]) if IS_ONE_OF_MANY else n for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))


def local_device(device: torch.device) -> torch.device:
    """The GPU of this rank, where GPUs train and none is named."""
    if COUNT == 1 or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """While it holds, this process is a rank of the group: by NCCL on GPUs, by gloo on CPUs. Rank 0 alone speaks."""
    if COUNT == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with contextlib.ExitStack() as stack:
        if RANK:
            warnings.simplefilter("ignore")
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield
    distributed.destroy_process_group()


def refuse_orphan() -> None:
    """Ends this rank if torchrun was killed: else it would train on, and write where the resumed run writes."""
    if COUNT > 1 and os.getppid() != LAUNCHER:
        raise SystemExit("the process that started this rank has gone")


def own(seed: int) -> int:
    """A seed of this rank alone: parts of a batch have dropout of their own."""
    return fold_in(seed, RANK) if RANK else seed


def group() -> distributed.ProcessGroup | None:
    """Of all ranks; None if this one is alone."""
    return distributed.group.WORLD if COUNT > 1 else None


def replica(model: nn.Module) -> nn.Module:
    """The module to call in training: it gives the gradients of all ranks."""
    return DistributedDataParallel(model) if COUNT > 1 else model


def parts(batches: Batches) -> Iterator[tuple[Tensor, Tensor, float]]:
    """This rank's samples of each batch, and their weight.

    The mean over ranks of weighted losses is the batch's loss.
    """
    of_rank = replace(batches, part=slice(RANK, None, COUNT))
    for start, (inputs, targets) in zip(batches.starts, of_rank, strict=True):
        whole = min(batches.batch_size, batches.starts.stop - start)
        yield inputs, targets, len(targets) * COUNT / whole


def share(batches: Batches) -> Batches:
    """Each COUNT-th of the batches: together the ranks have all."""
    return replace(batches, share=slice(RANK, None, COUNT))


def total(numbers: Tensor) -> Tensor:
    """The sum over ranks, in place."""
    if COUNT > 1:
        distributed.all_reduce(numbers)
    return numbers
