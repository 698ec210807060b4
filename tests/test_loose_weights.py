"""Trained tensors that are no parameters of the model are rounded like weights, and reported.

Such are a plain tensor that requires grad, a module in a plain list, and a float module that is given to forward."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from swalp_fx import Recipe, Rule, convert, quantize, report

RECIPE = "bfp4[0] rounding=nearest"
X = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def low(tensor):
    return quantize(tensor.detach(), "bfp4[0]")


class Holds(nn.Module):
    def __init__(self, part=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.part = nn.Linear(8, 8, bias=False), part

    def forward(self, x):
        return self.first(x) @ self.part


class Listed(Holds):
    def forward(self, x):
        return self.part[0](self.first(x))


class Given(Holds):
    def forward(self, x, head):
        return head(self.first(x))


class Keeps(Holds):
    """One that keeps its input."""

    def forward(self, x):
        self.kept = x
        return super().forward(x)


def fresh(seed=2):
    torch.manual_seed(seed)
    return torch.randn(8, 8, requires_grad=True)


def linear():
    layer = nn.Linear(8, 8, bias=False)
    layer.weight.data = fresh().detach()
    return layer


CASES = {  # the model, its part, its extra inputs, the name of the weight, the operation on it
    "a tensor": (Holds, fresh, (), "part", torch.matmul),
    "a module in a list": (Listed, lambda: [linear()], (), "part[0].weight", F.linear),
    "a frozen module in a list": (Listed, lambda: [linear().requires_grad_(False)], (), "part[0].weight", F.linear),
    "a module that is given": (Given, lambda: None, (linear,), "head.weight", F.linear),
}


def hidden(lp):
    return low(F.linear(X, low(lp.first.weight)))


@pytest.mark.parametrize("case", CASES)
def test_it_is_rounded_as_a_weight_and_reported(case):
    kind, part, given, name, product = CASES[case]
    lp, _ = convert(kind(part()), recipe=RECIPE)
    given = [make() for make in given]
    assert torch.equal(lp(X, *given), product(hidden(lp), low(fresh())))
    assert f"\n  {name}: no parameters of the model, only W is rounded" in str(report(lp))
    assert "parameters  64 values in 1 tensors: 1 in bfp4[0]" in str(report(lp))


@pytest.mark.parametrize("case", ["a tensor", "a module in a list"])
def test_before_a_call_it_is_reported_as_unread_and_a_rule_may_name_it(case):
    kind, part, _, name, product = CASES[case]
    lp, _ = convert(kind(part()), recipe=Recipe.parse(RECIPE, rules=(Rule("part*", weight="float"),)))
    assert f"{name}: never read by a graph" in " ".join(str(report(lp)).split())
    assert torch.equal(lp(X), product(hidden(lp), fresh()))


def test_it_has_a_gradient_and_another_in_its_place_is_followed():
    lp, _ = convert(Holds(fresh()), recipe=RECIPE)
    for part in (lp.part, fresh(3)):
        lp.part = part
        assert torch.equal(lp(X), hidden(lp) @ low(part))
        lp(X).sum().backward()
        assert part.grad is not None


def test_an_input_that_the_model_keeps_is_none():
    lp, _ = convert(Keeps(fresh()), recipe=RECIPE)
    x = X.clone().requires_grad_()
    due = lp(x)
    torch._dynamo.reset()
    assert torch.equal(lp(x), due) and len(lp.graphs) == 2


def test_a_module_around_the_model_in_anothers_graph_stays_float():
    lp, other = convert(Holds(fresh()), recipe=RECIPE).module, linear()
    assert torch.equal(torch.compile(lambda x: other(lp(x)), backend="eager", fullgraph=True)(X), other(lp(X)))
