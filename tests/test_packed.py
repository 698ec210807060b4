"""Packed checkpoints: a converted model's weights as codes, restored bit for bit."""

import io

import pytest
import torch
from shapes import Tied
from torch import nn

import swalp_fx
from swalp_fx.codes.packed import packed_state, unpacked_state
from swalp_fx.formats import named, parse


def trained(model, recipe, steps=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    lp, swalp = swalp_fx.convert(model, optimizer, recipe=recipe)
    size = next(model.parameters()).shape[1]
    for _ in range(steps):
        optimizer.zero_grad()
        lp(torch.randn(4, size)).square().mean().backward()
        optimizer.step()
    return lp, swalp


def assert_same_state(found, due):
    """Bit for bit: the sign of a zero counts."""
    assert found.keys() == due.keys()
    for name, value in due.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (found[name], value))), name


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def restored(state):
    """Through a file, which holds nothing but tensors and plain values."""
    return unpacked_state(torch.load(io.BytesIO(saved(state)), weights_only=True))


SPECS = ["bfp8[0]", "bfp8", "fixed8.6", "int8[0]", "int4[-1:32]", "mxfp4", "nvfp4", "e4m3[1x128]", "nf4"]
SPECS += ["int8[0]+asym"]


@pytest.mark.parametrize("spec", SPECS)
def test_weights_come_back_bit_for_bit(spec):
    model = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.ReLU(), nn.Linear(96, 10))
    lp, swalp = trained(model, f"bfp8[0] W={spec} M=float")
    due = {name: value.clone() for name, value in lp.state_dict().items()}
    state = torch.load(io.BytesIO(saved(swalp.packed_state_dict(lp))), weights_only=True)
    for value in lp.state_dict().values():
        value.zero_()
    swalp.load_packed_state_dict(lp, state)
    assert_same_state(lp.state_dict(), due)


@pytest.mark.parametrize("spec", [*named.PRESETS, "int8[0]+asym", "posit8.1[]", "mxfp8+even", "e5m2+inf", "uint8[0]"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_rounded_weights_of_every_format(spec, rounding):
    layer = nn.Linear(40, 30)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(swalp_fx.quantize(parameter, spec, rounding, key=1))
        layer.bias[:3] = torch.tensor([-0.0, 0.0, torch.nan])
    assert_same_state(restored(packed_state(layer, {"weight": parse(spec), "bias": parse(spec)})), layer.state_dict())


@pytest.mark.parametrize("spec", ["bfp8[0]", "int8[0]", "e4m3", "mxfp8"])
def test_eight_bits_take_less_than_a_third(spec):
    lp, swalp = trained(nn.Sequential(nn.Linear(256, 512), nn.BatchNorm1d(512), nn.Linear(512, 256)), f"{spec} M=float")
    assert len(saved(swalp.packed_state_dict(lp))) < 0.33 * len(saved(lp.state_dict()))


def test_weights_that_no_step_has_rounded_stay_as_they_are():
    layer = nn.Linear(40, 30)
    state = packed_state(layer, {"weight": parse("bfp8[0]"), "bias": parse("bfp8")})
    assert not state["packed"] and state["plain"].keys() == layer.state_dict().keys()
    assert_same_state(restored(state), layer.state_dict())


def test_a_tied_weight_is_packed_once():
    lp, swalp = trained(Tied(), "bfp8[0]")
    packed = swalp.packed_state_dict(lp)["packed"]
    assert packed["first.weight"] is packed["second.weight"]
    assert_same_state(restored(swalp.packed_state_dict(lp)), lp.state_dict())


def test_rules_say_which_format_a_weight_has():
    rules = (swalp_fx.Rule("1", W="float"), swalp_fx.Rule("2", W="e4m3"))
    recipe = swalp_fx.Recipe.parse("bfp8[0] M=float", rules=rules)
    lp, swalp = trained(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)), recipe)
    packed = swalp.packed_state_dict(lp)["packed"]
    assert {name: record["format"] for name, record in packed.items()} == {
        "0.weight": "bfp8[0]",
        "0.bias": "bfp8[0]",
        "2.weight": "e4m3",
        "2.bias": "e4m3",
    }


@pytest.mark.parametrize("state", [{}, {"0.weight": torch.ones(2)}, {"version": 2, "packed": {}, "plain": {}}])
def test_another_state_is_refused(state):
    with pytest.raises(ValueError, match="no packed state of version 1; pass the result of packed_state_dict"):
        unpacked_state(state)
