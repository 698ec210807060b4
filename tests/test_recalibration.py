"""Batch-norm statistics of new weights, against a direct computation."""

import copy

import pytest
import torch
import torch.multiprocessing as mp
from torch import distributed, nn

from swalp_fx import recalibrate


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv_net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(3, 4, 1))


def test_unequal_batches_give_the_statistics_of_all_the_data():
    model, data = conv_net(), rows(22, 2, 6, 6)
    batches = list(data.split(8))  # 8, 8, 6
    recalibrate(model, batches)
    with torch.no_grad():
        hidden = [model[0](batch) for batch in batches]
    everything = torch.cat(hidden)
    torch.testing.assert_close(model[1].running_mean, everything.mean((0, 2, 3)))
    variances = torch.stack([h.transpose(0, 1).flatten(1).var(1) for h in hidden])
    sizes = torch.tensor([[8.0], [8.0], [6.0]])
    torch.testing.assert_close(model[1].running_var, (variances * sizes).sum(0) / 22)
    assert model[1].num_batches_tracked == 3


def test_one_batch_of_all_the_data_gives_its_mean_and_variance():
    model, data = conv_net(), rows(40, 2, 6, 6)
    recalibrate(model, [data])
    with torch.no_grad():
        hidden = model[0](data).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, hidden.mean(1))
    torch.testing.assert_close(model[1].running_var, hidden.var(1))


def test_a_norm_called_twice_in_a_forward_counts_both_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x):
            return self.norm(x) + self.norm(x[:2] + 10)[:1]

    model, x = Twice(), torch.arange(6.0)[:, None]
    recalibrate(model, [x])
    torch.testing.assert_close(model.norm.running_mean, torch.cat([x, x[:2] + 10]).mean(0))


def test_bfloat16_statistics_are_averaged_in_float32():
    model = nn.Sequential(nn.BatchNorm1d(1)).bfloat16()
    low, high = torch.tensor([[0.5], [1.5]]).bfloat16(), torch.tensor([[0.75], [1.75]]).bfloat16()
    recalibrate(model, [low] * 150 + [high] * 150)  # in bfloat16 the mean would stop near 1
    assert model[0].running_mean.item() == 1.125


def test_instance_norm_statistics_are_recalibrated():
    model = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True))
    batches = [rows(4, 3, 9), rows(2, 3, 9, seed=1)]
    recalibrate(model, batches)
    torch.testing.assert_close(model[0].running_mean, torch.cat(batches).mean((0, 2)))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, torch.zeros(1)), lambda x: [x, "label"], lambda x: [x]])
def test_batches_may_be_tensors_tuples_or_lists(wrap):
    model, plain, data = conv_net(), conv_net(), rows(12, 2, 6, 6)
    recalibrate(plain, data.split(5))
    recalibrate(model, (wrap(batch) for batch in data.split(5)))
    assert torch.equal(model[1].running_mean, plain[1].running_mean)
    assert torch.equal(model[1].running_var, plain[1].running_var)


@pytest.mark.parametrize("training", [True, False])
def test_momenta_modes_parameters_and_hooks_are_put_back(training):
    model = conv_net().train(training)
    model[1].momentum = 0.3
    model[3].train(not training)
    before = copy.deepcopy(model)
    recalibrate(model, [rows(4, 2, 6, 6)])
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert model[1].momentum == 0.3
    assert not model[1]._forward_hooks and not model[1]._forward_pre_hooks
    for new, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(new, old) and new.requires_grad and new.grad is None


def test_recalibration_consumes_no_random_number():
    model = conv_net()
    before = torch.get_rng_state()
    recalibrate(model, [rows(4, 2, 6, 6)])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_the_statistics_held_before_does_not_matter():
    model, spoilt = conv_net(), conv_net()
    spoilt[1].running_mean.fill_(torch.nan)
    spoilt[1].running_var.fill_(torch.inf)
    for each in (model, spoilt):
        recalibrate(each, [rows(4, 2, 6, 6), rows(3, 2, 6, 6, seed=1)])
    assert torch.equal(model[1].running_mean, spoilt[1].running_mean)
    assert torch.equal(model[1].running_var, spoilt[1].running_var)


def test_a_norm_that_is_never_called_keeps_its_statistics():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.aux = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            x = self.norm(x)
            return (x, self.aux(x)) if self.training else x

    model = Auxiliary()
    model.aux.running_mean.fill_(3)
    recalibrate(model, [rows(4, 2)])
    assert model.aux.running_mean.tolist() == [3, 3]


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))])
def test_without_running_statistics_the_loader_is_not_read(model):
    def loader():
        raise AssertionError("read")
        yield

    recalibrate(model, loader())


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match=r"yielded no batch .*; pass one that does"):
        recalibrate(conv_net(), [])


@pytest.mark.parametrize(("batch", "kind"), [({"image": torch.ones(1)}, "dict"), ("image", "str"), ((), "tuple")])
def test_a_batch_of_another_kind_is_refused(batch, kind):
    model = conv_net()
    with pytest.raises(TypeError, match=rf"input tensor first, not a {kind}; say how"):
        recalibrate(model, [batch])
    assert model.training and model[1].momentum == 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_moved_to_the_models_device():
    model, plain, data = conv_net().cuda(), conv_net(), rows(12, 2, 6, 6)
    recalibrate(model, data.split(5))
    recalibrate(plain, data.split(5))
    torch.testing.assert_close(model[1].running_mean.cpu(), plain[1].running_mean)


def test_whatever_raises_leaves_every_statistic_as_it_was():
    model = conv_net()
    model(rows(4, 2, 6, 6))
    before = copy.deepcopy(model.state_dict())

    def broken():
        yield rows(8, 2, 6, 6, seed=3)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        recalibrate(model, broken())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_batch_of_one_sample_is_named_and_leaves_every_statistic():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"norm '1' got one value a channel, .* a batch of one sample; .*drop_last=True"
    ):
        recalibrate(model, torch.randn(9, 4).split(8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    recalibrate(conv_net(), rows(9, 2, 6, 6).split(8))  # one image has many values


def test_a_batch_of_any_kind_is_for_the_caller_to_pass_on():
    model, due, data = conv_net(), conv_net(), rows(12, 2, 6, 6)
    recalibrate(due, data.split(5))
    recalibrate(model, ({"image": each} for each in data.split(5)), forward=lambda m, batch: m(batch["image"]))
    assert torch.equal(model[1].running_mean, due[1].running_mean)


def of_rank(rank, folder, parts, found):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=len(parts))
    model = conv_net()
    recalibrate(model, parts[rank], group=distributed.group.WORLD)
    found[rank] = model[1].running_mean, model[1].running_var
    distributed.destroy_process_group()


def test_of_a_process_group_the_statistics_are_those_of_all_its_data(tmp_path):
    batches = rows(22, 2, 6, 6).split(8)
    due = conv_net()
    recalibrate(due, batches)
    with mp.get_context("spawn").Manager() as manager:
        found = manager.dict()
        mp.spawn(of_rank, (tmp_path, [batches[:1], batches[1:], []], found), nprocs=3)
        assert len(found) == 3
        for mean, variance in found.values():
            torch.testing.assert_close(mean, due[1].running_mean)
            torch.testing.assert_close(variance, due[1].running_var)
