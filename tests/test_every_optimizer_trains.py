"""Under the default recipe each optimizer trains about as well as with its states in float, on real images and texts:

    pytest -m slow -s tests/test_every_optimizer_trains.py      prints a row each; four minutes

Optimizers of packages need these: pip install lion-pytorch schedulefree prodigyopt pytorch-optimizer
"""

import argparse
import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import decoder
from swalp_fx import convert

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

AT_MOST = 1.5  # times the loss with states in float
LAST = 10  # losses are means of as many steps
# Name -> (where it is, its options).
OPTIMIZERS = {
    "SGD": ("torch.optim", {"lr": 0.1, "momentum": 0.9}),
    "Adam": ("torch.optim", {"lr": 3e-3}),
    "AdamW": ("torch.optim", {"lr": 3e-3}),
    "Adam, amsgrad": ("torch.optim", {"lr": 3e-3, "amsgrad": True}),
    "NAdam": ("torch.optim", {"lr": 3e-3}),
    "RAdam": ("torch.optim", {"lr": 1e-2}),
    "Adamax": ("torch.optim", {"lr": 1e-2}),
    "RMSprop": ("torch.optim", {"lr": 1e-3, "momentum": 0.9}),
    "RMSprop, centered": ("torch.optim", {"lr": 1e-3, "centered": True}),
    "Adagrad": ("torch.optim", {"lr": 3e-2}),
    "Adafactor": ("torch.optim", {"lr": 1e-2}),
    "Muon": ("torch.optim", {"lr": 1e-2}),
    "Lion": ("lion_pytorch", {"lr": 1e-3}),
    "SGDScheduleFree": ("schedulefree", {"lr": 1.0}),
    "AdamWScheduleFree": ("schedulefree", {"lr": 1e-2}),
    "Prodigy": ("prodigyopt", {}),
    "AggMo": ("pytorch_optimizer", {"lr": 3e-2}),
}


def images():
    """A network, and batches of handwritten digits with their labels. It has no biases: Muon takes matrices alone."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 10, bias=False))
    return model, [(x[at : at + 64], y[at : at + 64]) for at in range(0, 1728, 64)] * 6


def texts():
    """A decoder in the manner of nanoGPT, and batches of a source text: bytes, and the bytes behind them."""
    text = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    model = decoder.Decoder(context=32, width=48, layers=2)
    starts = torch.randint(len(text) - 33, (120, 16, 1))
    pieces = text[starts + torch.arange(33)]
    return model, [(piece[:, :-1], piece[:, 1:]) for piece in pieces]


def loss_of(make, module, name, options, recipe):
    torch.manual_seed(0)
    model, batches = make()
    optimizer = getattr(importlib.import_module(module), name.partition(",")[0])(model.parameters(), **options)
    if hasattr(optimizer, "train"):
        optimizer.train()
    convert(model, optimizer, recipe=recipe, seed=0)
    losses = []
    for x, y in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-LAST:]) < sum(losses[:LAST]), "it does not train at all"
    return sum(losses[-LAST:]) / LAST


@pytest.mark.parametrize("make", [images, texts])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_rounded_states_train_as_states_in_float(name, make, capsys):
    module, options = OPTIMIZERS[name]
    pytest.importorskip(module)
    if name == "Muon" and make is texts:
        pytest.skip("Muon takes matrices alone")
    found, due = (loss_of(make, module, name, options, recipe) for recipe in ("bfp8[0]", "bfp8[0] M=float"))
    with capsys.disabled():
        print(f"\n| {name} | {make.__name__} | {found:.3f} | {due:.3f} | {found / due:.2f} |", end=" ")
    assert found <= AT_MOST * due
