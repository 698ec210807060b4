"""Averages of weights: the updates that count, and how; the effect of rounding; the averages of a run."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import swalp_fx
from swalp_fx import Average
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


def test_a_complex_mean_is_not_rounded_beside_others_that_are():
    """No format holds it; a model may have it frozen."""
    parameters = {"c": torch.full((2,), 0.3 + 0.7j), "w": torch.full((2,), 0.3)}
    average = Average("fixed4.2")
    for _ in range(2):
        average.update(parameters)
    for means in (average.means, average.mean("fixed4.2")):
        assert torch.equal(means["c"], parameters["c"])
        assert means["w"].tolist() == [0.25, 0.25]


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


# The effect of rounding on a mean: fixed16.8 has steps of 2^-8


def fed(average, *stretches):
    """``average`` after updates of 4,000 equal elements: (number of updates, value)."""
    for count, value in stretches:
        for _ in range(count):
            average.update({"w": torch.full((4000,), value)}, key=average.n_averaged)
    return average


@pytest.mark.parametrize(("before", "moved"), [(126, 2**-8), (128, 0.0)])
def test_rounded_to_nearest_an_update_counts_up_to_twice_the_distance_in_steps(before, moved):
    """From 0, a parameter at 1/4 = 64 steps moves the n-th mean by 64 / n steps: half a step at n = 128."""
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
    """(model, optimizer, swalp) after ``steps``; every step updates all averages."""
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


# Which updates count, and how


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_an_average_with_decay_is_the_exponential_one_without_the_bias_of_its_start(decay):
    values = [rows(5, seed=seed).double() for seed in range(30)]
    average, biased = Average(decay=decay), torch.zeros(5, dtype=torch.float64)
    for n, value in enumerate(values, start=1):
        average.update({"w": value})
        biased = decay * biased + (1 - decay) * value
        torch.testing.assert_close(average.means["w"], biased / (1 - decay**n))


@pytest.mark.parametrize(("start", "every", "counted"), [(0, 1, range(9)), (3, 1, range(3, 9)), (2, 3, (2, 5, 8))])
def test_updates_count_from_start_on_and_every_so_many(start, every, counted):
    average = Average(start=start, every=every)
    for step in range(9):
        average.update({"w": torch.tensor([float(step)])})
    assert average.n_seen == 9 and average.n_averaged == len(counted)
    torch.testing.assert_close(average.means["w"].item(), sum(counted) / len(counted))


def test_a_mean_in_float64_keeps_what_float32_loses():
    averages = [Average(dtype=dtype) for dtype in (None, torch.float64)]
    values = 1 + rows(2000, 1) * 1e-4
    for average in averages:
        for value in values:
            average.update({"w": value})
    errors = [(each.means["w"].double() - values.double().mean()).abs().item() for each in averages]
    assert averages[1].means["w"].dtype == torch.float64 and errors[1] < 1e-14 < errors[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_mean_may_live_on_another_device_than_its_parameter():
    average = Average(device="cpu")
    for value in (1.0, 3.0):
        average.update({"w": torch.full((3,), value, device="cuda")})
    assert average.means["w"].is_cpu and torch.equal(average.means["w"], torch.full((3,), 2.0))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"decay": 1.0}, "decay=1.0 is out of range; use more than 0 and less than 1"),
        ({"decay": 0.0}, "decay=0.0 is out of range"),
        ({"start": -1}, "start=-1, every=1 is out of range"),
        ({"every": 0}, "start=0, every=0 is out of range"),
        ({"start": 1.5}, "start=1.5, every=1 is out of range; use whole numbers"),  # no call has that number
        ({"every": 2.5}, "start=0, every=2.5 is out of range"),
        ({"dtype": torch.bfloat16}, "kept in float32 or float64, not torch.bfloat16; name a format"),
    ],
)
def test_numbers_without_a_meaning_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Average(**options)


# Several averages of a run


def with_averages(recipe="bfp8[0] A=float E=float"):
    parts = run(recipe, ())
    parts[2].averages["ema"] = Average(decay=0.5)
    parts[2].averages["late"] = Average("bfp6[0]", "stochastic", start=1, every=2)
    return parts


def test_update_average_updates_them_all():
    parts = with_averages()
    by_hand = Average(decay=0.5)
    run("", range(5), by_hand, run=parts)
    swalp = parts[2]
    counts = [average.n_averaged for average in (swalp.average, *swalp.averages.values())]
    assert counts == [5, 5, 2]
    assert torch.equal(swalp.averages["ema"].means["0.weight"], by_hand.means["0.weight"])
    read = swalp.averaged_model(average="late", format="bfp4[0]")
    assert torch.equal(read[0].weight, quantize(swalp.averages["late"].means["0.weight"], "bfp4[0]"))


def test_resumed_they_have_the_bits_of_a_run_never_stopped():
    whole = run("", range(6), run=with_averages())
    first = run("", range(3), run=with_averages())
    torch.manual_seed(99)
    second = with_averages()
    for part, before in zip(second, first, strict=True):
        part.load_state_dict(copy.deepcopy(before.state_dict()))
    run("", range(3, 6), run=second)
    for name, average in whole[2].averages.items():
        found = second[2].averages[name]
        assert (found.n_seen, found.n_averaged) == (average.n_seen, average.n_averaged)
        assert all(torch.equal(found.means[each], mean) for each, mean in average.means.items())


def test_a_state_with_other_averages_is_refused_by_name_and_one_of_before_there_were_any_is_read():
    parts, plain = with_averages(), run("bfp8[0] A=float E=float", ())
    run("", range(2), run=parts)
    run("", range(2), run=plain)
    state = plain[2].state_dict()
    with pytest.raises(ValueError, match=r"are none, and this SWALP's 'ema', 'late'; set swalp"):
        parts[2].load_state_dict(state)
    with pytest.raises(ValueError, match="the state's averages are 'ema', 'late', and this SWALP's none"):
        plain[2].load_state_dict(parts[2].state_dict())
    truncated = copy.deepcopy(parts[2].state_dict())
    del truncated["averages"]["ema"]["means"]["2.bias"]
    with pytest.raises(ValueError, match=r"the state's average 'ema' lacks '2.bias'"):
        parts[2].load_state_dict(truncated)
    newer = ("averages", "parameters", "fingerprints", "waiting")
    of_before = {name: value for name, value in state.items() if name not in newer}
    of_before["version"] = 2
    plain[2].load_state_dict(of_before)
    assert plain[2].n_averaged == 2


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (Average(), "has decay=0.5, and this SWALP's decay=None; make swalp"),
        (Average("bfp6[0]", decay=0.5), "has format='float', and this SWALP's format='bfp6"),
        (Average(decay=0.5, every=2), "has every=1, and this SWALP's every=2"),
    ],
)
def test_an_average_of_other_updates_is_not_resumed(other, complaint):
    parts = with_averages()
    run("", range(2), run=parts)
    state = copy.deepcopy(parts[2].state_dict())
    parts[2].averages["ema"] = other
    with pytest.raises(ValueError, match=f"the state's average 'ema' {complaint}"):
        parts[2].load_state_dict(state)
    parts[2].averages["ema"] = Average(decay=0.5, device="cpu")  # the device is no part of an average's identity
    parts[2].load_state_dict(state)


@pytest.mark.parametrize(("name", "average"), [("ema", 0.999), ("", Average()), (0, Average())])
def test_what_is_no_average_or_has_no_name_is_refused(name, average):
    """The paper's own average has the name "", in averaged_model."""
    parts = run("bfp8[0] A=float E=float", range(1))
    state = parts[2].state_dict()
    parts[2].averages[name] = average
    for use in (parts[2].update_average, lambda: parts[2].load_state_dict(state)):
        with pytest.raises(TypeError, match=rf"swalp.averages\[{name!r}\] is .*; it takes a text, not empty, and an"):
            use()
    assert parts[2].n_averaged == 1


def test_one_average_under_two_names_is_refused():
    """Each update would count twice in it."""
    for other in (Average(), None):
        *_, swalp = run("bfp8[0] A=float E=float", range(1))
        swalp.averages["first"] = swalp.average if other is None else other
        swalp.averages["second"] = other or Average()
        name = "swalp.average" if other is None else r"swalp.averages\['first'\]"
        with pytest.raises(ValueError, match=f"is {name} too, and would have each update twice"):
            swalp.update_average()
        assert swalp.n_averaged == 1


def test_a_name_that_no_average_has_and_an_average_without_an_update_are_refused():
    parts = with_averages()
    run("", range(1), run=parts)
    with pytest.raises(KeyError, match=r"there is no average 'emma'; .* has 'ema', 'late'"):
        parts[2].averaged_model(average="emma")
    with pytest.raises(ValueError, match=r"there is no average yet; call update_average\(\) .* before averaged\(\)"):
        parts[2].averaged(average="late").__enter__()


# The model with the averaged weights


def net_with_norm():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lp, swalp = swalp_fx.convert(model, optimizer, recipe="bfp6[0] rounding=nearest")
    for step in range(4):
        optimizer.zero_grad()
        lp(rows(16, 6, seed=step)).square().sum().backward()
        optimizer.step()
        swalp.update_average()
    return lp, optimizer, swalp


@pytest.mark.parametrize("loader", [None, [rows(16, 6, seed=9)]])
def test_within_averaged_the_model_is_the_average_in_low_precision_and_itself_afterwards(loader):
    lp, optimizer, swalp = net_with_norm()
    before = copy.deepcopy(lp.state_dict())
    due = swalp.averaged_model(loader, low_precision=True).eval()
    x = rows(8, 6, seed=7)
    with swalp.averaged(loader) as averaged:
        assert averaged is lp
        lp.eval()
        found = lp(x)
        for call, what in ((optimizer.step, "SGD.step()"), (swalp.update_average, "update_average()")):
            with pytest.raises(ValueError, match=re.escape(f"{what} inside `with swalp.averaged()`")):
                call()
        lp.train()
    assert torch.equal(found, due(x)) and not torch.equal(found, lp.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in lp.state_dict().items())
    lp.train()
    lp(x).sum().backward()
    optimizer.step()


def test_an_error_within_puts_the_weights_back_too():
    lp, _, swalp = net_with_norm()
    before = copy.deepcopy(lp.state_dict())
    with pytest.raises(OSError, match="the disk is gone"), swalp.averaged([rows(16, 6)]):
        raise OSError("the disk is gone")
    assert all(torch.equal(value, before[name]) for name, value in lp.state_dict().items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_a_copy_of_a_run_is_not_made_within_averaged(duplicate):
    """The copy would have the weights of the average for good, but the masters of the run."""
    parts = run("bfp8[0] A=float E=float", range(2), Average())
    with parts[2].averaged():
        with pytest.raises(ValueError, match=r"a copy of swalp inside `with swalp.averaged\(\)` would use the"):
            duplicate(parts)
        assert torch.equal(copy.deepcopy(parts[0])[0].weight, parts[0][0].weight)  # the model alone is copied
    duplicate(parts)


def test_a_state_is_not_loaded_within_averaged():
    """Weights loaded there are gone afterwards, so model and average would not fit together."""
    _, _, swalp = run("bfp8[0] A=float E=float", range(2))
    state = copy.deepcopy(swalp.state_dict())
    with swalp.averaged(), pytest.raises(ValueError, match=r"load_state_dict\(\) inside `with swalp.averaged\(\)`"):
        swalp.load_state_dict(state)
    swalp.load_state_dict(state)


class Counting(nn.Module):
    """Has buffers that its forward sets: to another tensor, and for the first time."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)

    def forward(self, x):
        self.calls = self.calls + 1
        self.last = x.amax()
        return self.layer(x)


def test_buffers_that_a_forward_sets_are_put_back_too():
    model = Counting()
    lp, swalp = swalp_fx.convert(model, torch.optim.SGD(model.parameters(), lr=0.1), "W=bfp8[0]")
    swalp.average.update(dict(lp.named_parameters()))
    with swalp.averaged():
        lp(rows(4, 6))
        assert lp.calls == 1 and lp.last is not None
    assert lp.calls == 0 and lp.last is None


def test_an_averaged_model_in_low_precision_computes_and_is_recalibrated_in_the_recipe():
    lp, _, swalp = net_with_norm()
    data, x = rows(32, 6, seed=9), rows(8, 6, seed=7)
    low, plain = (swalp.averaged_model([data], low_precision=low).eval() for low in (True, False))
    hidden = quantize(
        nn.functional.linear(data, *(quantize(p.detach(), "bfp6[0]") for p in low[0].parameters())), "bfp6[0]"
    )
    torch.testing.assert_close(low[1].running_mean, hidden.mean(0))
    assert not torch.equal(low[1].running_mean, plain[1].running_mean)
    assert torch.equal(low[0].weight, plain[0].weight) and not torch.equal(low(x), plain(x))
    assert low.graphs and not hasattr(plain, "graphs") and lp.training


@pytest.mark.parametrize("low_precision", [False, True])
def test_a_pruned_model_is_averaged_with_its_mask(low_precision):
    """PyTorch's deepcopy refuses the weight that the mask gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    lp, swalp = swalp_fx.convert(model, optimizer, recipe="bfp8[0] rounding=nearest")
    weights = []
    for _ in range(3):
        lp(rows(4, 6)).sum().backward()
        optimizer.step()
        swalp.update_average()
        weights.append(model[0].weight_orig.detach().clone())
    averaged = swalp.averaged_model(low_precision=low_precision)
    averaged(rows(4, 6))
    torch.testing.assert_close(averaged[0].weight_orig.detach(), torch.stack(weights).mean(0))
    assert torch.equal(averaged[0].weight == 0, model[0].weight_mask == 0)
    assert model[0].weight.requires_grad


def test_batches_of_any_kind_are_for_the_caller_to_pass_on():
    _, _, swalp = net_with_norm()
    data = rows(32, 6, seed=9)
    given = [{"x": each, "label": "a"} for each in data.split(16)]
    found = swalp.averaged_model(given, forward=lambda model, batch: model(batch["x"]))
    due = swalp.averaged_model(data.split(16))
    assert torch.equal(found[1].running_mean, due[1].running_mean)
