"""The seed of a pass: one that is given, or one that torch's generator draws when a step is going to need it."""

import numpy as np
import pytest
import torch
from stepping import OPTIMIZERS, RECIPE, algorithm_2, fitted, net, run_on, same, train, values

from swalp_fx import SWALP, convert, restore
from swalp_fx.recipe import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")
COARSE = "bfp4[0] average=bfp6[0]~stochastic"  # so coarse that other random bits show after two steps


def run(steps=2, recipe=COARSE, **seed):
    """The state of a run from the same weights, and its seed."""
    state = torch.get_rng_state()
    model = net()  # which seeds torch
    torch.set_rng_state(state)
    optimizer = OPTIMIZERS["momentum"](model.parameters())
    swalp = SWALP(model, recipe, **seed)
    swalp.attach(optimizer)
    run_on(model, optimizer, swalp, range(steps))
    state = values(model, optimizer, swalp)
    return state, state[2].pop("seed")


def differ(one, other):
    """Whether weights, momenta and averages all differ."""
    (model, states, swalp), (others_model, others_states, others_swalp) = one, other
    pairs = [(model, others_model), (states, others_states), (swalp["average"], others_swalp["average"])]
    return not any(same(a, b) for a, b in pairs)


# A seed of torch's


def test_two_passes_of_one_process_round_apart():
    torch.manual_seed(5)
    (first, seed), (second, other) = run(), run()
    assert seed != other and differ(first, second)


def test_torchs_seed_makes_a_process_reproducible():
    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert same([first, second], [run(), run()])
    torch.manual_seed(6)
    assert differ(first[0], run()[0])


def test_a_seed_that_is_drawn_fits_everywhere_that_int64_does():
    model = net()
    assert all(0 <= SWALP(model, "bfp4").state_dict()["seed"] < 2**63 for _ in range(20))


FLOAT_STEPS = "W=float G=float M=float"
DRAW_NOTHING = [
    "float",
    "float rounding=stochastic master=float",
    "bfp8[0] rounding=nearest",
    "bfp8[0] rounding=up average=bfp8[0]",
    f"{FLOAT_STEPS} A=bfp8[0] E=bfp8[0]",  # its forwards draw, and its steps do not
    f"{FLOAT_STEPS} average=bf16",
    f"{FLOAT_STEPS} rules=[0 W=bfp8[0]~nearest A=bf16]",
]
DRAW = [
    "bfp8[0]",
    "bfp8[0] rounding=nearest G=bfp8[0]~stochastic8",
    f"{FLOAT_STEPS} master=fixed16.12",
    f"{FLOAT_STEPS} average=bf16~stochastic",
    f"{FLOAT_STEPS} V=bf16",
    f"{FLOAT_STEPS} state.exp_avg=bf16",
    f"{FLOAT_STEPS} rules=[0 W=bfp8[0]]",
    "bfp8[0] rounding=nearest rules=[3.bias state.exp_avg=bf16~stochastic]",
]


@pytest.mark.parametrize("recipe, draws", [*((each, False) for each in DRAW_NOTHING), *((each, True) for each in DRAW)])
def test_a_seed_is_drawn_where_a_step_or_the_average_rounds_at_random(recipe, draws):
    for make in (lambda model: SWALP(model, recipe), lambda model: convert(model, recipe=recipe)):
        model, before = net(), torch.get_rng_state()
        make(model)
        assert torch.equal(torch.get_rng_state(), before) != draws


def test_a_recipe_of_one_parameter_counts():
    model, before = net(), torch.get_rng_state()
    SWALP(model, "float", {"0.weight": Recipe.parse("bfp8[0]")})
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("recipe", ["float", "bfp8[0] rounding=nearest"])
def test_without_random_rounding_a_run_draws_what_a_float_run_draws(recipe):
    """Dropout and shuffles after the conversion have the numbers of a float run."""

    def trained(recipe):
        torch.manual_seed(5)
        model = torch.nn.Sequential(net(), torch.nn.Dropout(0.5), torch.nn.Linear(3, 3))
        torch.manual_seed(5)
        optimizer = OPTIMIZERS["momentum"](model.parameters())
        if recipe is not None:
            convert(model, optimizer, recipe)
        train(model, optimizer, range(3))
        return torch.get_rng_state()

    assert torch.equal(trained(recipe), trained(None))


def test_convert_draws_the_seed_of_a_pass_of_its_own():
    torch.manual_seed(5)
    first, second = net(), net()
    torch.manual_seed(5)
    due = SWALP(first, COARSE).state_dict()["seed"]
    torch.manual_seed(5)
    assert convert(second, recipe=COARSE).swalp.state_dict()["seed"] == due


@pytest.mark.parametrize(
    "broken",
    [
        lambda model: convert(model, torch.optim.SGD(net().parameters(), lr=0.1)),
        lambda model: convert(model, recipe="bfp8[0] exclude=nowhere", example_inputs=(torch.ones(2, 6),)),
        lambda model: convert(model, example_inputs=(torch.ones(2, 5),)),
        lambda model: convert(model, seed=0.5),
        lambda model: SWALP(model, "bfp8[0]", seed=2**64),
    ],
    ids=["another model's optimizer", "no such layer", "unfit inputs", "no seed", "a seed too large"],
)
def test_what_fails_draws_nothing(broken):
    model, before = net(), torch.get_rng_state()
    with pytest.raises(Exception, match=r"not the model's|matches nothing|shapes cannot be|a seed"):
        broken(model)
    assert torch.equal(torch.get_rng_state(), before)
    convert(model)  # which refuses a model that is converted


# A seed that is given


@pytest.mark.parametrize("seed", [0, 7, 2**63, 2**64 - 1])
def test_a_given_seed_is_the_seed_and_draws_nothing(seed):
    before = torch.get_rng_state()
    first, used = run(seed=seed)
    assert used == seed and torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert same(first, run(seed=seed)[0]) and differ(first, run(seed=seed ^ 1)[0])
    assert convert(net(), seed=seed).swalp.state_dict()["seed"] == seed


@pytest.mark.parametrize("seed", [7, 2**64 - 1])
def test_a_step_with_a_given_seed_is_algorithm_2(seed):
    model = net()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    swalp = SWALP(model, fitted(RECIPE, optimizer), seed=seed)
    swalp.attach(optimizer)
    train(model, optimizer, range(2))
    plain = net()
    algorithm_2(plain, OPTIMIZERS["sgd"](plain.parameters()), swalp.recipe, seed, range(2))
    assert same(values(model), values(plain))


@pytest.mark.parametrize(
    "given, seed", [(-1, 2**64 - 1), (-(2**63), 2**63), (np.int64(7), 7), (np.uint64(2**63), 2**63)]
)
def test_seeds_are_taken_as_torch_takes_them(given, seed):
    model = net()
    torch.manual_seed(int(given))
    assert SWALP(model, "float", seed=given).state_dict()["seed"] == seed == torch.initial_seed()


@pytest.mark.parametrize("make", [SWALP, lambda model, recipe, seed: convert(model, recipe=recipe, seed=seed)])
def test_what_is_no_seed_is_refused_in_a_sentence(make):
    for seed in (True, 1.0, "7", torch.tensor(7), np.float32(1), [7]):
        with pytest.raises(TypeError, match=r"^a seed is a whole number, not .*; leave it out"):
            make(net(), "bfp8[0]", seed=seed)
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match=rf"^a seed has 64 bits, and {seed} does not fit in them; use"):
            make(net(), "bfp8[0]", seed=seed)


# What outlives a seed


def test_a_loaded_seed_wins():
    first, second = SWALP(net(), COARSE, seed=3), SWALP(net(), COARSE, seed=4)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["seed"] == 3


def test_a_model_that_is_converted_again_has_a_new_seed():
    model = net()
    first = convert(model, recipe=COARSE).swalp
    assert convert(restore(model), recipe=COARSE).swalp.state_dict()["seed"] != first.state_dict()["seed"]


def test_detaching_keeps_the_seed():
    optimizer = OPTIMIZERS["momentum"]((model := net()).parameters())
    swalp = SWALP(model, COARSE)
    seed = swalp.state_dict()["seed"]
    for _ in range(2):
        swalp.attach(optimizer)
        train(model, optimizer, range(1))
        swalp.detach()
    assert swalp.state_dict()["seed"] == seed
