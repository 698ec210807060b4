"""Steps in the user's own loop: groups, closures, schedulers, exceptions and Ctrl-C."""

import copy
import itertools
import signal
import sys

import pytest
import torch
from stepping import MASTERS, OPTIMIZERS, Breaks, Decayed, algorithm_2, loss_of, net, same, setup, train, values
from torch import nn

from swalp_fx.ops import quantize
from swalp_fx.optimizer import SWALP
from swalp_fx.random import fold_in
from swalp_fx.recipe import Recipe


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
    optimizer, swalp = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), SWALP(model, recipe, others, seed=7)
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
    optimizer, swalp = torch.optim.SGD(model.parameters(), lr=0.1), SWALP(model, recipe, seed=7)
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

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process of the test runner ignores it
    sys.settrace(trace)
    try:
        step()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
        signal.signal(signal.SIGINT, handler)
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
