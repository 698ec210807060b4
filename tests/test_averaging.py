"""The average and what rounding does to it, against exact means; batch-norm statistics against a direct computation."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import swalp_fx
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


# What rounding does to a mean: fixed16.8 has steps of 2^-8


def fed(average, *stretches):
    """``average`` after updates of 4,000 equal elements: (number of updates, value)."""
    for count, value in stretches:
        for _ in range(count):
            average.update({"w": torch.full((4000,), value)}, key=average.n_averaged)
    return average


@pytest.mark.parametrize(("before", "moved"), [(126, 2**-8), (128, 0.0)])
def test_rounded_to_nearest_an_update_counts_up_to_twice_the_distance_in_steps(before, moved):
    """From 0, a parameter at 1/4 = 64 steps moves the n-th mean by 64 / n steps, which is half a step at n = 128."""
    average = fed(Average("fixed16.8"), (before, 0.0), (1, 0.25))
    assert average.means["w"].unique().tolist() == [moved]


def test_rounded_to_nearest_a_mean_stalls_for_good():
    assert fed(Average("fixed16.8"), (128, 0.0), (128, 0.25)).means["w"].unique().tolist() == [0]


def test_rounded_stochastically_a_mean_does_not_stall():
    mean = fed(Average("fixed16.8", "stochastic"), (128, 0.0), (128, 0.25)).means["w"]
    assert torch.equal(quantize(mean, "fixed16.8"), mean) and len(mean.unique()) > 1
    error = mean.std() / len(mean) ** 0.5
    assert abs(mean.mean() - 0.125) < 4 * error < 1e-3


def test_rounded_when_it_is_read_a_mean_is_exact_to_half_a_step():
    average = fed(Average(), (128, 0.0), (127, 0.25))
    assert average.means["w"].unique().tolist() == pytest.approx([127 / 255 / 4])
    assert average.mean("fixed16.8")["w"].unique().tolist() == [32 / 256]


@pytest.mark.parametrize("rounding", ["stochastic", "stochastic8", "down"])
def test_each_update_is_rounded_as_it_says(rounding):
    average, mean = Average("bfp6[0]", rounding), None
    for n in range(1, 5):
        parameters = {"b": rows(3, seed=n), "w": rows(4, 6, seed=-n)}
        average.update(parameters, key=n)
        w = parameters["w"]
        mean = quantize(w if mean is None else mean.lerp(w, 1 / n), "bfp6[0]", rounding, key=n, stream=1)
        assert torch.equal(average.means["w"], mean)


def test_parameters_of_other_dtypes_and_in_another_order_are_averaged_side_by_side():
    average = Average("bfp8", "stochastic")
    first = {"single": rows(5), "codes": torch.ones(2, dtype=torch.int8), "double": rows(5, seed=1).double()}
    average.update(first, key=0)
    average.update(dict(reversed(first.items())), key=1)
    assert {name: mean.dtype for name, mean in average.means.items()} == {
        "single": torch.float32,
        "double": torch.float64,
    }
    for name in ("single", "double"):
        assert torch.equal(quantize(average.means[name], "bfp8"), average.means[name])
        torch.testing.assert_close(average.means[name], first[name], rtol=0, atol=0.05)


def test_without_a_key_torchs_generator_rules_stochastic_rounding():
    means = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        average = Average("bfp4", "stochastic")
        average.update({"w": rows(100)})
        means.append(average.means["w"])
    assert torch.equal(means[0], means[1]) and not torch.equal(means[0], means[2])


@pytest.mark.parametrize("spec", ["float", "bfp6[0]"])
def test_the_mean_that_is_read_is_a_copy_and_leaves_the_average_as_it_was(spec):
    average = Average()
    average.update({"w": rows(4, 6), "z": torch.tensor([1 + 2j])} if spec == "float" else {"w": rows(4, 6)})
    read = average.mean(spec)
    assert read.keys() == average.means.keys()
    assert torch.equal(read["w"], quantize(rows(4, 6), spec))
    read["w"].zero_()
    assert torch.equal(average.means["w"], rows(4, 6))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Average("bpf8"), "unknown format spec 'bpf8'"),
        (lambda: Average("bfp8", "random"), "unknown rounding 'random'"),
        (lambda: Average().mean("bpf8"), "unknown format spec 'bpf8'"),
    ],
)
def test_an_unknown_format_or_rounding_is_refused(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()


# The averages of one run


def run(recipe, steps, *averages, run=None):
    """(model, optimizer, swalp) after ``steps``, each of which all averages take part in."""
    if run is None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run = model, optimizer, swalp_fx.convert(model, optimizer, recipe=recipe).swalp
    model, optimizer, swalp = run
    for step in steps:
        optimizer.zero_grad()
        model(rows(4, 6, seed=step)).square().sum().backward()
        optimizer.step()
        swalp.update_average()
        for average in averages:
            average.update(dict(model.named_parameters()), key=step)
    return run


def test_a_run_has_as_many_averages_as_one_makes():
    averages = [Average(), Average("bfp9[0]"), Average("bfp9[0]", "stochastic")]
    model, _, swalp = run("bfp8[0] A=float E=float", range(5), *averages)
    alone = Average("bfp9[0]")
    run("bfp8[0] A=float E=float", range(5), alone)
    assert [average.n_averaged for average in averages] == [5, 5, 5]
    means = [average.means["0.weight"] for average in (*averages, swalp.average, alone)]
    assert torch.equal(means[0], means[3]) and torch.equal(means[1], means[4])
    assert len({mean.sum().item() for mean in means[:3]}) == 3
    assert torch.equal(averages[1].applied_to(model)[0].weight, means[1])


def test_the_average_of_a_run_is_public_and_rounded_when_it_is_read():
    model, _, swalp = run("bfp8[0] A=float E=float", range(3))
    assert isinstance(swalp.average, Average) and swalp.average.n_averaged == 3
    assert list(swalp.average.mean()) == [name for name, _ in model.named_parameters()]
    for name, parameter in swalp.averaged_model(format="bfp5[0]").named_parameters():
        assert torch.equal(parameter, swalp.average.mean("bfp5[0]")[name])
        assert torch.equal(parameter, quantize(swalp.average.means[name], "bfp5[0]"))


def test_a_resumed_average_has_the_bits_of_one_never_stopped():
    recipe = "bfp8[0] A=float E=float average=bfp6[0]~stochastic"
    whole = run(recipe, range(5))
    first = run(recipe, range(2))
    torch.manual_seed(99)
    second = run(recipe, ())
    for part, before in zip(second, first, strict=True):
        part.load_state_dict(copy.deepcopy(before.state_dict()))
    run(recipe, range(2, 5), run=second)
    means = [each.average.means for each in (whole[2], second[2])]
    assert all(torch.equal(means[0][name], means[1][name]) for name in means[0])
    nearest = run(recipe.replace("stochastic", "nearest"), range(5))[2].average.means
    assert not torch.equal(nearest["0.weight"], means[0]["0.weight"])


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
