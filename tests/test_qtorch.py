"""tools/train_qtorch.py, compare_qtorch.py and qpytorch.py; some tests need QPyTorch installed."""

import copy
import itertools
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from refusal import refusal
from torch import nn

import compare_qtorch
import data
import models
import qpytorch
import swalp_fx
import train_qtorch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tool", [compare_qtorch, train_qtorch])
def test_without_qpytorch_the_remedy_is_said(tool, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "qtorch", None)
    line = refusal(capsys, tool.main, [])
    assert "qtorch cannot be imported" in line and line.endswith("pip install qtorch ninja setuptools")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--bits", "1"], "--bits: '1' is not a whole number of 2 to 16"),
        (["--epochs", "1"], "--epochs: '1' is not a whole number of 2 or more"),
        (["--seeds", "0"], "--seeds: '0' is not a whole number of 1 or more"),
        (["--own", "--bits", "4"], "argument --bits: not allowed with argument --own"),
    ],
)
def test_bad_options_are_refused(words, said, capsys):
    assert said in refusal(capsys, train_qtorch.main, words)


def test_a_row_has_means_deviations_and_the_mean_ratio():
    slow = [{"warm-up": 10.0, "average": 8.0, "ms": 3.0}, {"warm-up": 12.0, "average": 8.0, "ms": 4.0}]
    quick = [{"warm-up": 10.0, "average": 9.0, "ms": 1.0}, {"warm-up": 10.0, "average": 9.0, "ms": 2.0}]
    text = train_qtorch.table([{"float": f, "other": o} for f, o in zip(quick, slow, strict=True)])
    row = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert row == ["other", "11.00 ± 1.41", "8.00 ± 0.00", "3.50", "2.50"]


def test_weights_are_judged_in_the_network_given():
    digits = data.load("digits")
    torch.manual_seed(0)
    model, other = (models.build("convnet", 10, *digits.shape) for _ in range(2))
    outputs = other(digits.test_inputs)
    due = 100 * (outputs.argmax(-1) != digits.test_targets).double().mean().item()
    assert train_qtorch.error(model, dict(other.named_parameters()), digits) == pytest.approx(due)


def test_the_layer_left_in_float_is_the_classifier():
    layers = [name for name, layer in models.build("convnet").named_modules() if isinstance(layer, nn.Linear)]
    assert layers[-1] == train_qtorch.CLASSIFIER


def test_each_element_of_a_bias_has_an_exponent_of_its_own():
    torch.manual_seed(0)
    model = models.build("convnet")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    module, _ = swalp_fx.convert(model, optimizer, recipe=train_qtorch.recipe_of(5))
    module(torch.randn(4, 3, 28, 28)).square().mean().backward()
    optimizer.step()
    bias, weight = model[0].bias, model[0].weight
    assert torch.equal(swalp_fx.quantize(bias, "bfp5[-1:1]"), bias)
    assert not torch.equal(swalp_fx.quantize(bias, "bfp5[0]"), bias)  # which shares one
    assert torch.equal(swalp_fx.quantize(weight, "bfp5[0]"), weight)


def test_qpytorch_rounds_what_it_is_told_to():
    pytest.importorskip("qtorch")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lower = qpytorch.in_low_precision(model, optimizer, 4, (nn.Linear,))
    x, seen = torch.randn(5, 6), {}
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda layer, inputs, output, name=name: seen.update({name: output.detach()}))
    model(x).square().sum().backward()
    lower.step()
    on_grid = {name: torch.equal(swalp_fx.quantize(each, "bfp4[0]"), each) for name, each in seen.items()}
    assert on_grid == {"0": True, "1": True, "2": False}  # a ReLU of rounded numbers is rounded
    assert all(torch.equal(swalp_fx.quantize(w, "bfp4[0]"), w) for w in (model[0].weight, model[2].weight))


def test_its_own_recipe_has_a_rounding_a_role():
    recipe = swalp_fx.Recipe.parse(qpytorch.OWN).resolved()
    roles = {role: str(getattr(recipe, role)) for role in ("weight", "activation", "error", "gradient")}
    assert set(roles.values()) == {"e5m2+finite~nearest_away"}
    assert {str(recipe.momentum), str(recipe.master)} == {"e6m9+finite~stochastic"}


def test_the_loss_is_unscaled_before_the_gradients_are_rounded():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    optimizer.register_step_pre_hook(train_qtorch._unscale)
    swalp_fx.SWALP(nn.ParameterList([weight]), qpytorch.OWN).attach(optimizer)
    weight.grad = torch.tensor([1000.0, 1300.0, -2000.0])
    optimizer.step()
    due = swalp_fx.quantize(torch.tensor([1.0, 1.3, -2.0]), "e5m2+finite", "nearest_away")
    assert torch.equal(weight.grad, due)


def test_its_own_recipe_to_nearest_has_the_same_bits_here_in_every_role():
    """Stochastic roundings cannot be compared: no seed reaches theirs."""
    pytest.importorskip("qtorch")
    digits = data.load("digits")
    torch.manual_seed(0)
    theirs = models.build("convnet", digits.classes, *digits.shape)
    with torch.no_grad():
        for p in theirs.parameters():  # initial weights are not rounded there
            p.copy_(swalp_fx.quantize(p, "e5m2+finite", "nearest_away"))
    ours = copy.deepcopy(theirs)
    sgd, optimizer = (torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (theirs, ours))
    lower = qpytorch.in_its_own(theirs, sgd, "nearest")
    optimizer.register_step_pre_hook(train_qtorch._unscale)
    recipe = qpytorch.OWN.replace("~stochastic", "")
    _, swalp = swalp_fx.convert(ours, optimizer, recipe=f"{recipe} exclude={train_qtorch.CLASSIFIER}")
    for inputs, targets in itertools.islice(digits.train(32, 0), 10):
        for model, each in ((theirs, lower), (ours, optimizer)):
            each.zero_grad()
            (qpytorch.SCALE * F.cross_entropy(model(inputs), targets)).backward()
            each.step()
        masters = swalp.state_dict()["masters"].values()
        for p, q, master in zip(theirs.parameters(), ours.parameters(), masters, strict=True):
            assert torch.equal(p, q) and torch.equal(p.grad, q.grad) and torch.equal(lower.weight_acc[p], master)
            assert torch.equal(sgd.state[p]["momentum_buffer"], optimizer.state[q]["momentum_buffer"])


@pytest.mark.parametrize("recipe", [["--bits", "5"], ["--own"]])
def test_the_three_train_on_the_same_digits(recipe, capsys):
    pytest.importorskip("qtorch")
    train_qtorch.main([*recipe, "--dataset", "digits", "--epochs", "4", "--samples", "640", "--seeds", "1"])
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith("| ")][1:]
    averages = [float(row.split("|")[3]) for row in rows]
    assert len(rows) == 3 and max(averages) < 30.0  # chance is 90
    assert re.search(r"qtorch \S+, torch \S+", out)
