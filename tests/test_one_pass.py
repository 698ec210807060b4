"""A step in one pass: the bits of a step by hooks, in every format; steps left to the hooks; the state after it."""

import copy
import io
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from swalp_fx import Recipe, ops
from swalp_fx.optimizer import SWALP, algorithm, kernels, one_pass
from swalp_fx.optimizer.states import states_of

pytestmark = [
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"),
        reason="torch's own kernels multiply and add with one rounding only where the processor has AVX2",
    ),
    # Tests compare the bits of a step, whatever becomes of the training.
    pytest.mark.filterwarnings("ignore:.*divides one moment by another"),
]

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
SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
GROUPS = {
    "plain": (SGD, {}),
    "decay": (SGD, {"weight_decay": 1e-2}),
    "momentum": (SGD, {"momentum": 0.9, "weight_decay": 5e-4}),
    "damped": (SGD, {"momentum": 0.8, "dampening": 0.3}),
    "nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}),
    "maximize": (SGD, {"momentum": 0.9, "weight_decay": 1e-2, "maximize": True}),
    "for each": (SGD, {"momentum": 0.9, "foreach": True}),
    "adam": (ADAM, {}),
    "adam, decay": (ADAM, {"weight_decay": 1e-2}),
    "adam, decoupled": (ADAM, {"weight_decay": 1e-2, "decoupled_weight_decay": True}),
    "adam, maximize": (ADAM, {"weight_decay": 1e-2, "maximize": True}),
    "adam, for each": (ADAM, {"weight_decay": 1e-2, "foreach": True, "maximize": True}),
    "adamw": (ADAMW, {}),
    "adamw, no decay": (ADAMW, {"weight_decay": 0}),
    "adamw, betas": (ADAMW, {"betas": (0.3, 0.9), "eps": 1e-3}),
    "adamw, least betas": (ADAMW, {"betas": (1e-7, 0.0), "eps": 0.0}),
    "adamw, half a beta": (ADAMW, {"betas": (0.5, 0.99)}),
    "adamw, maximize": (ADAMW, {"maximize": True}),
    "adamw, for each": (ADAMW, {"foreach": True, "maximize": True}),
    "adamw, no rate": (ADAMW, {"lr": 0}),
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
    stepper, swalp = make(model), SWALP(model, Recipe.parse(recipe), **changes, seed=3)
    swalp.attach(stepper)
    return stepper, swalp


def run(make, recipe="bfp8[0]", model=None, steps=4, between=None, **changes):
    """Every number that some steps leave behind; ``make`` gives an optimizer from a model.

    between: called with the model and the optimizer before the third step.
    """
    model = Weights() if model is None else copy.deepcopy(model)
    stepper, swalp = attached(make, model, recipe, **changes)
    for step in range(steps):
        stepper.zero_grad()
        if between is not None and step == 2:
            between(model, stepper)
        model().backward()
        stepper.step()
    state = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    gradients = {f"{name}.grad": None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    states = {(i, key): value for i, each in stepper.state_dict()["state"].items() for key, value in each.items()}
    masters = {f"{name}.master": tensor for name, tensor in swalp.state_dict()["masters"].items()}
    return {**state, **gradients, **states, **masters}


def group_of(kind=SGD, **changes):
    return lambda model: kind(model.parameters(), **{"lr": 0.05, **changes})


def group(name):
    kind, changes = GROUPS[name]
    return group_of(kind, **changes)


def has_states(name):
    kind, changes = GROUPS[name]
    return kind is not SGD or "momentum" in changes


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


def bits(tensor):
    """Of each number; of each NaN the same."""
    tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return tensor.view({4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_same(found, due):
    assert found.keys() == due.keys()
    for name, tensor in due.items():
        assert (found[name] is None) == (tensor is None), name
        if tensor is not None:
            assert torch.equal(bits(found[name]), bits(tensor)), name
            assert found[name].stride() == tensor.stride()


@pytest.mark.parametrize("rounding", ["stochastic", "nearest", "stochastic8", "toward_zero"])
@pytest.mark.parametrize("spec", FORMATS)
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_in_every_format_it_is_the_step_by_hooks(name, spec, rounding, passes, by_hooks):
    make, recipe = group(name), f"{spec} rounding={rounding}"
    assert_same(run(make, recipe), by_hooks(make, recipe))
    assert passes == [False, True, True, True]  # the first step makes the momenta


ROLES = ["bfp8[0]", "W=bfp8[0] G=bfp8[0] M=bfp8[0]", "W=bfp8[0]", "G=bfp8[0] M=bfp8[0]", "M=bfp8[0]"]
# Of which some are rounded in the pass, and the others after it.
FORMATS_THAT_DIFFER = [
    "W=bfp8[0] G=fixed8.9 M=bfp10[0] V=e8m7",
    "W=bfp8[0] G=bfp8[0] M=bfp10[0] V=bfp8[0]~nearest",
    "W=bfp8[0] M=bfp8[0] V=e8m7",
    "V=e8m7",
    "bfp8[0] V=e8m7 rounding=nearest",
]


def _has(name, role):
    """Whether the optimizer of that group has a state in a role: V is refused of SGD, and M of SGD without momentum."""
    return has_states(name) and (role == "M" or GROUPS[name][0] is not SGD)


def _fits(name, roles):
    return all(_has(name, word[0]) for word in roles.split() if word[:2] in ("M=", "V="))


@pytest.mark.parametrize("master", ["", " master=float"])
@pytest.mark.parametrize(
    "name, roles", [(name, roles) for name in GROUPS for roles in ROLES + FORMATS_THAT_DIFFER if _fits(name, roles)]
)
def test_of_every_group_it_is_the_step_by_hooks(name, roles, master, passes, by_hooks):
    make = group(name)
    assert_same(run(make, roles + master), by_hooks(make, roles + master))
    assert passes == [not has_states(name), True, True, True]


def test_a_state_is_rounded_by_its_own_name(passes, by_hooks):
    recipe = "W=bfp8[0] G=bfp8[0] state.exp_avg=bfp10[0] state.exp_avg_sq=e8m7~nearest"
    assert_same(run(group("adamw"), recipe), by_hooks(group("adamw"), recipe))
    assert passes == [False, True, True, True]


@pytest.mark.parametrize("recipe", ["bfp8[0]", "bfp8[0] master=float"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_threads_change_nothing(name, threads, recipe, by_hooks):
    due = by_hooks(group(name), recipe)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert_same(run(group(name), recipe), due)
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

    make = group("momentum")
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
        return *attached(group("momentum"), model), model

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


# What happens to a run between two of its steps.
def assign(model, stepper):
    model.all[0].data = model.all[0].detach() + 1
    model.all[1].data = model.all[1].detach().flip(0)


def cast(model, stepper):
    model.double().float()


def cast_for_good(model, stepper):
    model.double()
    stepper.load_state_dict(stepper.state_dict())  # casts the states too


def reorder(model, stepper):
    for each in (model.all[-1], *stepper.state[model.all[-1]].values()):
        each.data = each.detach().contiguous() if each.dim() else each.detach()


def reorder_one(model, stepper):
    model.all[-1].data = model.all[-1].detach().contiguous()


def load(model, stepper):
    stepper.load_state_dict(copy.deepcopy(stepper.state_dict()))


def freeze(model, stepper):
    model.all[2].requires_grad_(False)


def forget(model, stepper):
    stepper.state.pop(model.all[0], None)


def set_numbers(model, stepper):
    stepper.param_groups[0].update(lr=0.2, weight_decay=0.3)


def add_group(model, stepper):
    model.all.append(nn.Parameter(torch.ones(5)))
    stepper.add_param_group({"params": [model.all[-1]], "lr": 0.3})


def share(model, stepper):
    model.all[3].data = model.all[0].detach()[0, :129]


def free(model, stepper):
    model.all[0].register_hook(lambda gradient: None)
    model.all[0].register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))


BETWEEN = [
    assign,
    cast,
    cast_for_good,
    reorder,
    reorder_one,
    load,
    freeze,
    forget,
    set_numbers,
    add_group,
    share,
    free,
]


@pytest.mark.parametrize("name", ["plain", "momentum", "adamw"])
@pytest.mark.parametrize("change", BETWEEN)
def test_what_changes_between_steps_is_seen(change, name, passes, by_hooks):
    assert_same(run(group(name), between=change), by_hooks(group(name), between=change))
    assert any(passes)


def test_parameters_that_count_their_steps_apart_are_served(passes, by_hooks):
    def make(model):
        stepper = group("adamw")(model)
        for count, weight in enumerate(model.all):
            # In another order than torch's.
            zeros = {name: torch.zeros_like(weight) for name in ("exp_avg_sq", "exp_avg")}
            stepper.state[weight] = {**zeros, "step": torch.tensor(float(count % 3))}
        return stepper

    assert_same(run(make), by_hooks(make))
    assert passes == [True] * 4


# Optimizers and recipes that one pass does not serve.
LEFT = {
    "no kernel": (group_of(torch.optim.RMSprop), "bfp8[0]"),
    "a subclass": (lambda m: type("Mine", (SGD,), {})(m.parameters(), lr=0.1), "bfp8[0]"),
    "a subclass of Adam": (lambda m: type("Mine", (ADAM,), {})(m.parameters(), lr=0.1), "bfp8[0]"),
    "fused": (group_of(fused=True, momentum=0.9), "bfp8[0]"),
    "fused Adam": (group_of(ADAM, fused=True), "bfp8[0]"),
    "amsgrad": (group_of(ADAMW, amsgrad=True), "bfp8[0]"),
    "a mean that is the gradient": (group_of(ADAMW, betas=(0.0, 0.9)), "bfp8[0]"),
    "a mean that float32 takes for the gradient": (group_of(ADAMW, betas=(1e-8, 0.9)), "bfp8[0]"),
    "betas in tensors": (group_of(ADAM, betas=(torch.tensor(0.9), torch.tensor(0.99))), "bfp8[0]"),
    "a gradient that torch writes into": (group_of(foreach=True, momentum=0.9, nesterov=True), "bfp8[0]"),
    "numbers beyond float32": (group_of(weight_decay=1e-50), "bfp8[0]"),
    "eps beyond float32": (group_of(ADAM, eps=1e-50), "bfp8[0]"),
    "state of its own": (lambda m: remembering(group_of(momentum=0.9)(m)), "bfp8[0]"),
    "memory that overlaps": (lambda m: group_of()(overlapping(m)), "bfp8[0]"),
    "memory of two groups that overlaps": (lambda m: in_two_groups(overlapping(m)), "bfp8[0]"),
    "a counter of two": (lambda m: counting_together(group_of(ADAM)(m)), "bfp8[0]"),
    "lr in a tensor": (lambda m: SGD(m.parameters(), lr=torch.tensor(0.1)), "bfp8[0]"),
    "lr of Adam in a tensor": (lambda m: ADAM(m.parameters(), lr=torch.tensor(0.1)), "bfp8[0]"),
    "nothing rounded": (group_of(momentum=0.9), "float"),
    "only outputs rounded": (group_of(momentum=0.9), "A=bfp8[0] E=bfp8[0]"),
    "masters that are rounded": (group_of(momentum=0.9), "bfp8[0] master=fixed16.12"),
    "float64": (lambda m: SGD(m.double().parameters(), lr=0.1), "bfp8[0]"),
    "gaps": (lambda m: SGD(strided(m).parameters(), lr=0.1), "bfp8[0]"),
}


def in_two_groups(model):
    weights = list(model.parameters())
    return SGD([{"params": weights[:4]}, {"params": weights[4:]}], lr=0.1)


def counting_together(stepper):
    counter = torch.tensor(0.0)
    for weight in stepper.param_groups[0]["params"]:
        zeros = {name: torch.zeros_like(weight) for name in ("exp_avg", "exp_avg_sq")}
        stepper.state[weight] = {"step": counter, **zeros}
    return stepper


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

    def updated(weights, gradients, masters=(), states=()):
        roles, sgd = [None] * (2 + len(states)), [0.1, 0, 1, 0, 0, 0]
        streams = [0] * len(weights)
        of_all = {"key": None, "streams": streams, "roles": roles}
        return ops.update_(0, sgd, weights, gradients, states, masters, "bfp8[0]", "nearest", **of_all)

    class Mine(torch.Tensor):
        pass

    others = [g, w, w.double(), w.to("meta"), w.to_sparse(), w[:2], w.clone().as_subclass(Mine), torch.zeros(4, 6, 1)]
    others += [torch.complex(w, w).conj().imag, torch._efficientzerotensor(4, 6)]
    for other in others:
        assert not updated([w], [other])
        assert not updated([w], [w.clone()], masters=[other])
        assert not updated([w], [w.clone()], states=[other])
        if other is not w:
            assert not updated([other], [w])
    assert not updated([w, w], [w.clone(), w.clone()])
    freed = w.clone()
    freed.untyped_storage().resize_(0)
    assert not updated([w], [freed])
    with pytest.raises(RuntimeError, match="has no memory"):
        updated([freed], [w])
    with pytest.raises(RuntimeError, match="swalp_fx::quantize: 1 weights but 2 gradients"):
        updated([w], [w.clone(), w.clone()])
    with pytest.raises(RuntimeError, match=r"swalp_fx::quantize: .*2 masters"):
        updated([w], [w.clone()], masters=[w.clone(), w.clone()])
    with pytest.raises(RuntimeError, match="a weight has 2 states; give it 0 to 1"):
        updated([w], [w.clone()], states=[w.clone(), w.clone()])
    assert torch.equal(w, before[0]) and torch.equal(g, before[1])
    assert updated([w], [w.clone()]) and not torch.equal(w, before[0])


@pytest.mark.parametrize(
    ("capability", "served"), [("default", "False"), pytest.param("avx2", "True", marks=pytest.mark.slow)]
)
def test_where_torch_rounds_otherwise_the_step_is_left_to_the_hooks(capability, served):
    """In a process whose torch has no kernels for AVX2, and multiplies and adds with two roundings."""
    command = """
import torch
from swalp_fx.optimizer.kernels import KERNELS, kernel_of
weight = torch.nn.Parameter(torch.ones(3))
for row in KERNELS:
    for kind in row.optimizers:
        print(kernel_of(kind([weight], lr=0.1)) is row)
"""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    found = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [served] * 3


def test_states_are_in_the_order_of_their_streams():
    for name in GROUPS:
        model = Weights()
        stepper = group(name)(model)
        model().backward()
        stepper.step()
        states = kernels.kernel_of(stepper).states(stepper.param_groups[0])
        recipe = Recipe.parse("bfp8[0]")
        assert all(list(states) == [found for found, *_ in states_of(stepper, p, recipe)] for p in model.all)
