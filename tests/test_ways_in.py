"""Whichever way a converted model is entered, its bare products have quantized operands, or the call says why not."""

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import functional_call
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
    """A module with a call that makes no graph."""

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
    assert "set after convert" not in str(report(lp))
    lp.encode = lambda x: x @ lp.w
    assert "test_ways_in.py:" in str(report(lp)) and "encode: set after convert, in float where no graph calls" in str(
        report(lp)
    )


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
    """Methods that compute nothing are left to Python, and a base class's methods on layers too."""

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


@dataclass
class Batch:
    x: torch.Tensor


class Trained(nn.Module):
    """A module with the methods of a training framework."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.w, self.x = nn.Parameter(torch.randn(8, 8)), X

    def forward(self, x):
        return torch.relu(self.linear(x)) @ self.w

    def loss(self, x):
        return F.mse_loss(torch.relu(self.linear(x)) @ self.w, x)

    def training_step(self, batch, number):
        (x,) = batch
        return self.loss(x)

    def named_like_a_layer(self):
        return F.linear(self.x, self.w)

    def reading_a_child(self, xs):
        return [x * self.norm.weight for x in xs]

    def given_a_record(self, batch):
        return batch.x @ self.w

    def in_threads(self, x):
        with ThreadPoolExecutor(2) as threads:
            return sum(threads.map(self.forward, [x, x]))

    def fit(self, x, optimizer):
        self.loss(x).backward()
        optimizer.step()


def of(name):
    return quantize(dict(Trained().named_parameters())[name].detach(), "bfp4[0]")


TAKEN = {
    "tensors in a tuple": (lambda m: m.training_step((X,), 0), lambda m: m.loss(X)),
    "a function that a layer is named like": (lambda m: m.named_like_a_layer(), lambda m: F.linear(X, of("w"))),
    "a parameter of a layer": (lambda m: m.reading_a_child([X])[0], lambda m: X * of("norm.weight")),
    "a tensor in a record": (lambda m: m.given_a_record(Batch(X)), lambda m: X @ of("w")),
    "the module itself, in threads": (lambda m: m.in_threads(X), lambda m: m(X) + m(X)),
}


@pytest.mark.parametrize("way", TAKEN)
def test_what_a_method_is_given_may_be_inside_of_something(way):
    lp, _ = convert(Trained(), recipe=RECIPE)
    seen, due = TAKEN[way]
    assert torch.equal(seen(lp), due(lp))
    assert lp.graphs


OUTER = {
    "a method": (lambda m: lambda x: m.loss(x), lambda m: m.loss(X)),
    "the forward": (lambda m: lambda x: m.forward(x), lambda m: m(X)),
    "parameters that are given": (
        lambda m: lambda x: functional_call(m, {"w": 2 * torch.eye(8)}, (x,)),
        lambda m: functional_call(m, {"w": 2 * torch.eye(8)}, (X,)),
    ),
}


@pytest.mark.parametrize("way", OUTER)
def test_another_compiler_around_a_way_in_keeps_the_bits(way):
    lp, _ = convert(Trained(), recipe=RECIPE)
    around, due = OUTER[way]
    assert torch.equal(torch.compile(around(lp), backend="eager")(X), due(lp))


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = Trained(), nn.Linear(8, 2)

    def forward(self, x):
        return self.head.forward(self.inner.forward(x))


def test_what_a_method_makes_is_named_by_its_module_whoever_calls_it():
    lp, _ = convert(Holding(), recipe="bfp4[0]")
    lp(X)
    lp.inner(X)
    names = [
        {node.name: node.args[2] for node in made.graph.nodes if node.name in ("inner_relu_q", "inner_linear_q")}
        for made in lp.graphs
    ]
    assert names[0] == names[1] and len(names[0]) == 2
    assert [node.name for node in lp.graphs[0].graph.nodes][-2:] == ["head", "output"]


class Plain(torch.optim.Optimizer):
    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.add_(torch.tanh(parameter.grad), alpha=-0.1)


@pytest.mark.parametrize("kind", [Plain, lambda parameters: torch.optim.SGD(parameters, lr=0.1)], ids=["own", "sgd"])
def test_an_optimizer_that_a_method_steps_is_none_of_the_model(kind):
    lp, _ = convert(Trained(), recipe=RECIPE)
    before = lp.w.detach().clone()
    lp.fit(X, kind(lp.parameters()))
    assert not torch.equal(lp.w, before)
    assert {made.entry for made in lp.graphs} == {"Trained: fit"}


class Learning(Trained):
    """Its optimizer is its own, and each step is followed by a forward in one method."""

    def __init__(self):
        super().__init__()
        self.optimizer = None

    def learn(self, x):
        for _ in range(2):
            self.optimizer.zero_grad()
            loss = self.loss(x)
            loss.backward()
            self.optimizer.step()
        return self.loss(x)

    def learn_unrolled(self, x):
        self.loss(x).backward()
        self.optimizer.step()
        return self.loss(x)


OPTIMIZERS = {
    "own": Plain,
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "muon": lambda parameters: torch.optim.Muon([each for each in parameters if each.dim() == 2], lr=0.1),
}


@pytest.mark.parametrize("method, steps", [("learn", 2), ("learn_unrolled", 1)])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_of_the_models_own_steps_in_float_and_the_next_forward_reads_rounded_weights(kind, method, steps):
    (lp, _), (alike, _) = (convert(Learning(), recipe=RECIPE) for _ in range(2))
    lp.optimizer, outside = OPTIMIZERS[kind](lp.parameters()), OPTIMIZERS[kind](alike.parameters())
    found = getattr(lp, method)(X)
    for _ in range(steps):
        outside.zero_grad()
        alike.loss(X).backward()
        outside.step()
    assert torch.equal(found, alike.loss(X))
    assert all(map(torch.equal, lp.parameters(), alike.parameters()))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_a_first_call_may_be_in_a_closure_of_an_optimizers_step(kind):
    (lp, _), (alike, _) = (convert(Trained(), recipe=RECIPE) for _ in range(2))
    optimizer = kind(lp.parameters(), lr=0.1)
    expected = alike.loss(X)

    def closure():
        optimizer.zero_grad()
        loss = lp.loss(X)
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure), expected)
    assert {made.entry for made in lp.graphs} == {made.entry for made in alike.graphs}


def test_an_entry_has_what_a_method_has():
    lp, _ = convert(Trained(), recipe=RECIPE)
    assert lp.loss.__func__ is Trained.loss and lp.loss.__self__ is lp and lp.loss.__qualname__ == "Trained.loss"
    assert inspect.getsource(lp.loss) == inspect.getsource(Trained.loss)


# Graph breaks and marks of PyTorch's front end, in what another compiler calls


class Own(nn.Module):
    """A product with a parameter of its own, around a graph break."""

    def __init__(self):
        super().__init__()
        self.weight, self.last = nn.Parameter(torch.eye(4) / 3), nn.Parameter(torch.eye(4) / 5)

    def forward(self, x):
        x = torch.relu(x @ self.weight)
        self.between(x)
        return x @ self.last

    def between(self, x):
        print(end="")


class InAFunction(Own):
    def between(self, x):
        self.kept = _broken(self, x)


def _broken(module, x):
    print(end="")
    return x @ module.last


class Unbroken(Own):
    def between(self, x):
        pass


class Compiled(Unbroken):
    @torch.compile(backend="eager")
    def forward(self, x):
        return super().forward(x)


class CompiledPart(Unbroken):
    @torch.compile(backend="eager")
    def product(self, x):
        return x @ self.weight

    def forward(self, x):
        return torch.relu(self.product(x)) @ self.last


class CompiledHere(Unbroken):
    def __init__(self):
        super().__init__()
        self.forward = torch.compile(self.forward, backend="eager")


class CompiledFunction(Unbroken):
    def __init__(self):
        super().__init__()
        self.product = torch.compile(lambda x, weight: x @ weight, backend="eager")

    def forward(self, x):
        return torch.relu(self.product(x, self.weight)) @ self.last


class OneNode(Unbroken):
    @torch._dynamo.allow_in_graph
    def forward(self, x):
        return torch.relu(x @ self.weight) @ self.last


class Disabled(Own):
    @torch.compiler.disable
    def forward(self, x):
        return super().forward(x)


class InALoop(Own):
    """No torch goes on behind a break in a loop."""

    def forward(self, x):
        for weight in (self.weight, self.last):
            x = torch.relu(x @ weight)
            print(end="")
        return x


AROUND = {
    "by itself": lambda lp: lp,
    "compiled": lambda lp: torch.compile(lp, backend="eager"),
    "compiled by AOT": lambda lp: torch.compile(lp, backend="aot_eager"),
    "compiled around": lambda lp: torch.compile(lambda x: lp(x), backend="eager"),
    "its forward compiled": lambda lp: torch.compile(lp.forward, backend="eager"),
    "in a compiled model": lambda lp: torch.compile(nn.Sequential(lp), backend="eager"),
}
KEPT = [Own, InAFunction, Compiled, CompiledPart, CompiledHere, CompiledFunction, OneNode]
X4 = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("way", AROUND)
@pytest.mark.parametrize("kind", KEPT, ids=lambda k: k.__name__)
def test_whatever_compiles_a_part_or_breaks_a_graph_keeps_the_bits(kind, way):
    expected = convert(Unbroken(), recipe="bfp4[0] rounding=nearest").module(X4)
    assert not torch.equal(expected, Unbroken()(X4))
    lp = convert(kind(), recipe="bfp4[0] rounding=nearest").module
    assert torch.equal(AROUND[way](lp)(X4), expected)


@pytest.mark.parametrize("way", AROUND)
@pytest.mark.parametrize("kind", [Disabled, InALoop], ids=lambda k: k.__name__)
def test_what_runs_as_python_alone_is_refused_also_where_another_compiles_it(kind, way):
    lp = convert(kind(), recipe="bfp4[0] rounding=nearest").module
    with pytest.raises(NotRewritten, match="computed in float, since no graph holds anything of its forward"):
        AROUND[way](lp)(X4)
