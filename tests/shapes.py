"""Small models, one for each thing that a rewrite can get wrong; ``inputs`` are what they are called with."""

import torch
import torch.nn.functional as F
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
    """Layers whose output is a nest of tensors."""

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
    """What two layers give, in one tensor, and a constant of forward's own."""

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


def made(kind):
    """(model, inputs), the same each time."""
    torch.manual_seed(0)
    model = kind()
    return model, [torch.randn(size) for size in kind.inputs]


def run(module, inputs, seed=0):
    torch.manual_seed(seed)
    return module(*inputs)


def equal(a, b):
    """Whether two nests hold the same tensors, bit for bit."""
    leaves = [torch.utils._pytree.tree_leaves(nest) for nest in (a, b)]
    return all(torch.equal(x, y) for x, y in zip(*leaves, strict=True))
