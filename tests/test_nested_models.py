"""A converted model that another model or a compiled function calls computes in its own recipe."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from captured import NEAREST, Block, X
from torch import nn

from swalp_fx import NotRewritten, convert, quantize, report, restore


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


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.second(self.first(x))


def pairs(*called):
    """Two converted models, in six bits and in four, and those of them that were called are called."""
    torch.manual_seed(0)
    models = [convert(Pair(), recipe=f"bfp{bits}[0] rounding=nearest").module for bits in (6, 4)]
    for i in called:
        models[i](X)
    return models


def due(pair, spec):
    rounded = {name: quantize(each.detach(), spec) for name, each in pair.named_parameters()}
    hidden = quantize(F.linear(X, rounded["first.weight"], rounded["first.bias"]), spec)
    return F.linear(hidden, rounded["second.weight"], rounded["second.bias"])


SHARED = {
    "a layer": lambda one, other: setattr(other, "first", one.first),
    "a layer past setattr": lambda one, other: other._modules.update(first=one.first),
    "a layer in another": lambda one, other: setattr(other, "first", nn.Sequential(one.first)),
}


@pytest.mark.parametrize("called", [(), (0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("case", SHARED)
def test_a_part_of_two_converted_models_is_refused_in_the_second(case, called):
    one, other = pairs(*called)
    SHARED[case](one, other)
    for _ in range(2):
        with pytest.raises(
            NotRewritten, match=r"^first(.0)? of the converted Pair is first of another converted model"
        ):
            other(X)
        assert torch.equal(one(X), due(one, "bfp6[0]"))
    other.first = restore(copy.deepcopy(one.first))
    assert torch.equal(other(X), due(other, "bfp4[0]"))


@pytest.mark.parametrize("called", [(), (0, 1)], ids=str)
def test_a_parameter_of_two_converted_models_is_rounded_by_each_in_its_recipe(called):
    one, other = pairs(*called)
    other.first.weight = one.first.weight
    for _ in range(2):
        assert torch.equal(one(X), due(one, "bfp6[0]")) and torch.equal(other(X), due(other, "bfp4[0]"))


def test_a_list_of_converted_models_leaves_each_its_recipe():
    models = nn.ModuleList(pairs())
    assert [
        torch.equal(model(X), due(model, spec)) for model, spec in zip(models, ("bfp6[0]", "bfp4[0]"), strict=True)
    ] == [True] * 2


def test_a_layer_of_a_converted_model_in_another_may_be_called():
    """It is a part of the second only by way of the first."""
    one, _ = pairs()
    student, _ = convert(Student(lambda x: student.teacher.first(x)), recipe=NEAREST)
    student.teacher = one
    assert student(X).shape == (4, 3) and "bfp6" in one.graphs[0].code


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
