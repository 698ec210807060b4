"""Each role has a rounding of its own: as text, in graphs, in steps and in the average."""

import copy
import dataclasses
import pickle

import pytest
import shapes
import torch
from marks import rewritten_by
from stepping import OPTIMIZERS, algorithm_2, net, same, setup, train, values
from torch import nn

from swalp_fx import Quantizer, Recipe, RecipeError, Rule, convert, draw, measure, nodes, parse, quantize, report
from swalp_fx.formats import FormatError
from swalp_fx.passes.names import place

KEY = torch.tensor(1234)


# ---- the value -------------------------------------------------------------------------------------------------------


def test_a_quantizer_is_a_format_and_a_rounding():
    quantizer = Quantizer.parse("bfp8[0]~stochastic8")
    assert (quantizer.format, quantizer.rounding) == (parse("bfp8[0]"), "stochastic8")
    assert Quantizer.parse(str(quantizer)) == quantizer == pickle.loads(pickle.dumps(quantizer))
    assert Quantizer.parse("bfp8[0]") == Quantizer(parse("bfp8[0]")) != quantizer
    assert eval(repr(quantizer)) == quantizer and hash(eval(repr(quantizer))) == hash(quantizer)
    with pytest.raises(dataclasses.FrozenInstanceError):
        quantizer.rounding = "up"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("bfp8~stohastic", RecipeError, "unknown rounding 'stohastic'; did you mean stochastic"),
        ("bfp8~", RecipeError, "unknown rounding ''"),
        ("bfp8~up~down", RecipeError, "unknown rounding 'up~down'"),
        ("float~up", RecipeError, "float rounds nothing, so it has no rounding; leave ~up out"),
        ("bpf8~up", FormatError, "unknown format spec 'bpf8'; did you mean bfp8"),
        ("~up", FormatError, "unknown format spec ''"),
    ],
)
def test_what_is_refused(text, error, message):
    for make in (Quantizer.parse, lambda text: Recipe.parse(f"bfp8 G={text}"), lambda text: Rule("fc", W=text)):
        with pytest.raises(error, match=message):
            make(text)


def test_a_quantizer_is_not_taken_for_a_format():
    """The comparison would be false in silence, whatever the role's format."""
    with pytest.raises(TypeError, match=r"Quantizer.parse\('float'\) is compared with a format; compare its .format"):
        assert Recipe().weight == parse("float")


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_a_role_without_a_rounding_takes_the_recipes():
    recipe = Recipe.parse("bfp8[0] rounding=nearest G=bfp8[0]~stochastic E=e5m2~stochastic8 average=bfp9")
    resolved = recipe.resolved()
    roundings = {role: getattr(resolved, role).rounding for role in ("weight", "error", "gradient", "average")}
    assert roundings == {"weight": "nearest", "error": "stochastic8", "gradient": "stochastic", "average": "nearest"}
    assert Recipe.parse(recipe, rounding="up").resolved().weight.rounding == "up"
    assert Recipe.parse(str(recipe)) == recipe
    assert str(recipe) == (
        "W=bfp8[0] A=bfp8[0] E=e5m2~stochastic8 G=bfp8[0]~stochastic M=bfp8[0] average=bfp9 rounding=nearest"
    )


def test_one_word_may_give_all_five_roles_their_rounding():
    recipe = Recipe.parse("bfp8[0]~up M=float")
    assert [str(each) for each in (recipe.weight, recipe.error, recipe.momentum)] == ["bfp8[0]~up"] * 2 + ["float"]
    assert str(Recipe.parse("bfp8[0]~up")) == "bfp8[0]~up"


def test_the_old_word_for_the_averages_rounding_is_read():
    recipe = Recipe.parse("bfp8[0] average=bfp9[0] average_rounding=stochastic")
    assert str(recipe) == "bfp8[0] average=bfp9[0]~stochastic" and Recipe.parse(str(recipe)) == recipe
    assert recipe == Recipe.parse("bfp8[0] average=bfp9[0]", average_rounding="stochastic")
    assert recipe == Recipe.parse(Recipe.parse("bfp8[0] average=bfp9[0]"), average_rounding="stochastic")
    assert Recipe.parse("bfp8[0] average=bfp9 average_rounding=nearest") == Recipe.parse("bfp8[0] average=bfp9")
    with pytest.raises(RecipeError, match="unknown rounding 'random'"):
        Recipe.parse("bfp8[0] average_rounding=random")
    with pytest.raises(
        RecipeError, match="average=bfp9~up and average_rounding=down differ; leave average_rounding out"
    ):
        Recipe.parse("bfp8 average=bfp9~up average_rounding=down")


@pytest.mark.parametrize(
    ("text", "rules", "draws"),
    [
        ("bfp8 rounding=nearest", (), False),
        ("bfp8 rounding=nearest G=bfp8~stochastic M=bfp8~stochastic", (), False),  # the step has a key of its own
        ("bfp8 rounding=nearest E=bfp8~stochastic8", (), True),
        ("bfp8 rounding=nearest", (Rule("fc", A="bfp4~stochastic"),), True),
        ("bfp8", (), True),
    ],
)
def test_a_graph_is_given_random_bits_where_a_role_of_it_may_draw_some(text, rules, draws):
    assert Recipe.parse(text, rules=rules).draws is draws


# ---- graphs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_nodes_round_each_role_its_own_way(rounding):
    x, error = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    y = nodes.quantize_output(x, KEY, 7, "bfp4[0]~up", "e2m1~down", rounding)
    y.backward(error)
    assert torch.equal(y, quantize(x, "bfp4[0]", "up")) and torch.equal(x.grad, quantize(error, "e2m1", "down"))
    w = nodes.quantize_weight(x.detach(), KEY, 7, "bfp4~stochastic8", rounding)
    assert torch.equal(w, quantize(x, "bfp4", "stochastic8", key=KEY, stream=7))
    kept = nodes.quantize_weight(w, KEY, 9, "bfp4~up", rounding)
    assert kept is w  # whatever the rounding


def test_without_a_key_a_role_that_is_stochastic_rounds_to_nearest():
    x, error = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6)
    y = nodes.quantize_output(x, None, 7, "bfp4[0]~stochastic", "e2m1~up", "down")
    y.backward(error)
    assert torch.equal(y, quantize(x, "bfp4[0]", "nearest")) and torch.equal(x.grad, quantize(error, "e2m1", "up"))
    assert torch.equal(nodes.quantize_weight(x, None, 7, "bfp4~stochastic8", "up"), quantize(x, "bfp4", "nearest"))


def test_graphs_and_gradients_follow_the_recipe():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 3, bias=False))
    first, second = (layer.weight.detach().clone() for layer in model)
    recipe = "W=bfp4[0]~up A=bfp5[0]~down E=bfp4[0]~toward_zero rounding=stochastic"
    lp, _ = convert(model, recipe=recipe)
    x, error = torch.randn(4, 6), torch.randn(4, 3)
    lp(x).backward(error)
    first, second = (quantize(each, "bfp4[0]", "up") for each in (first, second))
    hidden = quantize(x @ first.T, "bfp5[0]", "down")
    assert torch.equal(lp(x), hidden @ second.T)
    assert torch.equal(model[1].weight.grad, error.T @ hidden)
    assert torch.equal(model[0].weight.grad, quantize(error @ second, "bfp4[0]", "toward_zero").T @ x)


def test_a_rule_has_roundings_too():
    recipe = Recipe.parse(
        "bfp8[0] rounding=nearest", rules=(Rule("fc", W="bfp4~up"), Rule("*", kind="norm", A="bf16~down"))
    )
    graph = rewritten_by(shapes.PreResNet, recipe)
    weights = {place(n.args[0]): n.args[3] for n in graph.nodes if n.target is nodes.quantize_weight}
    outputs = {place(n.args[0]): n.args[3:5] for n in graph.nodes if n.target is nodes.quantize_output}
    assert weights["fc.weight"] == "bfp4~up" and weights["conv1.weight"] == "bfp8[0]"
    assert outputs["blocks.0.bn1"] == ("e8m7~down", "bfp8[0]") and outputs["conv1"] == ("bfp8[0]", "bfp8[0]")


def test_a_number_that_is_rounded_to_a_format_is_in_it_whatever_the_rounding():
    """So that the second rounding of a mask is left out, both ways, as between equal roundings."""
    layers = nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    rules = (Rule("1", A="bfp6[0]~up", E="bfp6[0]~down"),)
    x = torch.randn(4, 6)
    found = []
    for in_place in (True, False):
        torch.manual_seed(1)
        lp, _ = convert(
            copy.deepcopy(nn.Sequential(*layers)), recipe=Recipe.parse("bfp6[0]", rules=rules, in_place=in_place)
        )
        lp.zero_grad()
        torch.manual_seed(2)
        output = lp(x)
        output.square().sum().backward()
        found.append([output.detach(), *(p.grad.clone() for p in lp.parameters())])
        kept = [n.kwargs.get("kept", "") for n in lp.graphs[0].graph.nodes if n.target is nodes.quantize_output]
        assert kept == (["E", "A"] if in_place else ["", ""])
    assert all(map(torch.equal, *found))


def test_what_is_shown_of_a_model_names_the_roundings(tmp_path):
    model, inputs = shapes.made(shapes.Convnet)
    lp, _ = convert(model, recipe="bfp8[0] rounding=nearest E=e5m2~stochastic8 G=bfp8[0]~up", example_inputs=inputs)
    text = str(report(lp))
    assert "WAM bfp8[0], E e5m2~stochastic8, G bfp8[0]~up" in text
    assert "rounding    nearest, but where ~ names another" in text
    assert "100%" not in text.split("bits ")[1].splitlines()[0]  # a format with a rounding has its bits
    path = tmp_path / "graph.dot"
    draw(lp, path)
    assert "e5m2~stochastic8" in path.read_text()
    measures = measure(lp, [(inputs[0], None)], lambda y, _: y.square().sum())
    assert {each.format for (_, role), each in measures.items() if role == "E"} == {"e5m2"}


# ---- steps -----------------------------------------------------------------------------------------------------------

STEP = "W=bfp8[0]~nearest G=fixed8.9~up M=bfp10[0]~stochastic8 V=bfp12[0]~down A=float E=float master=fixed16.12~down"


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*divides one moment by another")
def test_a_step_rounds_each_role_its_own_way(name, rounding):
    model, optimizer, swalp = setup(OPTIMIZERS[name], STEP, rounding=rounding)
    train(model, optimizer, range(4))
    plain = net()
    reference = OPTIMIZERS[name](plain.parameters())
    algorithm_2(plain, reference, swalp.recipe, 7, range(4))
    assert same(values(model, optimizer), values(plain, reference))


@pytest.mark.parametrize("recipe", ["bfp8[0] G=bfp8[0]~up", "bfp8[0]~stochastic8", "bfp8[0]~stochastic M=float"])
def test_a_step_in_one_pass_has_the_bits_of_one_by_hooks(recipe):
    found = []
    for foreign_hook in (False, True):  # which keeps the step from being one pass
        model, optimizer, _ = setup(recipe=f"{recipe} A=float E=float")
        if foreign_hook:
            optimizer.register_step_post_hook(lambda *_: None)
        train(model, optimizer, range(4))
        found.append(values(model, optimizer))
    assert same(*found)


def test_the_average_has_a_rounding_of_its_own():
    _, _, swalp = setup(recipe="bfp8[0] average=bfp9[0]~stochastic8")
    assert (swalp.average.format, swalp.average.rounding) == (parse("bfp9[0]"), "stochastic8")
    _, _, swalp = setup(recipe="bfp8[0] average=bfp9[0]")
    assert (swalp.average.format, swalp.average.rounding) == (parse("bfp9[0]"), "nearest")
