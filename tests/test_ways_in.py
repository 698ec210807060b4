"""Whichever way a converted model is entered, its bare products have quantized operands, or the call says why not."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from swalp_fx import NotRewritten, convert, in_float, quantize, report, restore

RECIPE = "bfp4[0] rounding=nearest"
X = torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def _project(x, weight):
    return x @ weight


class Above(nn.Module):
    """A base of the class that defines forward."""

    def above(self, x):
        return x @ self.w

    def around(self, x):
        return self._private(x)

    def _private(self, x):
        return F.linear(x, self.w.t())


class Ways(Above):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x @ self.w

    def _own(self, x, *, turned: bool = False):
        return x @ (self.w.t() if turned else self.w)

    def helped(self, xs):
        return _project(xs[0], self.w)

    def listed(self, xs):
        return xs[0] @ self.w

    def scaled(self, batch):
        return batch["x"] * self.w

    def table(self):
        return self.w @ self.v

    def overridden(self, x):
        return super().above(x)

    @torch.no_grad()
    def decorated(self, xs):
        return torch.mm(xs[0], self.w)

    @staticmethod
    def static(x, w):
        return x @ w

    @classmethod
    def of_class(cls, x, w):
        return x @ w

    @property
    def product(self):
        return self.w @ self.v

    def __getitem__(self, row):
        return self.w @ self.v[:, row]

    def __matmul__(self, x):
        return x @ self.w

    def rows(self, x):
        for row in x:
            yield row @ self.w

    async def later(self, x):
        return x @ self.w

    unnamed = lambda self, x: x @ self.w  # noqa: E731


class Bare(nn.Module):
    """One without a forward."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def gram(self):
        return self.layer.weight @ self.layer.weight.t()


class Called(Ways):
    def __call__(self, x):
        return super().__call__(x) @ self.v


class Answers(Ways):
    """One whose call makes no graph."""

    def __call__(self, x):
        return self._compute(x)

    @torch.compiler.disable
    def _compute(self, x):
        return torch.relu(x)


def table(w, v):
    return w @ v


WAYS = {  # the call, and its right value, of the weights as they are read
    "forward": (lambda m: m.forward(X), lambda w, v: X @ w),
    "a base's": (lambda m: m.above(X), lambda w, v: X @ w),
    "a base's private": (lambda m: m._private(X), lambda w, v: X @ w),
    "a base's that calls one": (lambda m: m.around(X), lambda w, v: X @ w),
    "its own private": (lambda m: m._own(X, turned=True), lambda w, v: X @ w.t()),
    "a function of the file": (lambda m: m.helped([X]), lambda w, v: X @ w),
    "a list": (lambda m: m.listed([X]), lambda w, v: X @ w),
    "a dict": (lambda m: m.scaled({"x": X}), lambda w, v: X * w),
    "no tensor": (lambda m: m.table(), table),
    "super": (lambda m: m.overridden(X), lambda w, v: X @ w),
    "decorated": (lambda m: m.decorated([X]), lambda w, v: X @ w),
    "a property": (lambda m: m.product, table),
    "an item": (lambda m: m[0], lambda w, v: w @ v[:, 0]),
    "an operator": (lambda m: m @ X, lambda w, v: X @ w),
    "a lambda of the class": (lambda m: m.unnamed(X), lambda w, v: X @ w),
}


def converted(kind=Ways):
    return convert(kind(), recipe=RECIPE).module


def weights(lp, rounded=True):
    return [quantize(each, "bfp4[0]") if rounded else each.detach() for each in (lp.w, lp.v)]


@pytest.mark.parametrize("way", WAYS)
def test_a_product_has_quantized_operands_in_the_model_and_in_its_copies(way):
    call, right = WAYS[way]
    lp = converted()
    due = right(*weights(lp))
    for each in (lp, copy.deepcopy(lp), pickle.loads(pickle.dumps(lp))):
        assert torch.equal(call(each), due) and torch.equal(call(each), due)
    with in_float(lp):
        assert torch.equal(call(lp), right(*weights(lp, rounded=False)))
    assert torch.equal(call(lp), due)
    assert torch.equal(call(restore(lp)), right(*weights(lp, rounded=False)))


def test_what_takes_no_self_reads_activations():
    lp = converted()
    for function in (lp.static, lp.of_class):
        assert torch.equal(function(X, lp.w), X @ quantize(lp.w, "bfp4[0]"))
        assert str(inspect.signature(function)) == "(x, w)"


@pytest.mark.parametrize("set_on", [lambda m: lambda x: x @ m.w, lambda m: m.unnamed], ids=["a lambda", "a method"])
def test_a_function_that_is_set_on_the_model_is_entered_and_kept(set_on):
    model = Ways()
    model.encode = encode = set_on(model)
    lp, _ = convert(model, recipe=RECIPE)
    assert torch.equal(lp.encode(X), X @ quantize(lp.w, "bfp4[0]"))
    assert inspect.signature(lp.encode) == inspect.signature(encode)
    assert restore(lp).encode == encode


def test_a_function_that_is_set_later_is_reported():
    lp = converted()
    assert "set after convert" not in report(lp)
    lp.encode = lambda x: x @ lp.w
    assert "test_ways_in.py:" in report(lp) and "encode: set after convert, in float where no graph calls" in report(lp)


def test_a_call_of_its_own_is_part_of_the_graph_and_other_instances_stay_float():
    lp, floating = converted(Called), Called()
    w, v = weights(lp)
    assert torch.equal(lp(X), quantize(X @ w, "bfp4[0]") @ v) and len(lp.graphs) == 1
    assert torch.equal(floating(X), X @ floating.w @ floating.v)
    nested, _ = convert(nn.Sequential(Called()), recipe=RECIPE)
    assert torch.equal(nested(X), lp(X)) and len(nested.graphs) == 1


def test_a_call_of_its_own_under_which_no_graph_ran_is_refused():
    with pytest.raises(NotRewritten, match="Answers computed in float, since no graph holds anything of its __call__"):
        converted(Answers)(X)


def test_a_model_without_a_forward_has_ways_in():
    lp, _ = convert(Bare(), recipe=RECIPE)
    weight = quantize(lp.layer.weight, "bfp4[0]")
    assert torch.equal(lp.gram(), weight @ weight.t())


@pytest.mark.parametrize("name", ["rows", "later"])
def test_what_runs_later_is_refused(name):
    with pytest.raises(NotRewritten, match=f"Ways.{name} would have computed in float: it is a generator, or async"):
        getattr(converted(), name)(X)


class Framework(nn.Module):
    def initialise(self, layer):
        layer.weight.data = layer.weight.data.t() @ layer.weight.data


class Settings(Ways, Framework):
    """Methods that compute nothing of their own are left to Python, and what a base does to layers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def reset(self):
        with torch.no_grad():
            self.linear.weight.zero_()

    def group(self):
        yield self.w


def test_settings_are_left_to_python():
    lp = converted(Settings)
    lp.reset()
    lp.initialise(lp.linear)
    assert next(lp.group()) is lp.w and not lp.linear.weight.any() and not lp.graphs


@pytest.mark.parametrize("name", ["forward", "above", "_own", "unnamed", "table", "__getitem__"])
def test_signatures_stay(name):
    assert inspect.signature(getattr(converted(), name)) == inspect.signature(getattr(Ways(), name))
