"""Data-parallel training, in two real processes: replicas stay bit-equal, and each draws bits of its own."""

import pytest
import shapes
import torch
from torch import distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from swalp_fx import convert, draw_key

RANKS = 2


def _train(rank, folder, seeds):
    """One rank: three low-precision steps on data of its own, and all that must or must not be equal, stored."""
    torch.set_num_threads(1)
    torch.manual_seed(seeds[rank])
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    model = shapes.PreResNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    module, swalp = convert(model, optimizer, recipe="bfp6[0]")
    replica = DistributedDataParallel(module)
    if seeds[0] != seeds[1]:
        state = [swalp.state_dict()]
        distributed.broadcast_object_list(state)
        swalp.load_state_dict(state[0])
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


# Ranks seeded apart take over the state of rank 0, which holds the seed of the optimizer pass.
@pytest.mark.parametrize("seeds", [(0, 0), pytest.param((0, 1), marks=pytest.mark.slow)], ids=["alike", "apart"])
def test_replicas_stay_bit_equal_and_draw_apart(seeds, tmp_path):
    spawn(_train, (str(tmp_path), seeds), nprocs=RANKS)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(RANKS))
    assert first.pop("key") != second.pop("key")
    assert first.keys() == {"weights", "gradients", "momentum", "average"}
    for name, tensors in first.items():
        assert shapes.equal(tensors, second[name]), name
