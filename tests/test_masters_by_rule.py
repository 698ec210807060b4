"""Rules that give some parameters masters, or an average in a format of its own."""

import copy

import pytest
import torch
from stepping import OPTIMIZERS, same, values
from torch import nn

from swalp_fx import Recipe, convert, quantize, report
from swalp_fx.random import fold_in

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*divides one moment by another"),
    pytest.mark.filterwarnings("ignore:an update of"),
]
ROLES = "W=bfp8[0] G=fixed8.9 "


class Apart(nn.Module):
    """Two layers whose gradients do not depend on one another."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8).to(dtype), nn.Linear(6, 8).to(dtype)

    def forward(self, x):
        return self.first(x).square().mean() + self.second(x).square().mean()


def trained(recipe, name="momentum", dtype=torch.float32, steps=4, seed=0):
    """(model, optimizer, swalp), the same each time."""
    torch.manual_seed(seed)
    model = Apart(dtype)
    torch.manual_seed(7)
    optimizer = OPTIMIZERS[name](model.parameters())
    momentum = "" if name == "sgd" else "M=bfp10[0] "
    parts = *convert(model, optimizer, ROLES + momentum + recipe), optimizer
    run(*parts, range(steps))
    return parts


def run(model, swalp, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        model(x.to(model.first.weight.dtype)).backward()
        optimizer.step()
        swalp.update_average()


def of_layer(parts, layer):
    """The weights, masters, averages and states of one layer."""
    model, swalp, optimizer = parts
    state = swalp.state_dict()
    mine = {name: p for name, p in model.named_parameters() if name.startswith(layer)}
    kept = [{name: state[key].get(name) for name in mine} for key in ("masters", "average")]
    return [{name: p.detach() for name, p in mine.items()}, *kept, [optimizer.state[p] for p in mine.values()]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("master", ["float", "fixed16.12"])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_a_rule_gives_masters_to_the_parameters_that_it_matches(name, master, dtype):
    found = trained(f"rules=[second master={master}]", name, dtype)
    assert same(of_layer(found, "second"), of_layer(trained(f"master={master}", name, dtype), "second"))
    assert same(of_layer(found, "first"), of_layer(trained("", name, dtype), "first"))
    assert list(found[1].state_dict()["masters"]) == ["second.weight", "second.bias"]
    is_wide = found[2].state.get(found[0].second.weight, {}).get("momentum_buffer")
    assert is_wide is None or is_wide.dtype == torch.float32


def test_a_rule_gives_some_masters_another_format():
    found = trained("master=float rules=[first master=fixed16.12~nearest]")
    assert same(of_layer(found, "second"), of_layer(trained("master=float"), "second"))
    assert same(of_layer(found, "first"), of_layer(trained("master=fixed16.12~nearest"), "first"))


def test_a_rule_gives_an_average_of_its_own():
    found = trained("average=bfp12[0] rules=[second average=bf16~stochastic; first.bias average=float]")
    means = found[1].average.means
    assert same(of_layer(found, "second"), of_layer(trained("average=bf16~stochastic"), "second"))
    assert torch.equal(means["first.weight"], trained("average=bfp12[0]")[1].average.means["first.weight"])
    assert torch.equal(means["first.bias"], trained("")[1].average.means["first.bias"])
    model, swalp, _ = trained("rules=[second average=bf16~stochastic]", steps=1)
    drawn = fold_in(swalp._seed, 0)
    due = quantize(model.second.weight.detach(), "bf16", "stochastic", key=drawn, stream=2)
    assert torch.equal(swalp.average.means["second.weight"], due)


def test_an_average_runs_along_the_axis_that_a_convolution_contracts():
    torch.manual_seed(0)
    model = nn.Conv2d(64, 4, 1, bias=False)
    _, swalp = convert(model, recipe="A=bfp8 average=bfp4[c:32]")
    swalp.update_average()
    assert torch.equal(swalp.average.means["weight"], quantize(model.weight.detach(), "bfp4[1:32]"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("stop", [0, 2])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(stop, dtype):
    recipe = "rules=[second master=float average=bf16]"
    whole = trained(recipe, dtype=dtype, steps=4)
    first, second = trained(recipe, dtype=dtype, steps=stop), trained(recipe, dtype=dtype, steps=0, seed=99)
    for part, to in zip(first, second, strict=True):
        to.load_state_dict(copy.deepcopy(part.state_dict()))
    run(*second, range(stop, 4))
    (model, swalp, optimizer), (due, of_due, stepper) = second, whole
    assert same(values(model, optimizer, swalp), values(due, stepper, of_due))


def test_a_state_without_a_master_that_a_rule_gives_is_refused():
    swalp = trained("rules=[second master=float]")[1]
    state = swalp.state_dict()
    with pytest.raises(ValueError, match=r"the state's masters lacks 'second\.bias'"):
        swalp.load_state_dict({**state, "masters": {"second.weight": state["masters"]["second.weight"]}})
    with pytest.raises(ValueError, match=r"the state's masters has 'first\.bias', which this model does not"):
        swalp.load_state_dict({**state, "masters": {**state["masters"], "first.bias": torch.zeros(8)}})


def test_detach_narrows_the_states_beside_masters_alone():
    _, swalp, optimizer = trained("rules=[second master=float]", dtype=torch.bfloat16)
    wide = {state["momentum_buffer"].dtype for state in optimizer.state.values()}
    swalp.detach()
    assert wide == {torch.bfloat16, torch.float32}
    assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {torch.bfloat16}


def test_only_parameters_without_masters_are_warned_of():
    model = Apart(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"is lost in most of 'first\.weight' and 1 more in torch\.bfloat16"):
        convert(model, torch.optim.SGD(model.parameters(), lr=1e-5), ROLES + "rules=[second master=float]")


def test_texts_and_the_report_have_both():
    text = "bfp8[0] rules=[fc master=float average=bf16~stochastic]"
    recipe = Recipe.parse(text)
    assert str(recipe) == "bfp8[0] rules=[fc master=float average=e8m7~stochastic]"
    assert Recipe.parse(str(recipe)) == recipe == Recipe.from_json(recipe.to_json()) == eval(repr(recipe))
    assert Recipe.parse("bfp8[0] rules=[fc accumulator=float]").rules[0].master.format == Recipe().weight.format
    model, *_ = trained("rules=[second master=float average=bf16]")
    printed = str(report(model, torch.zeros(1, 6)))
    assert "float in second, which the optimizer steps on" in printed and "e8m7 in second" in printed


def test_a_rule_of_a_single_call_sets_no_master():
    model = nn.Sequential(relu := nn.ReLU(), nn.Linear(2, 2), relu)
    with pytest.raises(ValueError, match="sets master, which all calls of a layer share"):
        convert(model, recipe='bfp8[0] rules=["0@2" master=float]', example_inputs=(torch.ones(1, 2),))
