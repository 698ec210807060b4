"""What the optimizer pass refuses: one sentence, and nothing is changed."""

import copy

import pytest
import torch
from stepping import MASTERS, OPTIMIZERS, RECIPE, fitted, loss_of, net, run_on, same, setup, train, values
from torch import nn
from torch.distributed import checkpoint

from swalp_fx.ops import quantize
from swalp_fx.optimizer import SWALP, Average


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
