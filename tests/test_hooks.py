"""Hooks: one that comes after the first call makes a new graph, and no number is other than if it had been there."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks_of_all

from swalp_fx import convert


class Net(nn.Module):
    """Roundings in place, and left out, everywhere."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.fc, self.hook, self.kept = nn.Linear(16, 3), None, []

    def forward(self, x):
        y = self.relu(self.bn(self.conv(x)))
        if self.hook is not None:
            y.register_hook(self.hook)
        return self.fc(F.max_pool2d(y, 2).flatten(1))


def _keep(kept):
    """A hook of any kind that keeps its arguments."""
    return lambda *seen: kept.extend(each for each in seen if isinstance(each, (torch.Tensor, tuple)))


def _doubles(*seen):
    """A hook of any kind that changes the input, the output, or the gradient."""
    value = seen[-1]
    return tuple(None if each is None else each * 2 for each in value) if isinstance(value, tuple) else value * 2


def _doubles_gradients(layer, given, received):
    return tuple(None if each is None else each * 2 for each in given)


def _writes(layer, inputs):
    inputs[0].data.mul_(0.3)


PLACES = ("conv", "bn", "relu", "fc")
# name -> a function that registers the hook on a model, given a list for kept values; the handle, if there is one
HOOKS = {
    **{
        f"forward of {name}": lambda m, k, name=name: m.get_submodule(name).register_forward_hook(_keep(k))
        for name in PLACES
    },
    **{
        f"input of {name}": lambda m, k, name=name: m.get_submodule(name).register_forward_pre_hook(_keep(k))
        for name in PLACES
    },
    "forward, changed": lambda m, k: m.bn.register_forward_hook(_doubles),
    "input, changed": lambda m, k: m.relu.register_forward_pre_hook(_doubles),
    "input, written into": lambda m, k: m.relu.register_forward_pre_hook(_writes),
    **{
        f"backward of {name}": lambda m, k, name=name: m.get_submodule(name).register_full_backward_hook(_keep(k))
        for name in ("conv", "fc")
    },
    "backward, changed": lambda m, k: m.fc.register_full_backward_hook(_doubles_gradients),
    "before backward": lambda m, k: m.fc.register_full_backward_pre_hook(_keep(k)),
    "tensor, kept": lambda m, k: setattr(m, "hook", _keep(k)),
    "tensor, changed": lambda m, k: setattr(m, "hook", _doubles),
    "all modules, forward": lambda m, k: hooks_of_all.register_module_forward_hook(_keep(k)),
    "all modules, input": lambda m, k: hooks_of_all.register_module_forward_pre_hook(_keep(k)),
    "all modules, backward": lambda m, k: hooks_of_all.register_module_full_backward_hook(_keep(k)),
}


def _run(model, x):
    """Every tensor that a forward and a backward leave behind."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    out = model(x)
    out.square().sum().backward()
    return [out, x.grad, *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("name", HOOKS)
def test_a_late_hook_sees_and_changes_what_one_from_the_start_does(name):
    model, x = Net().eval(), torch.randn(2, 2, 4, 4)
    if name == "all modules, backward":
        model.relu.inplace = False  # PyTorch wants it so
    found, seen = [], []
    for late, recipe in ((True, ""), (False, ""), (False, "in_place=false")):
        low, _ = convert(copy.deepcopy(model), recipe=f"bfp4[0] rounding=nearest {recipe}")
        if late:
            _run(low, x)
        kept = []
        handle = HOOKS[name](low, kept)
        try:
            found.append(_run(low, x))
        finally:
            if handle is not None:
                handle.remove()
        seen.append(_flat(kept))
    assert bool(seen[0]) == ("chang" not in name and "written" not in name)
    for late, early, plain in (*zip(*found, strict=True), *zip(*seen, strict=True)):
        assert torch.equal(late, early) and torch.equal(early, plain)


def _flat(nest):
    return [leaf for leaf in torch.utils._pytree.tree_leaves(nest) if isinstance(leaf, torch.Tensor)]


class Encoder(Net):
    def encode(self, x):
        return self.relu(self.bn(self.conv(x)))


@pytest.mark.parametrize("register", [hooks_of_all.register_module_forward_hook, lambda hook: None], ids=["all", "one"])
def test_a_late_hook_on_what_a_method_calls_runs(register):
    lp, _ = convert(Encoder().eval(), recipe="float")
    x = torch.randn(2, 2, 4, 4)
    before = lp.encode(x)
    handle = register(_doubles) or lp.relu.register_forward_hook(_doubles)
    assert not torch.equal(lp.encode(x), before)
    handle.remove()
    assert torch.equal(lp.encode(x), before)
