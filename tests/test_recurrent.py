"""Recurrent layers have the bits of what one would write by hand of linear layers, sums, products, sigmoid and tanh."""

import functools
import itertools

import pytest
import torch
from graphs import converted
from torch import nn

FORMATS = ["bfp8[0]", "mxfp8", pytest.param("e4m3", marks=pytest.mark.slow)]
FEATURES, HIDDEN, BATCH, TIMES = 6, 5, 3, 4
generator = torch.Generator().manual_seed(1)
X = torch.randn(TIMES, BATCH, FEATURES, generator=generator)


def _lstm(cell, x, h, c):
    i, f, g, o = (cell.ih(x) + cell.hh(h)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h if cell.hr is None else cell.hr(h)), c


def _gru(cell, x, h):
    (x_r, x_z, x_n), (h_r, h_z, h_n) = cell.ih(x).chunk(3, -1), cell.hh(h).chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return ((1 - z) * n + z * h,)


def _rnn(activation, cell, x, h):
    return (activation(cell.ih(x) + cell.hh(h)),)


STEPS = {
    "LSTM": _lstm,
    "GRU": _gru,
    "tanh": functools.partial(_rnn, torch.tanh),
    "relu": functools.partial(_rnn, torch.relu),
}


def _step_of(layer):
    kind = type(layer).__name__.removesuffix("Cell")
    return STEPS[layer.nonlinearity if kind == "RNN" else kind]


class WrittenCell(nn.Module):
    """One step, with the weights of ``layer`` whose names end so."""

    def __init__(self, layer, suffix=""):
        super().__init__()
        self.step = _step_of(layer)
        self.ih, self.hh = (
            self._linear(layer, f"weight_{name}{suffix}", f"bias_{name}{suffix}") for name in ("ih", "hh")
        )
        self.hr = self._linear(layer, f"weight_hr{suffix}", "") if getattr(layer, "proj_size", 0) else None

    @staticmethod
    def _linear(layer, weight, bias):
        weight, bias = getattr(layer, weight), getattr(layer, bias, None)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype)
        linear.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        return linear

    def forward(self, x, *states):
        return self.step(self, x, *states)


class Written(nn.Module):
    """A layer written by hand: loops over layers, directions and time."""

    def __init__(self, layer):
        super().__init__()
        self.like = [layer]
        suffixes = itertools.product(range(layer.num_layers), ("", "_reverse")[: 1 + layer.bidirectional])
        self.cells = nn.ModuleList(WrittenCell(layer, f"_l{k}{direction}") for k, direction in suffixes)

    def forward(self, x, hx=None):
        (layer,) = self.like
        directions, is_lstm = 1 + layer.bidirectional, isinstance(layer, nn.LSTM)
        x = x.transpose(0, 1) if layer.batch_first else x
        if hx is None:
            hx = tuple(
                torch.zeros(len(self.cells), x.shape[1], size, dtype=x.dtype)
                for size in (layer.proj_size or layer.hidden_size, layer.hidden_size)[: 1 + is_lstm]
            )
        elif not is_lstm:
            hx = (hx,)
        last = []
        for k in range(layer.num_layers):
            outputs = []
            for d in range(directions):
                states, given = tuple(each[k * directions + d] for each in hx), []
                for now in reversed(x.unbind(0)) if d else x.unbind(0):
                    states = self.cells[k * directions + d](now, *states)
                    given.append(states[0])
                outputs.append(torch.stack(given[::-1] if d else given))
                last.append(states)
            x = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            if layer.dropout and self.training and k + 1 < layer.num_layers:
                x = torch.dropout(x, layer.dropout, True)
        x = x.transpose(0, 1) if layer.batch_first else x
        last = tuple(torch.stack(each) for each in zip(*last, strict=True))
        return x, (last if is_lstm else last[0])


class Headed(nn.Module):
    """A linear layer behind the outputs; the states are returned."""

    def __init__(self, layer, size):
        super().__init__()
        torch.manual_seed(2)
        self.layer, self.head = layer, nn.Linear(size, 3)

    def forward(self, x, *states):
        y, last = self.layer(x, *states)
        return self.head(y), last


def _leaves(nest):
    return [nest] if isinstance(nest, torch.Tensor) else [leaf for each in nest for leaf in _leaves(each)]


def _results(model, recipe, *inputs):
    """Outputs and all gradients, in train and in eval mode."""
    low = converted(model, recipe if "rounding" in recipe else f"{recipe} rounding=nearest")
    found = []
    for mode in (True, False):
        torch.manual_seed(3)
        given = torch.utils._pytree.tree_map(lambda each: each.clone().requires_grad_(), inputs)
        outputs = _leaves(low.train(mode)(*given))
        sum(each.square().sum() for each in outputs).backward()
        gradients = {name: parameter.grad for name, parameter in low.named_parameters()}
        found.append((outputs, [each.grad for each in _leaves(given)], gradients))
        low.zero_grad()
    assert [each.broke for each in low.graphs] == [None] * len(low.graphs)
    return found


def _assert_same(layer, recipe, *inputs, size=None):
    """``layer`` and what is written by hand in its place agree bit for bit."""
    size = size or (getattr(layer, "proj_size", 0) or layer.hidden_size) * (1 + layer.bidirectional)
    written = Headed(Written(layer), size)
    by_layer, by_hand = (_results(each, recipe, *inputs) for each in (Headed(layer, size), written))
    for (outputs, given, gradients), (own_outputs, own_given, own) in zip(by_layer, by_hand, strict=True):
        assert all(map(torch.equal, outputs + given, own_outputs + own_given))
        assert torch.equal(gradients["head.weight"], own["head.weight"])
        for i, name in enumerate(
            dict.fromkeys(each.split("_", 2)[2] for each in gradients if each.startswith("layer."))
        ):
            for part in ("ih", "hh", "hr"):
                for kind in ("weight", "bias"):
                    if (gradient := gradients.get(f"layer.{kind}_{part}_{name}")) is not None:
                        assert torch.equal(gradient, own[f"layer.cells.{i}.{part}.{kind}"]), (name, part, kind)


KINDS = {
    "LSTM": nn.LSTM,
    "GRU": nn.GRU,
    "RNN, tanh": nn.RNN,
    "RNN, relu": functools.partial(nn.RNN, nonlinearity="relu"),
}
WAYS = {
    "plain": {},
    "without biases": {"bias": False},
    "batch first": {"batch_first": True},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True},
    "two layers, both directions, batch first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
}


@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_has_the_bits_of_what_one_writes_by_hand(kind, recipe):
    torch.manual_seed(0)
    _assert_same(KINDS[kind](FEATURES, HIDDEN), recipe, X)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_however_the_layer_is_set_up(kind, way):
    torch.manual_seed(0)
    _assert_same(KINDS[kind](FEATURES, HIDDEN, **WAYS[way]), "bfp8[0]", X)
