"""Every recipe has a text and a JSON form that read back."""

import json
import re
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given
from strategies import EVERY_FORMAT

from swalp_fx import FLOAT, Quantizer, Recipe, RecipeError, Rule
from swalp_fx.recipe import PLACEMENTS, ROLES, ROUNDINGS

_roundings = st.sampled_from(ROUNDINGS) | st.integers(1, 24).map(lambda bits: f"stochastic{bits}")
_quantizers = st.just(Quantizer(FLOAT)) | st.builds(Quantizer, EVERY_FORMAT, st.none() | _roundings)
# Names as they are, and whatever may stand in a pattern.
_names = st.sampled_from(
    ["fc", "layer1.*", "re:conv\\d+", "*.bn@2", "rules=[fc W=float]", '"', "a b;c=d,[e]]", "W=bfp8"]
)
_patterns = _names | st.text(st.sampled_from('ab.*?[]{}()=;,"\\ \t\n~@:+-_é'), min_size=1) | st.text(min_size=1)
_states = st.dictionaries(st.sampled_from(["exp_avg", "exp_avg_sq", "momentum_buffer"]), _quantizers)


def _is_pattern(text):
    try:
        return Rule(text, W="float") is not None
    except RecipeError:  # no regular expression
        return False


_rules = st.builds(
    lambda match, kind, roles, others, states: Rule(match, kind, states=states, **{**others, **roles}),
    _patterns.filter(_is_pattern),
    st.none() | _patterns,
    st.builds(dict.fromkeys, st.sampled_from([*([role] for role in ROLES), list(ROLES)]), _quantizers),
    st.just({}) | st.fixed_dictionaries({}, optional=dict.fromkeys([*ROLES, "master", "average"], _quantizers)),
    _states,
)
_globs = st.lists(_patterns, max_size=3).map(tuple)
_recipes = st.builds(
    lambda roles, **others: Recipe(**roles, **others),
    _quantizers.map(lambda each: dict.fromkeys(ROLES, each)) | st.fixed_dictionaries(dict.fromkeys(ROLES, _quantizers)),
    master=st.none() | _quantizers,
    average=_quantizers,
    states=_states,
    rounding=_roundings,
    placement=st.sampled_from(PLACEMENTS),
    include=_globs,
    exclude=_globs,
    whole=_globs.map(lambda globs: tuple(f"!{each}" if i % 2 else each for i, each in enumerate(globs))),
    quantize_input=st.booleans(),
    quantize_logits=st.booleans(),
    in_place=st.booleans(),
    rules=st.lists(_rules, max_size=3).map(tuple),
)


@given(_recipes)
def test_a_recipe_is_read_from_its_text_and_from_its_json(recipe):
    assert Recipe.parse(str(recipe)) == recipe and str(Recipe.parse(str(recipe))) == str(recipe)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert eval(repr(recipe)) == recipe and all(eval(repr(rule)) == rule for rule in recipe.rules)


def test_the_json_has_every_field_in_order():
    recipe = Recipe.parse(
        "bfp8[0] G=e5m2~up master=bf16 state.exp_avg=float exclude=fc whole=!a "
        "rules=[fc kind=Linear W=float state.exp_avg=bf16]"
    )
    assert json.loads(recipe.to_json()) == {
        "weight": "bfp8[0]",
        "activation": "bfp8[0]",
        "error": "bfp8[0]",
        "gradient": "e5m2~up",
        "momentum": "bfp8[0]",
        "second_moment": "float",
        "master": "e8m7",
        "average": "float",
        "states": {"exp_avg": "float"},
        "rounding": "stochastic",
        "placement": "every",
        "include": [],
        "exclude": ["fc"],
        "whole": ["!a"],
        "quantize_input": False,
        "quantize_logits": False,
        "in_place": True,
        "rules": [{"match": "fc", "kind": "Linear", "weight": "float", "states": {"exp_avg": "e8m7"}}],
    }
    assert list(json.loads(recipe.to_json())) == list(json.loads(Recipe().to_json()))


def test_json_may_leave_fields_out_and_use_letters_and_old_words():
    text = (
        '{"W": "bfp8", "accumulator": "bf16", "average": "bfp9", "average_rounding": "up", "states": {}, "rules": []}'
    )
    assert Recipe.from_json(text) == Recipe(weight="bfp8", master="bf16", average="bfp9~up")
    assert Recipe.from_json("{}") == Recipe()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"wieght": "bfp8"}', r"a recipe's JSON: there is no role 'wieght'; did you mean weight\?"),
        ('{"rules": [{"match": "fc", "wieght": "bfp8"}]}', r"a rule in JSON: .* 'wieght'; did you mean weight\?"),
        ('{"W": "bfp8", "weight": "bfp4"}', "sets weight twice, W=bfp8 and weight=bfp4"),
        ('{"weight": "bfp8", "weight": "bfp4"}', "sets weight twice"),
        ('{"states": {"a": "bfp8", "a": "bfp4"}}', "sets state.a twice"),
        ('{"states": "bf16"}', "states maps names to formats"),
        ('{"weight": 8}', "a format spec must be a string or a format, not int 8"),
        ('{"exclude": "fc"}', "exclude must be a tuple of globs"),
        ('{"in_place": 1}', "in_place is true or false, not 1"),
        ('{"rules": {"match": "fc"}}', "rules is a list of objects"),
        ('{"rules": ["fc"]}', "a rule is an object in JSON"),
        ('{"rules": [{"weight": "bfp8"}]}', "a rule matches a qualified name"),
        ('["bfp8"]', "a recipe is an object in JSON"),
        ("bfp8[0]", "a recipe's JSON does not parse: "),
        (None, "a recipe's JSON does not parse: "),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        Recipe.from_json(text)
    assert "\n" not in str(caught.value)


def test_an_older_text_of_rules_is_read():
    """As they were printed before they could be read: in the states of runs."""
    rules = (Rule("re:layer[12]\\.\\d+", kind="Conv2d", W="float", A="bfp4[0]"), Rule("*.bias", M="float"))
    text = r"bfp8[0] rules=[re:layer[12]\.\d+ kind=Conv2d W=float A=bfp4[0]; *.bias M=float]"
    assert Recipe.parse(text) == Recipe.parse("bfp8[0]", rules=rules)


def test_the_examples_of_the_page_are_recipes():
    page = (Path(__file__).parent.parent / "docs" / "recipes.md").read_text()
    texts = re.findall(r"^    (bfp8.*)$", page, re.MULTILINE)
    assert len(texts) == 2 and all(Recipe.parse(str(Recipe.parse(each))) == Recipe.parse(each) for each in texts)
    (document,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    assert list(json.loads(document)) == list(json.loads(Recipe().to_json()))
    assert Recipe.from_json(document) == Recipe.parse("bfp8[0] G=bfp8[0]~up M=float rules=[fc W=float]")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(code, {})


def test_a_rule_may_begin_with_a_format_for_all_roles():
    read = Recipe.parse("bfp8[0] rules=[fc float M=bf16; head bfp4~up kind=Linear]")
    assert read.rules == (
        Rule("fc", W="float", A="float", E="float", G="float", M="bf16"),
        Rule("head", "Linear", **dict.fromkeys("WAEGM", "bfp4~up")),
    )
    assert str(Recipe.parse("bfp8[0] rules=[fc W=float A=float E=float G=float M=float]")) == "bfp8[0] rules=[fc float]"
