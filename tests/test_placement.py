"""Placement: which outputs are rounded; pass and prover agree, and the SWALP authors' networks come out as theirs."""

import re
import warnings

import pytest
import shapes
import torch
import torchvision
from graphs import converted, rewritten
from marks import Traced, rewritten_by, rounded
from torch import nn

import models
from swalp_fx import Recipe, RecipeError, convert, quantize
from swalp_fx.passes.proof import VerifyError
from swalp_fx.recipe import PLACEMENTS


def _rounded(kind, **fields):
    return rounded(rewritten_by(kind, Recipe.parse("bfp8[0]", **fields)))


@pytest.mark.parametrize(
    ("placement", "places"),
    [
        ("every", ["0", "1", "2", "3"]),
        ("compute", ["0"]),
        ("compute+activation", ["0", "2"]),
        ("group", ["2"]),
    ],
)
def test_a_convnet(placement, places):
    assert _rounded(shapes.Convnet, placement=placement) == places


class Residual(nn.Module):
    inputs = (torch.Size([2, 3, 4, 4]),)

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.shortcut = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Identity()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc((self.bn(self.conv(x)) + self.shortcut(x)).relu())


class Projected(Residual):
    def __init__(self):
        super().__init__()
        self.shortcut = nn.Conv2d(3, 3, 1)


def test_a_group_goes_through_a_sum_that_only_an_activation_reads():
    assert _rounded(Residual, placement="group") == ["relu"]
    assert _rounded(Projected, placement="group") == ["shortcut", "relu"]


def test_a_group_ends_where_two_read_it_and_at_a_sum_that_is_read_bare():
    class Shared(nn.Module):
        inputs = (torch.Size([3, 4]),)

        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.first(x)
            return self.second(y + y.tanh()).exp()

    assert _rounded(Shared, placement="group") == ["first", "tanh", "second"]


class Frozen(nn.Module):
    """A norm of several nodes; one of them reads the norm's input."""

    inputs = (torch.Size([2, 3, 4, 4]),)

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), torchvision.ops.FrozenBatchNorm2d(3)
        self.depth, self.relu, self.fc = torchvision.ops.StochasticDepth(0.5, "row"), nn.ReLU(), nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.depth(self.relu(self.bn(self.conv(x)))))


def test_a_layer_of_several_nodes_is_one():
    assert _rounded(Frozen) == ["conv", "bn", "relu"]  # to drop a row is movement
    assert _rounded(Frozen, placement="group") == ["relu"]


@pytest.mark.parametrize("kind", [*shapes.ALL, Residual, Projected, Frozen], ids=lambda kind: kind.__name__)
def test_pass_and_prover_agree(kind):
    for placement in PLACEMENTS:
        for flags in ({}, {"quantize_input": True, "quantize_logits": True}):
            rewritten_by(kind, Recipe.parse("bfp8[0]", placement=placement, **flags))


def _on_meta(name, *size):
    recipe = Recipe.parse("bfp8[0]", **models.REFERENCE_PLACEMENT[name])
    with torch.device("meta"):
        model = models.build(name)
        return model, rounded(rewritten(model, recipe, torch.randn(size)).graph)


def test_vgg16_has_the_authors_15_quantizers():
    model, places = _on_meta("vgg16", 2, 3, 32, 32)
    assert len(places) == 15
    assert all(type(model.get_submodule(place)) is nn.ReLU for place in places)


@pytest.mark.parametrize(
    ("name", "blocks", "convolutions"),
    [("preresnet20", 9, 2), pytest.param("preresnet164", 54, 3, marks=pytest.mark.slow)],
)
def test_preresnet_has_the_authors_quantizers(name, blocks, convolutions):
    _, (first, *inner) = _on_meta(name, 2, 3, 32, 32)
    assert first == "conv" and len(inner) == blocks * 2 * convolutions
    # bn, relu, Q, conv, Q in turn: neither shortcuts, nor sums, nor the last ReLU.
    assert all(
        f"branch.{'conv' if i % 2 else 'relu'}{i // 2 % convolutions + 1}" in each for i, each in enumerate(inner)
    )


def test_include_and_exclude():
    assert _rounded(shapes.Convnet, placement="compute", include=("3",)) == ["0", "3"]
    assert _rounded(shapes.Convnet, exclude=("[12]",)) == ["0", "3"]
    assert _rounded(shapes.PreResNet, placement="compute", exclude=("blocks",)) == ["conv1"]
    assert _rounded(shapes.PreResNet, placement="compute", include=("blocks.1.iadd",), exclude=("*.conv?",)) == [
        "conv1",
        "blocks.1.downsample",
        "blocks.1.iadd",
    ]


def test_input_and_logits():
    assert _rounded(shapes.Convnet, placement="compute", quantize_input=True) == ["input", "0"]
    assert _rounded(shapes.Convnet, placement="compute", quantize_logits=True) == ["0", "6"]
    model, (x,) = shapes.made(shapes.Tied)
    y = converted(model.eval(), "bfp4[0] quantize_input=true quantize_logits=true")(x)
    again = converted(model, "bfp4[0]")
    assert torch.equal(y, quantize(again(quantize(x, "bfp4[0]")), "bfp4[0]"))


def test_what_one_graph_gives_the_next_is_no_input_of_the_model():
    class Broken(shapes.Two):
        def forward(self, x):
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.second(y)

    low = converted(Broken(), "bfp8[0] quantize_input=true")
    logits = low(torch.randn(4, 6))
    # A layer might read the output of "second"; the caller gets it as it was before rounding.
    assert [rounded(made.graph) for made in low.graphs] == [["x", "first"], ["second"]]
    assert not torch.equal(logits, quantize(logits, "bfp8[0]"))


@pytest.mark.parametrize(
    "fields",
    [
        {"placement": "group"},
        {"exclude": ("bn",)},
        {"exclude": ("blocks.0.relu@2",)},
        {"quantize_input": True},
        {"quantize_logits": True},
    ],
)
def test_the_prover_refuses_another_placement(fields):
    made = Traced(shapes.PreResNet, Recipe.parse("bfp8"))
    with pytest.raises(VerifyError):
        made.proved(Recipe.parse("bfp8", **fields))


def test_the_prover_counts_calls_as_the_pass_does():
    made = Traced(shapes.PreResNet, Recipe.parse("bfp8", exclude=("blocks.0.relu@1",)))
    assert made.proved()
    with pytest.raises(VerifyError):
        made.proved(Recipe.parse("bfp8", exclude=("blocks.0.relu@2",)))


@pytest.mark.parametrize(
    "text",
    ["bfp8[0] placement=group", "bfp8 include=a.*,b exclude=c.?[01] quantize_input=true quantize_logits=true"],
)
def test_text_round_trips(text):
    recipe = Recipe.parse(text)
    assert str(recipe) == text and Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "some"}, "unknown placement 'some'; use one of every, compute"),
        ({"include": "conv"}, r"include must be a tuple of globs, such as \('layer1"),
        ({"exclude": ("",)}, "exclude: '' is no glob"),
        ({"quantize_input": 1}, "quantize_input is true or false, not 1"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.parse("bfp8", **fields)


def test_bad_text_is_refused():
    with pytest.raises(RecipeError, match="quantize_input is true or false, not 'yes'"):
        Recipe.parse("bfp8 quantize_input=yes")


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_refused_with_the_nearest_names(field):
    with pytest.raises(RecipeError, match=rf"{field} 'downsampel' matches nothing .*blocks.1.downsample"):
        convert(shapes.PreResNet(), recipe=Recipe.parse("bfp8", **{field: ("downsampel",)}))


class Pointwise(nn.Module):
    """No product, a parameter, and two outputs; one of them is read."""

    inputs = (torch.Size([3, 4]),)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return torch.relu(x * self.scale)


NOTHING = (
    r"no output is rounded under {}, which leaves out {}; choose another placement or exclude less, or name W, G and M"
)


@pytest.mark.parametrize(
    ("kind", "recipe", "words", "names"),
    [
        (Pointwise, "bfp8[0] placement=compute", "placement=compute", "mul"),
        (Pointwise, "E=bfp8[0] exclude=*", "placement=every exclude=*", "mul"),
        (shapes.Convnet, "A=bfp8 placement=compute exclude=0,6", "placement=compute exclude=0,6", "0, 1, 2, 3"),
    ],
)
def test_a_placement_that_leaves_nothing_rounded_is_refused(kind, recipe, words, names):
    message = re.escape(NOTHING.format(words, names))
    model, inputs = shapes.made(kind)
    with pytest.raises(RecipeError, match=message):
        convert(model, None, recipe, example_inputs=inputs)
    assert type(model) is kind and not hasattr(model, "graphs")
    lp, _ = convert(model, None, recipe)
    with pytest.warns(UserWarning, match=message):
        lp(*inputs)


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [
        (Pointwise, "W=bfp8[0] placement=compute"),
        (Pointwise, "bfp8[0] placement=compute include=mul"),
        (Pointwise, "bfp8[0] placement=compute quantize_logits=true exclude=mul include=relu"),
        (Pointwise, "bfp8[0] placement=compute rules=[mul A=float E=float]"),
        (shapes.Tied, "bfp8 placement=compute"),
    ],
)
def test_a_placement_that_leaves_something_is_not(kind, recipe):
    model, inputs = shapes.made(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lp, _ = convert(model, None, recipe, example_inputs=inputs)
        lp(*inputs)
