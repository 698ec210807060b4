"""One seed for the ranks of a process group, so that replicas with different seeds round alike."""

from __future__ import annotations

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from ..random import MASK

__all__ = ["agreed_seed"]


def agreed_seed(seed: int, step: int, device: torch.device, group: ProcessGroup | None) -> int:
    """The seed for all ranks: rank 0's, if no rank has taken a step; else ``seed``, the same on all. A collective call.

    step: the number of steps that this rank has taken. device: of the trained parameters; the group communicates on it.
    group: None for all ranks. Without a process group, and in one of a single rank, this is ``seed``.
    Raises ValueError on every rank if ranks are at different steps, or go on with different seeds.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return seed
    ranks = distributed.get_world_size(group)
    if ranks <= 1:  # below it: this rank is not one of the group
        return seed
    mine = torch.tensor([seed >> 32 & MASK, seed & MASK, step], device=device)
    of_all = [torch.empty_like(mine) for _ in range(ranks)]
    distributed.all_gather(of_all, mine, group=group)
    (high, low, first), *others = (each.tolist() for each in of_all)
    for rank, (*words, other) in enumerate(others, 1):
        if other != first or (first and words != [high, low]):
            what = f"at step {other}" if other != first else "of another seed"
            raise ValueError(
                f"rank {rank} of the process group is {what}, where rank 0 is at step {first}, so that their weights "
                "would drift apart; load one rank's swalp.state_dict() on all of them"
            )
    return high << 32 | low
