"""The optimizer pass against a plain loop of Algorithm 2, bit for bit."""

import copy

import pytest
import torch
from stepping import MASTERS, OPTIMIZERS, RECIPE, algorithm_2, loss_of, net, run_on, same, setup, train, values
from torch import nn

from swalp_fx.ops import quantize
from swalp_fx.optimizer import SWALP
from swalp_fx.random import fold_in
from swalp_fx.recipe import Recipe


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_algorithm_2(name, master, rounding):
    model, optimizer, swalp = setup(OPTIMIZERS[name], rounding=rounding, **MASTERS[master])
    train(model, optimizer, range(4))

    plain = net()
    reference = OPTIMIZERS[name](plain.parameters())
    masters = algorithm_2(plain, reference, swalp.recipe, 7, range(4))

    assert same(values(model, optimizer), values(plain, reference))
    assert same([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert same(list(swalp.state_dict()["masters"].values()), masters or [])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_float_recipe_is_the_plain_optimizer(name):
    model, optimizer, _ = setup(OPTIMIZERS[name], "float")
    plain = net()
    reference = OPTIMIZERS[name](plain.parameters())
    for each in (model, optimizer), (plain, reference):
        train(*each, range(3))
    assert same(values(model, optimizer), values(plain, reference))


def test_float_masters_follow_the_plain_optimizer():
    """With gradients exact, the masters of a linear loss are the plain run's weights."""
    model = nn.Linear(4, 2)
    plain = copy.deepcopy(model)
    _, optimizer, swalp = setup(recipe="W=bfp4", model=model, master="float")
    reference = OPTIMIZERS["momentum"](plain.parameters())
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    for step in range(3):
        for each, each_optimizer in (model, optimizer), (plain, reference):
            each_optimizer.zero_grad()
            each(x * step).sum().backward()
            each_optimizer.step()
    assert same(swalp.state_dict()["masters"], dict(plain.named_parameters()))
    assert torch.equal(model.weight, quantize(model.weight, "bfp4"))
    assert not torch.equal(model.weight, plain.weight)


def test_attaching_changes_no_value_and_draws_nothing():
    model = net()
    swalp = SWALP(model, Recipe.parse(RECIPE, master="float"))
    before, rng = copy.deepcopy(values(model)), torch.get_rng_state()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    swalp.attach(optimizer)
    assert same(values(model), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not optimizer.state


def test_a_step_draws_nothing_from_torch():
    model, optimizer, _ = setup()
    loss_of(model, 0).backward()
    rng = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), rng)


# Which parameters


def test_frozen_and_foreign_parameters_are_untouched():
    model = net()
    model[0].weight.requires_grad_(False)
    head = list(model[3].parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    setup_model, optimizer, _ = setup(lambda _: torch.optim.SGD([model[0].weight, *head], lr=0.1), model=model)
    train(setup_model, optimizer, range(2))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"3.weight", "3.bias"}


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_parameter_without_gradient_is_left_alone(name, master):
    """Others write into such parameters: averages, that shall not end on the grid."""
    model, optimizer, swalp = setup(OPTIMIZERS[name], "bfp4", **MASTERS[master])
    before = model[0].weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model[3](torch.ones(2, 8)).sum().backward()
        optimizer.step()
    assert torch.equal(model[0].weight, before) and model[0].weight not in optimizer.state
    assert set(swalp._parameters.masters) == (set() if master == "none" else {"3.weight", "3.bias"})
    assert torch.equal(model[3].weight, quantize(model[3].weight, "bfp4"))


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_parameter_frozen_after_its_backward_is_stepped_in_low_precision(name, master):
    """An optimizer steps every parameter with a gradient, frozen or not."""
    runs = [setup(OPTIMIZERS[name], **MASTERS[master]) for _ in range(2)]
    for freeze, (model, optimizer, _) in zip((False, True), runs, strict=True):
        train(model, optimizer, range(2))
        loss_of(model, 2).backward()
        model[0].weight.requires_grad_(not freeze)
        optimizer.step()
    (model, _, swalp), (frozen, _, of_frozen) = runs
    assert same(values(model), values(frozen))
    assert same(swalp.state_dict()["masters"], of_frozen.state_dict()["masters"])


def test_a_tied_parameter_is_rounded_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

    model, optimizer, swalp = setup(OPTIMIZERS["sgd"], "W=bfp4", Tied())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # only the weights are rounded
    for index, (name, p) in enumerate(model.named_parameters()):
        rounded = quantize(before[name], "bfp4", "stochastic", key=fold_in(7, 0), stream=3 << 32 | index)
        assert torch.equal(p, rounded)
    swalp.update_average()
    assert list(swalp.state_dict()["average"]) == ["first.weight", "first.bias", "second.bias"]
    averaged = swalp.averaged_model()
    assert averaged.first.weight is averaged.second.weight


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda p: torch.optim.NAdam(p, lr=0.01),
        lambda p: torch.optim.ASGD(p, lr=0.01),
    ],
)
def test_counters_of_a_parameter_without_dimensions_are_no_momentum(make):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7))

    def run(recipe):
        model, optimizer, _ = setup(make, recipe, Scale())
        for _ in range(5):
            model.scale.grad = torch.tensor(0.1)  # given, not computed: the same in both runs
            optimizer.step()
        state = optimizer.state[model.scale]
        return {name: state[name] for name in ("step", "eta", "mu", "mu_product") if name in state}

    assert same(run("bfp2 W=float A=float G=float"), run("float"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("master", ["none", "float"])
def test_other_dtypes_step_and_keep_their_dtype(dtype, master):
    model = nn.Linear(4, 2).to(dtype)
    _, optimizer, swalp = setup(model=model, **MASTERS[master])
    model(torch.ones(3, 4, dtype=dtype)).sum().backward()
    optimizer.step()
    assert torch.equal(model.weight, quantize(model.weight, "bfp8[0]")) and model.weight.dtype == dtype
    swalp.update_average()
    assert swalp.averaged_model().weight.dtype == dtype


# The average


def test_the_average_is_of_the_weights_after_each_step():
    model, optimizer, swalp = setup(average="bfp12")
    assert swalp.n_averaged == 0
    weights = []
    for step in range(4):
        train(model, optimizer, [step])
        swalp.update_average()
        weights.append(model[0].weight.detach().clone())
    assert swalp.n_averaged == 4
    mean = torch.zeros(8, 6)
    for n, weight in enumerate(weights, start=1):
        mean = quantize(mean.lerp(weight, 1 / n), "bfp12")
    averaged = swalp.averaged_model()
    assert torch.equal(averaged[0].weight, mean)
    assert torch.equal(model[0].weight, weights[-1])
    assert same(dict(averaged.named_buffers()), dict(model.named_buffers()))


def test_the_averaged_model_has_statistics_of_its_own_weights():
    model, optimizer, swalp = setup()
    for step in range(3):
        train(model, optimizer, [step])
        swalp.update_average()
    live = {name: b.clone() for name, b in model.named_buffers()}
    data = torch.randn(20, 6, generator=torch.Generator().manual_seed(3))
    averaged = swalp.averaged_model((x, None) for x in data.split(8))
    with torch.no_grad():
        torch.testing.assert_close(averaged[1].running_mean, averaged[0](data).mean(0))
    assert same(dict(model.named_buffers()), live)


# CUDA


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
def test_rounding_on_cuda_draws_what_the_cpu_draws():
    def rounded(device):
        model = net().to(device)
        _, optimizer, swalp = setup(model=model, master="fixed16.12")
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.123)
        optimizer.step()
        return [dict(model.to("cpu").named_parameters()), {k: v.cpu() for k, v in swalp._parameters.masters.items()}]

    assert same(rounded("cuda"), rounded("cpu"))


@pytest.mark.gpu
@needs_cuda
def test_a_model_may_move_after_its_state_was_loaded():
    first = setup(master="float")
    run_on(*first, range(2))
    model = net(99)
    swalp = SWALP(model, first[2].recipe)
    swalp.load_state_dict(first[2].state_dict())
    model.cuda()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    swalp.attach(optimizer)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    swalp.update_average()
    assert all(t.is_cuda for t in swalp.state_dict()["masters"].values())
    assert all(t.is_cuda for t in swalp.state_dict()["average"].values())


@pytest.mark.gpu
@needs_cuda
def test_a_step_captured_in_a_graph_is_refused():
    model = net().cuda()
    _, optimizer, _ = setup(lambda p: torch.optim.Adam(p, capturable=True), model=model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"captured in a CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        optimizer.step()
