"""Compiled steps, alone or with the forward and the backward around them, draw the eager run's bits."""

import pytest
import torch
from stepping import MASTERS, OPTIMIZERS, RECIPE, Decayed, algorithm_2, fitted, loss_of, net, same, train, values
from torch import nn

from swalp_fx import SWALP, Recipe, convert, quantize

BACKENDS = ["eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("aot_eager", "inductor"))]
MAKES = {name: OPTIMIZERS[name] for name in ("momentum", "nesterov", "for-each", "adam")}
MAKES["subclass"] = lambda p: Decayed(p, lr=0.1, momentum=0.9)

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*divides one moment by another"),
]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("master", ["none", pytest.param("rounded", marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKES)
def test_a_compiled_step_is_algorithm_2_around_torchs_own_compiled_step(name, backend, master):
    found = net()
    optimizer, plain = MAKES[name](found.parameters()), net()
    reference = MAKES[name](plain.parameters())
    swalp = SWALP(found, Recipe.parse(fitted(RECIPE, optimizer), **MASTERS[master]), seed=7)
    swalp.attach(optimizer)
    for each in (optimizer, reference):
        each.step = torch.compile(each.step, backend=backend)
    train(found, optimizer, range(5))
    algorithm_2(plain, reference, swalp.recipe, 7, range(5))
    assert same(values(found, optimizer), values(plain, reference))
    assert swalp.state_dict()["step"] == 5


def whole_steps(backend, name, rounding):
    """The state after five steps: forward, backward, step, average, in one function, compiled if there is a backend."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = MAKES[name](model.parameters())
    lp, swalp = convert(model, optimizer, recipe=f"bfp8[0] rounding={rounding}")

    def step(x):
        optimizer.zero_grad()
        loss = lp(x).square().mean()
        loss.backward()
        optimizer.step()
        swalp.update_average()
        return loss

    run = torch.compile(step, backend=backend) if backend else step
    losses = [run(x).item() for x in torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))]
    return losses, values(model, optimizer, swalp)


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["momentum", "subclass"])
def test_a_whole_compiled_step_has_the_bits_of_the_eager_one(name, backend, rounding):
    losses, found = whole_steps(backend, name, rounding)
    of_eager, due = whole_steps(None, name, rounding)
    assert same(found, due)
    assert losses == pytest.approx(of_eager, rel=1e-6)  # a compiler may sum in another order


@pytest.mark.parametrize("where", ["before", "behind", "on both sides"])
def test_a_graph_break_around_a_call_of_the_model_leaves_what_it_returns_as_it_is(where):
    torch.manual_seed(0)
    lp, _ = convert(nn.Linear(6, 3), recipe="bfp4")

    def call(x):
        if where != "behind":
            torch._dynamo.graph_break()
        y = lp(x)
        if where != "before":
            torch._dynamo.graph_break()
        return y

    x = torch.randn(4, 6)
    torch.manual_seed(1)
    due = lp(x)
    assert not torch.equal(due, quantize(due, "bfp4"))
    torch.manual_seed(1)
    assert torch.equal(torch.compile(call, backend="eager")(x), due)


def test_a_step_without_graph_breaks_is_refused_in_one_sentence():
    model = net()
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    swalp = SWALP(model, fitted(RECIPE, optimizer))
    swalp.attach(optimizer)
    loss_of(model, 0).backward()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(Exception, match="swalp_fx rounds a step between graphs; leave out fullgraph=True"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert same(before, list(model.parameters())) and swalp.state_dict()["step"] == 0


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_key_that_a_compiled_function_is_given_as_a_number_is_that_number(backend):
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))

    def draw(x, key):
        return quantize(x, "bfp4", "stochastic", key=key)

    compiled = torch.compile(draw, backend=backend)
    for key in (3, 4, 2**40 + 5, 2**63 + 9):
        assert torch.equal(compiled(x, key), draw(x, key))
