"""The warning of updates that a half-precision parameter loses: it comes where most of them are lost."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swalp_fx.optimizer import SWALP
from swalp_fx.optimizer.lost import length_of, loses_updates
from swalp_fx.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr, eps=1e-6),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, eps=1e-6),
    "nadam": lambda p, lr: torch.optim.NAdam(p, lr=lr, eps=1e-6),
    "adagrad": lambda p, lr: torch.optim.Adagrad(p, lr=lr, eps=1e-3),
    "adamax": lambda p, lr: torch.optim.Adamax(p, lr=lr, eps=1e-6),
}


def net(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)


def warnings_of(model, optimizer, recipe="W=bfp8[0] A=float E=float", **changes):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SWALP(model, Recipe.parse(recipe, **changes)).attach(optimizer)
    return [str(each.message) for each in caught]


def unmoved(model, optimizer, steps):
    """Parameter -> the share of its numbers that a step leaves as they are, the mean over steps."""
    images = torch.randn(256, 64, generator=torch.Generator().manual_seed(1))
    targets = images[:, :10].argmax(1)  # which can be learned
    shares = dict.fromkeys(model.parameters(), 0.0)
    for step in range(steps):
        rows = torch.randint(256, (32,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        F.cross_entropy(model(images[rows].to(model[0].weight.dtype)).float(), targets[rows]).backward()
        before = [p.detach().clone() for p in shares]
        optimizer.step()
        for p, old in zip(shares, before, strict=True):
            shares[p] += (p == old).float().mean().item() / steps
    return shares


@pytest.mark.parametrize("lr", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_where_it_warns_most_updates_are_lost(name, dtype, lr):
    model = net(dtype)
    optimizer = OPTIMIZERS[name](model.parameters(), lr)
    (group,) = optimizer.param_groups
    lost = [p for p in model.parameters() if loses_updates(p, length_of(group))]
    shares = unmoved(model, optimizer, 30)
    assert all(shares[p] > 0.5 for p in lost)
    assert lost or lr > 1e-5


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_warns_wherever_adams_first_update_is_lost(dtype, lr):
    """Which is the learning rate itself."""
    model = net(dtype)
    optimizer = OPTIMIZERS["adam"](model.parameters(), lr)
    lost = [loses_updates(p, lr) for p in model.parameters()]
    assert lost == [share > 0.5 for share in unmoved(model, optimizer, 1).values()]


def test_the_words():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    (message,) = warnings_of(model, optimizer)
    assert message == (
        "an update of 0.001, which is AdamW's for a gradient of one, is lost in most of '1.weight' and 1 more in "
        "torch.bfloat16; keep masters: master=float"
    )
    assert not warnings_of(model, torch.optim.AdamW(model.parameters(), lr=1e-3), master="float")
    assert not warnings_of(model.float(), torch.optim.AdamW(model.parameters(), lr=1e-3))


def test_a_frozen_parameter_and_a_learning_rate_of_zero_lose_nothing():
    model = nn.LayerNorm(4).bfloat16()
    assert not warnings_of(model, torch.optim.SGD(model.parameters(), lr=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(1e-3))
    assert len(warnings_of(model, optimizer)) == 1
    assert not warnings_of(model.requires_grad_(False), torch.optim.SGD(model.parameters(), lr=1e-3))


def test_a_warm_up_is_no_alarm():
    model = nn.LayerNorm(4).bfloat16()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-3)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4)
    assert not warnings_of(model, optimizer)
