"""Models in the manner of well-known code, trained for twenty steps, are bit-equal to float under identity formats."""

import copy

import pytest
import torch
from wild import WILD, NanoGPT

import swalp_fx
from swalp_fx import Recipe
from swalp_fx.capture import Conversion, install

STEPS = 20


def identity_nodes(model, optimizer):
    """Every rounding is there, and changes nothing."""
    install(Conversion(model, Recipe(rounding="nearest"), identity=True))


def float_formats(model, optimizer):
    """No rounding is there, and the optimizer steps as converted."""
    swalp_fx.convert(model, optimizer, recipe="float")


def bits(value):
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def trained(model, convert=None):
    """The losses, and the model's state after training."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if convert is not None:
        convert(model, optimizer)
    torch.manual_seed(1)
    losses = []
    for number in range(STEPS):
        loss = model.step(number)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(bits(loss))
    attributes = {
        name: bits(value) for name, value in vars(model).items() if isinstance(value, torch.Tensor | float | int)
    }
    return losses, {name: bits(value) for name, value in model.state_dict().items()}, attributes


@pytest.mark.parametrize("convert", [identity_nodes, float_formats])
@pytest.mark.parametrize("name", WILD)
def test_twenty_steps_are_those_of_float(name, convert):
    model = WILD[name]()
    expected = trained(copy.deepcopy(model))
    found = trained(model, convert)
    for before, after in zip(expected, found, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", WILD)
def test_in_eight_bits_it_learns_other_numbers(name):
    model = WILD[name]()
    losses, state, _ = trained(copy.deepcopy(model))
    found, others, _ = trained(model, lambda *both: swalp_fx.convert(*both, recipe="bfp8[0]"))
    assert all(loss.isfinite() for loss in found) and found != losses
    assert state.keys() == others.keys()


def test_nanogpt_generates_what_float_generates():
    model = NanoGPT().eval()
    text = torch.randint(32, (1, 3))
    torch.manual_seed(2)
    expected = model.generate(text, 20, top_k=4)  # past its block size: lengths 3 to 16, then 16
    identity_nodes(model, None)
    torch.manual_seed(2)
    assert torch.equal(model.generate(text, 20, top_k=4), expected)
    assert model.graphs


def test_nanogpt_refuses_a_long_text_as_it_does_in_float():
    model = NanoGPT()
    identity_nodes(model, None)
    with pytest.raises(AssertionError, match="block size is only 16"):
        model(torch.zeros(1, 17, dtype=torch.long))
