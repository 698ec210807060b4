"""Rules: exceptions by qualified name and kind, in the graph, in the optimizer and in the report."""

import dataclasses
import pickle

import pytest
import shapes
import torch
from graphs import converted
from marks import rewritten_by
from torch import nn

from swalp_fx import FLOAT, Recipe, RecipeError, Rule, convert, nodes, parse, quantize
from swalp_fx.passes import recipes_of_parameters
from swalp_fx.passes.names import place
from swalp_fx.recipe import matches
from swalp_fx.reports import report


def _recipe(*rules, **fields):
    return Recipe.parse("bfp8[0]", rules=rules, **fields)


def _specs(kind, recipe, function):
    found = rewritten_by(kind, recipe).find_nodes(op="call_function", target=function)
    return {place(node.args[0]): node.args[3:-1] for node in found}


@pytest.mark.parametrize(
    ("pattern", "name", "matched"),
    [
        ("fc", "fc", True),
        ("fc", "fc.weight", True),
        ("fc", "fc2", False),
        ("fc", "head.fc", False),
        ("*.fc", "head.fc", True),
        ("blocks.[01].*", "blocks.1.conv1", True),
        ("*.bias", "blocks.1.conv1.bias", True),
        (r"re:blocks\.\d+", "blocks.12.conv1", True),
        (r"re:blocks\.\d", "blocks.12.conv1", False),
    ],
)
def test_a_pattern_matches_a_whole_name_or_a_module_around_it(pattern, name, matched):
    assert matches(pattern, name) is matched


def test_the_first_match_wins_and_unset_roles_are_the_recipes():
    recipe = _recipe(Rule("fc", weight="bfp4"), Rule("*", weight="bfp5", error="float"))
    fc, other = recipe.at(("fc.weight", ["compute"])), recipe.at(("conv.weight", ["compute"]))
    assert (fc.weight.format, fc.error.format) == (parse("bfp4"), parse("bfp8[0]"))
    assert (other.weight.format, other.error.format) == (parse("bfp5"), FLOAT)


def test_first_and_last_layer_in_float():
    float_ = dict.fromkeys(("weight", "activation", "error"), "float")
    recipe = _recipe(Rule("conv1", **float_), Rule("fc", **float_))
    weights = _specs(shapes.PreResNet, recipe, nodes.quantize_weight)
    outputs = _specs(shapes.PreResNet, recipe, nodes.quantize_output)
    assert not any(name.startswith(("conv1", "fc")) for name in (*weights, *outputs))
    assert "blocks.0.conv1.weight" in weights and "blocks.0.conv1" in outputs


def test_norms_in_float_by_kind():
    recipe = _recipe(Rule("*", kind="norm", weight="float", activation="bf16"))
    weights = _specs(shapes.PreResNet, recipe, nodes.quantize_weight)
    outputs = _specs(shapes.PreResNet, recipe, nodes.quantize_output)
    assert weights and not any("bn" in name for name in weights)
    assert outputs["blocks.0.bn1"] == ("e8m7", "bfp8[0]") and outputs["blocks.0.conv1"] == ("bfp8[0]", "bfp8[0]")


@pytest.mark.parametrize("kind", ["arithmetic", "iadd"])
def test_a_function_is_named_by_its_module_and_its_name(kind):
    outputs = _specs(shapes.PreResNet, _recipe(Rule("blocks.1", kind=kind, activation="bfp4")), nodes.quantize_output)
    assert [name for name, formats in outputs.items() if formats[0] == "bfp4"] == ["blocks.1.iadd"]


def test_a_rule_may_round_what_the_recipe_does_not():
    recipe = Recipe(rules=(Rule("blocks.0.conv1", weight="bfp4", activation="bfp5"),))
    assert _specs(shapes.PreResNet, recipe, nodes.quantize_weight) == {"blocks.0.conv1.weight": ("bfp4",)}
    assert _specs(shapes.PreResNet, recipe, nodes.quantize_output) == {"blocks.0.conv1": ("bfp5", "float")}


def test_a_tied_parameter_is_matched_by_each_of_its_names():
    weights = _specs(shapes.Tied, _recipe(Rule("second", weight="bfp4")), nodes.quantize_weight)
    assert weights == {"first.weight": ("bfp4",), "first.bias": ("bfp8[0]",), "second.bias": ("bfp4",)}


def test_a_parameter_read_by_itself_is_of_kind_parameter():
    recipes = recipes_of_parameters(shapes.Direct(), _recipe(Rule("*", kind="parameter", weight="bfp4")))
    assert [name for name, recipe in recipes.items() if recipe.weight.format == parse("bfp4")] == ["scale"]


def test_the_optimizer_follows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    floats = dict.fromkeys(("weight", "gradient", "momentum"), "float")
    recipe = _recipe(Rule("0", **floats), Rule("1", gradient="bfp4", momentum="bfp5", weight="bfp6"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    module, _ = convert(model, optimizer, recipe=recipe)
    for _ in range(2):
        optimizer.zero_grad()
        module(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    first, second, third = ((p, p.grad, optimizer.state[p]["momentum_buffer"]) for p in model.parameters())
    assert not any(_is_in(tensor, "bfp8[0]") for tensor in first)
    assert all(map(_is_in, second, ("bfp6", "bfp4", "bfp5")))
    assert all(_is_in(tensor, "bfp8[0]") and not _is_in(tensor, "bfp6") for tensor in third)


def _is_in(tensor, spec):
    return torch.equal(quantize(tensor.detach(), spec), tensor)


def test_the_report_follows():
    model, inputs = shapes.made(shapes.Convnet)
    recipe = _recipe(Rule("0", weight="bfp4", gradient="bfp5"), Rule("1", activation="float", error="float"))
    module, _ = convert(model, recipe=recipe, example_inputs=inputs)
    rows = [line.split() for line in str(report(module)).splitlines()[2:4]]
    assert " ".join(rows[0]) == "0 Conv2d W bfp4, AEM bfp8[0], G bfp5 112 4.14"
    assert " ".join(rows[1]) == "1 BatchNorm2d WGM bfp8[0] 8 10.00"
    assert "  1: a rule says so" in str(report(module))


def test_a_pickle_keeps_the_rules():
    model, inputs = shapes.made(shapes.Tied)
    module, _ = convert(model, recipe=_recipe(Rule("second", weight="bfp4")))
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again.eval()(*inputs), module.eval()(*inputs))
    assert not torch.equal(module(*inputs), converted(shapes.made(shapes.Tied)[0].eval(), _recipe())(*inputs))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            Rule("blokcs.*", weight="float"),
            r"rule 'blokcs.\*' matches nothing in the model; the nearest names are blocks",
        ),
        (Rule("re:conv", weight="float", kind="norm"), "rule 're:conv' matches nothing .*conv1"),
        (Rule("blocks", kind="Conv2", weight="float"), r"kind='Conv2' of rule 'blocks' matches nothing .*Conv2d"),
    ],
)
def test_a_rule_that_matches_nothing_is_refused_with_the_nearest_names(rule, message):
    with pytest.raises(RecipeError, match=message):
        convert(shapes.PreResNet(), recipe=_recipe(rule))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rule("", weight="float"), "a rule matches a qualified name"),
        (lambda: Rule("re:(", weight="float"), r"rule 're:\(' is no regular expression"),
        (lambda: Rule("fc"), "rule 'fc' sets no format"),
        (lambda: _recipe("fc"), "rules must be a tuple of Rule"),
        (lambda: Recipe(rules=Rule("fc", weight="float")), "rules must be a tuple of Rule"),
        (lambda: Recipe.parse("bfp8 rules=fc"), r"rules are one list, such as rules=\[fc W=float"),
        (
            lambda: Rule("fc", kind="", weight="float"),
            "rule 'fc': a kind is a part, a type or a function's name, not ''",
        ),
    ],
)
def test_bad_rules_are_refused(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


def test_a_rule_for_one_call_sets_nothing_that_all_calls_share():
    model, _ = shapes.made(shapes.Twice)
    rule = Rule("layer@2", weight="float", activation="float", momentum="float")
    with pytest.raises(
        RecipeError, match="rule 'layer@2' sets weight, momentum, which all calls of a layer share; set"
    ):
        convert(model, recipe=_recipe(rule))
    outputs = _specs(shapes.Twice, _recipe(Rule("layer@2", activation="bfp4")), nodes.quantize_output)
    assert [formats[0] for name, formats in outputs.items() if name.startswith("layer")] == ["bfp8[0]", "bfp4"]


def test_rules_are_frozen_and_printed():
    rule = Rule("fc", kind="Linear", weight="float", activation="bfp4")
    assert str(_recipe(rule)) == "bfp8[0] rules=[fc kind=Linear W=float A=bfp4]"
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.match = "conv"


class Broken(nn.Module):
    """Its own code is in two graphs."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x).tanh()
        torch._dynamo.graph_break()
        return self.last(x.relu() + x)


@pytest.mark.parametrize("match", ["*", "relu", "add"])
def test_a_kind_that_is_the_type_of_the_model_is_of_the_outputs_of_its_own_code(match):
    low = converted(Broken(), _recipe(Rule(match, kind="Broken", activation="bfp4")))
    low(torch.randn(2, 4))
    found = {place(node.args[0]): node.args[3] for made in low.graphs for node in made.graph.nodes if _rounds(node)}
    own = ("tanh", "relu", "add") if match == "*" else (match,)
    assert found == {name: "bfp4" if name in own else "bfp8[0]" for name in ("first", "tanh", "relu", "add", "last")}


def _rounds(node):
    return node.target is nodes.quantize_output


@pytest.mark.parametrize("rule", [Rule("nix", kind="Broken", activation="bfp4"), Rule("*", kind="Brokn", error="bfp4")])
def test_with_the_type_of_the_model_a_name_or_kind_that_is_not_there_is_still_refused(rule):
    with pytest.raises(RecipeError, match="matches nothing in the model"):
        converted(Broken(), _recipe(rule))
