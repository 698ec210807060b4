"""One pass of SGD: the bits of a step by hooks, in every format; steps left to the hooks; the state after it."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from swalp_fx import Recipe
from swalp_fx.optimizer import SWALP, algorithm, one_pass

pytestmark = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
    reason="torch's own kernels multiply and add with one rounding only where the processor has AVX2",
)

# One of each kind of scale and of cut: by elements, by rows, by tiles, whole; and one with a short last tile.
FORMATS = [
    "fixed8.6",
    "e4m3",
    "bf16",
    "bfp8[0]",
    "bfp8",
    "bfp4+twos",
    "bfp8[-1:16]",
    "mxfp8",
    "bfp6[-1:7]",
    "int8[0]",
    "nvfp4",
]
GROUPS = {
    "plain": {},
    "decay": {"weight_decay": 1e-2},
    "momentum": {"momentum": 0.9, "weight_decay": 5e-4},
    "damped": {"momentum": 0.8, "dampening": 0.3},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    "maximize": {"momentum": 0.9, "weight_decay": 1e-2, "maximize": True},
    "for each": {"momentum": 0.9, "foreach": True},
}
# Around a thread's share and a vector's width; rows longer and shorter; channels last; without dimensions; empty.
SHAPES = [(33, 1000), (7, 3, 3, 3), (2, 70001), (129,), (1,), (), (0, 4), (3, 0), (1, 40000)]


class Weights(nn.Module):
    def __init__(self, shapes=SHAPES):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.all = nn.ParameterList(torch.randn(shape, generator=generator) for shape in shapes)
        self.all.append(torch.randn(8, 6, 5, 3, generator=generator).contiguous(memory_format=torch.channels_last))

    def forward(self):
        return torch.stack([(p.square() * torch.arange(p.numel()).view(p.shape).sin()).sum() for p in self.all]).sum()


def attached(make, model, recipe="bfp8[0]", **changes):
    """(an optimizer that ``make`` gives from ``model``, the SWALP on its steps), with the same seed each time."""
    torch.manual_seed(3)
    stepper, swalp = make(model), SWALP(model, Recipe.parse(recipe), **changes)
    swalp.attach(stepper)
    return stepper, swalp


def run(make, recipe="bfp8[0]", model=None, steps=4, **changes):
    """Every number that some steps leave behind; ``make`` gives an optimizer from a model."""
    model = Weights() if model is None else copy.deepcopy(model)
    stepper, swalp = attached(make, model, recipe, **changes)
    for _ in range(steps):
        stepper.zero_grad()
        model().backward()
        stepper.step()
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    gradients = {f"{name}.grad": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    momenta = {i: each.get("momentum_buffer") for i, each in stepper.state_dict()["state"].items()}
    masters = {f"{name}.master": tensor for name, tensor in swalp.state_dict()["masters"].items()}
    return {**state, **gradients, **momenta, **masters}


def group_of(**changes):
    return lambda model: torch.optim.SGD(model.parameters(), lr=0.05, **changes)


@pytest.fixture
def passes(monkeypatch):
    """How many steps were one pass."""
    counted = []

    def counting(*arguments):
        stepped = one_pass.in_one_pass(*arguments)
        counted.append(bool(stepped))
        return stepped

    monkeypatch.setattr(algorithm, "in_one_pass", counting)
    return counted


@pytest.fixture
def by_hooks(monkeypatch):
    def run_by_hooks(*arguments, **keywords):
        with monkeypatch.context() as patched:
            patched.setattr(algorithm, "in_one_pass", lambda *arguments: {})
            return run(*arguments, **keywords)

    return run_by_hooks


def assert_same(found, due):
    assert found.keys() == due.keys()
    for name, tensor in due.items():
        assert (found[name] is None) == (tensor is None), name
        if tensor is not None:
            assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name
            assert found[name].stride() == tensor.stride()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "stochastic8", "toward_zero"])
@pytest.mark.parametrize("spec", FORMATS)
def test_in_every_format_it_is_the_step_by_hooks(spec, rounding, passes, by_hooks):
    make, recipe = group_of(**GROUPS["momentum"]), f"{spec} rounding={rounding}"
    assert_same(run(make, recipe), by_hooks(make, recipe))
    assert passes == [False, True, True, True]  # the first step makes the momenta


@pytest.mark.parametrize("master", ["", " master=float"])
@pytest.mark.parametrize("roles", ["bfp8[0]", "W=bfp8[0]", "bfp8[0] W=float", "E=bfp8[0] M=bfp8[0]"])
@pytest.mark.parametrize("name", GROUPS)
def test_of_every_group_it_is_the_step_by_hooks(name, roles, master, passes, by_hooks):
    make = group_of(**GROUPS[name])
    assert_same(run(make, roles + master), by_hooks(make, roles + master))
    has_momentum = "momentum" in GROUPS[name]
    rounds = has_momentum or roles != "E=bfp8[0] M=bfp8[0]"
    assert passes == [rounds and not has_momentum, rounds, rounds, rounds]


@pytest.mark.parametrize("recipe", ["bfp8[0]", "bfp8[0] master=float"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads, recipe, by_hooks):
    due = by_hooks(group_of(**GROUPS["momentum"]), recipe)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(run(group_of(**GROUPS["momentum"]), recipe), due)
    finally:
        torch.set_num_threads(before)


def test_groups_and_rules_are_each_served(passes, by_hooks):
    """Two groups, one without momentum; a parameter in float, one in another format, and one frozen."""

    def make(model):
        weights = list(model.parameters())
        weights[3].requires_grad_(False)
        groups = [{"params": weights[:2], "momentum": 0.9}, {"params": weights[2:], "lr": 0.2}]
        return torch.optim.SGD(groups, lr=0.05, weight_decay=1e-3)

    local = {"all.0": Recipe.parse("float"), "all.2": Recipe.parse("e4m3")}
    assert_same(run(make, local=local), by_hooks(make, local=local))
    assert passes == [False, True, True, True]


def test_what_has_no_gradient_is_left_alone_as_ever(passes, by_hooks):
    class Half(Weights):
        def forward(self):
            return self.all[0].square().sum()

    make = group_of(**GROUPS["momentum"])
    assert_same(run(make, model=Half()), by_hooks(make, model=Half()))
    assert passes[1:] == [True] * 3


def test_a_closure_and_a_state_that_is_loaded_are_served(passes):
    def steps(stepper, swalp, model, count):
        def closure():
            stepper.zero_grad()
            loss = model()
            loss.backward()
            return loss

        for _ in range(count):
            stepper.step(closure)

    def make():
        model = Weights()
        return *attached(group_of(**GROUPS["momentum"]), model), model

    whole, first, second = make(), make(), make()
    steps(*whole, 5)
    steps(*first, 3)
    saved = io.BytesIO()
    torch.save([each.state_dict() for each in first], saved)
    saved.seek(0)
    for each, state in zip(second, torch.load(saved, weights_only=True), strict=True):
        each.load_state_dict(state)
    steps(*second, 2)
    for one, other in zip(whole[2].parameters(), second[2].parameters(), strict=True):
        assert torch.equal(one, other)
    assert passes == [False, *[True] * 4, False, True, True, True, True]


# Optimizers and recipes that one pass does not serve.
LEFT = {
    "Adam": (lambda m: torch.optim.Adam(m.parameters()), "bfp8[0]"),
    "a subclass": (lambda m: type("Mine", (torch.optim.SGD,), {})(m.parameters(), lr=0.1), "bfp8[0]"),
    "fused": (group_of(fused=True, momentum=0.9), "bfp8[0]"),
    "a gradient that torch writes into": (group_of(foreach=True, momentum=0.9, nesterov=True), "bfp8[0]"),
    "numbers beyond float32": (group_of(weight_decay=1e-50), "bfp8[0]"),
    "state of its own": (lambda m: remembering(group_of(momentum=0.9)(m)), "bfp8[0]"),
    "memory that overlaps": (lambda m: group_of()(overlapping(m)), "bfp8[0]"),
    "lr in a tensor": (lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(0.1)), "bfp8[0]"),
    "formats that differ": (group_of(momentum=0.9), "W=bfp8[0] G=bfp8[0] M=bfp10[0]"),
    "nothing rounded": (group_of(momentum=0.9), "float"),
    "only outputs rounded": (group_of(momentum=0.9), "A=bfp8[0] E=bfp8[0]"),
    "masters that are rounded": (group_of(momentum=0.9), "bfp8[0] master=fixed16.12"),
    "float64": (lambda m: torch.optim.SGD(m.double().parameters(), lr=0.1), "bfp8[0]"),
    "gaps": (lambda m: torch.optim.SGD(strided(m).parameters(), lr=0.1), "bfp8[0]"),
}


def strided(model):
    model.all[0] = nn.Parameter(torch.randn(6, 8)[:, ::2])
    return model


def overlapping(model):
    memory = torch.randn(100)
    model.all[3], model.all[4] = nn.Parameter(memory[:60]), nn.Parameter(memory[40:])
    return model


def remembering(stepper):
    for group in stepper.param_groups:
        for parameter in group["params"]:
            stepper.state[parameter]["anchor"] = parameter.detach().clone()
    return stepper


@pytest.mark.filterwarnings("ignore:Adam divides one moment by another")
@pytest.mark.parametrize("name", LEFT)
def test_what_it_leaves_to_the_hooks(name, passes):
    make, recipe = LEFT[name]
    run(make, recipe)
    assert not any(passes)


def test_it_leaves_steps_that_others_may_look_into(passes):
    seen = []

    def look(stepper, *arguments):
        seen.append(all(p.grad is not None for group in stepper.param_groups for p in group["params"]))

    def watched(model):
        stepper = group_of()(model)
        stepper.register_step_pre_hook(look)
        return stepper

    run(watched)
    handle = register_optimizer_step_pre_hook(look)
    try:
        run(group_of())
    finally:
        handle.remove()
    assert not any(passes) and len(seen) == 8 and all(seen)


def test_it_leaves_a_gradient_that_two_share(passes):
    model = Weights([(4, 4), (4, 4)])
    stepper, _ = attached(group_of(), model)
    shared = torch.randn(4, 4)
    model.all[0].grad = model.all[1].grad = shared
    stepper.step()
    assert passes == [False]


def test_what_it_steps_counts_as_written(passes):
    """Autograd then notices a weight that is stepped between a forward and its backward, as with torch's own step."""
    model = Weights()
    stepper, _ = attached(group_of(), model)
    model().backward()
    loss = model()
    gradients = [p.grad for p in model.parameters()]
    stepper.step()
    assert passes == [True] and all(p.grad is g for p, g in zip(model.parameters(), gradients, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_op_takes_nothing_that_is_not_alike():
    w, g = torch.randn(4, 6), torch.randn(6, 4).t()
    before = w.clone(), g.clone()
    group = {"lr": 0.1, "momentum": 0, "dampening": 0, "weight_decay": 0, "nesterov": False, "maximize": False}
    how = {"key": torch.tensor(1), "streams": ([], [], [])}
    for weights, gradients in [([w], [g]), ([w, w], [g]), ([w], [g.double()]), ([w], [g[:2]])]:
        with pytest.raises(RuntimeError, match="swalp_fx::quantize: "):
            one_pass.sgd_(weights, gradients, [], [], group, "bfp8[0]", "nearest", **how)
    for masters in [[g], [w], [w.clone(), w.clone()], [w.double()]]:
        with pytest.raises(RuntimeError, match=r"swalp_fx::quantize: .*masters?"):
            one_pass.sgd_([w], [w.clone()], [], masters, group, "bfp8[0]", "nearest", **how)
    assert torch.equal(w, before[0]) and torch.equal(g, before[1])
