"""Sharded and hidden parameters are refused by name, before anything is computed or changed."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer

from swalp_fx import ConvertError, NotRewritten, convert, in_float

X = torch.ones(3, 4)


def net():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded_before(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


SHARDED = {
    "FSDP": lambda model: sharded_before(model),
    "FSDP, parameters as they were": lambda model: sharded_before(model, use_orig_params=True),
    "FSDP of a part": lambda model: model.__setitem__(0, sharded_before(model[0])) or model,
    "fully_shard": lambda model: fully_shard(model) or model,
    "fully_shard of a part": lambda model: fully_shard(model[0]) and model,
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("way", SHARDED)
def test_a_converted_module_that_is_sharded_is_not_called(way, called_before):
    lp, _ = convert(net())
    if called_before:
        lp(X)
    sharded = SHARDED[way](lp)
    with pytest.raises(NotRewritten, match=r"would have computed in float.*DistributedDataParallel"):
        sharded(X)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("way", SHARDED)
def test_a_sharded_module_is_not_converted(way):
    sharded = SHARDED[way](net())
    with pytest.raises(ConvertError, match="whole parameters: wrap the converted module in DistributedDataParallel"):
        convert(sharded)


@pytest.mark.usefixtures("group")
def test_what_is_inside_a_sharded_module_is_not_converted():
    sharded = sharded_before(net(), use_orig_params=True)
    with pytest.raises(ConvertError, match=r"parameter 0\.weight, a shard of type Parameter"):
        convert(sharded.module)


@pytest.mark.usefixtures("group")
def test_an_optimizer_of_shards_is_neither_attached_nor_stepped():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    _, swalp = convert(model, optimizer)
    fully_shard(model)
    with pytest.raises(
        ValueError, match="SGD cannot train the model, which is FSDPModule; formats round whole parameters"
    ):
        optimizer.step()
    swalp.detach()
    with pytest.raises(ValueError, match="SGD cannot train the model, which is FSDPModule"):
        swalp.attach(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.usefixtures("group")
def test_an_optimizer_that_shards_its_states_is_refused():
    model = net()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="cannot attach to ZeroRedundancyOptimizer; its states are not there"):
        convert(model, optimizer)
    model(X)  # it is as it was


@pytest.mark.parametrize("when", ["before", "behind the conversion", "behind a call"])
def test_a_parameter_that_an_attribute_hides_is_refused(when):
    model = net()
    lp = model if when == "before" else convert(model).module
    if when == "behind a call":
        lp(X)
    vars(model[0])["weight"] = torch.zeros(4, 4)
    refusal = r"parameter 0\.weight, which an attribute of that name in its module's __dict__ hides"
    with pytest.raises(ConvertError if when == "before" else NotRewritten, match=refusal):
        convert(model) if when == "before" else lp(X)
    del vars(model[0])["weight"]
    assert lp(X).shape == (3, 2)
    if when != "before":
        with in_float(lp):
            assert lp(X).shape == (3, 2)
