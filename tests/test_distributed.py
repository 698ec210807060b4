"""Data-parallel training, in two real processes: replicas stay bit-equal, and each draws bits of its own."""

import copy

import pytest
import shapes
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from swalp_fx import SWALP, convert, draw_key

RANKS = 2


def _joined(rank, folder, seed):
    """Makes this process a rank of a group of RANKS, seeded so."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)


def _train(rank, folder, seeds):
    """One rank: three low-precision steps on data of its own, and all that must or must not be equal, stored."""
    _joined(rank, folder, seeds[rank])
    model = shapes.PreResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    module, swalp = convert(model, optimizer, recipe="bfp6[0]")
    replica = DistributedDataParallel(module)
    key = draw_key(True)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(rank))
    for _ in range(3):
        optimizer.zero_grad()
        replica(x).square().mean().backward()
        optimizer.step()
        swalp.update_average()
    found = {
        "key": key,
        "weights": dict(model.named_parameters()),
        "gradients": [parameter.grad for parameter in model.parameters()],
        "momentum": [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()],
        "average": dict(swalp.averaged_model().named_parameters()),
    }
    torch.save(found, f"{folder}/{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize("seeds", [(0, 0), pytest.param((0, 1), marks=pytest.mark.slow)], ids=["alike", "apart"])
def test_replicas_stay_bit_equal_and_draw_apart(seeds, tmp_path):
    spawn(_train, (str(tmp_path), seeds), nprocs=RANKS)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(RANKS))
    assert first.pop("key") != second.pop("key")
    assert first.keys() == {"weights", "gradients", "momentum", "average"}
    for name, tensors in first.items():
        assert shapes.equal(tensors, second[name]), name


class Words(nn.Module):
    """Small, with a state of batch norm, so that 200 steps take seconds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        return self.layers(x)


def _train_apart(rank, folder, steps, late):
    """Ranks seeded apart, data of their own; the seed, the weights and the momenta of every 20th step, stored.

    late: the group comes after the conversion, and the seeds of the passes are given by hand.
    """
    if late:
        torch.manual_seed(rank)
    else:
        _joined(rank, folder, rank)
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    module, swalp = convert(model, optimizer, recipe="bfp6[0]", seed=3 + rank if late else None)
    if late:
        _joined(rank, folder, rank)
    replica = DistributedDataParallel(module)
    data, found = torch.Generator().manual_seed(rank), []
    for step in range(1, steps + 1):
        x, y = torch.randn(8, 6, generator=data), torch.randint(3, (8,), generator=data)
        optimizer.zero_grad()
        F.cross_entropy(replica(x), y).backward()
        optimizer.step()
        if step % 20 == 0:
            momenta = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
            seed = torch.tensor(swalp.state_dict()["seed"])
            found.append([seed, *(p.detach().clone() for p in model.parameters()), *momenta])
    torch.save(found, f"{folder}/{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


LONG = pytest.param(200, False, marks=pytest.mark.slow)


@pytest.mark.parametrize("steps, late", [(20, False), (20, True), LONG], ids=["20", "20, given seeds", "200"])
def test_ranks_seeded_apart_take_equal_steps(steps, late, tmp_path):
    spawn(_train_apart, (str(tmp_path), steps, late), nprocs=RANKS)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(RANKS))
    assert len(first) == steps // 20 and shapes.equal(first, second)
    assert first[0][0] == 3 or not late  # rank 0's


def _go_on_apart(rank, folder, change):
    """Rank 1 goes on from a changed state; each rank stores the message of its step, and its changes."""
    _joined(rank, folder, 0)
    model = Words()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    swalp = SWALP(model, "bfp6[0]")
    swalp.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    swalp.load_state_dict({**swalp.state_dict(), **(change if rank == 1 else {})})
    before, text = copy.deepcopy(model.state_dict()), ""
    try:
        optimizer.step()
    except ValueError as error:
        text = str(error)
    torch.save([text, shapes.equal(before, model.state_dict())], f"{folder}/{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "change, what", [({"step": 9}, "at step 9"), pytest.param({"seed": 4}, "of another seed", marks=pytest.mark.slow)]
)
def test_ranks_with_states_of_different_runs_are_refused_on_each_before_anything_changes(change, what, tmp_path):
    spawn(_go_on_apart, (str(tmp_path), change), nprocs=RANKS)
    for rank in range(RANKS):
        text, same = torch.load(tmp_path / str(rank))
        assert text.startswith(f"rank 1 of the process group is {what}, where rank 0 is at step 1") and same
