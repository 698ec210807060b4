"""Placement: which outputs are rounded; pass and prover agree, and the SWALP authors' networks come out as theirs."""

import pytest
import shapes
import torch
from torch import nn

import models
from swalp_fx import Recipe, RecipeError, convert, nodes, quantize
from swalp_fx.capture import capture
from swalp_fx.passes import assign, classify, insert, rewrite, verify
from swalp_fx.passes.classify import PARTS
from swalp_fx.passes.verify import PARTS as PROVERS_PARTS
from swalp_fx.passes.verify import VerifyError
from swalp_fx.recipe import PLACEMENTS


def _rounded(model, **fields):
    module = rewrite(model, Recipe.parse("bfp8[0]", **fields))
    return [node.args[0].name for node in module.graph.find_nodes(op="call_function", target=nodes.quantize_output)]


def test_the_prover_knows_the_same_layers():
    for part, pattern in PROVERS_PARTS.items():
        for other, names in PARTS.items():
            for name in names.split() if other in (*PROVERS_PARTS, "arithmetic") else ():
                assert bool(pattern.fullmatch(name)) == (part == other), (name, part)


@pytest.mark.parametrize(
    ("placement", "rounded"),
    [
        ("every", ["_0", "_1", "_2", "_3"]),
        ("compute", ["_0"]),
        ("compute+activation", ["_0", "_2"]),
        ("group", ["_2"]),
    ],
)
def test_a_convnet(placement, rounded):
    assert _rounded(shapes.Convnet(), placement=placement) == rounded


class Residual(nn.Module):
    def __init__(self, shortcut):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.shortcut = nn.Conv2d(3, 3, 1) if shortcut else nn.Identity()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc((self.bn(self.conv(x)) + self.shortcut(x)).relu())


def test_a_group_goes_through_a_sum_that_only_an_activation_reads():
    assert _rounded(Residual(False), placement="group") == ["relu"]
    assert _rounded(Residual(True), placement="group") == ["shortcut", "relu"]


def test_a_group_ends_where_two_read_it_and_at_a_sum_that_is_read_bare():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.first(x)
            return self.second(y + y.tanh()).exp()

    assert _rounded(Shared(), placement="group") == ["first", "tanh", "second"]


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kind", shapes.ALL, ids=lambda kind: kind.__name__)
def test_pass_and_prover_agree(kind, placement):
    for flags in ({}, {"quantize_input": True, "quantize_logits": True}):
        rewrite(shapes.made(kind)[0], Recipe.parse("bfp8[0]", placement=placement, **flags))


def test_vgg16_has_the_authors_15_quantizers():
    with torch.device("meta"):
        model = models.build("vgg16")
    rounded = _rounded(model, **models.REFERENCE_PLACEMENT["vgg16"])
    assert len(rounded) == 15
    assert all(type(model.get_submodule(_path(name))) is nn.ReLU for name in rounded)


def _path(name):
    return name.replace("_", ".")


@pytest.mark.parametrize(("name", "blocks", "convolutions"), [("preresnet20", 9, 2), ("preresnet164", 54, 3)])
def test_preresnet_has_the_authors_quantizers(name, blocks, convolutions):
    with torch.device("meta"):
        rounded = _rounded(models.build(name), **models.REFERENCE_PLACEMENT[name])
    assert rounded[0] == "conv"
    inner = rounded[1:]
    assert len(inner) == blocks * 2 * convolutions
    # bn, relu, Q, conv, Q in turn: neither shortcuts, nor sums, nor the last ReLU.
    assert all(
        f"branch_{'conv' if i % 2 else 'relu'}{i // 2 % convolutions + 1}" in each for i, each in enumerate(inner)
    )


def test_include_and_exclude():
    assert _rounded(shapes.Convnet(), placement="compute", include=("3",)) == ["_0", "_3"]
    assert _rounded(shapes.Convnet(), exclude=("[12]",)) == ["_0", "_3"]
    assert _rounded(shapes.PreResNet(), placement="compute", exclude=("blocks",)) == ["conv1"]
    assert _rounded(shapes.PreResNet(), placement="compute", include=("blocks.1.iadd",), exclude=("*.conv?",)) == [
        "conv1",
        "blocks_1_downsample",
        "iadd_1",
    ]


def test_input_and_logits():
    assert _rounded(shapes.Convnet(), placement="compute", quantize_input=True) == ["input_1", "_0"]
    assert _rounded(shapes.Convnet(), placement="compute", quantize_logits=True) == ["_0", "_6"]
    model, (x,) = shapes.made(shapes.Tied)
    module, _ = convert(model, recipe=Recipe.parse("bfp4[0]", quantize_input=True, quantize_logits=True))
    y = module.eval()(x)
    again, _ = convert(model, recipe="bfp4[0]")
    assert torch.equal(y, quantize(again.eval()(quantize(x, "bfp4[0]")), "bfp4[0]"))


def test_the_prover_refuses_another_placement():
    model, _ = shapes.made(shapes.PreResNet)
    captured = capture(model).graph
    graph = insert(assign(classify(captured, model), model, Recipe.parse("bfp8")))
    for fields in (
        {"placement": "group"},
        {"exclude": ("bn",)},
        {"exclude": ("blocks.0.relu@2",)},
        {"quantize_input": True},
        {"quantize_logits": True},
    ):
        with pytest.raises(VerifyError):
            verify(graph, captured, model, Recipe.parse("bfp8", **fields))


def test_the_prover_counts_calls_as_the_pass_does():
    model, _ = shapes.made(shapes.PreResNet)
    captured = capture(model).graph
    graph = insert(assign(classify(captured, model), model, Recipe.parse("bfp8", exclude=("blocks.0.relu@1",))))
    verify(graph, captured, model, Recipe.parse("bfp8", exclude=("blocks.0.relu@1",)))
    with pytest.raises(VerifyError):
        verify(graph, captured, model, Recipe.parse("bfp8", exclude=("blocks.0.relu@2",)))


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
        ({"exclude": ("a b",)}, "exclude: 'a b' is no glob"),
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
