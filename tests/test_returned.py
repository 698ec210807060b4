"""Outputs of a model stay float, and its layers read rounded numbers, also with Python between several graphs."""

import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tables import crossed
from torch import Tensor, nn

from swalp_fx import convert, quantize

RECIPE = "bfp4[0] rounding=nearest"
X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def forget_graphs():
    """The front end keeps the graphs of all models of a class at the one code of its functions."""
    yield
    torch._dynamo.reset()


def rounded(x):
    return quantize(x, "bfp4[0]")


def by_hand(layer, x):
    """The output of ``layer`` before rounding."""
    return F.linear(x, rounded(layer.weight), rounded(layer.bias))


def converted(model, recipe=RECIPE):
    return convert(model, recipe=recipe)[0]


def seeded(made, *args):
    torch.manual_seed(0)
    return made(*args)


# Returned numbers that were moved, or are in a container


class Behind(nn.Module):
    """Two layers, and an operation on the second one's output after a break."""

    def __init__(self, give):
        super().__init__()
        self.body, self.head, self.give = nn.Linear(3, 4), nn.Linear(4, 4), give

    def forward(self, x):
        y = self.head(self.body(x))
        torch._dynamo.graph_break()
        return self.give(y)


class InPython(Behind):
    """Its own forward has no graph: it breaks in a try block."""

    def forward(self, x):
        try:
            y = self.head(self.body(x))
            torch._dynamo.graph_break()
            return self.give(y)
        finally:
            self.done = True


class InChild(Behind):
    """A layer's output is moved in the graph of a child that Python calls."""

    def __init__(self, give):
        super().__init__(give)
        self.child = Child(self.head, give)

    def forward(self, x):
        try:
            y = self.body(x)
            torch._dynamo.graph_break()
            return self.child(y)
        finally:
            self.done = True


class Child(nn.Module):
    def __init__(self, head, give):
        super().__init__()
        self.head, self.give = head, give

    def forward(self, x):
        return self.give(self.head(x))


VIEWS = {
    "itself": lambda y: y,
    "view": lambda y: y.view(-1, 2),
    "detach": lambda y: y.detach(),
    "index": lambda y: y[0],
    "slices": lambda y: y[1:, ::2],
    "transpose": lambda y: y.transpose(0, 1),
    "views of views": lambda y: y.view(2, 2, 4)[1].t()[:, None].expand(4, 3, 2),
}
COPIES = {
    "reshape": lambda y: y.t().reshape(-1),
    "cat": lambda y: torch.cat([y, y[:1].contiguous()]),
    "stack": lambda y: torch.stack(y.unbind(0), 1),
    "clone": lambda y: y.clone(),
    "indices": lambda y: y[torch.tensor([2, 0])],
    "where": lambda y: torch.where(torch.eye(4) > 0, y, 0.0),
    "top": lambda y: y.topk(2).values,
    "chunks": lambda y: y.chunk(2, 1)[1],
}


def moved(moves):
    return lambda y: {name: move(y) for name, move in moves.items()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind, moves", [(Behind, VIEWS | COPIES), (InPython, VIEWS), (InChild, VIEWS | COPIES)])
def test_what_is_moved_behind_a_break_is_float(kind, moves, mode, training):
    model = seeded(kind, moved(moves)).train(training)
    logits = by_hand(model.head, rounded(by_hand(model.body, X)))
    lp = converted(model)
    for _ in range(2):
        with mode():
            given = lp(X)
        assert not [name for name, move in moves.items() if not torch.equal(given[name], move(logits))]


@pytest.mark.parametrize("kind", [Behind, InPython, InChild])
def test_the_gradient_of_what_is_moved_is_that_of_one_graph(kind):
    class Whole(Behind):
        def forward(self, x):
            return self.give(self.head(self.body(x)))

    found = []
    for each in (Whole, kind):
        lp = converted(seeded(each, VIEWS["views of views"]))
        lp(X).square().sum().backward()
        found.append([parameter.grad for parameter in (*lp.body.parameters(), *lp.head.parameters())])
    assert all(map(torch.equal, *found))


class Plain:
    def __init__(self, y):
        self.y = y


class Slots:
    __slots__ = ("y",)

    def __init__(self, y):
        self.y = y


class Items(dict):
    pass


class List(list):
    pass


@dataclass(frozen=True)
class Record:
    y: Tensor


CONTAINERS = {
    "tuple": (lambda y: (y, 1), lambda given: given[0]),
    "dataclass": (Record, lambda given: given.y),
    "object": (Plain, lambda given: given.y),
    "namespace": (lambda y: SimpleNamespace(y=y), lambda given: given.y),
    "slots": (Slots, lambda given: given.y),
    "set": (lambda y: {y}, lambda given: next(iter(given))),
    "dict": (lambda y: Items(y=y), lambda given: given["y"]),
    "list": (lambda y: List([y]), lambda given: given[0]),
    "nested": (lambda y: [Record({"y": Slots((y,))})], lambda given: given[0].y["y"].y[0]),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_holds_it_comes_back_with_it_float(name):
    hold, take = CONTAINERS[name]
    model = seeded(Behind, hold)
    logits = by_hand(model.head, rounded(by_hand(model.body, X)))
    lp = converted(model)
    for _ in range(2):
        given = lp(X)
        assert type(given) is type(hold(X)) and torch.equal(take(given), logits)


def test_what_an_attribute_keeps_is_rounded_though_it_is_returned_too():
    class Keeping(InPython):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    lp = converted(seeded(Keeping, Plain))
    given = lp(X)
    assert torch.equal(rounded(given.y), lp.last.y) and not torch.equal(given.y, lp.last.y)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [Behind, InPython])
def test_what_is_written_into_keeps_what_was_written(kind, mode):
    def give(y):
        y[:, 0] = 7.0
        return y, y.view(-1)

    lp = converted(seeded(kind, give))
    with mode():
        given = lp(X)
    assert (given[0][:, 0] == 7).all() and torch.equal(*map(torch.flatten, given))


def test_a_hook_of_what_is_returned_runs():
    seen = []

    def give(y):
        y.register_hook(seen.append)
        return y

    lp = converted(seeded(InPython, give))
    lp.head.register_full_backward_hook(lambda *_: seen.append("layer"))
    lp(X).sum().backward()
    assert len(seen) == 2


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, error):
        return error * 3


def test_a_backward_of_ones_own_behind_it_is_not_passed_over():
    lp = converted(seeded(InPython, Scaled.apply))
    lp(X).sum().backward()
    assert torch.equal(lp.head.bias.grad, torch.full((4,), 12.0))


def test_what_the_caller_gave_comes_back_as_itself():
    class Filling(InPython):
        def forward(self, x, out):
            out.y = super().forward(x)
            return out

    out = SimpleNamespace()
    assert converted(seeded(Filling, torch.relu))(X, out) is out


def test_nothing_is_kept_behind_a_call_that_fails():
    from swalp_fx.capture.running import local

    def give(y):
        raise KeyError(y)

    with pytest.raises(KeyError):
        converted(seeded(InPython, give))(X)
    assert not local.bare._pairs


# Layers that read numbers from the model's own code


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(3, 3) for _ in range(3))
        self.read = []
        self.c.register_forward_pre_hook(lambda _, args: self.read.append(args[0]))

    def inner(self, x):
        """b(a(x)), with a break between."""
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(y)

    def forward(self, x):
        return self.inner(x)


class ByMethod(Net):
    def roll(self, x):
        return self.c(self(x))


class ByForward(ByMethod):
    def roll(self, x):
        return self.c(self.forward(x))


class Private(Net):
    def _inner(self, x):
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(y)

    def forward(self, x):
        return self.c(self._inner(x))

    roll = forward


class Recursive(Net):
    def forward(self, x, depth=1):
        return self.c(self(x, 0)) if depth else self.inner(x)

    roll = forward


class Super(Net):
    def forward(self, x):
        return self.c(super().forward(x))

    roll = forward


def behind(x, net):
    y = net.a(x)
    torch._dynamo.graph_break()
    return net.b(y)


def before(net, x):
    return behind(x, net)


def no_module(x, layers):
    y = layers[0](x)
    torch._dynamo.graph_break()
    return layers[1](y)


class Functional(Net):
    def forward(self, x):
        return self.c(behind(x, self))

    roll = forward


class First(Net):
    def forward(self, x):
        return self.c(before(self, x))

    roll = forward


class Listed(Net):
    def forward(self, x):
        return self.c(no_module(x, [self.a, self.b]))

    roll = forward


class Undone(Net):
    @torch._dynamo.disable
    def inner(self, x):
        return self.b(self.a(x))

    def forward(self, x):
        return self.c(self.inner(x))

    roll = forward


INNER = [ByMethod, ByForward, Private, Recursive, Super, Functional, First, Listed, Undone]


class Nested(nn.Module):
    def __init__(self, made):
        super().__init__()
        self.net = made()
        self.read, self.a, self.b, self.c = self.net.read, self.net.a, self.net.b, self.net.c

    def forward(self, x):
        return self.net.roll(x)

    roll = forward


@pytest.mark.parametrize(("made", "training"), crossed(INNER, [True, False]))
def test_a_layer_reads_what_inner_code_gives_rounded_and_the_caller_gets_float(made, training):
    nested = not training
    torch.manual_seed(0)
    model = Nested(made) if nested else made()
    lp = converted(model.train(training))
    hidden = rounded(by_hand(lp.b, rounded(by_hand(lp.a, X))))
    logits = by_hand(lp.c, hidden)
    for _ in range(2):
        lp.read.clear()
        given = lp.roll(X)
        assert torch.equal(lp.read[-1], hidden)
        assert torch.equal(given, logits)


@pytest.mark.parametrize("made", [ByMethod, ByForward])
def test_the_inner_call_gives_float_where_it_is_the_outermost(made):
    torch.manual_seed(0)
    lp = converted(made())
    for call in (lp.roll, lp, lp.roll, lp.inner, lp.forward):
        given, layer = call(X), lp.c if call == lp.roll else lp.b
        inner = rounded(by_hand(lp.a, X))
        assert torch.equal(given, by_hand(layer, rounded(by_hand(lp.b, inner)) if layer is lp.c else inner)), call


@pytest.mark.parametrize("made", [Private, ByMethod])
def test_threads_that_come_in_by_other_ways_get_what_one_alone_gets(made):
    torch.manual_seed(0)
    lp = converted(made())
    inner = rounded(by_hand(lp.a, X))
    wanted = {"roll": by_hand(lp.c, rounded(by_hand(lp.b, inner))), "inner": by_hand(lp.b, inner)}
    lp.c._forward_pre_hooks.clear()
    start, wrong = threading.Barrier(4), []

    def run(name):
        start.wait()
        wrong.extend(name for _ in range(20) if not torch.equal(getattr(lp, name)(X), wanted[name]))

    threads = [threading.Thread(target=run, args=(name,)) for name in ("roll", "inner") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
