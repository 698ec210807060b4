"""The model runs as the user wrote it, at every call: whatever its Python reads, sets, makes, draws and branches on."""

import asyncio
import contextlib
import copy
import inspect
import pickle
import random
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch.utils.checkpoint
from marks import rounded
from torch import nn

from swalp_fx import ConvertError, check, convert, nodes, quantize, report
from swalp_fx.capture import Conversion, compiler

NEAREST = "bfp4[0] rounding=nearest"
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A layer, and whatever is tried behind it."""

    def __init__(self, inner):
        super().__init__()
        self.layer, self.inner = nn.Linear(3, 3), inner

    def forward(self, x):
        return self.inner(self.layer(x))


def both(made, recipe="float rounding=nearest"):
    """(the model, a converted one), with the same numbers."""
    torch.manual_seed(0)
    model = made()
    return model, convert(copy.deepcopy(model), recipe=recipe).module


def same(*calls):
    torch.manual_seed(0)
    random.seed(0)
    first = calls[0]()
    torch.manual_seed(0)
    random.seed(0)
    return torch.equal(first, calls[1]())


# Branches, new tensors, draws and writes of a forward


class ByValue(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else -x


class ByLoop(nn.Module):
    def forward(self, x):
        return sum(row * i for i, row in enumerate(x))


class ByShape(nn.Module):
    def forward(self, x):
        batch, width = x.shape
        assert width == 3, f"{width} columns"
        return x * {4: 3.0}.get(batch, 1.0) if isinstance(x.shape, tuple) else -x


class ByType(nn.Module):
    def forward(self, x, scale=None):
        if isinstance(x, torch.Tensor) and torch.is_tensor(x) and type(x) is torch.Tensor and hasattr(x, "shape"):
            x = x * 2
        match scale:
            case torch.Tensor():
                return x * scale
            case None:
                return x + 1


class ByText(nn.Module):
    def forward(self, x):
        return x * 2 if str(x.dtype) == "torch.float32" and f"{x.shape[0]} rows" == "4 rows" else -x


class ByPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))])

    def forward(self, x):
        for part in self.parts:
            x = part(x) * len(part) if isinstance(part, nn.Sequential) else part(x)
        return x


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand(3)


class Coin(nn.Module):
    def forward(self, x):
        return x * 2 if random.random() < 0.5 else -x


class Seeded(nn.Module):
    """Draws the same numbers at each call, and leaves the state of the generator as it was."""

    def forward(self, x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            noise = torch.rand(3)
        return x * noise + torch.rand(3)


class Restoring(nn.Module):
    def forward(self, x):
        state = torch.get_rng_state()
        first = torch.rand(3)
        torch.set_rng_state(state)
        return x * first + torch.rand(3)


class Homeless(nn.Module):
    def forward(self, x):
        return nn.ReLU()(x)


class Adding(nn.Module):
    """Writes into a tensor that it has made."""

    def forward(self, x):
        sums = torch.zeros(x.shape[0], 3)
        for _ in range(3):
            sums += torch.tanh(x)
        return sums


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.tensor(2.0)

    def forward(self, x):
        return x * self.scale + torch.tensor([1.0, 2.0, 3.0])


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.total.add_(x.detach().sum(0))
        y = x + 1
        y += x
        y[:, 0] = 0
        y.relu_()
        return y * self.total


class InPlace(nn.Module):
    def forward(self, x):
        y = x * 2
        F.leaky_relu(y, 0.1, True)
        return y + 1


class Setting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        self.calls += 1
        return x - self.mean


class Resetting(Setting):
    def forward(self, x):
        self.mean = torch.ones(3)
        return x * self.mean


class Recomputing(nn.Module):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(torch.sigmoid, x, use_reentrant=False)


class Offloading(nn.Module):
    def forward(self, x):
        with torch.autograd.graph.save_on_cpu():
            return torch.sigmoid(x)


class Round(torch.autograd.Function):
    """Rounds, and doubles the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class Rounding(nn.Module):
    def forward(self, x):
        return Round.apply(x * 4)


class ByName(nn.Module):
    """Reaches its parameters and buffers by name."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(3, 3)
        self.register_buffer("shift", torch.ones(3))

    def forward(self, x):
        weight = dict(self.named_parameters())["other.weight"]
        return F.linear(x, weight, self.state_dict()["other.bias"]) + dict(self.named_buffers())["shift"]


class Closures(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.calls = [lambda x: self.layer(x), self.inner, self.layer]

    def inner(self, x):
        return self.layer(x) * 2

    def forward(self, x):
        return sum(call(x) for call in self.calls)


FAITHFUL = [
    ByValue, ByLoop, ByShape, ByType, ByText, ByPart, Noisy, Coin, Seeded, Restoring, Homeless, Adding, Constant,
    Writing, InPlace, Setting, Resetting, Recomputing, Offloading, Rounding, ByName,
]  # fmt: skip


@pytest.mark.parametrize("inner", FAITHFUL, ids=lambda inner: inner.__name__)
def test_it_computes_what_the_model_computes_at_every_call(inner):
    torch.manual_seed(0)
    found = check(Block(inner()), X)
    assert found, found


def test_closures_and_bound_methods_reach_the_rewritten_layers():
    torch.manual_seed(0)
    model = Closures()
    lp, _ = convert(model, recipe=NEAREST)
    weight, bias = (quantize(parameter.detach(), "bfp4[0]") for parameter in model.layer.parameters())
    y = F.linear(X, weight, bias)
    q = quantize(y, "bfp4[0]")
    assert torch.equal(lp(X), quantize(q + quantize(q * 2, "bfp4[0]"), "bfp4[0]") + q)
    assert torch.equal(model.calls[0](X), y) and torch.equal(model.calls[2](X), y)


@pytest.mark.parametrize("size", [(4, 3), (2, 3), (1, 3)])
def test_a_branch_on_a_shape_follows_the_shape(size):
    for kind in (ByShape, ByText):
        model, lp = both(lambda kind=kind: Block(kind()))
        for each in (X, torch.ones(size), X):
            assert torch.equal(lp(each), model(each))
        with pytest.raises(AssertionError, match="2 columns") if kind is ByShape else contextlib.nullcontext():
            lp.inner(torch.ones(2, 2))


def test_a_branch_on_a_value_follows_the_value():
    model, lp = both(lambda: nn.Sequential(nn.Linear(3, 3), ByValue(), nn.Linear(3, 3)))
    for x in (X, -X, 5 * X):
        assert torch.equal(lp(x), model(x))


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x, mask=None, invert=False, *, skip=None):
        y = self.layer(x)
        y = y if mask is None else y * mask
        y = y + skip if isinstance(skip, torch.Tensor) else y
        return -y if invert else y


def test_optional_inputs_may_be_given_or_not_in_any_order():
    model, lp = both(Optional)
    for arguments, keywords in (
        ((X,), {}), ((X, X > 0), {}), ((X, None, True), {}), ((X,), {"skip": X}), ((X,), {"skip": 3}),
        ((X,), {"mask": X}),
    ):  # fmt: skip
        assert torch.equal(lp(*arguments, **keywords), model(*arguments, **keywords))


# Attributes that a forward sets, and that are set on it


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.seen, self.last, self.calls, self.plain, self.factor = [], None, 0, torch.zeros(3), 1.0

    def forward(self, x):
        y = self.layer(x)
        self.seen.append(y)
        self.last = (y, y.pow(2).mean())
        self.calls += 1
        self.plain += 1
        return y * self.calls * self.factor + self.plain


def test_attributes_that_a_forward_sets_are_set_at_every_call():
    for _ in range(2):
        model, lp = both(Remembering)
        for calls in (1, 2, 3):
            assert torch.equal(lp(X), model(X))
            assert lp.calls == calls == len(lp.seen) and torch.equal(lp.plain, model.plain)
            for found, due in zip((*lp.last, *lp.seen), (*model.last, *model.seen), strict=True):
                assert torch.equal(found, due)
        lp.last[1].backward()
        model.last[1].backward()
        assert torch.equal(lp.layer.weight.grad, model.layer.weight.grad)


def test_attributes_that_a_forward_reads_are_followed():
    model, lp = both(Remembering)
    for factor in (1.0, 0.5, 0.25, 3, "x"):
        for each in (model, lp):
            each.factor = 2.0 if factor == "x" else factor
        assert torch.equal(lp(X), model(X))


class Switching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 3), nn.Dropout()

    def forward(self, x):
        y = self.drop(self.layer(x))
        self.eval()
        return y


def test_a_mode_that_a_forward_switches_is_switched():
    model, lp = both(Switching)
    assert same(lambda: lp(X), lambda: model(X)) and not lp.training and not lp.drop.training
    assert same(lambda: lp(X), lambda: model(X))


@pytest.mark.parametrize("early", [True, False])
def test_a_forward_that_is_set_on_the_instance_runs_rewritten(early):
    def forward(self, x):
        return self.inner(self.layer(x)) * 3

    torch.manual_seed(0)
    model = Block(nn.Linear(3, 2))
    due, _ = convert(copy.deepcopy(model), recipe=NEAREST)
    if early:
        model.forward = MethodType(forward, model)
        lp, _ = convert(model, recipe=NEAREST)
    else:
        lp, _ = convert(model, recipe=NEAREST)
        lp(X)
        lp.forward = MethodType(forward, lp)
    assert torch.equal(lp(X), quantize(due(X), "bfp4[0]") * 3)
    model.layer.forward = lambda x: F.linear(x, model.layer.weight) * 0
    assert torch.equal(lp(X), lp(2 * X))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x)

    def twice(self, x):
        return self.layer(x) * 2


class Doubled(Scaled):
    def forward(self, x):
        return self.layer(x) * 2

    def thrice(self, x):
        return x @ self.layer.weight


def _another_forward(monkeypatch, module):
    monkeypatch.setattr(type(module), "forward", Doubled.forward)


def _another_method(monkeypatch, module):
    monkeypatch.setattr(type(module), "forward", Scaled.twice)


def _another_type(monkeypatch, module):
    module.__class__ = Doubled


@pytest.mark.parametrize("change", [_another_forward, _another_method, _another_type])
@pytest.mark.parametrize("way", [lambda lp: lp(X), lambda lp: lp.forward(X), lambda lp: lp[0](X)], ids=range(3))
def test_a_forward_that_is_replaced_on_the_class_runs_rewritten(monkeypatch, change, way):
    torch.manual_seed(0)
    lp, _ = convert(nn.Sequential(Scaled(), Scaled()), recipe=NEAREST)
    due, _ = convert(nn.Sequential(Doubled(), Doubled()), recipe=NEAREST)
    due.load_state_dict(lp.state_dict())
    assert not torch.equal(way(lp), way(due))
    for each in lp:
        change(monkeypatch, each)
    assert torch.equal(way(lp), way(due))


def test_the_methods_of_another_type_are_entries_from_its_next_call_on():
    lp, _ = convert(Scaled(), recipe=NEAREST)
    lp.__class__ = Doubled
    lp(X)
    assert torch.equal(lp.thrice(X), X @ quantize(lp.layer.weight.detach(), "bfp4[0]"))


# Hooks


def _keeping_in(kept):
    return lambda _, x, y: kept.append(y)  # torch 2.11 does not append to a list that is a function's default


def test_a_hook_on_a_block_runs_at_every_call_and_what_it_takes_has_a_gradient():
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        model, kept = nn.Sequential(Block(nn.Tanh()), nn.Linear(3, 2)), []
        model[0].register_forward_hook(_keeping_in(kept))
        if converted:
            convert(model, recipe="float")
        for calls in (1, 2):
            model(X)
            assert len(kept) == calls
        kept[-1].square().mean().backward()
        found.append(model[0].layer.weight.grad)
    assert torch.equal(*found)


def test_a_late_hook_is_given_what_one_that_was_there_before_is_and_changes_the_same_bits():
    """Also if a rounding was left out or is in place: a ReLU keeps rounded numbers."""
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        model, seen = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), []

        def hook(_, x, y, seen=seen):
            seen.append(y.clone())
            return y * 0.3

        if not late:
            model[1].register_forward_hook(hook)
        lp, _ = convert(model, recipe=NEAREST)
        if late:
            lp(X)
            model[1].register_forward_hook(hook)
        y = lp(X)
        found.append([y, *seen])
    assert all(map(torch.equal, *found))


# Outputs of a model


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


# Ways in


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 3)

    def encode(self, x):
        return self.encoder(x)

    def decode(self, y, *, scale: float = 1.0):
        return self.decoder(y) * scale

    def forward(self, x):
        return self.decode(self.encode(x))


def test_every_way_in_runs_rewritten_graphs():
    torch.manual_seed(0)
    model = Coder()
    floating = copy.deepcopy(model)
    lp, _ = convert(model, recipe=NEAREST)
    ways = {
        "a method": lambda model: model.decode(X, scale=2.0),
        "a child": lambda model: model.encoder(X),
        "a child's child": lambda model: model.encoder[0](X),
        "a slice": lambda model: model.encoder[:1](X),
        "each child": lambda model: next(child(X) for child in model.encoder),
        "forward": lambda model: model.forward(X),
        "a method outside of the model": lambda model: Coder.encode(model, X),
    }
    for name, way in ways.items():
        assert not torch.equal(way(lp), way(floating)), name
    assert len(lp.encoder) == 2 and isinstance(lp, Coder) and "scale" in str(inspect.signature(lp.decode))


def test_surgery_is_followed():
    torch.manual_seed(0)
    lp, _ = convert(Coder(), recipe=NEAREST)
    lp(X)
    lp.decoder = nn.Linear(3, 5)
    assert lp(X).shape == (4, 5)
    lp.encoder.insert(0, nn.Linear(3, 3))
    nn.utils.prune.random_unstructured(lp.decoder, "weight", 0.5)
    lp(X)
    nn.utils.parametrizations.weight_norm(lp.encoder[0])
    lp(X)
    rounded = lp.graphs[-1].graph.find_nodes(op="call_function", target=nodes.quantize_weight)
    assert len(rounded) == 6, rounded


@pytest.mark.parametrize("called", [False, True])
def test_what_is_put_between_layers_that_python_calls_is_rewritten(called):
    class Printing(nn.Sequential):
        def forward(self, x):
            for layer in self:
                try:
                    x = layer(x)
                    print(end="")
                finally:
                    self.done = True
            return x

    torch.manual_seed(0)
    lp, _ = convert(Printing(nn.Linear(3, 3), nn.Tanh()), recipe=NEAREST)
    if called:
        lp(X)
    lp.insert(0, nn.Linear(3, 3))
    lp(X)
    assert {each.path for each in lp.graphs if "quantize_weight" in each.code} == {"0", "1"}


# Models in models


class Teacher(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))

    def features(self, x):
        return torch.relu(self[0](x))


class Student(nn.Module):
    """Calls another model, which nothing registers, between its layers."""

    def __init__(self, call):
        super().__init__()
        self.first, self.second, self.call = nn.Linear(3, 3), nn.Linear(3, 3), call

    def forward(self, x):
        return self.second(torch.relu(self.call(self.first(x))))


CALLS = {
    "a model": lambda teacher: lambda x: teacher(x),
    "in a block": lambda teacher: lambda x: Block(lambda y: teacher(y) + 0).inner(x),
    "its method": lambda teacher: teacher.features,
    "a layer of it": lambda teacher: lambda x: teacher[0](x),
    "without gradients": lambda teacher: torch.no_grad()(teacher.__call__),
    "checkpointed": lambda teacher: lambda x: torch.utils.checkpoint.checkpoint(teacher, x, use_reentrant=False),
}


@pytest.mark.filterwarnings("ignore:.*Graph break")
@pytest.mark.parametrize("around", [lambda lp: lp, lambda lp: torch.compile(lp, backend="eager")], ids=["", "compiled"])
@pytest.mark.parametrize("case", CALLS)
def test_a_converted_model_that_another_calls_computes_in_its_own_recipe(case, around):
    torch._dynamo.reset()  # the limit of torch.compile is for all of a class
    torch.manual_seed(0)
    teacher, _ = convert(Teacher(), recipe="bfp6[0] rounding=nearest")
    call = CALLS[case](teacher)
    student, _ = convert(Student(call), recipe=NEAREST)
    first, second = (
        [quantize(parameter.detach(), "bfp4[0]") for parameter in layer.parameters()]
        for layer in (student.first, student.second)
    )
    hidden = quantize(torch.relu(call(quantize(F.linear(X, *first), "bfp4[0]"))), "bfp4[0]")
    for _ in range(2):
        assert torch.equal(around(student)(X), F.linear(hidden, *second))
    assert teacher.graphs and not any("bfp6" in each.code for each in student.graphs)


def test_a_converted_model_that_becomes_an_attribute_of_another_keeps_its_recipe():
    torch.manual_seed(0)
    teacher, _ = convert(Teacher(), recipe="bfp6[0] rounding=nearest")
    student, _ = convert(Student(nn.Identity()), recipe=NEAREST)
    student(X)
    expected = teacher(X)
    student.call = teacher
    student(X)
    assert torch.equal(teacher(X), expected) and torch.equal(student.call[0](X), teacher[0](X))
    assert "bfp6" in teacher.graphs[-1].code and not any("bfp6" in each.code for each in student.graphs)
    assert "bfp4" in str(report(student))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_compiled_function_that_checkpoints_a_converted_model_has_its_bits(reentrant):
    torch.manual_seed(0)
    lp = convert(Teacher(), recipe=NEAREST).module
    x = X.clone().requires_grad_()

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(lp, x, use_reentrant=reentrant) * 1.0

    results = []
    for run in (lp, torch.compile(checkpointed, backend="eager")):
        x.grad = None
        lp.zero_grad()
        y = run(x)
        y.sum().backward()
        results.append([y.detach(), x.grad, *(each.grad for each in lp.parameters())])
    assert all(map(torch.equal, *results))


WITH_GRADIENT = torch.zeros(1, requires_grad=True)


def function_of(lp):
    """A custom autograd function that calls a model in its forward."""

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return lp(x).detach()

        @staticmethod
        def backward(ctx, error):
            return error

    return Own.apply


@pytest.mark.parametrize(
    "name, call",
    [
        ("cond", lambda lp: torch.cond(X.sum() > 0, lambda x: lp(x), lambda x: lp(x) + 1, (X,))),
        ("map_impl", lambda lp: torch._higher_order_ops.map(lambda x: lp(x), X)),
        ("while_loop", lambda lp: torch._higher_order_ops.while_loop(lambda x: x.sum() > 0, lambda x: (lp(x),), (X,))),
        (
            "autograd_function_apply",
            lambda lp: torch.compile(function_of(lp), backend="eager")(X + WITH_GRADIENT),
        ),
    ],
)
def test_a_converted_model_in_a_body_that_is_not_rewritten_is_refused(name, call):
    lp = convert(Teacher(), recipe=NEAREST).module
    with pytest.raises(Exception, match=f"NotRewritten: {name} around the converted model would compute it in float"):
        call(lp)
    assert function_of(lp)(X).equal(lp(X))


def test_a_compiled_function_may_call_two_converted_models_but_not_in_one_graph():
    torch.manual_seed(0)
    one, other = (
        convert(Teacher(), recipe=f"bfp{bits}[0] quantize_logits=true rounding=nearest").module for bits in (4, 6)
    )
    expected = one(X), other(X)
    found = torch.compile(lambda x: (one(x), other(x)), backend="eager")(X)
    assert all(map(torch.equal, found, expected))
    with pytest.raises(Exception, match="a converted module is called while another's graph is made"):
        torch.compile(lambda x: (one(x), other(x)), backend="eager", fullgraph=True)(X)


# Errors


class Clamping(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        with torch.no_grad():
            self.scale.data.view(-1).clamp_(0, 1)
        return x * self.scale


class Halving(Clamping):
    def forward(self, x):
        with torch.no_grad():
            first, _ = self.scale.chunk(2)
            first.contiguous().mul_(0.5)
        return x * self.scale


@pytest.mark.parametrize("inner", [Clamping, Halving])
def test_a_forward_that_writes_into_its_parameter_is_refused(inner):
    lp, _ = convert(Block(inner()))
    for _ in range(2):
        with pytest.raises(
            ConvertError, match=r"inner writes into its parameter scale, .*keep it in a buffer"
        ) as failure:
            lp(X)
        assert "\n" not in str(failure.value)


# Descriptions of graphs


def test_nodes_know_where_they_come_from():
    lp, _ = convert(Block(nn.Sequential(OrderedDict(drop=nn.Dropout(), norm=nn.LayerNorm(3)))), example_inputs=(X,))
    (graph,) = lp.graphs
    (norm,) = [node for node in graph.graph.nodes if node.name == "inner_norm"]
    assert list(norm.meta["nn_module_stack"].values())[-1][1] is nn.LayerNorm
    assert "return self.inner(self.layer(x))" in norm.stack_trace
    assert "def forward(self, key, x, layer_weight" in graph.code or "layer_weight, layer_bias" in graph.code


def test_the_sizes_of_another_model_of_the_class_change_no_graph():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)

        def forward(self, x):
            return self.conv(x)

    torch._dynamo.reset()
    codes = []
    for size in (8, 9, 10):
        lp = convert(Block()).module
        lp(torch.ones(2, 1, size, size))
        codes.append(lp.graphs[0].code)
    assert codes[0] == codes[1] == codes[2]


def test_behind_a_break_in_what_another_compiles_all_is_rounded():
    """There nothing names the model any more: its forward has read all of it that it needs."""

    class Breaks(Closures):
        def forward(self, x):
            return self.layer(torch.relu(_broken(self.layer(x) * 3) * 5))

    def _broken(x):
        torch._dynamo.graph_break()
        return x

    torch.manual_seed(0)
    lp = convert(Breaks(), recipe=NEAREST).module
    expected = lp(X)
    assert torch.equal(torch.compile(lp, backend="eager")(X), expected)


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


class Broken(nn.Module):
    """Two layers, a graph break between them."""

    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        x = self.fc(x)
        print(end="")
        return self.head(x)


class Looping(Broken):
    """No torch goes on behind a break in a loop: its forward runs as Python, and its layers have graphs."""

    def forward(self, x):
        for layer in (self.fc, self.head):
            x = torch.tanh(layer(x))
            print(end="")
        return x


class Printer:
    def show(self, x):
        print(end="")
        return x


class Showing(Broken):
    """Nor does torch 2.11 behind one in a method of another object that is an attribute."""

    def __init__(self):
        super().__init__()
        self.show = Printer().show

    def forward(self, x):
        return self.head(torch.tanh(self.show(self.fc(x))))


@pytest.mark.parametrize("kind", [Looping, Showing])
def test_what_no_graph_rounds_is_named_with_its_line(kind):
    lp, _ = convert(kind(), recipe=NEAREST)
    text = str(report(lp, torch.randn(2, 3)))
    lines, first = inspect.getsourcelines(kind.forward)
    (line,) = (i for i, each in enumerate(lines, first) if "tanh" in each)
    is_rounded = any("quantize_output(tanh" in made.code for made in lp.graphs)
    assert is_rounded != (f"test_capture.py:{line} forward: tanh" in text)


class Judging(Broken):
    """A loss that looks at its values runs as Python: PyTorch's own code, which this line calls."""

    judge = nn.GaussianNLLLoss()

    def forward(self, x):
        return self.judge(self.fc(x), x, torch.ones_like(x))  # judge


def test_a_layer_of_pytorch_that_runs_as_python_is_named_by_the_line_that_calls_it():
    lp, _ = convert(Judging(), recipe=NEAREST)
    lines, first = inspect.getsourcelines(Judging.forward)
    (line,) = (i for i, each in enumerate(lines, first) if "# judge" in each)
    text = str(report(lp, torch.randn(2, 3)))
    assert f"test_capture.py:{line} forward: " in text and "ways.py" not in text


def test_models_of_one_class_do_not_share_one_limit_of_graphs(monkeypatch):
    monkeypatch.setattr(compiler, "MAX_GRAPHS", 2)
    monkeypatch.setattr(Conversion, "count", 0)
    x, models = torch.randn(2, 3), [Broken() for _ in range(5)]
    for model in models:
        convert(model, recipe=NEAREST)
    for model in models:
        assert model(x).shape == (2, 2) and len(model.graphs) == 2


class Waiting(Broken):
    """Its first layer runs in a thread that its forward waits for."""

    def forward(self, x):
        with ThreadPoolExecutor(1) as threads:
            x = threads.submit(self.fc, x).result(timeout=60)
        return self.head(x)


def test_a_forward_may_wait_for_a_thread_that_calls_its_layers():
    model = Waiting()
    lp, _ = convert(model, recipe=NEAREST)
    assert lp(torch.randn(2, 3)).shape == (2, 2)
    assert {made.path for made in lp.graphs} == {"fc", "head"}


class Patching(Broken):
    """Its forward wraps a layer's forward for a while, as transformers does to record outputs."""

    def forward(self, x):
        kept, before = [], self.fc.forward

        def recording(x):
            kept.append(before(x))
            return kept[-1]

        self.fc.forward = recording
        y = self.head(self.fc(x))
        self.fc.forward = before
        return y, kept[0]


def test_a_forward_may_wrap_that_of_a_layer_while_it_runs():
    model, x = Patching(), torch.randn(2, 3)
    before = copy.deepcopy(model)(x)
    lp, _ = convert(model, recipe="float")
    for _ in range(2):
        assert all(map(torch.equal, lp(x), before))
    assert len(lp.graphs) == 1


class Checkpointing(nn.Module):
    """A block with buffers that it writes into, each of its two times."""

    def __init__(self, reentrant):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())
        self.head, self.reentrant = nn.Conv2d(2, 2, 1), reentrant

    def forward(self, x):
        return self.head(torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_checkpointed_may_write_into_buffers(reentrant):
    assert check(Checkpointing(reentrant), torch.randn(2, 1, 5, 5, requires_grad=True))


class Reading(nn.Module):
    """Numbers from tensors: a scale, a size, a count, an attribute, a result."""

    def __init__(self):
        super().__init__()
        self.fc, self.head, self.last, self.seen = nn.Linear(3, 3), nn.Linear(3, 2), None, []

    def forward(self, x):
        y = self.fc(x)
        self.last = y.detach().mean().item()
        self.seen.append(int(y.argmax()))
        y = self.head(y / y.detach().abs().max().item())[: int((x[:, 0] > 0).sum()) + 1]
        return y + torch.ones(int(x.abs().sum()) + 1, 2).sum(0), self.seen[-1]


def test_numbers_that_tensors_give_end_no_graph():
    model = Reading()
    lp, _ = convert(copy.deepcopy(model), recipe="float")
    for seed in range(4):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) * (1 + seed)
        (seen, number), (due, due_number) = lp(x), model(x)
        assert torch.equal(seen, due) and number == due_number and type(number) is int
        assert lp.last == model.last and lp.seen == model.seen and type(lp.last) is float
    assert all(made.broke is None for made in lp.graphs)


class Normed(nn.Module):
    """Two norms, of which the first averages over all batches so far. Its block may be checkpointed."""

    def __init__(self, checkpointed=False):
        super().__init__()
        norms = nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(2, momentum=0.5, affine=False)
        self.block = nn.Sequential(nn.Conv2d(1, 3, 3), norms[0], nn.ReLU(), nn.Conv2d(3, 2, 3), norms[1])
        self.checkpointed = checkpointed

    def forward(self, x):
        if self.checkpointed:
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False)
        return self.block(x)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_norm_that_counts_its_batches_and_one_whose_momentum_changes_end_no_graph(checkpointed):
    model, lp = both(lambda: Normed(checkpointed))
    for i in range(5):
        x = torch.randn(2, 1, 6, 6, requires_grad=True)
        for each in (model, lp):
            each.block[4].momentum = 1 / (i + 2)
        due, given = model(x), lp(x)
        wanted = torch.autograd.grad(due.square().sum(), [x, *model.parameters()])
        found = torch.autograd.grad(given.square().sum(), [x, *lp.parameters()])
        assert torch.equal(given, due) and all(map(torch.equal, found, wanted))
        assert all(map(torch.equal, lp.buffers(), model.buffers()))
    assert len(lp.graphs) == 2 and all(made.broke is None for made in lp.graphs)


def test_a_norm_that_counts_its_batches_is_rounded():
    _, lp = both(Normed, NEAREST)
    x = torch.randn(2, 1, 6, 6)
    lp(x)
    assert {"block.1", "block.3"} < set(rounded(lp.graphs[0].graph))
    assert not {"block.1", "block.1.weight"} & set(str(report(lp, x)).partition("in float")[2].split())


class Decoder(nn.Module):
    """A text model of PyTorch's layers. They compare its mask with a causal one, if is_causal is None."""

    def __init__(self, is_causal):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head, self.is_causal = nn.Linear(8, 4), is_causal

    def forward(self, x, mask):
        return self.head(self.blocks(x, mask, is_causal=self.is_causal))


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_that_layers_of_pytorch_look_at_ends_no_graph(is_causal, training):
    x, mask = torch.randn(2, 5, 8), torch.zeros(5, 5)
    mask.masked_fill_(torch.ones(5, 5).triu(1) > 0 if is_causal else torch.ones(5, 5).triu(3) > 0, float("-inf"))
    recipe = "bfp8[0]" if training else NEAREST
    lps = [both(lambda hint=hint: Decoder(hint).train(training), recipe)[1] for hint in (None, is_causal)]
    assert same(*[lambda lp=lp: lp(x, mask) for lp in lps])
    assert [len(lp.graphs) for lp in lps] == [1, 1]
    model, lp = both(lambda: Decoder(None).train(training))
    assert torch.equal(lp(x, mask), model(x, mask))


def _waits(layer, x):
    async def run():
        await asyncio.sleep(0)
        return layer(x)

    return asyncio.run(run())


BY_PYTHON = {
    "a copy": lambda layer, x: copy.deepcopy(layer)(x),
    "a pickle": lambda layer, x: pickle.loads(pickle.dumps(layer))(x),
    "a coroutine": _waits,
}


class Handing(nn.Module):
    """Python does something with a layer in the middle of a forward."""

    def __init__(self, call):
        super().__init__()
        self.fc, self.head, self.call = nn.Linear(3, 3), nn.Linear(3, 2), call

    def forward(self, x):
        return self.head(torch.relu(self.call(self.fc, x)))


@pytest.mark.parametrize("way", BY_PYTHON)
def test_what_python_does_with_a_layer_in_a_forward_ends_a_graph_and_no_more(way):
    _, whole = both(lambda: Handing(lambda layer, x: layer(x)), "W=bfp4[0] A=float E=float rounding=nearest")
    _, lp = both(lambda: Handing(BY_PYTHON[way]), "W=bfp4[0] A=float E=float rounding=nearest")
    for _ in range(2):
        assert torch.equal(lp(X), whole(X))
    model, lp = both(lambda: Handing(BY_PYTHON[way]))
    assert torch.equal(lp(X), model(X)) and not torch.equal(whole(X), model(X))
