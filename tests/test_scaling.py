"""Gradients are rounded in the scale of the loss, and infinities that rounding makes reach the GradScaler."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from stepping import MASTERS, OPTIMIZERS, same, setup, values
from torch import nn

import swalp_fx
from swalp_fx.ops import quantize
from swalp_fx.recipe import Recipe

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*divides one moment by another"),
]

TINY = 2.0**-30  # zero in float16; times 2^16, not
G_ALONE = "W=float M=float G=fp16 A=float E=float"


class Tiny(nn.Module):
    """Its gradient is a tiny multiple of the input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, x):
        return (self.weight * x).sum() * TINY


X = torch.tensor([1.0, 1.2345, -3.21, 100.0, 1e-3, 0.0, -7.7, 2.5])


def by_scaler(model, optimizer, swalp, scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(model(X)).backward()
    scaler.step(optimizer)
    scaler.update()


def by_unscaling_first(model, optimizer, swalp, scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(model(X)).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    scaler.step(optimizer)


def by_number(model, optimizer, swalp, scale):
    swalp.grad_scale = scale
    by_hand(model, optimizer, scale)


def by_function(model, optimizer, swalp, scale):
    swalp.grad_scale = torch.amp.GradScaler("cpu", init_scale=scale).get_scale
    swalp.grad_scale.__self__.scale(torch.zeros(1))  # a scaler has its scale from the first loss on
    by_hand(model, optimizer, scale)


def by_hand(model, optimizer, scale):
    (model(X) * scale).backward()
    for p in model.parameters():
        p.grad /= scale
    optimizer.step()


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("way", [by_scaler, by_unscaling_first, by_number, by_function])
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_gradients_are_rounded_in_their_scaled_form(name, way, master):
    scale = 2.0**16
    changes = MASTERS[master]
    model, optimizer, swalp = setup(OPTIMIZERS[name], G_ALONE, Tiny(), rounding="nearest", **changes)
    way(model, optimizer, swalp, scale)
    due = quantize(X * TINY * scale, "fp16") / scale
    assert same(model.weight.grad, due) and due.count_nonzero() == 7
    assert not quantize(X[:3] * TINY, "fp16").any()  # as it would be unscaled


def test_a_scale_that_is_no_power_of_two():
    model, optimizer, swalp = setup(OPTIMIZERS["sgd"], "W=float M=float G=fixed8.4", Tiny(), rounding="nearest")
    by_number(model, optimizer, swalp, 1e9)
    steps = model.weight.grad * 1e9 * 16
    assert torch.allclose(steps, (X * TINY * 1e9 * 16).round().clamp(-128, 127), atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
def test_a_gradient_that_two_parameters_share_is_scaled_once(shared):
    model = nn.ParameterList([torch.zeros(8), torch.zeros(8)])
    _, optimizer, swalp = setup(OPTIMIZERS["sgd"], G_ALONE, model, rounding="nearest")
    swalp.grad_scale = 2.0**16
    model[0].grad = X * TINY
    model[1].grad = model[0].grad if shared else X * TINY
    optimizer.step()
    assert same(model[0].grad, quantize(X * TINY * 2.0**16, "fp16") / 2.0**16)
    assert same(model[1].grad, model[0].grad)


def test_a_disabled_scaler_scales_nothing():
    runs = [setup(OPTIMIZERS["sgd"], G_ALONE, Tiny()) for _ in range(2)]
    for scaler, (model, optimizer, _) in zip((torch.amp.GradScaler("cpu", enabled=False), None), runs, strict=True):
        model(X * 2**10).backward()
        optimizer.step() if scaler is None else scaler.step(optimizer)
    assert same(values(*runs[0]), values(*runs[1]))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), "much", lambda: 0.0])
def test_what_is_no_scale_is_refused_before_anything_changes(scale):
    model, optimizer, swalp = setup(OPTIMIZERS["sgd"], G_ALONE, Tiny())
    model(X).backward()
    before = copy.deepcopy([model.weight, model.weight.grad])
    swalp.grad_scale = scale
    with pytest.raises(ValueError, match=r"grad_scale is .*; it takes the number that the loss was multiplied by"):
        optimizer.step()
    assert same([model.weight, model.weight.grad], before)


# Overflow


class InFloat16(torch.autograd.Function):
    """Casts error signals to float16 and back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, error):
        return error.half().float()


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))


def scales(forward, model, optimizer, steps=40, rounded=None):
    """The scale of each step, of a GradScaler that tries twice as much after two good ones."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=2)
    found = []
    for step in range(steps):
        rows = torch.Generator().manual_seed(step)
        x, y = torch.randn(64, 20, generator=rows), torch.randint(10, (64,), generator=rows)
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(forward(x), y)).backward()
        for p in model.parameters() if rounded else ():
            p.grad = quantize(p.grad, rounded)
        scaler.step(optimizer)
        scaler.update()
        found.append(scaler.get_scale())
    return found


def test_a_grad_scaler_settles_where_a_cast_to_float16_does():
    model = classifier()
    casts = InFloat16.apply
    first, relu, last = model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    due = scales(lambda x: last(casts(relu(casts(first(x))))), model, optimizer)  # a model's output is not rounded

    found = {}
    for error in ("fp16+inf", "fp16"):
        model = classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recipe = f"W=float M=float A=float G=float E={error} rounding=nearest"
        lp, _ = swalp_fx.convert(model, optimizer, recipe=recipe)
        found[error] = scales(lp, model, optimizer)
    assert found["fp16+inf"] == due
    assert set(due[-6:]) == {2.0**24, 2.0**25}  # it tries 2^25, and falls back
    assert found["fp16"][-1] > 2.0**30  # which saturates


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("name", ["momentum", "adam", "for-each"])
def test_gradients_that_overflow_as_they_are_rounded_are_no_step(name, master):
    """As if they had been rounded before the scaler looked."""
    plain = classifier()
    reference = OPTIMIZERS[name](plain.parameters())
    due = scales(plain, plain, reference, rounded="fp16+inf")
    model, optimizer, swalp = setup(
        OPTIMIZERS[name], "W=float M=float G=fp16+inf", classifier(), rounding="nearest", **MASTERS[master]
    )
    assert scales(model, model, optimizer) == due
    skipped = sum(after < before for before, after in itertools.pairwise(due))
    assert skipped > 3 and swalp.state_dict()["step"] == len(due) - skipped
    if master != "rounded":
        assert same(values(model, optimizer), values(plain, reference))


def test_a_scale_of_one_may_overflow_too():
    model, optimizer, swalp = setup(OPTIMIZERS["sgd"], "W=bfp8 G=fp16+inf", classifier(), rounding="nearest")
    before = copy.deepcopy(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(model(torch.full((2, 20), 1e6)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert same(dict(model.state_dict()), dict(before))
    assert scaler.get_scale() == 0.5 and swalp.state_dict()["step"] == 0


def test_an_overflow_without_a_scaler_is_the_optimizers():
    model, optimizer, _ = setup(OPTIMIZERS["sgd"], "W=float M=float G=fp16+inf", Tiny(), rounding="nearest")
    model.weight.grad = torch.full((8,), 1e6)
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert model.weight.isinf().all()
    assert Recipe.parse("G=fp16+inf").gradient.format.overflow == "infinity"
