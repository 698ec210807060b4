"""Runs that go on: from saved states, and as copies; and the pass taken off."""

import copy
import io
import pickle

import pytest
import torch
from stepping import MASTERS, OPTIMIZERS, ORDERS, RECIPE, fitted, net, run_on, same, setup, train, values

from swalp_fx.optimizer import SWALP
from swalp_fx.recipe import Recipe

# Resuming


def saved(state):
    """``state`` after a trip to disk, as a careful user reads it back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("stop", [0, 1, 3])
@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "amsgrad"])
def test_a_resumed_run_has_the_bits_of_one_never_stopped(name, master, stop):
    changes = {**MASTERS[master], "average": "bfp16"}
    whole = setup(OPTIMIZERS[name], **changes)
    run_on(*whole, range(5))

    first = setup(OPTIMIZERS[name], **changes)
    run_on(*first, range(stop))
    states = [saved(part.state_dict()) for part in first]
    # In another process: other weights and another seed, which the states must overrule.
    second = setup(OPTIMIZERS[name], model=net(99), **changes)
    second[2]._seed = 12345
    for part, state in zip(second, states, strict=True):
        part.load_state_dict(state)
    run_on(*second, range(stop, 5))

    assert same(values(*second), values(*whole))
    assert same(second[2].averaged_model().state_dict(), whole[2].averaged_model().state_dict())


@pytest.mark.parametrize("attach_first", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_states_load_in_any_order_before_or_after_attaching(order, attach_first):
    whole = setup(master="fixed16.12")
    run_on(*whole, range(3))
    states = copy.deepcopy([part.state_dict() for part in whole])
    run_on(*whole, range(3, 5))

    model = net(99)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    parts = model, optimizer, SWALP(model, Recipe.parse(fitted(RECIPE, optimizer), master="fixed16.12"))
    if attach_first:
        parts[2].attach(optimizer)
    for i in order:
        parts[i].load_state_dict(states[i])
    if not attach_first:
        parts[2].attach(optimizer)
    run_on(*parts, range(3, 5))
    assert same(values(*parts), values(*whole))


def test_a_loaded_state_is_a_copy():
    first, second = setup(master="float"), setup(master="float")
    run_on(*first, range(2))
    state = first[2].state_dict()
    before = copy.deepcopy(state)
    second[2].load_state_dict(state)
    run_on(*second, range(2))
    assert same(state, before)


# Copies, and taking the pass off


def by_pickle(parts):
    return pickle.loads(pickle.dumps(parts))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle])
def test_a_copy_made_together_goes_on_alone(duplicate, order):
    parts = setup(master="float")
    run_on(*parts, range(2))
    copied = duplicate(tuple(parts[i] for i in order))
    twin = tuple(copied[order.index(i)] for i in range(3))
    before = copy.deepcopy(values(*parts))
    run_on(*twin, range(2, 4))
    assert same(values(*parts), before)
    run_on(*parts, range(2, 4))
    assert same(values(*twin), values(*parts))


def test_a_swalp_copied_alone_acts_on_nothing_of_the_users():
    model, optimizer, swalp = setup()
    run_on(model, optimizer, swalp, range(1))
    twin = copy.deepcopy(swalp)
    before = copy.deepcopy(values(twin.model, None, twin))
    run_on(model, optimizer, swalp, range(1, 3))
    assert same(values(twin.model, None, twin), before)
    assert twin.model is not model


def test_an_optimizer_copied_alone_is_an_ordinary_one():
    model, optimizer, swalp = setup()
    twin_model, twin = copy.deepcopy((model, optimizer))
    plain = net()
    reference = OPTIMIZERS["momentum"](plain.parameters())
    train(twin_model, twin, range(2))
    train(plain, reference, range(2))
    assert same(values(twin_model, twin), values(plain, reference))
    assert swalp.state_dict()["step"] == 0


@pytest.mark.parametrize("master", MASTERS)
def test_detach_changes_no_value_and_the_optimizer_is_ordinary_again(master):
    model, optimizer, swalp = setup(**MASTERS[master])
    train(model, optimizer, range(2))
    plain = copy.deepcopy(model)
    reference = OPTIMIZERS["momentum"](plain.parameters())
    reference.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    swalp.detach()
    swalp.detach()
    assert same(values(model, optimizer), values(plain, reference))
    train(model, optimizer, range(2, 4))
    train(plain, reference, range(2, 4))
    assert same(values(model, optimizer), values(plain, reference))


def test_a_second_attach_starts_the_masters_from_the_weights_of_that_moment():
    model, optimizer, swalp = setup(recipe="W=bfp4", master="float")
    train(model, optimizer, range(2))
    swalp.detach()
    with torch.no_grad():
        model[0].weight.fill_(3)
    other = torch.optim.SGD(model.parameters(), lr=0.0)
    swalp.attach(other)
    train(model, other, range(1))
    assert torch.equal(swalp.state_dict()["masters"]["0.weight"], torch.full((8, 6), 3.0))
