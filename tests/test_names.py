"""One name for one place: report, measure and draw print it; rules, include and exclude take it."""

import re

import pytest
import shapes
import torch
import torch.nn.functional as F
from marks import rewritten_by, rounded
from torch import nn
from torch.utils.checkpoint import checkpoint

from swalp_fx import Recipe, RecipeError, Rule, check, convert, draw, measure, nodes, report


class Reused(nn.Module):
    """A module and a function of one name, a module that is called twice, and a block that is."""

    inputs = (torch.Size([2, 6]),)

    def __init__(self):
        super().__init__()
        self.layer, self.relu, self.block = nn.Linear(6, 6), nn.ReLU(), shapes.Tied()

    def forward(self, x):
        x = F.relu(self.layer(self.relu(x + 1) + 1))
        return self.block(self.block(self.relu(x))) + 1


class Namesakes(nn.Module):
    """An input with the name of a layer, and a layer with a name like a numbered one."""

    inputs = (torch.Size([2, 6]),)

    def __init__(self):
        super().__init__()
        self.layer, self.relu = nn.Linear(6, 6), nn.ReLU()
        self.add_module("relu@1", nn.Linear(6, 6))

    def forward(self, layer):
        return self.relu(getattr(self, "relu@1")(self.relu(self.layer(layer)))) + 1


KINDS = (*shapes.ALL, Reused, Namesakes, shapes.Inside, shapes.Normed, shapes.Derived, shapes.Loop)


def _rows(module):
    """Name -> role -> format, of each row of the report."""
    return {line.name: _roles(line.rounded) for line in report(module).layers}


def _roles(formats):
    pairs = [each.split(" ") for each in formats.split(", ") if each != "-"]
    return {letter: spec for letters, spec in pairs for letter in letters}


def _activations(kind, text="bfp8", **fields):
    """Name -> format, of each output that is rounded."""
    recipe = Recipe.parse(text, **fields)
    graph = rewritten_by(kind, recipe)
    found = graph.find_nodes(op="call_function", target=nodes.quantize_output)
    return dict(zip(rounded(graph), (node.args[3] for node in found), strict=True))


def _converted(kind, text="bfp8[0]", **fields):
    model, inputs = shapes.made(kind)
    return convert(model, recipe=Recipe.parse(text, **fields), example_inputs=inputs).module


def test_what_has_one_name_is_numbered_in_the_order_of_the_graph():
    module = _converted(Reused)
    assert list(_rows(module)) == [
        "add@1", "relu@1", "add@2", "layer", "relu@2", "relu@3",
        "block.first@1", "block.tanh@1", "block.second@1", "block.first@2", "block.tanh@2", "block.second@2", "add@3",
    ]  # fmt: skip


def test_names_are_unique_whatever_the_model_calls_its_parts():
    module = _converted(Namesakes, "bfp8 quantize_input=true")
    assert list(_rows(module)) == ["layer", "relu@2", "relu@1", "relu@3", "add"]
    assert {("layer@0", "A"), ("layer", "A")} <= measure(module, [torch.ones(2, 6)]).keys()
    module = _converted(Namesakes, "bfp8 quantize_input=true exclude=layer@0")
    assert ("layer@0", "A") not in measure(module, [torch.ones(2, 6)])


@pytest.mark.parametrize("kind", KINDS)
def test_report_measure_and_draw_print_the_same_names(kind, tmp_path):
    model, inputs = shapes.made(kind)
    module, _ = convert(model, recipe="bfp8[0] quantize_logits=true", example_inputs=inputs)
    rows, parameters = _rows(module), [name for name, _ in model.named_parameters()]
    measured = measure(module, inputs)
    outputs = {name for name, roles in rows.items() if "A" in roles}
    assert {site for site, role in measured if role == "A"} == outputs
    assert {site for site, role in measured if role == "W"} <= {*rows, *parameters}
    draw(module, tmp_path / "graph.dot")
    source = (tmp_path / "graph.dot").read_text()
    drawn = set(re.findall(r">([^<>]+)<", source))
    if "①" in source:  # blocks that are alike are drawn once, with the names inside them
        short = {name: re.sub(r"@\d+$", "", name) for name in outputs}
        outputs = {name for name in outputs if not any(short[name].endswith(f".{inner}") for inner in drawn)}
    assert outputs <= drawn


@pytest.mark.parametrize("most", [8, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_means_the_one_place_that_it_names(kind, most):
    every = _activations(kind)
    compute = _activations(kind, "bfp8 placement=compute")
    for name in list(every)[:: 1 + len(every) // most]:
        assert _activations(kind, exclude=(name,)) == {other: spec for other, spec in every.items() if other != name}
        assert _activations(kind, rules=(Rule(name, activation="bfp4"),)) == {**every, name: "bfp4"}
        assert _activations(kind, "bfp8 placement=compute", include=(name,)) == {**compute, name: "bfp8"}


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("relu", ["add@1", "add@2", "layer"]),  # all its calls
        ("relu@[23]", ["add@1", "relu@1", "add@2", "layer"]),
        (r"re:relu@\d", ["add@1", "add@2", "layer"]),
        ("re:(relu|add)@1", ["add@2", "layer", "relu@2", "relu@3"]),
    ],
)
def test_a_name_without_a_number_means_all(pattern, left):
    assert list(_activations(Reused, exclude=(pattern, "block"))) == left


def test_a_name_and_its_numbers_give_the_same_code():
    codes = [
        str(rewritten_by(Reused, Recipe.parse("bfp8", exclude=names)))
        for names in (("relu",), ("relu@1", "relu@2", "relu@3"))
    ]
    assert codes[0] == codes[1]


def test_a_pattern_without_an_at_sign_sees_no_number():
    with pytest.raises(RecipeError, match=r"exclude '\*\[12\]' matches nothing"):
        _converted(Reused, exclude=("*[12]",))


def test_the_second_call_of_a_block():
    assert [name for name in _activations(Reused) if name not in _activations(Reused, exclude=("block.*@2",))] == [
        "block.first@2", "block.tanh@2", "block.second@2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["relu@4", "layer@1", "block@2"])
def test_a_call_that_is_not_there_is_refused_with_the_nearest(name):
    with pytest.raises(RecipeError, match=rf"exclude '{name}' matches nothing in the model; the nearest names are \w+"):
        _converted(Reused, exclude=(name,))


def test_names_do_not_depend_on_the_recipe():
    every = _activations(Reused)
    for placement in ("compute", "compute+activation", "group"):
        assert _activations(Reused, f"bfp8 placement={placement}").keys() <= every.keys()


def test_each_branch_on_the_training_flag_counts_its_own_calls():
    class Deeper(shapes.Two):
        def forward(self, x):
            x = self.first(x)
            return self.second(self.first(x) if self.training else x)

    module, inputs = _converted(Deeper, "bfp8 exclude=first@2"), shapes.made(Deeper)[1]
    module.eval()(*inputs)
    assert [rounded(made.graph) for made in module.graphs] == [["first@1"], ["first"]]


def test_a_bare_layer_is_named_by_its_type():
    x = torch.ones(1, 2)
    module, _ = convert(nn.Linear(2, 2), recipe="bfp8 quantize_logits=true", example_inputs=(x,))
    assert list(_rows(module)) == ["linear"] and ("linear", "A") in measure(module, [torch.ones(1, 2)])
    module, _ = convert(nn.Linear(2, 2), recipe="bfp8 quantize_logits=true exclude=linear", example_inputs=(x,))
    assert _rows(module)["linear"].keys() == {"W", "G", "M"}


def test_a_checkpointed_block_is_named_as_it_is_outside_of_one():
    module = _converted(shapes.Checkpointed, "bfp8 quantize_logits=true")
    bodies = [body.graph for _, body in module.graphs[0].graph_module.named_children()]
    assert [name for body in bodies for name in rounded(body)] == [
        "blocks.0.0",
        "blocks.0.2",
        "blocks.1.0",
        "blocks.1.2",
    ]


class Attending(nn.Module):
    """Attention whose projections are no calls of layers."""

    def __init__(self, checkpointed):
        super().__init__()
        self.attention, self.checkpointed = nn.MultiheadAttention(8, 2, batch_first=True), checkpointed

    def attend(self, x):
        return self.attention(x, x, x, need_weights=False)[0]

    def forward(self, x):
        return (checkpoint(self.attend, x, use_reentrant=False) if self.checkpointed else self.attend(x)) + 1


def test_in_a_checkpoint_a_projection_has_the_name_of_the_layer_that_holds_its_weight():
    found = []
    for checkpointed in (True, False):
        x = torch.randn(2, 3, 8)
        lp, _ = convert(Attending(checkpointed), recipe="bfp8", example_inputs=(x,))
        made = lp.graphs[0].graph_module
        body = next(iter(made.named_children()))[1] if checkpointed else made
        found.append([name for name in rounded(body.graph) if name.startswith("attention")])
        convert(Attending(checkpointed), recipe="bfp8 exclude=attention.out_proj", example_inputs=(x,))
    assert found[0] == found[1] and found[0][-1] == "attention.out_proj"


def test_a_weight_that_is_derived_for_each_reader_has_one_row():
    module, inputs = _converted(shapes.Normed), shapes.made(shapes.Normed)[1]
    assert str(report(module)).count("\nspectral.weight ") == 1
    assert ("spectral.weight", "W") in measure(module, inputs)


@pytest.mark.parametrize(
    "call",
    [
        lambda layer, x: F.linear(x, weight=layer.weight),
        lambda layer, x: F.linear(input=x, weight=layer.weight, bias=layer.bias),
        lambda layer, x: F.linear(x, layer.weight.mT.mT),
        lambda layer, x: F.linear(bias=None, weight=layer.weight, input=x),
    ],
)
def test_a_function_is_named_however_its_arguments_are_given(call):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return call(self.fc, x).relu() * 2

    x = torch.randn(3, 4)
    assert check(Model(), x)
    lp, _ = convert(Model(), recipe="bfp8", example_inputs=(x,))
    assert [layer.name for layer in report(lp).layers if layer.operation == "linear"] == ["linear"]
