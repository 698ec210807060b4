"""Half-precision parameters with float32 masters: the step, its states, and the state after an exception."""

import copy
import io
import warnings

import pytest
import torch
from stepping import MEANS, OPTIMIZERS, RECIPE, Breaks, fitted, same, values
from torch import nn

from swalp_fx.ops import quantize
from swalp_fx.optimizer import SWALP
from swalp_fx.random import fold_in
from swalp_fx.recipe import Recipe

HALF = [torch.bfloat16, torch.float16]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*divides one moment by another"),
]


def net(dtype, seed=0):
    """The first layer of each dtype, the second float32: half-precision parameters beside others."""
    torch.manual_seed(seed)
    return nn.ModuleList([nn.Linear(6, 8).to(dtype), nn.Linear(8, 3)])


def loss_of(model, step):
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
    hidden = model[0](x.to(model[0].weight.dtype)).relu()
    return model[1](hidden.to(model[1].weight.dtype)).square().mean()


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def attached(model, make=OPTIMIZERS["momentum"], recipe=RECIPE, **changes):
    optimizer = make(model.parameters())
    swalp = SWALP(model, Recipe.parse(fitted(recipe, optimizer), **{"master": "float", **changes}), seed=7)
    swalp.attach(optimizer)
    return model, optimizer, swalp


def on_masters(model, make, recipe, steps, backend=None):
    """The plain loop: an optimizer of float32 copies, and a model that gets their values. (masters, optimizer)"""
    masters = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
    optimizer = make(masters)
    if backend is not None:
        optimizer.step = torch.compile(optimizer.step, backend=backend)

    def q(tensor, quantizer, role, index):
        rounding = quantizer.rounding or recipe.rounding
        return quantize(tensor, quantizer.format, rounding, key=key, stream=role * 2**32 + index)

    for step in steps:
        key = fold_in(7, step)
        model.zero_grad()
        loss_of(model, step).backward()
        for i, (p, master) in enumerate(zip(model.parameters(), masters, strict=True)):
            master.grad = q(p.grad, recipe.gradient, 1, i).float()
        optimizer.step()
        for i, (p, master) in enumerate(zip(model.parameters(), masters, strict=True)):
            master.data.copy_(q(master.data, recipe.master, 2, i))
            p.data.copy_(q(master.data, recipe.weight, 3, i))
            moments = {k: v for k, v in optimizer.state.get(master, {}).items() if k != "step" and v is not None}
            for slot, name in enumerate(sorted(moments)):
                quantizer = recipe.momentum if name in MEANS else recipe.second_moment
                moments[name].copy_(q(moments[name], quantizer, 4 + slot, i))  # in place: it is compiled once
    return masters, optimizer


@pytest.mark.parametrize("master", ["float", "fixed20.14"])
@pytest.mark.parametrize("recipe", [RECIPE, "float"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_the_optimizers_on_float32_masters(name, dtype, recipe, master):
    model, optimizer, swalp = attached(net(dtype), OPTIMIZERS[name], recipe, master=master)
    train(model, optimizer, range(4))
    plain = net(dtype)
    masters, reference = on_masters(plain, OPTIMIZERS[name], swalp.recipe, range(4))
    assert same(values(model), values(plain))
    assert same(list(swalp.state_dict()["masters"].values()), [each.detach() for each in masters])
    assert same(optimizer.state_dict()["state"], reference.state_dict()["state"])
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())


@pytest.mark.parametrize("dtype", HALF)
def test_updates_below_a_half_step_of_the_dtype_add_up(dtype):
    model = nn.ParameterList([torch.ones(4, dtype=dtype)])
    _, optimizer, swalp = attached(model, lambda p: torch.optim.SGD(p, lr=1e-4), "float")
    float32 = torch.ones(4)
    for _ in range(1000):
        model[0].grad = torch.full((4,), -1.0, dtype=dtype)
        optimizer.step()
        float32.add_(torch.ones(4), alpha=1e-4)
    assert same(swalp.state_dict()["masters"]["0"], float32)
    assert same(model[0].detach(), float32.to(dtype))
    assert abs(model[0][0].item() - 1.1) < 2e-3


def test_the_parameters_stay_the_ones_that_a_compiled_forward_and_a_tie_hold():
    model = net(torch.bfloat16)
    model.append(nn.Linear(6, 8).bfloat16())
    model[2].weight = model[0].weight
    _, optimizer, _ = attached(model, OPTIMIZERS["adam"])
    runs = []

    def counted(graph, inputs):
        runs.append(graph)
        return graph

    compiled = torch.compile(lambda x: model[0](x).sum() + model[2](x).sum(), backend=counted)
    places = [(p, p.data_ptr(), p.dtype) for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        compiled(torch.ones(2, 6).bfloat16()).backward()
        optimizer.step()
    assert len(runs) == 1
    assert places == [(p, p.data_ptr(), p.dtype) for p in model.parameters()]
    assert same(model[2].weight.detach(), model[0].weight.detach())


def test_a_closure_may_zero_the_gradients():
    model, optimizer, _ = attached(net(torch.bfloat16))

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    optimizer.step(closure)
    other, its_optimizer, _ = attached(net(torch.bfloat16))
    train(other, its_optimizer, [0])
    assert same(values(model, optimizer), values(other, its_optimizer))


class Counts(torch.optim.SGD):
    """Keeps numbers in its groups and on itself, as schedule-free and Prodigy do, and steps by them."""

    taken = 0

    def step(self, closure=None):
        self.taken += 1
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
            group["lr"] = 0.1 / group["k"]
        self.state["of all"] = {"k": self.taken}
        return super().step(closure)


def test_what_an_optimizer_keeps_of_its_own_goes_on():
    model, optimizer, swalp = attached(net(torch.bfloat16), lambda p: Counts(p, lr=1.0, momentum=0.9))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # sets a step on the optimizer that is its own
    train(model, optimizer, range(3))
    assert (optimizer.taken, optimizer.param_groups[0]["k"], optimizer.state["of all"]) == (3, 3, {"k": 3})
    plain = net(torch.bfloat16)
    masters, _ = on_masters(plain, lambda p: Counts(p, lr=1.0, momentum=0.9), swalp.recipe, range(3))
    assert same(list(swalp.state_dict()["masters"].values()), [each.detach() for each in masters])


def test_a_step_that_raised_is_no_step():
    model, optimizer, swalp = attached(net(torch.bfloat16).bfloat16(), lambda p: Breaks(p, lr=0.1, momentum=0.9))
    train(model, optimizer, [0])
    before = copy.deepcopy(values(model, optimizer, swalp))
    optimizer.broken = True
    with pytest.raises(MemoryError):
        train(model, optimizer, [1])
    assert same(values(model, optimizer, swalp), before)
    assert [p for group in optimizer.param_groups for p in group["params"]] == list(model.parameters())
    optimizer.broken = False
    train(model, optimizer, [1, 2])
    whole = attached(net(torch.bfloat16).bfloat16(), lambda p: Breaks(p, lr=0.1, momentum=0.9))
    train(*whole[:2], range(3))
    assert same(values(model, optimizer, swalp), values(*whole))


def saved(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["momentum", "amsgrad", "fused adam"])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(name, dtype):
    whole = attached(net(dtype), OPTIMIZERS[name], M="float")
    train(*whole[:2], range(2))
    states = [saved(part.state_dict()) for part in whole]
    train(*whole[:2], range(2, 4))
    again = attached(net(dtype, 99), OPTIMIZERS[name], M="float")
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(*again[:2], range(2, 4))
    assert same(values(*again), values(*whole))
    loaded = next(iter(again[1].state.values()))
    assert {v.dtype for v in loaded.values() if isinstance(v, torch.Tensor)} == {torch.float32}


def test_copies_go_on_alone():
    parts = attached(net(torch.bfloat16))
    train(*parts[:2], range(2))
    twin = copy.deepcopy(parts)
    for each in (parts, twin):
        train(*each[:2], range(2, 4))
    assert same(values(*parts), values(*twin))


def test_an_older_state_whose_masters_are_as_narrow_as_the_parameters_loads():
    parts = attached(net(torch.bfloat16))
    train(*parts[:2], range(1))
    state = parts[2].state_dict()
    dtypes = {name: p.dtype for name, p in parts[0].named_parameters()}
    narrow = {name: master.to(dtypes[name]) for name, master in state["masters"].items()}
    parts[2].load_state_dict(state | {"masters": narrow})
    assert same(parts[2].state_dict()["masters"], {name: master.float() for name, master in narrow.items()})


def test_states_that_were_loaded_in_half_precision_are_warned_of():
    parts = attached(net(torch.bfloat16))
    train(*parts[:2], range(1))
    states = [copy.deepcopy(part.state_dict()) for part in parts]
    model = net(torch.bfloat16)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    optimizer.load_state_dict(states[1])  # too early
    swalp = SWALP(model, parts[2].recipe)
    swalp.attach(optimizer)
    swalp.load_state_dict(states[2])
    message = r"state 'momentum_buffer' of '0.weight' was in torch.bfloat16 and goes on in float32; .* load .* after"
    with pytest.warns(UserWarning, match=message):
        train(model, optimizer, [1])


@pytest.mark.parametrize("name", ["adam", "fused adam", "momentum"])
def test_the_optimizer_is_ordinary_after_detach(name):
    model, optimizer, swalp = attached(net(torch.bfloat16), OPTIMIZERS[name])
    train(model, optimizer, range(2))
    optimizer.state["of all"] = {"k": 1}
    plain = copy.deepcopy(model)
    reference = OPTIMIZERS[name](plain.parameters())
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    swalp.detach()
    train(model, optimizer, range(2, 4))
    train(plain, reference, range(2, 4))
    assert same(values(model, optimizer), values(plain, reference))


@pytest.mark.filterwarnings("ignore:.*Profiler")
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_step_is_compiled_once(name):
    torch._dynamo.reset()
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph

    model, optimizer, swalp = attached(net(torch.bfloat16), OPTIMIZERS[name])
    optimizer.step = torch.compile(optimizer.step, backend=counted)
    train(model, optimizer, range(12))
    assert 1 <= len(graphs) <= 2  # the first step makes the states
    plain = net(torch.bfloat16)
    masters, _ = on_masters(plain, OPTIMIZERS[name], swalp.recipe, range(12), backend="eager")
    assert same(values(model), values(plain))
    assert same(list(swalp.state_dict()["masters"].values()), [each.detach() for each in masters])


def test_a_step_holds_no_memory_that_its_parameters_do_not_need():
    model, optimizer, swalp = attached(net(torch.bfloat16), OPTIMIZERS["adam"])
    train(model, optimizer, range(2))
    stand_ins = swalp._twin.stand_ins
    assert len(stand_ins) == 4 and not any(p.numel() or p.grad is not None for p in stand_ins.values())
