"""The model runs as the user wrote it, at every call: whatever its Python reads, sets, makes, draws and branches on."""

import asyncio
import contextlib
import copy
import inspect
import pickle
import random
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch.utils.checkpoint
from captured import NEAREST, Block, X, both, same
from marks import rounded
from torch import nn

from swalp_fx import ConvertError, check, convert, nodes, quantize, report

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
