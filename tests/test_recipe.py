"""Recipes: texts that round-trip, roles one by one, and errors."""

import dataclasses
import pickle

import pytest
import shapes

from swalp_fx import FLOAT, FormatError, Recipe, RecipeError, Rule, convert, parse
from swalp_fx.recipe import ROLES

BFP8 = parse("bfp8[0]")


def test_one_spec_is_for_all_five_roles():
    recipe = Recipe.parse("bfp8[0]")
    assert [getattr(recipe, role).format for role in ROLES.values()] == [BFP8] * 5
    assert (recipe.master, recipe.average.format, recipe.rounding) == (None, FLOAT, "stochastic")


def test_exceptions_follow():
    recipe = Recipe.parse("bfp8[0] M=float error=e5m2 master=bf16")
    assert [each.format for each in (recipe.weight, recipe.activation, recipe.gradient)] == [BFP8] * 3
    others = (recipe.momentum, recipe.error, recipe.master)
    assert [each.format for each in others] == [FLOAT, parse("e5m2"), parse("e8m7")]


def test_letters_are_the_papers():
    recipe = Recipe.parse("W=bfp2 A=bfp3 E=bfp4 G=bfp5 M=bfp6")
    assert recipe == Recipe(weight="bfp2", activation="bfp3", error="bfp4", gradient="bfp5", momentum="bfp6")
    assert (recipe.weight.format, recipe.momentum.format) == (parse("bfp2"), parse("bfp6"))


def test_changes_come_last():
    recipe = Recipe.parse("bfp8[0] rounding=nearest", rounding="stochastic", momentum="float")
    assert (recipe.rounding, recipe.momentum.format, recipe.weight.format) == ("stochastic", FLOAT, BFP8)


def test_float_rounds_nothing():
    assert Recipe.parse("float") == Recipe()


@pytest.mark.parametrize(
    "text",
    [
        "float",
        "bfp8[0]",
        "bfp8[0] rounding=nearest",
        "W=e4m3 A=e4m3 E=e5m2 G=e5m2 M=bf16",
        "bfp8[0,1] master=fp16 average=bfp12+twos",
        "fixed8.6 M=float rounding=toward_zero",
        "bfp8 master=float",
        "bfp8 quantize_logits=true in_place=false",
        'bfp8[0]~up include="a b","re:x{1,2}" rules=[fc W=float; "a;b=[c]" kind="d e" A={-1,0,1} E=e4m3[1x128]~up]',
        "bfp8 rules=[layer[12].* W=int8[-1:32]+asym state.exp_avg=float;]; M=float",
    ],
)
def test_round_trip(text):
    recipe = Recipe.parse(text)
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.parse(recipe) is recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert hash(recipe) == hash(Recipe.parse(str(recipe)))


def test_the_old_word_for_masters_is_read():
    recipe = Recipe.parse("bfp8 accumulator=fixed16.12")
    assert recipe == Recipe.parse("bfp8", accumulator="fixed16.12") == Recipe.parse("bfp8 master=fixed16.12")
    assert str(recipe) == "bfp8 master=fixed16.12"
    with pytest.raises(RecipeError, match="sets master twice, accumulator=bf16 and master=fp16"):
        Recipe.parse("bfp8 accumulator=bf16 master=fp16")


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
        (
            "bfp8[0] X=float",
            RecipeError,
            r"recipe 'bfp8\[0\] X=float': there is no role 'X'; the roles are W \(weight\), A",
        ),
        ("weights=bfp8", RecipeError, r"there is no role 'weights'; did you mean weight\?"),
        ("w=e4m3", RecipeError, r"there is no role 'w'; did you mean W\?"),
        ("rounding=nearest", RecipeError, r"names no format; put one first: 'bfp8\[0\] rounding=nearest'"),
        ("exclude=2", RecipeError, r"names no format; put one first: 'bfp8\[0\] exclude=2'"),
        ("bfp8[0], M=float", RecipeError, r"has a comma between words; write 'bfp8\[0\] M=float'"),
        ("bfp8[0] M:float", RecipeError, "'M:float' would override the words before it; write M=float"),
        ("bfp 8", RecipeError, "'8' would override the words before it; write ROLE=FORMAT, such as M=float"),
        ("bfp8 rouding=up", RecipeError, r"there is no role 'rouding'; did you mean rounding\?"),
        ("bfp8 rounding=truncate", RecipeError, "unknown rounding 'truncate'; use one of nearest, stochastic"),
        ("bfp8 rounding=stohastic", RecipeError, r"unknown rounding 'stohastic'; did you mean stochastic\?"),
        ("bfp8 rounding=stochastic99", RecipeError, "unknown rounding 'stochastic99'; use stochastic1 to stochastic24"),
        ("bfp8 placement=evry", RecipeError, r"unknown placement 'evry'; did you mean every\?"),
        ("bfp8 quantize_input=yes", RecipeError, "quantize_input is true or false, not 'yes'"),
        ("bfp8 rounding=", RecipeError, "unknown rounding ''"),
        ("M=float bfp8", RecipeError, "'bfp8' would override the words before it; put it first"),
        ("bfp8 bfp4", RecipeError, "'bfp4' would override the words before it; name its role, such as M=bfp4"),
        ("bfp8 M", RecipeError, "'M' lacks its value; write M=..."),
        ("W = e4m3", RecipeError, "recipe 'W = e4m3' has a space within a word; write 'W=e4m3'"),
        ("bfp8 M= float", RecipeError, "write 'bfp8 M=float'"),
        ("int8 [0]", RecipeError, r"write 'int8\[0\]'"),
        ("bfp8 exclude=fc, conv1", RecipeError, "write 'bfp8 exclude=fc,conv1'"),
        ("W=e4m3 weight=e5m2", RecipeError, "sets weight twice, W=e4m3 and weight=e5m2; leave one out"),
        ("W=e4m3 W=e5m2", RecipeError, "sets weight twice, W=e4m3 and W=e5m2; leave one out"),
        ("bfp8 rounding=up rounding=down", RecipeError, "sets rounding twice, rounding=up and rounding=down"),
        ("bfp8 rules=[fc W=float] rules=[fc W=float]", RecipeError, "rules are one list, such as"),
        ("bfp8 rules=[a]b W=float]", RecipeError, "quote a pattern that has brackets"),
        (
            "bfp8 rules=[a b W=float]",
            RecipeError,
            "rule 'a b W=float' is no pattern .* quote a pattern that has spaces",
        ),
        ("bfp8 rules=[W=float]", RecipeError, "rule 'W=float' is no pattern with words behind it, such as fc float"),
        ("bfp8 rules=[fc flaot]", RecipeError, "rule 'fc flaot' is no pattern with words behind it, such as fc float"),
        ("bfp8 rules=[fc]", RecipeError, "rule 'fc' sets no format"),
        ("bfp8 rules=[fc w=float]", RecipeError, r"rule 'fc': there is no role 'w'; did you mean W\?"),
        ("bfp8 rules=[fc W=float W=bfp4]", RecipeError, "rule 'fc' sets weight twice"),
        ('bfp8 exclude="fc', RecipeError, "has a quote without its end"),
        ('bfp8 exclude="a b", fc', RecipeError, "has a space within a word; write 'bfp8 exclude=\"a b\",fc'"),
        ("rules=[fc W=bfp8]", RecipeError, "names no format; put one first"),
        ("bpf8[0]", FormatError, r"unknown format spec 'bpf8\[0\]'; did you mean bfp8\[0\]\?"),
        ("W=fp8", FormatError, r"unknown format spec 'fp8'; did you mean e4m3, e5m2 or mxfp8\?"),
        ("bfp88", FormatError, "word length 88 is out of range"),
        ("W=posit3", FormatError, "unknown format spec 'posit3'"),
        ("W=", FormatError, "unknown format spec ''"),
        ("", FormatError, "unknown format spec ''"),
        (None, RecipeError, "a recipe must be a string or a Recipe, not NoneType None"),
        (BFP8, RecipeError, r"a recipe must be a string or a Recipe, not Format.*; use 'bfp8\[0\]'"),
    ],
)
def test_refusals(text, error, message):
    with pytest.raises(error, match=message) as caught:
        Recipe.parse(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_refusal_of_a_change_that_names_no_role():
    with pytest.raises(RecipeError, match="there is no role 'momentums'"):
        Recipe.parse("bfp8", momentums="float")


def test_a_change_named_twice_is_refused():
    with pytest.raises(RecipeError, match="sets weight twice, W=float and weight=bfp4"):
        Recipe.parse("bfp8", W="float", weight="bfp4")


def test_letters_name_roles_wherever_roles_are_named():
    assert Recipe.parse("bfp8[0]", M="float") == Recipe.parse("bfp8[0] M=float")
    assert Rule("fc", W="float", E="e5m2") == Rule("fc", weight="float", error="e5m2")
    with pytest.raises(RecipeError, match="rule 'fc' sets weight twice, W=float and weight=bfp8"):
        Rule("fc", W="float", weight="bfp8")
    with pytest.raises(RecipeError, match=r"rule 'fc': there is no role 'w'; did you mean W\?"):
        Rule("fc", w="float")


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        (Recipe.parse("bfp8[0]"), "Recipe.parse('bfp8[0]')"),
        (Recipe(weight="bfp8"), "Recipe.parse('W=bfp8 A=float E=float G=float M=float')"),
        (
            Recipe.parse("bfp8", rules=(Rule("fc", "Linear", weight="float", E="e5m2"),)),
            "Recipe.parse('bfp8 rules=[fc kind=Linear W=float E=e5m2]')",
        ),
    ],
)
def test_a_repr_is_short_and_is_code_that_makes_the_recipe(recipe, text):
    assert repr(recipe) == text
    assert eval(text) == recipe


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("head", "matches nothing in the model; its outermost names are conv1, blocks, bn, fc"),
        ("cnv1", "matches nothing in the model; the nearest names are conv1"),
        ("bloks.*", "matches nothing in the model; the nearest names are blocks, blocks.0 or blocks.1"),
        ("module.fc", "matches nothing in the model; the nearest names are fc"),
        ("blocks.1.cnv2", "matches nothing in the model; the nearest names are blocks.1.conv2, blocks.0.conv2"),
    ],
)
@pytest.mark.parametrize(
    "recipe",
    [
        lambda name: Recipe.parse("bfp8", exclude=(name,)),
        lambda name: Recipe.parse("bfp8", include=(name,)),
        lambda name: Recipe.parse("bfp8", rules=(Rule(name, W="float"),)),
    ],
    ids=["exclude", "include", "rules"],
)
def test_a_name_that_the_model_does_not_have_is_answered_with_outer_names_first(recipe, name, message):
    with pytest.raises(RecipeError, match=message):
        convert(shapes.PreResNet(), recipe=recipe(name))


def test_a_role_needs_a_format():
    with pytest.raises(FormatError, match="not NoneType None"):
        Recipe(weight=None)


def test_recipe_errors_are_value_errors():
    assert issubclass(RecipeError, ValueError)
