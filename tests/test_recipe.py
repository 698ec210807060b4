"""Recipes: texts that round-trip, roles one by one, and what is refused."""

import dataclasses
import pickle

import pytest

from swalp_fx import FLOAT, BlockFloat, Float, FormatError, Recipe, RecipeError, parse
from swalp_fx.recipe import ROLES

BFP8 = BlockFloat(8, dims=(0,))


def test_one_spec_is_for_all_five_roles():
    recipe = Recipe.parse("bfp8[0]")
    assert [getattr(recipe, role) for role in ROLES.values()] == [BFP8] * 5
    assert (recipe.accumulator, recipe.average, recipe.rounding) == (None, FLOAT, "stochastic")


def test_exceptions_follow():
    recipe = Recipe.parse("bfp8[0] M=float error=e5m2 accumulator=bf16")
    assert (recipe.weight, recipe.activation, recipe.gradient) == (BFP8,) * 3
    assert (recipe.momentum, recipe.error, recipe.accumulator) == (FLOAT, Float(5, 2), Float(8, 7))


def test_letters_are_the_papers():
    recipe = Recipe.parse("W=bfp2 A=bfp3 E=bfp4 G=bfp5 M=bfp6")
    assert recipe == Recipe(weight="bfp2", activation="bfp3", error="bfp4", gradient="bfp5", momentum="bfp6")
    assert (recipe.weight, recipe.momentum) == (BlockFloat(2), BlockFloat(6))


def test_changes_come_last():
    recipe = Recipe.parse("bfp8[0] rounding=nearest", rounding="stochastic", momentum="float")
    assert (recipe.rounding, recipe.momentum, recipe.weight) == ("stochastic", FLOAT, BFP8)


def test_float_rounds_nothing():
    assert Recipe.parse("float") == Recipe()


@pytest.mark.parametrize(
    "text",
    [
        "float",
        "bfp8[0]",
        "bfp8[0] rounding=nearest",
        "W=e4m3 A=e4m3 E=e5m2 G=e5m2 M=bf16",
        "bfp8[0,1] accumulator=fp16 average=bfp12+twos",
        "fixed8.6 M=float rounding=toward_zero",
        "bfp8 accumulator=float",
        "bfp8 quantize_logits=true in_place=false",
    ],
)
def test_round_trip(text):
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.parse(recipe) is recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert hash(recipe) == hash(Recipe.parse(str(recipe)))


def test_changes_apply_to_a_recipe_too():
    assert Recipe.parse(Recipe.parse("bfp8"), momentum="float") == Recipe.parse("bfp8 M=float")


def test_a_recipe_takes_fewer_random_bits():
    assert str(Recipe.parse("bfp8", rounding="stochastic8")) == "bfp8 rounding=stochastic8"


def test_semicolons_separate_too():
    assert Recipe.parse("bfp8[0]; M=float;rounding=nearest") == Recipe.parse("bfp8[0] M=float rounding=nearest")


def test_equal_formats_print_as_one():
    assert str(Recipe.parse("W=bfp8 A=bfp8 E=bfp8 G=bfp8 M=bfp8 rounding=nearest")) == "bfp8 rounding=nearest"


def test_recipes_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().weight = parse("bfp8")


@pytest.mark.parametrize(
    "text, error, message",
    [
        ("bfp8[0] X=float", RecipeError, r"recipe 'bfp8\[0\] X=float': there is no role 'X'; use one of weight"),
        ("weights=bfp8", RecipeError, "there is no role 'weights'"),
        ("bfp8 rounding=up_and_down", RecipeError, "unknown rounding 'up_and_down'; use one of nearest, stochastic"),
        ("bfp8 rounding=", RecipeError, "unknown rounding ''"),
        ("M=float bfp8", RecipeError, "'bfp8' would undo what stands before it; put it first"),
        ("bfp88", FormatError, "word length 88 is out of range"),
        ("W=posit3", FormatError, "unknown format spec 'posit3'"),
        ("W=", FormatError, "unknown format spec ''"),
        ("", FormatError, "unknown format spec ''"),
        (None, RecipeError, "a recipe must be a string or a Recipe, not NoneType None"),
        (BFP8, RecipeError, "a recipe must be a string or a Recipe, not BlockFloat"),
    ],
)
def test_refusals(text, error, message):
    with pytest.raises(error, match=message) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value)


def test_refusal_of_a_change_that_names_no_role():
    with pytest.raises(RecipeError, match="there is no role 'momentums'"):
        Recipe.parse("bfp8", momentums="float")


def test_a_role_needs_a_format():
    with pytest.raises(FormatError, match="not NoneType None"):
        Recipe(weight=None)


def test_recipe_errors_are_value_errors():
    assert issubclass(RecipeError, ValueError)
