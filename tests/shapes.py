"""Small models, one for each thing that a rewrite can get wrong.

``inputs`` are their arguments: a size for random numbers, or the value itself."""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn


class Convnet(nn.Sequential):
    inputs = (torch.Size([2, 3, 8, 8]),)

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Dropout(),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


class PreBlock(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Conv2d(inputs, width, 1, stride, bias=False) if stride > 1 else None

    def forward(self, x):
        out = self.conv1(self.relu(self.bn1(x)))
        out = self.conv2(self.relu(self.bn2(out)))
        out += x if self.downsample is None else self.downsample(x)
        return out


class PreResNet(nn.Module):
    inputs = (torch.Size([2, 3, 8, 8]),)

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(PreBlock(4, 4, 1), PreBlock(4, 8, 2))
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.bn(self.blocks(self.conv1(x))))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Tied(nn.Module):
    """Two names for one weight, and a bias of its own for each."""

    inputs = (torch.Size([2, 6]),)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Twice(nn.Module):
    inputs = (torch.Size([2, 6]),)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.layer(self.norm(self.layer(x).relu())))


class Direct(nn.Module):
    """Parameters that forward reads by itself, one of them also a layer's."""

    inputs = (torch.Size([2, 6]),)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return F.linear(self.layer(x) * self.scale, self.layer.weight).exp() + self.scale


class Unused(nn.Module):
    """Order, unread entries and a non-persistent buffer must survive."""

    inputs = (torch.Size([2, 6]),)

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.ones(6))
        self.register_buffer("hidden", torch.ones(6), persistent=False)
        self.spare = nn.Linear(2, 2)
        self.last, self.first = nn.Linear(6, 6), nn.Linear(6, 6)
        self.alias = self.first

    def forward(self, x):
        return self.last(self.first(x + self.shift) * self.hidden)


class Droops(nn.Module):
    inputs = (torch.Size([4, 6]),)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = F.dropout(F.gelu(layer(x)), 0.5, self.training)
        return x


class Plain(nn.Module):
    """No parameter at all, sizes that are numbers, and more than one output."""

    inputs = (torch.Size([2, 3, 4]),)

    def forward(self, x):
        n = x.size(0) * x.shape[1]
        y = torch.sigmoid(x).view(n, -1)
        return {"pair": (y * 2, y.argmax(1)), "sum": (y + 1).sum()}


class Counting(nn.Module):
    """Writes: into a buffer, a slice, itself; reads after the write."""

    inputs = (torch.Size([2, 6]),)

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        y = self.layer(x)
        self.mean.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        y = y - self.mean
        y[:, 0] = x[:, 0]
        F.relu(y, inplace=True)
        return self.layer(y)


class Recurrent(nn.Module):
    """Layers that return a nest of tensors."""

    inputs = (torch.Size([2, 5, 6]),)

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x):
        y, (state, _) = self.lstm(x)
        z, weights = self.attention(y, y, y)
        return z.mean(1) + state[0] + weights.sum()


class Branchy(nn.Module):
    """The outputs of two layers in one tensor, and a constant that forward makes."""

    inputs = (torch.Size([2, 3, 8, 8]),)

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x):
        y = self.norm(torch.cat([self.left(x), self.right(x)], 1))
        left, right = y.chunk(2, 1)
        return (left * torch.sigmoid(right) * torch.tensor(0.5)).permute(0, 2, 3, 1)


ALL = (
    Convnet, PreResNet, Tied, Twice, Direct, Unused, Droops, Plain, Counting, Recurrent, Branchy,
)  # fmt: skip


def _value(given):
    return torch.randn(given) if isinstance(given, torch.Size) else given


def made(kind):
    """(model, inputs), the same each time."""
    torch.manual_seed(0)
    model = kind()
    is_size = {"is_leaf": lambda given: isinstance(given, torch.Size)}
    return model, [torch.utils._pytree.tree_map(_value, given, **is_size) for given in kind.inputs]


def run(module, inputs, seed=0):
    torch.manual_seed(seed)
    return module(*inputs)


def equal(a, b):
    """Whether two nests hold the same tensors, bit for bit."""
    leaves = [torch.utils._pytree.tree_leaves(nest) for nest in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*leaves, strict=True))


# Modes


class Two(nn.Module):
    """Two layers, for the models below."""

    inputs = (torch.Size([4, 6]),)

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)


class AutocastBlock(Two):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.first(x).relu()
            with torch.autocast("cpu", enabled=False):
                z = self.second(y.float())
        return z + self.first(x)


class AutocastByInput(Two):
    """A device and a switch that are known when it runs."""

    def forward(self, x):
        with torch.amp.autocast(x.device.type, dtype=torch.bfloat16, enabled=self.training):
            y = self.first(x)
        return self.second(y.float())


class AutocastDecorator(Two):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def inner(self, x):
        return self.first(x)

    def forward(self, x):
        return self.second(self.inner(x).float()) + self.inner(x)


class AutocastForward(Two):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return self.second(self.first(x).relu())


class NoGradBlock(Two):
    """The weight is first read where no gradient is taken, then where one is."""

    def forward(self, x):
        with torch.no_grad():
            target = torch.tanh(self.first(x))
        return self.second(torch.tanh(self.first(x))) - target


class NoGradDecorator(Two):
    @torch.no_grad()
    def target(self, x):
        return self.first(x)

    def forward(self, x):
        return self.second(x) - self.target(x)


class GradientsByFlag(Two):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            y = self.first(x)
            with torch.enable_grad():
                y = torch.tanh(y)
        return self.second(y)


class GradientsSwitched(Two):
    """Without a block."""

    def forward(self, x):
        torch.set_grad_enabled(False)
        y = self.first(x)
        torch.set_grad_enabled(True)
        return self.second(x) * y


class InferenceBlock(Two):
    def forward(self, x):
        with torch.inference_mode():
            scale = torch.tanh(self.first(x)).amax()
        return self.second(self.first(x)) * scale.clone()


# Writes of a forward


class Rebound(Two):
    """Sets its buffers, after reading one and before reading it again."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        y = self.first(x) * (1 + self.mean)
        self.mean = (self.mean * 0.9 + y.mean(0) * 0.1).detach()
        self.calls += 1
        return self.second(y - self.mean)


class Inside(nn.Module):
    """Calls one that does, twice."""

    inputs = (torch.Size([4, 6]),)

    def __init__(self):
        super().__init__()
        self.inner = Rebound()

    def forward(self, x):
        return self.inner(torch.relu(self.inner(x)))


class Carried(Two):
    """Its hidden state is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("hidden", torch.zeros(4, 6))

    def forward(self, x):
        self.hidden = torch.tanh(self.first(x) + self.second(self.hidden.detach()))
        return self.hidden * 2


class Updated(Two):
    """An exponential mean by hand, without gradients, in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        y = self.first(x)
        if self.training:
            with torch.no_grad():
                self.mean.lerp_(y.mean(0), 0.1)
        return self.second(y - self.mean)


class Assigned(Two):
    def forward(self, x):
        y = self.first(x)
        z = torch.zeros_like(y)
        z[:, ::2] = y[:, ::2]
        z[:, 1] += y[:, 3]
        z *= 2
        return self.second(z)


# Inputs and outputs


class OptionalInput(Two):
    def forward(self, x, mask=None, scale=1.0, *, invert=False):
        y = self.first(x) * scale
        y = y if mask is None else y * mask
        return self.second(-y if invert else y)


class DictInput(Two):
    inputs = ({"image": torch.Size([4, 6]), "extra": [torch.Size([4, 6])]},)

    def forward(self, batch):
        return {"logits": self.second(self.first(batch["image"]) + batch["extra"][0])}


class Keywords(nn.Module):
    inputs = (torch.Size([4, 6]),)

    def __init__(self):
        super().__init__()
        self.inner = OptionalInput()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(input=self.inner(x, mask=x.gt(0), scale=2.0, invert=True))


class Pair(NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor


@dataclasses.dataclass
class Record:
    logits: torch.Tensor
    name: str


class Packed(Two):
    def forward(self, x):
        y = self.first(x)
        return Pair(self.second(y), y), Record(torch.tanh(self.second(x)), "record")


class Mixed(Two):
    """Returns tensors and other objects."""

    def forward(self, x):
        y = self.second(self.first(x))
        return y, y.shape[0], "name", None, {"many": [3, y.argmax()]}


class Nothing(nn.Module):
    """No layer and no number."""

    inputs = (torch.Size([2, 3]),)

    def forward(self, x):
        return x


class Whole(Two):
    """Parameters and buffers that are no floats."""

    def __init__(self):
        super().__init__()
        self.index = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
        self.register_buffer("kept", torch.tensor([True, False, True, True, False, True]))
        self.register_buffer("offset", torch.arange(6))

    def forward(self, x):
        y = (self.first(x) + self.offset).masked_fill(~self.kept, 0)
        return self.second(y)[:, self.index]


# Parameters


class Lists(nn.Module):
    inputs = (torch.Size([4, 6]),)

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])
        self.named = nn.ParameterDict({"scale": nn.Parameter(torch.randn(6)), "shift": nn.Parameter(torch.randn(6))})

    def forward(self, x):
        for weight in self.weights:
            x = torch.relu(x @ weight)
        return F.layer_norm(x, (6,), self.named["scale"], self.named["shift"])


class Functional(nn.Module):
    inputs = (torch.Size([2, 3, 8, 8]),)

    def __init__(self):
        super().__init__()
        self.kernel, self.bias = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        x = F.relu(F.conv2d(x, self.kernel, self.bias, padding=1))
        return torch.einsum("bc,oc->bo", x.mean((2, 3)), self.matrix)


class LanguageModel(nn.Module):
    """One weight for the embedding and for the last layer."""

    inputs = (torch.tensor([[1, 5, 2, 0], [3, 3, 7, 1]]),)

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8, padding_idx=0)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.block(self.embedding(x)))


class Normed(nn.Module):
    """Weights that are derived from parameters, one of them twice."""

    inputs = (torch.Size([2, 4, 8]),)

    def __init__(self):
        super().__init__()
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3, padding=1))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8, bias=False))

    def forward(self, x):
        return self.orthogonal(torch.relu(self.spectral(self.spectral(self.conv(x)))))


class Positive(nn.Module):
    def forward(self, x):
        return F.softplus(x)


class Derived(nn.Module):
    """A parameter of forward's own, a buffer and an embedding, parametrized by a user's module."""

    inputs = (torch.tensor([[1, 2], [0, 1]]),)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4))
        self.register_buffer("shift", torch.randn(4))
        self.embedding = nn.Embedding(3, 4)
        for module, name in ((self, "scale"), (self, "shift"), (self.embedding, "weight")):
            nn.utils.parametrize.register_parametrization(module, name, Positive())

    def forward(self, x):
        return torch.tanh(self.embedding(x) * self.scale) + self.shift


class Positions(nn.Module):
    """Layers that read sizes alone, and a tensor that is filled piece by piece."""

    inputs = (torch.tensor([[1, 5, 2, 0], [3, 3, 7, 1]]),)

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(9, 8), nn.Embedding(4, 8)
        self.warp, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        steps = torch.arange(x.size(1), device=x.device)
        ones = torch.ones_like(x, dtype=torch.float32)[..., None].expand(-1, -1, 8)
        y = self.tokens(x) + self.positions(steps) + self.warp(ones)
        z = y.new_zeros(y.shape)
        z[:, 0] = y[:, 1]
        z[:, 1:] = y[:, :-1]
        return self.out(z)


# Structure


class Loop(nn.Module):
    """A recurrent net of fixed length, by hand."""

    inputs = (torch.Size([2, 5, 6]),)

    def __init__(self):
        super().__init__()
        self.cell, self.gru, self.out = nn.LSTMCell(6, 6), nn.GRUCell(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        state, hidden = (x[:, 0], x[:, 1]), x[:, 2]
        for step in range(5):
            state = self.cell(x[:, step], state)
            hidden = self.gru(state[0], hidden)
        return self.out(hidden)


class Nested(nn.Module):
    inputs = (torch.Size([2, 4, 8]),)

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Sequential(nn.BatchNorm1d(4), nn.ReLU())),
                nn.ModuleDict({"left": nn.Conv1d(4, 4, 1), "right": nn.Identity()}),
            ]
        )

    def forward(self, x):
        x = self.stages[0](x)
        return sum(branch(x) for branch in self.stages[1].values())


class Round(torch.autograd.Function):
    """A straight-through estimator: a trace of its forward would lose its backward."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.scale = scale
        return x.mul(scale).round().div(scale)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.scale, None


def swish(x, beta):
    return x * torch.sigmoid(x * beta)


class UserFunctions(Two):
    def forward(self, x):
        return self.second(Round.apply(swish(self.first(x), 1.5), 4.0))


class Heads(Two):
    """A head in train mode only, and an output of another shape."""

    def forward(self, x):
        y = torch.relu(self.first(x))
        return (y.sum(1), self.second(y)) if self.training else self.second(y)


class Encoder(nn.Module):
    inputs = (torch.Size([2, 5, 8]), torch.Size([2, 3, 8]))

    def __init__(self):
        super().__init__()
        settings = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**settings), 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**settings), 2, nn.LayerNorm(8))
        self.out = nn.Linear(8, 8)

    def forward(self, source, target):
        return self.out(self.decoder(target, self.encoder(source)))


# Beyond the symbolic trace of torch.fx


class Checkpointed(nn.Module):
    """Recomputes its blocks in backward, with the same random bits."""

    inputs = (torch.Size([4, 6]),)
    reentrant = False

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.Tanh()) for _ in range(2)])

    def forward(self, x):
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class CheckpointedReentrant(Checkpointed):
    reentrant = True


class Counted(Two):
    """Counts its calls in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.second(self.first(x) * self.calls)


class ByValue(Two):
    def forward(self, x):
        y = self.first(x)
        return self.second(y) if y.sum() > 0 else self.second(-y)


MORE = (
    AutocastBlock, AutocastByInput, AutocastDecorator, AutocastForward, NoGradBlock, NoGradDecorator, GradientsByFlag,
    GradientsSwitched, InferenceBlock, Rebound, Inside, Carried, Updated, Assigned, OptionalInput, DictInput, Keywords,
    Packed, Mixed, Nothing, Whole, Lists, Functional, LanguageModel, Normed, Derived, Positions, Loop, Nested,
    UserFunctions, Heads, Encoder,
)  # fmt: skip
PYTHON = (Checkpointed, CheckpointedReentrant, Counted, ByValue)


class Around(nn.Module):
    """One layer, called with its input ``arity`` times, the first of its outputs if it has several, and an end."""

    def __init__(self, layer, arity=1):
        super().__init__()
        self.layer, self.arity = layer, arity

    def forward(self, x):
        y = self.layer(*[x] * self.arity)
        return torch.sin(y[0] if isinstance(self.layer, SEVERAL) else y)


SEVERAL = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)
_TRANSFORMER = {"d_model": 8, "nhead": 2, "dim_feedforward": 16, "batch_first": True}

# Every layer of torch.nn with parameters, and every norm: the layer, its input or its size, how many inputs it takes.
LAYERS = (
    (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 8), 1),
    (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6), 1),
    (lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 2, 4, 4, 4), 1),
    (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 8), 1),
    (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 6, 6), 1),
    (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 4, 4, 4), 1),
    (lambda: nn.Linear(6, 4), (2, 3, 6), 1),
    (lambda: nn.Bilinear(6, 6, 4), (3, 6), 2),
    (lambda: nn.BatchNorm1d(6), (4, 6), 1),
    (lambda: nn.BatchNorm2d(3, momentum=None), (2, 3, 4, 4), 1),
    (lambda: nn.BatchNorm3d(3, affine=False), (2, 3, 4, 4, 4), 1),
    (lambda: nn.InstanceNorm1d(3, affine=True), (2, 3, 8), 1),
    (lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), (2, 3, 4, 4), 1),
    (lambda: nn.InstanceNorm3d(3), (2, 3, 4, 4, 4), 1),
    (lambda: nn.LayerNorm(6), (2, 3, 6), 1),
    (lambda: nn.GroupNorm(2, 4), (2, 4, 6), 1),
    (lambda: nn.RMSNorm(6), (2, 3, 6), 1),
    (lambda: nn.LocalResponseNorm(2), (2, 4, 6, 6), 1),
    (lambda: nn.CrossMapLRN2d(2), (2, 4, 6, 6), 1),
    (lambda: nn.Embedding(9, 4, padding_idx=0), torch.tensor([[1, 0], [8, 3]]), 1),
    (lambda: nn.EmbeddingBag(9, 4, mode="sum"), torch.tensor([[1, 0], [8, 3]]), 1),
    (lambda: nn.PReLU(3), (2, 3, 4), 1),
    (lambda: nn.MultiheadAttention(8, 2, batch_first=True), (2, 5, 8), 3),
    (lambda: nn.RNN(6, 4, 2, nonlinearity="relu", dropout=0.1), (5, 2, 6), 1),
    (lambda: nn.LSTM(6, 4, bidirectional=True, proj_size=2), (5, 2, 6), 1),
    (lambda: nn.GRU(6, 4, batch_first=True), (2, 5, 6), 1),
    (lambda: nn.RNNCell(6, 6), (2, 6), 2),
    (lambda: nn.LSTMCell(6, 4), (2, 6), 1),
    (lambda: nn.GRUCell(6, 6), (2, 6), 2),
    (lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True), (2, 5, 8), 2),
    (lambda: nn.TransformerEncoderLayer(**_TRANSFORMER), (2, 5, 8), 1),
    (lambda: nn.TransformerDecoderLayer(**_TRANSFORMER), (2, 5, 8), 2),
    (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**_TRANSFORMER), 2), (2, 5, 8), 1),
    (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**_TRANSFORMER), 2), (2, 5, 8), 2),
)
