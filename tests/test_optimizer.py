"""The optimizer pass against a plain loop of Algorithm 2, bit for bit; resuming; errors."""

import copy
import io
import itertools
import pickle
import signal
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import checkpoint

from swalp_fx.ops import quantize
from swalp_fx.optimizer import SWALP, Average
from swalp_fx.random import fold_in
from swalp_fx.recipe import Recipe

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "for-each": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "fused adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
}
# Every role in a format of its own, so that no two can be mistaken for one another.
RECIPE = "W=bfp8[0] G=fixed8.9 M=bfp10[0] V=bfp12[0] A=float E=float"
MEANS = ("momentum_buffer", "exp_avg")  # of gradients; the rest are second moments
ORDERS = list(itertools.permutations(range(3)))  # of model, optimizer and swalp
MASTERS = {"none": {}, "rounded": {"master": "fixed16.12"}, "float": {"master": "float"}}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # Tests compare the bits of a step, so these optimizers give the same bits each time.
    pytest.mark.filterwarnings("ignore:.*divides one moment by another"),
]


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def loss_of(model, step):
    rows = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 6, generator=rows), torch.randint(3, (16,), generator=rows)
    return F.cross_entropy(model(x), y)


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def setup(make=OPTIMIZERS["momentum"], recipe=RECIPE, model=None, **changes):
    """(model, optimizer, attached swalp), the same each time."""
    model = net() if model is None else model
    torch.manual_seed(7)
    optimizer = make(model.parameters())
    swalp = SWALP(model, Recipe.parse(fitted(recipe, optimizer), **changes))
    swalp.attach(optimizer)
    return model, optimizer, swalp


def fitted(recipe, optimizer):
    """The text of a recipe without the roles that the optimizer has no states for: naming those is refused."""
    if not isinstance(optimizer, torch.optim.SGD):
        return recipe
    lacks = ("V=",) if optimizer.param_groups[0]["momentum"] else ("V=", "M=")
    return " ".join(word for word in recipe.split() if not word.startswith(lacks))


def values(model, optimizer=None, swalp=None):
    """Every number of a run, as nested plain containers of tensors."""
    return [
        dict(model.state_dict()),
        optimizer.state_dict()["state"] if optimizer else None,
        swalp.state_dict() if swalp else None,
    ]


def same(a, b):
    """Whether nested containers hold the same bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# The order of operations


def algorithm_2(model, optimizer, recipe, seed, steps):
    """The plain loop that the pass must equal, written out for one optimizer that has no hooks."""
    parameters = list(model.parameters())
    masters = None if recipe.master is None else [p.detach().clone() for p in parameters]

    def q(tensor, quantizer, role, index):
        rounding = quantizer.rounding or recipe.rounding
        return quantize(tensor, quantizer.format, rounding, key=key, stream=role * 2**32 + index)

    for step in steps:
        key = fold_in(seed, step)
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for i, p in enumerate(parameters):
            p.grad = q(p.grad, recipe.gradient, 1, i)
        if masters is not None:
            for p, master in zip(parameters, masters, strict=True):
                p.data.copy_(master)
        optimizer.step()
        for i, p in enumerate(parameters):
            if masters is not None:
                masters[i] = q(p.data, recipe.master, 2, i)
                p.data.copy_(masters[i])
            p.data.copy_(q(p.data, recipe.weight, 3, i))
            moments = {k: v for k, v in optimizer.state.get(p, {}).items() if k != "step" and v is not None}
            for slot, name in enumerate(sorted(moments)):
                quantizer = recipe.momentum if name in MEANS else recipe.second_moment
                optimizer.state[p][name] = q(moments[name], quantizer, 4 + slot, i)
    return masters


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
    before, rng = copy.deepcopy(values(model)), torch.get_rng_state()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    SWALP(model, Recipe.parse(RECIPE, master="float")).attach(optimizer)
    assert same(values(model), before)
    assert torch.equal(torch.get_rng_state(), rng)
    assert not optimizer.state


def test_a_step_draws_nothing_from_torch():
    model, optimizer, _ = setup()
    loss_of(model, 0).backward()
    rng = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), rng)


def test_the_seed_is_torchs():
    runs = []
    for seed in (1, 1, 2):
        model = net()
        torch.manual_seed(seed)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        swalp = SWALP(model, fitted(RECIPE, optimizer))
        assert swalp.state_dict()["seed"] == seed
        swalp.attach(optimizer)
        train(model, optimizer, range(2))
        runs.append(values(model))
    assert same(runs[0], runs[1]) and not same(runs[0], runs[2])


def test_the_largest_seed_serves():
    model = net()
    torch.manual_seed(-1)  # torch's initial_seed is then 2^64 - 1
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    swalp = SWALP(model, fitted(RECIPE, optimizer))
    swalp.attach(optimizer)
    train(model, optimizer, range(1))
    plain = net()
    algorithm_2(plain, OPTIMIZERS["sgd"](plain.parameters()), swalp.recipe, 2**64 - 1, range(1))
    assert same(values(model), values(plain))


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


# The user's own loop


@pytest.mark.parametrize("master", MASTERS)
def test_dtypes_and_recipes_side_by_side_round_as_each_alone(master):
    """A step's tensors are rounded together; each must get the bits of a call of its own."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float32)
    model = nn.ParameterList([torch.randn(5, 4, dtype=dtype) for dtype in dtypes])
    changes = MASTERS[master]
    recipe = Recipe.parse("W=bfp8[0] G=fixed8.9 M=bfp10[0] A=float E=float", **changes)
    others = {"3": Recipe.parse("fixed8.5 M=float", rounding="up", **changes), "4": Recipe.parse("float", **changes)}
    gradients = [torch.randn_like(p) for p in model]
    for p, gradient in zip(model, gradients, strict=True):
        p.grad = gradient.clone()
    before = [p.detach().clone() for p in model]
    torch.manual_seed(7)
    optimizer, swalp = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), SWALP(model, recipe, others)
    swalp.attach(optimizer)
    optimizer.step()
    for index, p in enumerate(model):
        its = others.get(str(index), recipe)

        def q(tensor, role, half, its=its, index=index):
            format = getattr(its, role).format
            return quantize(tensor, format, its.rounding, key=fold_in(7, 0), stream=half << 32 | index)

        gradient = q(gradients[index], "gradient", 1)
        assert same(p.grad, gradient)
        dtype = p.dtype if its.master is None else torch.promote_types(p.dtype, torch.float32)  # of the step
        gradient = gradient.to(dtype)
        stepped = before[index].to(dtype) - 0.5 * gradient
        if its.master is not None:
            stepped = q(stepped, "master", 2)
        assert same(p.detach(), q(stepped, "weight", 3).to(p.dtype))
        assert same(optimizer.state[p]["momentum_buffer"], q(gradient, "momentum", 4))


def test_masters_follow_a_model_to_another_dtype():
    """In float16 they would lose bits of a float32 weight, and the state of the run would not load."""
    model, optimizer, swalp = setup(lambda p: torch.optim.SGD(p, lr=0.1), "W=bfp8[0]", net().half(), master="float")
    model(torch.ones(4, 6).half()).sum().backward()
    optimizer.step()
    model.float()
    train(model, optimizer, range(1))
    masters = swalp.state_dict()["masters"]
    assert {master.dtype for master in masters.values()} == {torch.float32}
    assert any(not torch.equal(master, master.half().float()) for master in masters.values())
    swalp.load_state_dict(swalp.state_dict())


def test_a_gradient_that_two_parameters_share_is_rounded_for_each():
    model = nn.ParameterList([torch.randn(6, 5), torch.randn(6, 5)])
    recipe = Recipe.parse("float", gradient="fixed8.3", rounding="stochastic")
    shared = torch.randn(6, 5)
    due = quantize(shared, "fixed8.3", "stochastic", key=fold_in(7, 0), stream=1 << 32)
    due = quantize(due, "fixed8.3", "stochastic", key=fold_in(7, 0), stream=1 << 32 | 1)
    for p in model:
        p.grad = shared
    torch.manual_seed(7)
    optimizer, swalp = torch.optim.SGD(model.parameters(), lr=0.1), SWALP(model, recipe)
    swalp.attach(optimizer)
    optimizer.step()
    assert same(shared, due)


def test_parameter_groups_and_schedulers_work_as_before():
    def make(parameters):
        first, *rest = parameters
        return torch.optim.SGD([{"params": [first], "lr": 0.0}, {"params": rest}], lr=0.1, momentum=0.9)

    model, optimizer, _ = setup(make)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
    reference = make(net().parameters())
    torch.optim.lr_scheduler.StepLR(reference, step_size=2, gamma=0.1)
    start, rates = model[0].weight.detach().clone(), []
    for step in range(4):
        train(model, optimizer, [step])
        scheduler.step()
        rates.append(optimizer.param_groups[1]["lr"])
    assert rates == pytest.approx([0.1, 0.01, 0.01, 0.001])
    # A learning rate of zero only rounds: each weight stays within a step of where it began.
    exponent = torch.floor(torch.log2(start.abs().amax(1, keepdim=True)))
    assert ((model[0].weight - start).abs() <= 2 ** (exponent - 6)).all()
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.state_dict()["param_groups"][0].keys() == reference.state_dict()["param_groups"][0].keys()


def test_a_group_added_later_is_served():
    model = net()
    _, optimizer, _ = setup(lambda p: torch.optim.SGD([model[0].weight], lr=0.1), "W=bfp4", model)
    optimizer.add_param_group({"params": [model[3].weight]})
    train(model, optimizer, range(1))
    assert torch.equal(model[3].weight, quantize(model[3].weight, "bfp4"))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_either_way(set_to_none):
    model, optimizer, swalp = setup()
    for step in range(3):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    plain = net()
    algorithm_2(plain, OPTIMIZERS["momentum"](plain.parameters()), swalp.recipe, 7, range(3))
    assert same(values(model), values(plain))


@pytest.mark.parametrize("keyword", [True, False])
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_gradients_computed_in_a_closure_are_rounded(name, master, keyword):
    model, optimizer, swalp = setup(OPTIMIZERS[name], **MASTERS[master])
    losses = []
    for step in range(3):

        def closure(step=step):
            for p in model.parameters():  # the low-precision weights, not the masters
                assert step == 0 or torch.equal(p, quantize(p, "bfp8[0]"))
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure=closure) if keyword else optimizer.step(closure))
    plain = net()
    reference = OPTIMIZERS[name](plain.parameters())
    algorithm_2(plain, reference, swalp.recipe, 7, range(3))
    assert same(values(model, optimizer), values(plain, reference))
    assert losses[0].item() == loss_of(net(), 0).item()


class Decayed(torch.optim.SGD):
    """Goes on after super().step(), by when torch has fired the step hooks of the inner call."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.97)


@pytest.mark.parametrize("with_closure", [True, False])
@pytest.mark.parametrize("master", MASTERS)
def test_a_subclass_that_calls_super_does_the_work_once(master, with_closure):
    model, optimizer, swalp = setup(lambda p: Decayed(p, lr=0.1, momentum=0.9), **MASTERS[master])
    for step in range(3):
        optimizer.zero_grad()
        if with_closure:

            def closure(step=step):
                loss_of(model, step).backward()

            optimizer.step(closure)
        else:
            loss_of(model, step).backward()
            optimizer.step()
    plain = net()
    reference = Decayed(plain.parameters(), lr=0.1, momentum=0.9)
    algorithm_2(plain, reference, swalp.recipe, 7, range(3))
    assert same(values(model, optimizer), values(plain, reference))
    assert swalp.state_dict()["step"] == 3


class Breaks(torch.optim.SGD):
    """Raises in the middle of its step, as an optimizer out of memory would."""

    broken = False

    def step(self, closure=None):
        if self.broken:
            raise MemoryError
        return super().step(closure)


def check_stopped(model, optimizer, swalp, before, error):
    """Steps into ``error``, which leaves weights and masters as they were."""
    with pytest.raises(error) as held:  # a held traceback keeps the dead frames alive
        train(model, optimizer, [1])
    assert same([dict(model.named_parameters()), swalp.state_dict()], before)
    del held


class Half(torch.optim.SGD):
    """Raises when it has stepped some of its parameters, as Ctrl-C does."""

    error: type[BaseException] | None = None

    def step(self, closure=None):
        if self.error is None:
            return super().step(closure)
        for p in self.param_groups[0]["params"][:2]:
            with torch.no_grad():
                p.sub_(p.grad)
        raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("master", ["rounded", "float"])
def test_a_step_that_raised_half_way_leaves_weights_and_masters(master, error):
    model, optimizer, swalp = setup(lambda p: Half(p, lr=0.1, momentum=0.9), **MASTERS[master])
    train(model, optimizer, [0])
    before = copy.deepcopy([dict(model.named_parameters()), swalp.state_dict()])
    optimizer.error = error
    check_stopped(model, optimizer, swalp, before, error)
    optimizer.error = None
    train(model, optimizer, [1])
    plain = net()
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    algorithm_2(plain, reference, swalp.recipe, 7, range(2))
    assert same(values(model)[0]["0.weight"], values(plain)[0]["0.weight"])


@pytest.mark.parametrize("master", ["rounded", "float"])
def test_a_hook_that_raises_before_the_step_leaves_weights_and_masters(master):
    model, optimizer, swalp = setup(OPTIMIZERS["adam"], **MASTERS[master])
    train(model, optimizer, [0])
    before = copy.deepcopy([dict(model.named_parameters()), swalp.state_dict()])
    handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)  # after the one of the pass
    check_stopped(model, optimizer, swalp, before, ZeroDivisionError)
    handle.remove()
    train(model, optimizer, [1])
    assert swalp.state_dict()["step"] == 2


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("master", ["rounded", "float"])
def test_a_hook_behind_the_step_sees_all_of_it(master, attach_first):
    """So an average that is taken in a hook is of the low-precision weights, and an error there is of a whole step."""
    seen = []

    def look(optimizer, *_):
        seen.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
        raise ZeroDivisionError

    model = net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    swalp = SWALP(model, Recipe.parse("bfp8[0] G=fixed8.9", **MASTERS[master]))
    for register in [swalp.attach, lambda each: each.register_step_post_hook(look)][:: 1 if attach_first else -1]:
        register(optimizer)
    for step in range(2):
        with pytest.raises(ZeroDivisionError):
            train(model, optimizer, [step])
        assert swalp.state_dict()["step"] == step + 1
        assert same(seen[-1], [p.detach() for p in model.parameters()])
        assert all(torch.equal(each, quantize(each, "bfp8[0]")) for each in seen[-1])


def with_ctrl_c(step, moment, files):
    """The number of lines of ``files`` that ``step`` runs; at the line of that number comes Ctrl-C."""
    lines = itertools.count()

    def trace(frame, event, argument):
        if event == "line" and frame.f_code.co_filename.endswith(files) and next(lines) == moment:
            signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        step()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return next(lines)


@pytest.mark.parametrize(
    ("recipe", "files"),
    [
        ("bfp8[0]", ("algorithm.py", "one_pass.py")),
        ("bfp8[0] master=float", ("algorithm.py", "one_pass.py")),
        ("bfp8[0] M=bfp10[0] master=float", ("algorithm.py", "twin.py", "states.py", "optim/sgd.py")),
    ],
)
def test_ctrl_c_at_any_line_of_a_step_is_no_step_or_a_whole_one(recipe, files):
    def at_the_third_step():
        model, optimizer, swalp = setup(recipe=recipe)
        train(model, optimizer, range(2))
        optimizer.zero_grad()
        loss_of(model, 2).backward()
        return model, optimizer, swalp

    def weights(model, optimizer, swalp):
        return copy.deepcopy([dict(model.named_parameters()), swalp.state_dict()])

    parts = at_the_third_step()
    states = [weights(*parts)]
    count = with_ctrl_c(parts[1].step, -1, files)
    states.append(weights(*parts))
    found = []
    for moment in range(0, count, max(1, count // 60)):
        parts = at_the_third_step()
        with_ctrl_c(parts[1].step, moment, files)
        assert torch.is_grad_enabled(), moment
        found.append(parts[2].state_dict()["step"] - 2)
        assert same(weights(*parts), states[found[-1]]), moment
    assert found == sorted(found) and set(found) == {0, 1}


def test_an_optimizer_that_keeps_parameters_elsewhere_has_no_masters():
    model = net()
    for kept in (list(model.parameters()), {model[0].weight}, {"decayed": [model[3].bias]}):
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        optimizer.decayed = kept
        with pytest.raises(ValueError, match=r"SGD keeps parameters in its attribute 'decayed' too, .*; leave master"):
            SWALP(model, "bfp8[0] master=float").attach(optimizer)
        assert not optimizer._optimizer_step_pre_hooks
        SWALP(model, "bfp8[0]").attach(optimizer)


@pytest.mark.parametrize("master", MASTERS)
def test_a_step_that_raised_is_no_step(master):
    model, optimizer, swalp = setup(lambda p: Breaks(p, lr=0.1, momentum=0.9), **MASTERS[master])
    train(model, optimizer, [0])
    optimizer.broken = True
    with pytest.raises(MemoryError) as held:  # a held traceback keeps the dead frames alive
        train(model, optimizer, [1])
    assert swalp.state_dict()["step"] == 1

    optimizer.broken = False
    optimizer.step()  # again, on the same gradients: rounded already, they do not move
    plain = net()
    reference = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    algorithm_2(plain, reference, swalp.recipe, 7, range(2))
    assert same(values(model, optimizer), values(plain, reference))
    del held


@pytest.mark.parametrize("master", MASTERS)
def test_a_closure_that_raised_is_no_step(master):
    model, optimizer, swalp = setup(**MASTERS[master])
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert same(dict(model.named_parameters()), before)
    train(model, optimizer, range(2))
    plain = net()
    algorithm_2(plain, OPTIMIZERS["momentum"](plain.parameters()), swalp.recipe, 7, range(2))
    assert same(values(model), values(plain))


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


# Resuming


def saved(state):
    """``state`` after a trip to disk, as a careful user reads it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def run_on(model, optimizer, swalp, steps):
    for step in steps:
        train(model, optimizer, [step])
        swalp.update_average()


@pytest.mark.parametrize("stop", [0, 1, 3])
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "amsgrad"])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(name, master, stop):
    changes = {**MASTERS[master], "average": "bfp16"}
    whole = setup(OPTIMIZERS[name], **changes)
    run_on(*whole, range(5))

    first = setup(OPTIMIZERS[name], **changes)
    run_on(*first, range(stop))
    states = [saved(part.state_dict()) for part in first]
    # In another process: other weights and another seed, which the states must overrule.
    second = setup(OPTIMIZERS[name], model=net(99), **changes)
    second[2]._seed = 12345
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    run_on(*second, range(stop, 5))

    assert same(values(*second), values(*whole))
    assert same(second[2].averaged_model().state_dict(), whole[2].averaged_model().state_dict())


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_states_load_in_any_order_before_or_after_attaching(order, attach_first):
    whole = setup(master="fixed16.12")
    run_on(*whole, range(3))
    states = copy.deepcopy([part.state_dict() for part in whole])
    run_on(*whole, range(3, 5))

    model = net(99)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    parts = model, optimizer, SWALP(model, Recipe.parse(fitted(RECIPE, optimizer), master="fixed16.12"))
    if attach_first:
        parts[2].attach(optimizer)
    for i in order:
        parts[i].load_state_dict(states[i])
    if not attach_first:
        parts[2].attach(optimizer)
    run_on(*parts, range(3, 5))
    assert same(values(*parts), values(*whole))


def test_a_loaded_state_is_a_copy():
    first, second = setup(master="float"), setup(master="float")
    run_on(*first, range(2))
    state = first[2].state_dict()
    before = copy.deepcopy(state)
    second[2].load_state_dict(state)
    run_on(*second, range(2))
    assert same(state, before)


# Copies, and taking the pass off


def by_pickle(parts):
    return pickle.loads(pickle.dumps(parts))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_a_copy_made_together_goes_on_alone(duplicate, order):
    parts = setup(master="float")
    run_on(*parts, range(2))
    copied = duplicate(tuple(parts[i] for i in order))
    twin = tuple(copied[order.index(i)] for i in range(3))
    before = copy.deepcopy(values(*parts))
    run_on(*twin, range(2, 4))
    assert same(values(*parts), before)
    run_on(*parts, range(2, 4))
    assert same(values(*twin), values(*parts))


def test_a_swalp_copied_alone_acts_on_nothing_of_the_users():
    model, optimizer, swalp = setup()
    run_on(model, optimizer, swalp, range(1))
    twin = copy.deepcopy(swalp)
    before = copy.deepcopy(values(twin.model, None, twin))
    run_on(model, optimizer, swalp, range(1, 3))
    assert same(values(twin.model, None, twin), before)
    assert twin.model is not model


def test_an_optimizer_copied_alone_is_an_ordinary_one():
    model, optimizer, swalp = setup()
    twin_model, twin = copy.deepcopy((model, optimizer))
    plain = net()
    reference = OPTIMIZERS["momentum"](plain.parameters())
    train(twin_model, twin, range(2))
    train(plain, reference, range(2))
    assert same(values(twin_model, twin), values(plain, reference))
    assert swalp.state_dict()["step"] == 0


@pytest.mark.parametrize("master", MASTERS)
def test_detach_changes_no_value_and_the_optimizer_is_ordinary_again(master):
    model, optimizer, swalp = setup(**MASTERS[master])
    train(model, optimizer, range(2))
    plain = copy.deepcopy(model)
    reference = OPTIMIZERS["momentum"](plain.parameters())
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    swalp.detach()
    swalp.detach()
    assert same(values(model, optimizer), values(plain, reference))
    train(model, optimizer, range(2, 4))
    train(plain, reference, range(2, 4))
    assert same(values(model, optimizer), values(plain, reference))


def test_a_second_attach_starts_the_masters_from_the_weights_of_that_moment():
    model, optimizer, swalp = setup(recipe="W=bfp4", master="float")
    train(model, optimizer, range(2))
    swalp.detach()
    with torch.no_grad():
        model[0].weight.fill_(3)
    other = torch.optim.SGD(model.parameters(), lr=0.0)
    swalp.attach(other)
    train(model, other, range(1))
    assert torch.equal(swalp.state_dict()["masters"]["0.weight"], torch.full((8, 6), 3.0))


# Errors: one sentence, and nothing changed


class Wrapper(torch.optim.Optimizer):
    """Like accelerate's, and many packages' Lookahead: an Optimizer by type, without the attributes of its __init__."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups


class SAM(torch.optim.Optimizer):
    """Steps by another, which has the momenta, and has hooks of its own."""

    def __init__(self, optimizer):
        super().__init__(optimizer.param_groups, {})
        self.base_optimizer = optimizer

    def step(self, closure=None):
        return self.base_optimizer.step(closure)


def sgd(*parameters, **options):
    return torch.optim.SGD(parameters, lr=0.1, **options)


class TestRefusedByAttach:
    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda m: m, TypeError, r"takes a torch.optim.Optimizer, not Sequential"),
            (lambda m: Wrapper(sgd(*m.parameters())), ValueError, r"Wrapper wraps .*; attach to its .optimizer"),
            (lambda m: SAM(sgd(*m.parameters())), ValueError, r"SAM wraps another .*; attach to its .base_optimizer"),
            (
                lambda m: torch.optim.lr_scheduler.StepLR(sgd(*m.parameters()), 1),
                ValueError,
                r"StepLR wraps another optimizer, .*; attach to its .optimizer",
            ),
            (lambda m: torch.optim.LBFGS(m.parameters()), ValueError, r"LBFGS evaluates .*; use SGD or Adam"),
            (lambda m: sgd(*m.parameters(), differentiable=True), ValueError, r"SGD has differentiable=True"),
            (
                lambda m: sgd(*m.parameters(), nn.Parameter(torch.ones(2, 3))),
                ValueError,
                r"parameter 6 of group 0 of SGD, of shape \(2, 3\), is not the model's; build .* model.parameters\(\)",
            ),
        ],
    )
    def test_an_optimizer_it_cannot_serve(self, make, error, message):
        model = net()
        optimizer = make(model)
        swalp = SWALP(model, "bfp8[0]")
        with pytest.raises(error, match=message):
            swalp.attach(optimizer)
        assert not getattr(optimizer, "_optimizer_step_pre_hooks", None)
        swalp.attach(sgd(*model.parameters()))  # it is still free

    def test_a_complex_parameter(self):
        model = nn.Linear(2, 2, dtype=torch.complex64)
        with pytest.raises(ValueError, match=r"'weight' is torch.complex64, .*; freeze it"):
            SWALP(model, "bfp8[0]").attach(sgd(*model.parameters()))

    def test_a_second_attach(self):
        model, optimizer, swalp = setup()
        with pytest.raises(ValueError, match=r"already attached to SGD; call detach\(\) first"):
            swalp.attach(sgd(*model.parameters()))
        swalp.detach()
        swalp.attach(optimizer)

    def test_a_second_swalp_on_the_same_optimizer(self):
        model, optimizer, swalp = setup()
        message = r"SGD is already attached to another SWALP; call that one's detach\(\) first, or convert"
        with pytest.raises(ValueError, match=message):
            SWALP(model, swalp.recipe).attach(optimizer)


class TestRefusedByStep:
    def unchanged(self, model, optimizer, swalp, message, step):
        before = copy.deepcopy([values(model, optimizer, swalp), [p.grad for p in model.parameters()]])
        with pytest.raises(ValueError, match=message):
            step()
        assert same([values(model, optimizer, swalp), [p.grad for p in model.parameters()]], before)

    @pytest.mark.parametrize("unscale_first", [True, False])
    def test_a_fused_step_under_a_grad_scaler(self, unscale_first):
        model, optimizer, swalp = setup(OPTIMIZERS["fused adam"])
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(loss_of(model, 0)).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        message = r"Adam unscales the gradients of a GradScaler inside its step, .*; use fused=False"
        self.unchanged(model, optimizer, swalp, message, lambda: scaler.step(optimizer))

    @pytest.mark.parametrize("master", MASTERS)
    @pytest.mark.parametrize("with_closure", [True, False])
    def test_a_sparse_gradient(self, with_closure, master):
        model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
        _, optimizer, swalp = setup(OPTIMIZERS["sgd"], RECIPE, model, **MASTERS[master])
        before = copy.deepcopy(values(model, optimizer, swalp))

        def closure():
            model(torch.tensor([1, 2])).sum().backward()

        if not with_closure:
            closure()
        with pytest.raises(ValueError, match=r"gradient of '0.weight' is torch.sparse_coo, .*; make it dense"):
            optimizer.step(closure if with_closure else None)
        assert same(values(model, optimizer, swalp), before)

    def test_a_sparse_gradient_is_served_where_gradients_are_not_rounded(self):
        model = nn.Sequential(nn.Embedding(5, 4, sparse=True))
        _, optimizer, _ = setup(OPTIMIZERS["sgd"], "W=bfp4", model)
        model(torch.tensor([1, 2])).sum().backward()
        optimizer.step()
        assert torch.equal(model[0].weight, quantize(model[0].weight, "bfp4"))

    def test_a_group_that_is_not_the_models(self):
        model, optimizer, swalp = setup()
        train(model, optimizer, range(1))
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
        message = r"parameter 0 of group 1 of SGD, of shape \(3,\), is not the model's"
        self.unchanged(model, optimizer, swalp, message, optimizer.step)

    def test_a_closure_evaluated_twice(self):
        class Twice(torch.optim.SGD):
            def step(self, closure):
                closure()
                super().step(closure)

        model, optimizer, _ = setup(lambda p: Twice(p, lr=0.1))
        with pytest.raises(ValueError, match=r"evaluated its closure twice in one step; attach one that does so once"):
            optimizer.step(lambda: loss_of(model, 0).backward())

    def test_a_closure_never_evaluated(self):
        class Never(torch.optim.SGD):
            def step(self, closure):
                super().step()

        model, optimizer, _ = setup(lambda p: Never(p, lr=0.1))
        with pytest.raises(ValueError, match=r"Never never evaluated the closure it was given; call step\(\) without"):
            optimizer.step(lambda: loss_of(model, 0).backward())


def test_an_average_of_nothing_is_refused():
    with pytest.raises(ValueError, match=r"no average yet; call update_average\(\) at least once"):
        setup()[2].averaged_model()


def without(key):
    return lambda state: state.pop(key)


def with_value(*path, value):
    def change(state):
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("seed"), r"the state lacks 'seed'; pass what state_dict\(\) returned"),
        (without("masters"), r"the state lacks 'masters'; pass what state_dict\(\) returned"),
        (with_value("waiting", value=["4.weight"]), r"waiting must be a list of parameters with masters, not \['4.we"),
        (with_value("extra", value=1), r"the state has 'extra' too; pass what state_dict\(\) returned"),
        (with_value("version", value=7), r"of version 7, and this SWALP reads version 6"),
        (with_value("recipe", value="bfp6"), r"of recipe 'bfp6', not 'W=bfp8\[0\] .*'; convert with the former"),
        (with_value("step", value=1.5), r"step must be a whole number, not 1.5"),
        (with_value("n_averaged", value=-1), r"n_averaged must be a whole number, not -1"),
        (with_value("n_averaged", value=0), r"an average of 0 models"),
        (lambda s: s["average"].pop("3.bias"), r"average lacks '3.bias', a parameter of the model"),
        (with_value("average", value=[1]), r"average must map names to tensors"),
        (
            with_value("average", "head.weight", value=torch.ones(2)),
            r"average has 'head.weight', which this model does",
        ),
        (
            with_value("average", "0.weight", value=torch.ones(2, 2)),
            r"average has '0.weight' as \(2, 2\) torch.float32, and this model needs \(8, 6\) torch.float32",
        ),
        (
            with_value("masters", "0.weight", value=torch.ones(8, 6).double()),
            r"masters has '0.weight' as \(8, 6\) torch.float64, and .* \(8, 6\) torch.float32",
        ),
        (
            with_value("averages", value=[]),
            r"the state's averages map names to n_seen, n_averaged, means and settings; pass",
        ),
        (lambda s: s["masters"].pop("3.bias"), r"masters lacks '3.bias', a parameter of the model"),
        (lambda s: s["parameters"].remove("3.bias"), r"the state is of a model without '3.bias'; load a state of this"),
        (lambda s: s["parameters"].append("head"), r"the state is of a model with 'head' too; load a state of this"),
        (lambda s: s["parameters"].reverse(), r"a model whose parameters are in another order"),
        (with_value("averages", "ema", value={"means": {}}), r"the state's averages map names to n_seen"),
        (with_value("masters", "x", value=torch.ones(2)), r"masters has 'x', which this model does not"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(change, message):
    parts = setup(master="float")
    run_on(*parts, range(2))
    state = copy.deepcopy(parts[2].state_dict())
    change(state)
    before = copy.deepcopy(values(*parts))
    with pytest.raises(ValueError, match=message):
        parts[2].load_state_dict(state)
    assert same(values(*parts), before)


def test_a_state_of_version_1_is_read():
    """It called masters accumulators, in its recipe too."""
    parts = setup(master="fixed16.12", average="bfp9~up")
    run_on(*parts, range(2))
    state = parts[2].state_dict()
    old = {("accumulators" if key == "masters" else key): value for key, value in state.items()} | {"version": 1}
    del old["parameters"], old["fingerprints"], old["waiting"]
    old["recipe"] = f"{fitted(RECIPE, parts[1])} accumulator=fixed16.12 average=bfp9 average_rounding=up"
    again = setup(master="fixed16.12", average="bfp9~up")[2]
    again.load_state_dict(old)
    assert same(again.state_dict(), state)


@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_of_version_3_is_read_though_it_has_only_what_was_made_so_far(steps):
    parts = setup(master="float")
    train(*parts[:2], range(steps))
    state = parts[2].state_dict()
    old = {key: value for key, value in state.items() if key not in ("parameters", "fingerprints", "waiting")}
    old |= {"version": 3, "average": {}}
    old["masters"] = {} if steps == 0 else {name: state["masters"][name] for name in list(state["masters"])[1:]}
    again = setup(master="float")[2]
    again.load_state_dict(old)
    assert again.state_dict()["step"] == steps and list(again._parameters.masters) == list(old["masters"])


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_distributed_checkpoints_load_into_a_fresh_state(dtype, steps, tmp_path):
    def made():
        model, optimizer, swalp = setup(master="float", model=net().to(dtype))
        swalp.averages["ema"] = Average(decay=0.9)
        return model, optimizer, swalp

    def go_on(model, swalp, optimizer, steps):
        for step in steps:
            for i, p in enumerate(model.parameters()):
                p.grad = torch.full_like(p, 0.1 * step + 0.01 * i)
            optimizer.step()
            swalp.update_average()

    model, optimizer, swalp = made()
    go_on(model, swalp, optimizer, range(steps))
    saved = {"model": model.state_dict(), "swalp": swalp.state_dict()}
    checkpoint.save(saved, checkpoint_id=tmp_path, no_dist=True)

    other, its_optimizer, its_swalp = made()
    loaded = {"model": other.state_dict(), "swalp": its_swalp.state_dict()}
    checkpoint.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(loaded["model"])
    its_swalp.load_state_dict(loaded["swalp"])
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(its_swalp.state_dict(), swalp.state_dict())
    for each in ((model, swalp, optimizer), (other, its_swalp, its_optimizer)):
        go_on(*each, range(steps, steps + 2))
    assert same(values(model, optimizer, swalp), values(other, its_optimizer, its_swalp))


def test_masters_of_a_state_before_the_first_step_are_the_weights_that_are_loaded_later():
    model, optimizer, swalp = setup(master="float")
    swalp.load_state_dict(swalp.state_dict())
    model.load_state_dict(net(5).state_dict())
    other, its_optimizer, its_swalp = setup(master="float", model=net(5))
    train(model, optimizer, range(2))
    train(other, its_optimizer, range(2))
    assert same(values(model, optimizer, swalp), values(other, its_optimizer, its_swalp))


def test_a_master_that_no_step_has_taken_is_the_weight_in_a_resumed_run_too():
    """Of a parameter that never had a gradient, into which others may write: an average, say."""

    def head_alone(model, optimizer):
        optimizer.zero_grad()
        model[3](torch.ones(2, 8)).sum().backward()
        optimizer.step()

    parts = setup(OPTIMIZERS["adam"], master="float")
    head_alone(*parts[:2])
    states = copy.deepcopy([part.state_dict() for part in parts])
    assert states[2]["waiting"] == ["0.weight", "0.bias", "1.weight", "1.bias"] and len(states[2]["masters"]) == 6
    again = setup(OPTIMIZERS["adam"], master="float", model=net(9))
    for i in (2, 0, 1):
        again[i].load_state_dict(states[i])
    for model, optimizer, _ in (parts, again):
        with torch.no_grad():
            model[0].weight.fill_(0.3)
        train(model, optimizer, range(2))
    assert same(values(*parts), values(*again)) and parts[2].state_dict()["waiting"] == []


def test_masters_are_refused_by_a_recipe_without():
    parts = setup()
    state = {**parts[2].state_dict(), "masters": {"0.weight": torch.ones(8, 6)}}
    with pytest.raises(ValueError, match=r"masters has '0.weight', which this model does not"):
        parts[2].load_state_dict(state)


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
