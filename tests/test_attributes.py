"""Attributes, modes, forwards and hooks that a forward sets or reads are followed at every call."""

import copy
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from captured import NEAREST, Block, X, both, same
from torch import nn

from swalp_fx import convert, quantize

# Attributes that a forward sets, and that are set on it


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.seen, self.last, self.calls, self.plain, self.factor = [], None, 0, torch.zeros(3), 1.0

    def forward(self, x):
        y = self.layer(x)
        self.seen.append(y)
        self.last = (y, y.pow(2).mean())
        self.calls += 1
        self.plain += 1
        return y * self.calls * self.factor + self.plain


def test_attributes_that_a_forward_sets_are_set_at_every_call():
    for _ in range(2):
        model, lp = both(Remembering)
        for calls in (1, 2, 3):
            assert torch.equal(lp(X), model(X))
            assert lp.calls == calls == len(lp.seen) and torch.equal(lp.plain, model.plain)
            for found, due in zip((*lp.last, *lp.seen), (*model.last, *model.seen), strict=True):
                assert torch.equal(found, due)
        lp.last[1].backward()
        model.last[1].backward()
        assert torch.equal(lp.layer.weight.grad, model.layer.weight.grad)


def test_attributes_that_a_forward_reads_are_followed():
    model, lp = both(Remembering)
    for factor in (1.0, 0.5, 0.25, 3, "x"):
        for each in (model, lp):
            each.factor = 2.0 if factor == "x" else factor
        assert torch.equal(lp(X), model(X))


class Switching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 3), nn.Dropout()

    def forward(self, x):
        y = self.drop(self.layer(x))
        self.eval()
        return y


def test_a_mode_that_a_forward_switches_is_switched():
    model, lp = both(Switching)
    assert same(lambda: lp(X), lambda: model(X)) and not lp.training and not lp.drop.training
    assert same(lambda: lp(X), lambda: model(X))


@pytest.mark.parametrize("early", [True, False])
def test_a_forward_that_is_set_on_the_instance_runs_rewritten(early):
    def forward(self, x):
        return self.inner(self.layer(x)) * 3

    torch.manual_seed(0)
    model = Block(nn.Linear(3, 2))
    due, _ = convert(copy.deepcopy(model), recipe=NEAREST)
    if early:
        model.forward = MethodType(forward, model)
        lp, _ = convert(model, recipe=NEAREST)
    else:
        lp, _ = convert(model, recipe=NEAREST)
        lp(X)
        lp.forward = MethodType(forward, lp)
    assert torch.equal(lp(X), quantize(due(X), "bfp4[0]") * 3)
    model.layer.forward = lambda x: F.linear(x, model.layer.weight) * 0
    assert torch.equal(lp(X), lp(2 * X))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x)

    def twice(self, x):
        return self.layer(x) * 2


class Doubled(Scaled):
    def forward(self, x):
        return self.layer(x) * 2

    def thrice(self, x):
        return x @ self.layer.weight


def _another_forward(monkeypatch, module):
    monkeypatch.setattr(type(module), "forward", Doubled.forward)


def _another_method(monkeypatch, module):
    monkeypatch.setattr(type(module), "forward", Scaled.twice)


def _another_type(monkeypatch, module):
    module.__class__ = Doubled


@pytest.mark.parametrize("change", [_another_forward, _another_method, _another_type])
@pytest.mark.parametrize("way", [lambda lp: lp(X), lambda lp: lp.forward(X), lambda lp: lp[0](X)], ids=range(3))
def test_a_forward_that_is_replaced_on_the_class_runs_rewritten(monkeypatch, change, way):
    torch.manual_seed(0)
    lp, _ = convert(nn.Sequential(Scaled(), Scaled()), recipe=NEAREST)
    due, _ = convert(nn.Sequential(Doubled(), Doubled()), recipe=NEAREST)
    due.load_state_dict(lp.state_dict())
    assert not torch.equal(way(lp), way(due))
    for each in lp:
        change(monkeypatch, each)
    assert torch.equal(way(lp), way(due))


def test_the_methods_of_another_type_are_entries_from_its_next_call_on():
    lp, _ = convert(Scaled(), recipe=NEAREST)
    lp.__class__ = Doubled
    lp(X)
    assert torch.equal(lp.thrice(X), X @ quantize(lp.layer.weight.detach(), "bfp4[0]"))


# Hooks


def _keeping_in(kept):
    return lambda _, x, y: kept.append(y)  # torch 2.11 does not append to a list that is a function's default


def test_a_hook_on_a_block_runs_at_every_call_and_what_it_takes_has_a_gradient():
    found = []
    for converted in (False, True):
        torch.manual_seed(0)
        model, kept = nn.Sequential(Block(nn.Tanh()), nn.Linear(3, 2)), []
        model[0].register_forward_hook(_keeping_in(kept))
        if converted:
            convert(model, recipe="float")
        for calls in (1, 2):
            model(X)
            assert len(kept) == calls
        kept[-1].square().mean().backward()
        found.append(model[0].layer.weight.grad)
    assert torch.equal(*found)


def test_a_late_hook_is_given_what_one_that_was_there_before_is_and_changes_the_same_bits():
    """Also if a rounding was left out or is in place: a ReLU keeps rounded numbers."""
    found = []
    for late in (False, True):
        torch.manual_seed(0)
        model, seen = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), []

        def hook(_, x, y, seen=seen):
            seen.append(y.clone())
            return y * 0.3

        if not late:
            model[1].register_forward_hook(hook)
        lp, _ = convert(model, recipe=NEAREST)
        if late:
            lp(X)
            model[1].register_forward_hook(hook)
        y = lp(X)
        found.append([y, *seen])
    assert all(map(torch.equal, *found))
