"""A model gives its caller float, of the type that it has, whichever graphs make it."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from captured import NEAREST, X
from torch import nn

from swalp_fx import check, convert, quantize


class Output(OrderedDict):
    """As of transformers: a dict with attributes."""

    def __getattr__(self, name):
        return self[name]


torch.utils._pytree.register_pytree_node(
    Output, lambda d: (list(d.values()), list(d)), lambda values, keys: Output(zip(keys, values, strict=True))
)


class Giving(nn.Module):
    def __init__(self, breaks):
        super().__init__()
        self.body, self.head, self.breaks = nn.Linear(3, 3), nn.Linear(3, 3), breaks

    def forward(self, x):
        y = torch.relu(self.body(x))
        if self.breaks:
            torch._dynamo.graph_break()
        return Output(logits=self.head(y), hidden=y)


@pytest.mark.parametrize("breaks", [False, True])
def test_what_a_model_gives_keeps_its_type_and_is_float(breaks):
    torch.manual_seed(0)
    model = Giving(breaks)
    assert check(model, X)
    lp, _ = convert(model, recipe=NEAREST)
    given = lp(X)
    assert type(given) is Output and list(given) == ["logits", "hidden"]
    hidden = quantize(
        torch.relu(quantize(F.linear(X, *(quantize(p, "bfp4[0]") for p in model.body.parameters())), "bfp4[0]")),
        "bfp4[0]",
    )
    assert torch.equal(given.logits, F.linear(hidden, *(quantize(p, "bfp4[0]") for p in model.head.parameters())))


class ByOutput(nn.Module):
    """Its own forward is Python: it looks for a value in a try block that breaks."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        try:
            y = self.body(x)
            torch._dynamo.graph_break()
            return self.head(y)
        finally:
            self.done = True


def test_logits_are_float_where_the_models_own_forward_is_python():
    torch.manual_seed(0)
    model = ByOutput()
    lp, _ = convert(model, recipe=NEAREST)
    logits = lp(X)
    assert not torch.equal(quantize(logits, "bfp4[0]"), logits)
    hidden = quantize(F.linear(X, *(quantize(p, "bfp4[0]") for p in model.body.parameters())), "bfp4[0]")
    assert torch.equal(logits, F.linear(hidden, *(quantize(p, "bfp4[0]") for p in model.head.parameters())))


class Auxiliary(nn.Module):
    """One layer's output goes to an attribute only."""

    def __init__(self):
        super().__init__()
        self.body, self.side = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        y = self.body(x)
        self.aux = self.side(y)
        return torch.relu(y)


class CalledByPython(nn.Module):
    def __init__(self, child):
        super().__init__()
        self.child = child

    def forward(self, x):
        torch._dynamo.graph_break()
        return self.child(x)


@pytest.mark.parametrize("breaks, more, is_rounded", [(0, "", 0), (1, "", 1), (0, " quantize_logits=true", 1)])
def test_what_only_an_attribute_keeps_is_rounded_where_another_graph_may_read_it(breaks, more, is_rounded):
    torch.manual_seed(0)
    model = Auxiliary()
    convert(CalledByPython(model) if breaks else model, recipe=NEAREST + more).module(X)
    body, side = ([quantize(p, "bfp4[0]") for p in layer.parameters()] for layer in (model.body, model.side))
    side = F.linear(quantize(F.linear(X, *body), "bfp4[0]"), *side)
    assert torch.equal(model.aux, quantize(side, "bfp4[0]") if is_rounded else side)


def test_what_a_model_looks_at_before_it_returns_it_stays_float():
    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.b(self.a(x))
            if y.sum().item() > 1e9:
                raise ValueError
            return y

    torch.manual_seed(0)
    lp = convert(Looks(), recipe="W=float A=bfp4[0] E=float G=float M=float rounding=nearest").module
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = F.linear(quantize(F.linear(x, lp.a.weight, lp.a.bias), "bfp4[0]"), lp.b.weight, lp.b.bias)
    assert torch.equal(lp(x), expected)
