"""The tracer: live flags, and a model left as it was."""

import contextlib
import operator
import random
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
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

    def forward(self, x):
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


class Setting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        self.mean = self.mean * 0.9 + x.detach().mean(0) * 0.1
        self.calls += 1
        return x - self.mean


class Remembering(nn.Module):
    """What a graph would forget."""

    def __init__(self):
        super().__init__()
        self.seen, self.last, self.calls = [], None, 0
        self.plain = torch.zeros(3)
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        return self.remember(x)

    def remember(self, x):
        raise NotImplementedError


class Appending(Remembering):
    def remember(self, x):
        self.seen.append(x)
        return x


class Keeping(Remembering):
    def remember(self, x):
        self.last = (x, x + 1)
        return x


class Tallying(Remembering):
    def remember(self, x):
        self.calls += 1
        return x


class Adding(Remembering):
    def remember(self, x):
        self.plain += 1
        return x


class Resetting(Remembering):
    def remember(self, x):
        self.mean = torch.ones(3)
        return x


class Switching(Remembering):
    def remember(self, x):
        self.eval()
        return x


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
        return Round.apply(x)


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
    assert captured.flags == {}
    assert "inner.training" in [node.target for node in captured.graph.find_nodes(op="get_attr")]


def test_the_flag_of_the_root_follows_the_inputs():
    nodes = list(capture(Dropping()).graph.nodes)
    assert [(node.op, node.target) for node in nodes[:2]] == [("placeholder", "x"), ("get_attr", "training")]


def test_a_branch_on_a_flag_is_noted():
    assert capture(Block(Branching())).flags == {"inner": True}
    assert capture(Branching().eval()).flags == {"": False}
    assert capture(Branching().eval(), training=True).flags == {"": True}


def test_inplace_is_seen_by_its_place_too():
    class Writes(nn.Module):
        def forward(self, x):
            y = x * 2
            F.leaky_relu(y, 0.1, True)
            return y + 1

    graph = capture(Writes()).graph
    (add,) = graph.find_nodes(op="call_function", target=operator.add)
    assert add.args[0].name == "leaky_relu"  # what is rounded behind it is what is read


def test_writes_are_kept_in_place():
    graph = capture(Writing()).graph
    assert _called(graph) == ["add", "iadd", "setitem", "mul"]
    assert _called(graph, "call_method") == ["detach", "sum", "add_", "relu_"]
    graph.lint()


def test_reads_after_a_write_read_the_write():
    graph = capture(Writing()).graph
    (mul,) = [node for node in graph.nodes if node.name.startswith("mul")]
    assert [source.target for source in mul.all_input_nodes] == ["relu_", "add_"]


def test_a_buffer_that_is_set_is_set_by_the_graph():
    model = Block(Setting())
    module, x = torch.fx.GraphModule(model, capture(model).graph), torch.randn(4, 3)
    mean = x.matmul(model.fc.weight.T).add(model.fc.bias).mean(0) * 0.1
    module(x)
    assert module.inner.mean.allclose(mean) and module.inner.calls == 1
    module(x)
    assert module.inner.mean.allclose(mean * 1.9) and module.inner.calls == 2


def test_an_autograd_function_is_called_whole():
    x = torch.randn(3, requires_grad=True)
    torch.fx.GraphModule(Rounding(), capture(Rounding()).graph)(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


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


def test_a_switch_comes_from_the_line_that_switches():
    class Block(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return x + 1

    graph = capture(nn.Sequential(Block())).graph
    on, off = graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    assert on.args == (False,) and off.args[0].target is torch.is_grad_enabled
    assert on.stack_trace.splitlines()[-1].strip() == "with torch.no_grad():"


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
    plain = [value for module in model.modules() for value in vars(module).values() if isinstance(value, torch.Tensor)]
    tensors = [(id(tensor), tensor.tolist()) for tensor in (*model.buffers(), *plain)]
    return attributes, tensors, [module.training for module in model.modules()]


FAITHFUL = [Writing, Setting, Branching, Dropping, Rounding, Constant]
REFUSED = [
    (ByValue, "branches on a tensor's value"),
    (ByLoop, "loops over a tensor"),
    (Noisy, "draws random numbers"),
    (Coin, "draws random numbers"),
    (Homeless, "not installed as a submodule"),
    (Appending, "changes its attribute seen, which a graph does not keep"),
    (Keeping, "changes its attribute last"),
    (Tallying, "changes its attribute calls"),
    (Adding, "changes its attribute plain"),
    (Resetting, "changes its attribute mean"),
    (Switching, "changes its attribute training"),
    (Clamping, "writes into its parameter scale"),
    (Halving, "writes into its parameter scale"),
    (Recomputing, "checkpoints or offloads"),
    (Offloading, "checkpoints or offloads"),
]


@pytest.mark.parametrize("inner", [*FAITHFUL, *(inner for inner, _ in REFUSED)])
def test_the_model_is_left_as_it_was_even_if_tracing_fails(inner):
    model = Block(inner())
    model.fc.eval()
    before, state = _anatomy(model), torch.get_rng_state()
    with contextlib.suppress(ConvertError):
        capture(model)
    assert _anatomy(model) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("inner", "reason"), REFUSED)
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
