"""Hooks: one that comes after the first call makes a new graph, and no number is other than if it had been there."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from swalp_fx import convert, report, restore


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


# What a hook computes is code of its own: it reads rounded numbers, and its results are rounded


class Scale(nn.Module):
    """A module of the model's own, with a layer, that a hook may stand at too."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) * 0.7


class Line(nn.Module):
    """``behind`` and ``before`` stand at the layers as hooks, or in the forward, where a hook would run."""

    def __init__(self, by_hand, wrap=lambda call, x: call(x)):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.block = nn.Linear(8, 8), nn.Linear(8, 8), Scale()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.by_hand, self.wrap = by_hand, wrap

    def before(self, x):
        return x * 0.37

    def behind(self, x):
        return (x @ self.weight) * 0.37

    def other(self, x):
        return self.block(x)

    def run(self, x):
        if not self.by_hand:
            return self.block(self.b(self.a(x)))
        x = self.b(self.before(self.behind(self.a(x))))
        x = self.behind(self.other(x))  # the hook of b calls the block, which has a hook of its own
        return self.behind(self.block(x))

    def forward(self, x):
        return self.wrap(self.run, x) * 1


def _hooked(model, wrap=lambda function: function):
    model.a.register_forward_hook(lambda m, i, o: wrap(model.behind)(o))
    model.b.register_forward_pre_hook(lambda m, i: (wrap(model.before)(i[0]),))
    model.b.register_forward_hook(lambda m, i, o: wrap(model.other)(o))
    model.block.register_forward_hook(lambda m, i, o: wrap(model.behind)(o) if m.training else None)
    return model


def _breaks(function):
    def broken(x):
        torch._dynamo.graph_break()
        return function(x)

    return broken


AROUND = {
    "in a graph": {},
    "in a checkpoint": {"wrap": lambda call, x: checkpoint(call, x, use_reentrant=False)},
}
HOOKED = [*((_hooked, around) for around in AROUND), (lambda m: _hooked(m, _breaks), "in a graph")]


@pytest.mark.parametrize(("hook", "around"), HOOKED, ids=[*AROUND, "behind a break"])
@pytest.mark.parametrize("recipe", ["bfp4[0] rounding=nearest", "mxfp4 rounding=nearest placement=compute"])
def test_a_hook_has_the_bits_of_the_same_code_in_the_forward(hook, around, recipe):
    x = torch.randn(3, 8)
    found = []
    for by_hand in (True, False):
        model = Line(by_hand, **AROUND[around])
        lp, _ = convert(model if by_hand else hook(model), recipe=recipe)
        found.append(_run(lp, x))
    for ours, by_hand in zip(*found, strict=True):
        assert torch.equal(ours, by_hand)


def test_what_a_hook_computes_is_named_after_its_module():
    x = torch.randn(3, 8)
    model = Line(by_hand=False)
    model.a.register_forward_hook(_doubles)
    model.a.register_forward_pre_hook(lambda m, i: (i[0] @ model.weight,))
    lp, _ = convert(model, recipe="bfp8", example_inputs=(x,))
    names = [(layer.name, layer.operation) for layer in report(lp).layers if "A" in layer.rounded]
    assert names[:3] == [("a.matmul", "matmul"), ("a", "Linear"), ("a.mul", "mul")]
    lp.a(x)  # it has a graph of its own
    assert "a_mul = a_q * 2" in lp.graphs[-1].code
    lp, _ = convert(restore(lp), recipe="bfp8 exclude=a.mul", example_inputs=(x,))
    assert "a.mul" not in [layer.name for layer in report(lp).layers if "A" in layer.rounded]


@pytest.mark.parametrize("around", AROUND)
def test_a_hook_that_masks_a_weight_is_a_part_of_its_layer(around):
    """Else the masked weight would be rounded as an output is."""
    x = torch.randn(3, 8)
    found = []
    for pruned in (True, False):
        model = Line(by_hand=False, **AROUND[around])
        mask = (torch.rand(8, 8, generator=torch.Generator().manual_seed(2)) > 0.5).float()
        if pruned:
            prune.custom_from_mask(model.a, "weight", mask)
        else:
            model.a.weight.data *= mask
        lp, _ = convert(model, recipe="W=fixed8.6 A=bfp3[0] E=bfp3[0] rounding=nearest")
        found.append(lp(x))
    assert torch.equal(*found)
