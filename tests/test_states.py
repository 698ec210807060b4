"""States of an optimizer that a recipe names: how they are rounded; those that it does not have are refused."""

import copy
import re
import warnings

import pytest
import torch
from stepping import loss_of, net, same, setup, train, values
from torch import nn

from swalp_fx import Recipe, RecipeError, Rule, convert, quantize
from swalp_fx.optimizer import SWALP
from swalp_fx.optimizer.states import quantizer_of
from swalp_fx.random import fold_in

optim = torch.optim
QUIET = "W=float A=float E=float G=float M=float"

# Optimizer -> its states that may be rounded, in its configuration here.
STATES = {
    "SGD": (lambda p: optim.SGD(p, lr=0.1, momentum=0.9), {"momentum_buffer"}),
    "plain SGD": (lambda p: optim.SGD(p, lr=0.1), set()),
    "Adam": (lambda p: optim.Adam(p), {"exp_avg", "exp_avg_sq"}),
    "AMSGrad": (lambda p: optim.AdamW(p, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "fused": (lambda p: optim.Adam(p, fused=True), {"exp_avg", "exp_avg_sq"}),
    "NAdam": (lambda p: optim.NAdam(p), {"exp_avg", "exp_avg_sq"}),
    "Adamax": (lambda p: optim.Adamax(p), {"exp_avg", "exp_inf"}),
    "RMSprop": (lambda p: optim.RMSprop(p, centered=True), {"square_avg", "grad_avg"}),
    "Adagrad": (lambda p: optim.Adagrad(p), {"sum"}),
    "Adadelta": (lambda p: optim.Adadelta(p), {"square_avg", "acc_delta"}),
    "ASGD": (lambda p: optim.ASGD(p), {"ax"}),
    "Rprop": (lambda p: optim.Rprop(p), {"prev", "step_size"}),
    "Adafactor": (lambda p: optim.Adafactor(p), {"row_var", "col_var", "variance"}),
}


class Mine(optim.Optimizer):
    """Of a user, with attributes of its own, which the optimizer's pickle leaves out."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.decay, self.seen, self.dropout = 0.9, [], nn.Dropout()

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.seen.append(p)
                state = self.state[p]
                state.setdefault("trace", torch.zeros_like(p)).mul_(self.decay).add_(self.dropout(p.grad))
                with torch.no_grad():
                    p.sub_(group["lr"] * state["trace"])


class NeedsAnArgument(optim.SGD):
    def step(self, loss):
        super().step()


@pytest.mark.parametrize("name", STATES)
def test_the_states_that_an_optimizer_has_are_known_before_its_first_step(name):
    make, states = STATES[name]
    model = net()
    optimizer = make(model.parameters())
    before = copy.deepcopy(values(model, optimizer)), torch.get_rng_state()
    for state in states:
        swalp = SWALP(model, Recipe.parse(f"{QUIET} state.{state}=bf16"), seed=0)
        swalp.attach(optimizer)
        swalp.detach()
    for other in {"exp_avg", "momentum_buffer", "step", "eta"} - states:
        with pytest.raises(RecipeError, match=f"has no state '{other}' to round"):
            SWALP(model, Recipe.parse(f"{QUIET} state.{other}=bf16"), seed=0).attach(optimizer)
    assert same(before[0], values(model, optimizer)) and torch.equal(before[1], torch.get_rng_state())


@pytest.mark.parametrize(
    ("make", "state", "message"),
    [
        (lambda p: optim.Adam(p), "exp_avg_sqr", "Adam has no state 'exp_avg_sqr' to round; did you mean exp_avg_sq"),
        (lambda p: optim.Adam(p), "velocity", "Adam has no state 'velocity' to round; it has exp_avg, exp_avg_sq"),
        (lambda p: optim.SGD(p, lr=1), "momentum_buffer", "to round; it has none that could be rounded"),
        (Mine, "traces", "Mine has no state 'traces' to round; did you mean trace"),
        (
            lambda p: NeedsAnArgument(p, lr=0.1),
            "momentum_buffer",
            r"states NeedsAnArgument has cannot be told before its first step, .* \(TypeError.*; attach it after that",
        ),
    ],
)
def test_a_state_that_the_optimizer_does_not_have_is_refused_before_anything_changes(make, state, message):
    model = net()
    optimizer = make(model.parameters())
    with pytest.raises(RecipeError, match=message) as caught:
        convert(model, optimizer, recipe=f"bfp8[0] state.{state}=bf16")
    assert "\n" not in str(caught.value)
    assert not optimizer._optimizer_step_pre_hooks and not optimizer.state
    convert(model, optimizer, recipe="bfp8[0] M=float")  # the model is not converted yet


def test_an_optimizer_of_a_user_is_tried_without_its_own_memory():
    model = net()
    optimizer = Mine(model.parameters())
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1)  # sets a step on the optimizer
    state = torch.get_rng_state()
    SWALP(model, Recipe.parse(f"{QUIET} state.trace=bfp4~up")).attach(optimizer)
    assert optimizer.seen == [] and not optimizer.state and torch.equal(state, torch.get_rng_state())
    train(model, optimizer, range(1))
    scheduler.step()
    assert all(torch.equal(quantize(s["trace"], "bfp4"), s["trace"]) for s in optimizer.state.values())


def test_an_optimizer_that_no_copy_of_can_step_is_attached_after_its_first_step():
    model = net()
    optimizer = NeedsAnArgument(model.parameters(), lr=0.1, momentum=0.9)
    loss_of(model, 0).backward()
    optimizer.step(None)
    SWALP(model, Recipe.parse(f"{QUIET} state.momentum_buffer=bfp4")).attach(optimizer)
    with pytest.raises(RecipeError, match="has no state 'exp_avg' to round; it has momentum_buffer"):
        SWALP(model, Recipe.parse(f"{QUIET} state.exp_avg=bfp4")).refuse(optimizer)


def test_a_format_that_does_not_fit_a_state_is_refused():
    model = nn.ParameterList([torch.randn(4, 3)])
    message = "state 'exp_avg' of parameter 0 cannot be rounded to .*"
    with pytest.raises(RecipeError, match=message):
        SWALP(model, Recipe.parse(f"{QUIET} state.exp_avg=bfp8[3]")).attach(optim.Adam(model.parameters()))


@pytest.mark.filterwarnings("ignore:.*divides one moment by another")
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_a_named_state_is_rounded_its_own_way_and_M_and_V_are_of_the_others(rounding):
    recipe = f"W=float A=float E=float G=float M=bfp10[0] V=bfp12[0] state.exp_avg_sq=e8m7~down rounding={rounding}"
    model, optimizer, _ = setup(lambda p: optim.AdamW(p, amsgrad=True), recipe)
    train(model, optimizer, range(2))
    plain = net()
    reference = optim.AdamW(plain.parameters(), amsgrad=True)
    for step in range(2):
        train(plain, reference, [step])
        for index, p in enumerate(plain.parameters()):
            state, key = reference.state[p], fold_in(7, step)
            for slot, name in enumerate(("exp_avg", "exp_avg_sq", "max_exp_avg_sq")):
                how = {"exp_avg": "bfp10[0]", "exp_avg_sq": "e8m7~down", "max_exp_avg_sq": "bfp12[0]"}[name]
                format, _, own = how.partition("~")
                state[name] = quantize(state[name], format, own or rounding, key=key, stream=(4 + slot) << 32 | index)
    assert same(values(model, optimizer), values(plain, reference))


def test_naming_every_state_is_naming_M():
    """The streams are the same, and one pass is one pass."""
    found = []
    for recipe in ("bfp8[0] M=bfp8[0]", "bfp8[0] M=float state.momentum_buffer=bfp8[0]"):
        model, optimizer, _ = setup(recipe=f"{recipe} A=float E=float")
        train(model, optimizer, range(3))
        found.append(values(model, optimizer))
    assert same(*found)


@pytest.mark.parametrize("recipe", ["V=bfp4~up", "state.row_var=bfp4~up state.col_var=bfp4~up"])
def test_a_state_of_another_shape_is_rounded_by_its_role_or_its_name(recipe):
    model, optimizer, _ = setup(lambda p: optim.Adafactor(p), f"{QUIET} {recipe}")
    train(model, optimizer, range(1))
    for name in ("row_var", "col_var"):
        found = optimizer.state[next(iter(model.parameters()))][name]
        assert torch.equal(quantize(found, "bfp4"), found)


def test_a_rule_names_states_too():
    recipe = Recipe.parse(
        f"{QUIET} state.exp_avg=bfp4~up", rules=(Rule("3", states={"exp_avg": "float", "exp_avg_sq": "e8m3"}),)
    )
    model = net()
    optimizer = optim.Adam(model.parameters())
    convert(model, optimizer, recipe=recipe)
    loss_of(model, 0).backward()
    optimizer.step()
    first, last = optimizer.state[model[0].weight], optimizer.state[model[3].weight]
    assert torch.equal(quantize(first["exp_avg"], "bfp4"), first["exp_avg"])
    assert not torch.equal(quantize(last["exp_avg"], "bfp4"), last["exp_avg"])
    assert torch.equal(quantize(last["exp_avg_sq"], "e8m3"), last["exp_avg_sq"])
    assert not torch.equal(quantize(first["exp_avg_sq"], "e8m3"), first["exp_avg_sq"])


@pytest.mark.parametrize(
    ("recipe", "amsgrad", "warned"),
    [
        ("bfp8[0] state.exp_avg_sq=float", False, None),
        (
            "bfp8[0] V=bfp8[0] state.exp_avg_sq=float",
            True,
            "max_exp_avg_sq of '0.weight' and 5 more in bfp8.0.; keep it in float: V=float",
        ),
        ("bfp8[0] M=float state.exp_avg=bfp8[0]", False, None),
        (
            "bfp8[0] M=float state.exp_avg_sq=bfp8[0]",
            False,
            "exp_avg_sq of '0.weight' and 5 more in bfp8.0.; keep it in float: state.exp_avg_sq=float",
        ),
    ],
)
def test_the_warning_of_moments_speaks_of_the_state_that_divides(recipe, amsgrad, warned):
    model = net()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        SWALP(model, Recipe.parse(recipe)).attach(optim.Adam(model.parameters(), amsgrad=amsgrad))
    assert len(found) == (warned is not None) and all(re.search(warned, str(each.message)) for each in found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe.parse("bfp8 state.=float"), "there is no role 'state.'"),
        (lambda: Recipe.parse("bfp8 state.a=float state.a=bf16"), "sets state.a twice"),
        (lambda: Recipe.parse("bfp8 states=bf16"), "states maps names to formats, such as state.exp_avg_sq=bf16"),
        (lambda: Recipe.parse("bfp8 state.a=bpf8"), "unknown format spec 'bpf8'"),
        (lambda: Rule("fc", states={"a b": "float"}), "rule 'fc': there is no role 'state.a b'"),
    ],
)
def test_words_for_states_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_states_are_a_part_of_a_recipe():
    recipe = Recipe.parse("bfp8[0] state.exp_avg_sq=bf16~stochastic state.exp_avg=float")
    assert recipe.states == Recipe(states={"exp_avg": "float", "exp_avg_sq": "bf16~stochastic"}).states
    assert str(recipe) == "bfp8[0] state.exp_avg=float state.exp_avg_sq=e8m7~stochastic"
    assert Recipe.parse(str(recipe)) == recipe and hash(Recipe.parse(str(recipe))) == hash(recipe)
    changed = Recipe.parse(recipe, **{"state.exp_avg": "bf16"})
    assert dict(changed.states)["exp_avg_sq"] == dict(recipe.states)["exp_avg_sq"]
    assert changed == Recipe.parse("bfp8[0] state.exp_avg=bf16 state.exp_avg_sq=bf16~stochastic")


# ---- the table of states ---------------------------------------------------------------------------------------------

# Of torch's optimizers: the role of each state. All other states are counters.
OF_ROLE = {
    "M": {"momentum_buffer", "exp_avg"},
    "V": {"exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg", "sum", "acc_delta"}
    | {"row_var", "col_var", "variance"},
    "": {"ax", "prev", "step_size"},
}


@pytest.mark.parametrize(
    "name", [*(each for each, (_, states) in STATES.items() if states), "Muon", "centered with momentum"]
)
@pytest.mark.parametrize("role", ["M", "V"])
def test_a_role_rounds_its_states_of_an_optimizer_and_no_others(name, role):
    make = {
        "Muon": lambda p: optim.Muon([each for each in p if each.dim() == 2]),
        "centered with momentum": lambda p: optim.RMSprop(p, centered=True, momentum=0.9),
    }.get(name) or STATES[name][0]
    recipe = f"{QUIET.replace('M=float', '')} {role}=bfp3~up"
    of_role = OF_ROLE[role] & states_made(make)
    if not of_role:
        words = {"M": "means of gradients", "V": "second moments"}[role]
        with pytest.raises(RecipeError, match=f"has no {words} for {role} to round .*; leave {role} out$"):
            SWALP(model := net(), recipe).attach(make(model.parameters()))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of divisors in a format that reaches less far
        model, optimizer, _ = setup(make, recipe)
    train(model, optimizer, range(1))
    weight = next(p for p in model.parameters() if p in optimizer.state and p.dim() == 2)
    for state, tensor in optimizer.state[weight].items():
        if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.unique().numel() > 2:
            is_rounded = torch.equal(quantize(tensor, "bfp3"), tensor)
            assert is_rounded == (state in of_role), state


@pytest.mark.parametrize(
    ("make", "recipe", "message"),
    [
        (
            lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
            "bfp8[0] V=bf16",
            "SGD has no second moments for V to round (it has momentum_buffer); leave V out",
        ),
        (
            lambda p: optim.SGD(p, lr=0.1),
            "bfp8[0] M=bf16",
            "SGD has no means of gradients for M to round (it has none that could be rounded); leave M out",
        ),
        (
            lambda p: optim.SGD(p, lr=0.1),
            "bfp8[0] rules=[3 M=bf16]",
            "SGD has no means of gradients for M to round (it has none that could be rounded); leave M out",
        ),
        (
            lambda p: optim.RMSprop(p),
            "bfp8[0] rules=[3 bfp4[0] M=bf16]",
            "RMSprop has no means of gradients for M to round (it has square_avg); leave M out",
        ),
        (
            lambda p: Mine(p),
            "bfp8[0] M=bf16",
            "Mine has no means of gradients for M to round (it has trace); leave M out, or name a state of the "
            "optimizer's own: state.trace=FORMAT",
        ),
    ],
)
def test_a_role_that_a_recipe_names_and_the_optimizer_lacks_is_refused(make, recipe, message):
    model = net()
    optimizer = make(model.parameters())
    with pytest.raises(RecipeError) as caught:
        convert(model, optimizer, recipe=recipe)
    assert str(caught.value) == message
    assert not optimizer._optimizer_step_pre_hooks and not optimizer.state
    convert(model, optimizer, recipe="bfp8[0]")  # the model is not converted yet


@pytest.mark.parametrize(
    "recipe",
    [
        "bfp8[0]",
        "bfp8[0] V=float",
        "bfp8[0] E=e5m2 G=e5m2~stochastic8",
        "bfp8[0] rules=[3 bfp4[0]]",
        "bfp8[0] rules=[3 W=e4m3 A=e4m3 E=e4m3 G=e4m3; 0 float]",
        "float W=bfp8[0] rounding=nearest",
    ],
)
def test_a_format_for_all_roles_names_no_state(recipe):
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(model, optim.SGD(model.parameters(), lr=0.1), recipe=recipe)


def states_made(make):
    """The names of all states that a step makes."""
    model = net()
    optimizer = make(model.parameters())
    train(model, optimizer, range(1))
    return {name for state in optimizer.state.values() for name in state}


class AggMo(optim.Optimizer):
    """Momentum of several betas, in a dict (Lucas et al., 2018), and a state that no table knows."""

    def __init__(self, parameters, betas=(0.0, 0.9, 0.99)):
        super().__init__(parameters, {"lr": 0.1, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffers = state.setdefault("momentum_buffer", {beta: torch.zeros_like(p) for beta in group["betas"]})
                state.setdefault("curvature", torch.zeros_like(p)).add_(p.grad)
                for beta, buffer in buffers.items():
                    p.sub_(buffer.mul_(beta).add_(p.grad), alpha=group["lr"] / len(buffers))


def test_states_in_containers_are_rounded_each_with_a_stream_of_its_own():
    model, optimizer, _ = setup(AggMo, f"{QUIET.replace('M=float', 'M=bfp4')} state.curvature=float")
    loss_of(model, 0).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    for index, (p, gradient) in enumerate(zip(model.parameters(), gradients, strict=True)):
        # The unknown state is the first by name.
        for slot, beta in enumerate((0.0, 0.9, 0.99), start=1):
            due = quantize(gradient, "bfp4", "stochastic", key=fold_in(7, 0), stream=(4 + slot) << 32 | index)
            assert torch.equal(optimizer.state[p]["momentum_buffer"][beta], due)


class Numbered(optim.SGD):
    """Calls its states by numbers."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            self.state[p][0] = p.grad.clone()
        super().step(closure)


def test_a_state_without_a_text_for_a_name_stays_in_float_too():
    model, optimizer, _ = setup(lambda p: Numbered(p, lr=0.1, momentum=0.9), "bfp4[0] G=float")
    with pytest.warns(match="Numbered's state '0' stays in float, since nothing says .* a mean of gradients$"):
        train(model, optimizer, range(2))
    for parameter, state in optimizer.state.items():
        assert torch.equal(state[0], parameter.grad)
        assert torch.equal(state["momentum_buffer"], quantize(state["momentum_buffer"], "bfp4[0]"))


@pytest.mark.parametrize(
    ("state", "role"),
    [("momentum", "M"), ("grad_sum_sq", "V"), ("x0", None), ("last_grad", None)],  # SGDP's, MADGRAD's, MARS's
)
def test_states_of_optimizers_of_packages_have_roles(state, role):
    recipe = Recipe.parse("M=bfp4 V=bfp5")
    assert str(quantizer_of(recipe, state)) == {"M": "bfp4", "V": "bfp5", None: "float"}[role]


def test_a_state_that_no_table_knows_stays_in_float_and_the_first_step_says_so():
    model, optimizer, _ = setup(AggMo, f"{QUIET.replace('M=float', '')} M=bfp4~up")
    with pytest.warns(UserWarning) as found:
        train(model, optimizer, range(2))
    assert [str(each.message) for each in found] == [
        "AggMo's state 'curvature' stays in float, since nothing says whether it is a mean of gradients; name it: "
        "state.curvature=bfp4~up, or state.curvature=float"
    ]
    state = optimizer.state[next(iter(model.parameters()))]
    assert not torch.equal(quantize(state["curvature"], "bfp4"), state["curvature"])


@pytest.mark.parametrize("make", [optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adagrad, optim.Adafactor])
def test_under_the_default_recipe_an_optimizer_trains_as_with_its_states_in_float(make):
    """Inputs, and so gradients, that span 20 octaves."""
    losses = []
    for recipe in ("bfp8[0]", "bfp8[0] M=float"):
        torch.manual_seed(0)
        x = torch.randn(256, 20) * 2.0 ** -torch.arange(20)
        y = (x[:, 0] > 0).long()
        model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 2))
        optimizer = make(model.parameters(), lr=0.01)
        lp, _ = convert(model, optimizer, recipe=recipe)
        for _ in range(100):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(lp(x), y)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 1.5 * losses[1] and losses[1] < 0.6
