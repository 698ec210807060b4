"""The average against exact means, and batch-norm statistics against a direct computation."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from swalp_fx.averaging import Average, recalibrate
from swalp_fx.formats import parse
from swalp_fx.ops import quantize


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The mean


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_two_thousand_updates_have_their_mean(dtype):
    average, parameter = Average(), torch.ones(3, dtype=dtype)
    for value in (1.0, 1.25):
        parameter.fill_(value)
        for _ in range(1000):
            average.update({"w": parameter})
    torch.testing.assert_close(average.means["w"].double(), torch.full((3,), 1.125).double(), rtol=1e-5, atol=0)
    assert average.n_averaged == 2000


def test_torch_averages_bfloat16_in_bfloat16():
    """Why the mean has its own dtype; if torch changes, this module can go."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    theirs, ours = AveragedModel(model), Average()
    for value in (1.0, 1.25):
        model.weight.data.fill_(value)
        for _ in range(1000):
            theirs.update_parameters(model)
            ours.update(dict(model.named_parameters()))
    assert theirs.module.weight.item() == 1.0
    assert ours.applied_to(model).weight.item() == 1.125


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.complex64, torch.complex64),
    ],
)
def test_the_mean_is_float32_or_wider(dtype, expected):
    average = Average()
    average.update({"w": torch.ones(2, dtype=dtype)})
    assert average.means["w"].dtype == expected


def test_an_integer_parameter_has_no_mean():
    average = Average()
    average.update({"w": torch.ones(2), "codes": torch.ones(2, dtype=torch.int8)})
    assert list(average.means) == ["w"]


def test_the_mean_is_a_copy():
    average, parameter = Average(), torch.ones(2)
    average.update({"w": parameter})
    parameter.fill_(5)
    assert average.means["w"].tolist() == [1, 1]


def test_equal_weights_are_their_own_mean():
    average, parameter = Average(), rows(50)
    for _ in range(30):
        average.update({"w": parameter})
    assert torch.equal(average.means["w"], parameter)


@pytest.mark.parametrize("spec", ["bfp6", "bfp8[0]", "fixed8.6", "e4m3"])
def test_a_quantized_mean_is_rounded_to_nearest_after_every_update(spec):
    average, mean = Average(parse(spec)), None
    for n, seed in enumerate(range(5), start=1):
        w = rows(4, 6, seed=seed)
        average.update({"w": w})
        mean = quantize(w if mean is None else mean.lerp(w, 1 / n), spec)
        assert torch.equal(average.means["w"], mean)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight


def test_applied_to_a_copy_with_tied_parameters_still_tied():
    model = Tied()
    average = Average()
    average.update(dict(model.named_parameters()))
    with torch.no_grad():
        model.embed.weight.add_(1)
    average.update(dict(model.named_parameters()))
    averaged = average.applied_to(model)
    assert averaged.head.weight is averaged.embed.weight
    torch.testing.assert_close(averaged.head.weight, model.head.weight - 0.5)
    assert averaged.head.weight.data_ptr() != model.head.weight.data_ptr()


def test_applied_keeps_dtype_buffers_and_mode():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
    average = Average()
    average.update(dict(model.named_parameters()))
    model[1].running_mean.fill_(7)
    model.eval()
    averaged = average.applied_to(model)
    assert averaged[0].weight.dtype == torch.bfloat16
    assert averaged[1].running_mean.tolist() == [7] * 4
    assert not averaged.training and not averaged[1].training


# Batch-norm statistics


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
    with pytest.raises(TypeError, match=rf"input tensor first, not a {kind}; map it"):
        recalibrate(model, [batch])
    assert model.training and model[1].momentum == 0.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_are_moved_to_the_models_device():
    model, plain, data = conv_net().cuda(), conv_net(), rows(12, 2, 6, 6)
    recalibrate(model, data.split(5))
    recalibrate(plain, data.split(5))
    torch.testing.assert_close(model[1].running_mean.cpu(), plain[1].running_mean)
