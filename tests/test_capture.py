"""The tracer: live flags, and a model left as it was."""

import contextlib
import random
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from swalp_fx.capture import ConvertError, LiveTracer, capture


def _called(graph, op="call_function"):
    return [getattr(node.target, "__name__", node.target) for node in graph.nodes if node.op == op]


class Dropping(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5, self.training)


class Branching(nn.Module):
    def forward(self, x):
        return x * 2 if self.training else x


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.seen = []
        self.last = None

    def forward(self, x):
        self.seen.append(x)
        self.last = x
        self.total.add_(x.detach().sum(0))
        y = x + 1
        y += x
        y[:, 0] = 0
        y.relu_()
        return y * self.total


class ByValue(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class ByLoop(nn.Module):
    def forward(self, x):
        return sum(row for row in x)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand(3)


class Coin(nn.Module):
    def forward(self, x):
        return x if random.random() < 0.5 else -x


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.tensor(2.0)

    def forward(self, x):
        return x * self.scale + torch.tensor([1.0, 2.0, 3.0])


class Homeless(nn.Module):
    def forward(self, x):
        return nn.ReLU()(x)


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.inner = inner

    def forward(self, x):
        return self.inner(self.fc(x))


def test_a_flag_that_is_an_argument_is_read_when_the_graph_runs():
    captured = capture(Block(Dropping()))
    assert captured.frozen == ()
    assert "inner.training" in [node.target for node in captured.graph.find_nodes(op="get_attr")]


def test_the_flag_of_the_root_follows_the_inputs():
    nodes = list(capture(Dropping()).graph.nodes)
    assert [(node.op, node.target) for node in nodes[:2]] == [("placeholder", "x"), ("get_attr", "training")]


def test_a_branch_on_a_flag_is_noted():
    assert capture(Block(Branching())).frozen == ("inner",)
    assert capture(Branching()).frozen == ("",)


def test_writes_are_kept_in_place():
    graph = capture(Writing()).graph
    assert _called(graph) == ["add", "iadd", "setitem", "mul"]
    assert _called(graph, "call_method") == ["detach", "sum", "add_", "relu_"]
    graph.lint()


def test_reads_after_a_write_read_the_write():
    graph = capture(Writing()).graph
    (mul,) = [node for node in graph.nodes if node.name.startswith("mul")]
    assert [source.target for source in mul.all_input_nodes] == ["relu_", "add_"]


class Optional(nn.Module):
    def forward(self, x, mask=None, invert=False, scale=1.0):
        x = x if mask is None else x * mask
        return -x * scale if invert else x * scale


def test_an_optional_input_is_fixed_at_its_default():
    module = torch.fx.GraphModule(Optional(), capture(Optional()).graph)
    x = torch.ones(2)
    assert torch.equal(module(x, None, False, scale=3.0), 3 * x)
    with pytest.raises(AssertionError, match="mask was None when the model was traced"):
        module(x, mask=x)
    with pytest.raises(AssertionError, match="invert was False"):
        module(x, invert=True)


def test_nodes_know_where_they_come_from():
    graph = capture(Block(nn.Sequential(OrderedDict(drop=Dropping())))).graph
    (dropout,) = [node for node in graph.nodes if node.name.startswith("dropout")]
    assert list(dropout.meta["nn_module_stack"].values())[-1] == ("inner.drop", Dropping)
    assert dropout.stack_trace.splitlines()[-1].strip() == "return F.dropout(x, 0.5, self.training)"


def test_tensors_of_no_module_are_kept_apart():
    captured = capture(Constant())
    assert set(captured.constants) == {"scale", "_tensor_constant0"}


@pytest.mark.parametrize("kind", ["StochasticDepth", "DropBlock2d", "FrozenBatchNorm2d"])
def test_layers_of_torchvision_are_leaves(kind):
    arguments = {"StochasticDepth": (0.5, "row"), "DropBlock2d": (0.5, 3), "FrozenBatchNorm2d": (3,)}[kind]
    graph = capture(nn.Sequential(getattr(torchvision.ops, kind)(*arguments))).graph
    assert _called(graph, "call_module") == ["0"]
    assert LiveTracer().is_leaf_module(torchvision.ops.SqueezeExcitation(8, 2), "") is False


def _anatomy(model):
    """Everything that capture might change, with identities where identity matters."""
    attributes = [
        (name, key, id(value), list(value) if type(value) in (list, dict, OrderedDict, set) else None)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
    ]
    return attributes, [(id(b), b._version, b.tolist()) for b in model.buffers()], [m.training for m in model.modules()]


@pytest.mark.parametrize("inner", [Writing, Branching, Dropping, Constant, ByValue, ByLoop, Noisy, Coin, Homeless])
def test_the_model_is_left_as_it_was_even_if_tracing_fails(inner):
    model = Block(inner())
    model.fc.eval()
    before, state = _anatomy(model), torch.get_rng_state()
    with contextlib.suppress(ConvertError):
        capture(model)
    assert _anatomy(model) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (ByValue, "branches on a tensor's value"),
        (ByLoop, "loops over a tensor"),
        (Noisy, "draws random numbers"),
        (Coin, "draws random numbers"),
        (Homeless, "not installed as a submodule"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(inner, reason):
    with pytest.raises(ConvertError) as failure:
        capture(Block(inner()))
    message = str(failure.value)
    assert message.startswith(f"cannot trace inner ({inner.__name__}): ") and reason in message
    assert f"leaves=[{inner.__name__}]" in message and "\n" not in message
    with pytest.raises(ConvertError, match=f"cannot trace {inner.__name__}: "):
        capture(inner())


def test_a_leaf_of_the_user_is_called_whole():
    graph = capture(Block(ByValue()), leaves=[ByValue]).graph
    assert _called(graph, "call_module") == ["fc", "inner"]


@pytest.mark.parametrize(
    ("model", "remedy"),
    [
        (lambda: nn.ModuleList([nn.Conv2d(3, 3, 3)]), "convert the module that calls its layers"),
        (lambda: nn.DataParallel(Dropping()), "convert the module inside"),
        (lambda: torch.compile(Dropping()), "then torch.compile"),
        (lambda: torch.jit.script(nn.Sequential(nn.ReLU())), "Python module"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "one batch first"),
        (lambda: "resnet18", "pass a torch.nn.Module"),
    ],
)
def test_what_is_no_float_model_is_refused_with_a_remedy(model, remedy):
    with pytest.raises(ConvertError, match=remedy):
        capture(model())
