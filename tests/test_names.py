"""One name for one place: report, measure and draw print it; rules, include and exclude take it."""

import re

import pytest
import shapes
import torch
import torch.nn.functional as F
from torch import nn

from swalp_fx import Recipe, RecipeError, Rule, convert, draw, measure, report

pytestmark = pytest.mark.filterwarnings("ignore:.*Rewritten instead")


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
    """An input that is named as a layer is, and a layer whose name looks like a numbered one."""

    inputs = (torch.Size([2, 6]),)

    def __init__(self):
        super().__init__()
        self.layer, self.relu = nn.Linear(6, 6), nn.ReLU()
        self.add_module("relu@1", nn.Linear(6, 6))

    def forward(self, layer):
        return self.relu(getattr(self, "relu@1")(self.relu(self.layer(layer)))) + 1


KINDS = (*shapes.ALL, Reused, Namesakes, shapes.Inside, shapes.Normed, shapes.Derived, shapes.Loop, shapes.Checkpointed)


def _rows(module):
    """Name -> role -> format, of each row of the report."""
    rows = [re.split(r" {2,}", line) for line in report(module).split("\n\n")[0].splitlines()[2:]]
    return {name: _roles(formats) for name, _, formats, *_ in rows}


def _roles(formats):
    pairs = [each.split(" ") for each in formats.split(", ") if each != "-"]
    return {letter: spec for letters, spec in pairs for letter in letters}


def _activations(kind, text="bfp8", **fields):
    """Name -> format, of each output that is rounded."""
    model, _ = shapes.made(kind)
    rows = _rows(convert(model, recipe=Recipe.parse(text, **fields)).module)
    return {name: roles["A"] for name, roles in rows.items() if "A" in roles}


def test_what_has_one_name_is_numbered_in_the_order_of_the_graph():
    module, _ = convert(Reused())
    assert list(_rows(module)) == [
        "add@1", "relu@1", "add@2", "layer", "relu@2", "relu@3",
        "block.first@1", "block.tanh@1", "block.second@1", "block.first@2", "block.tanh@2", "block.second@2", "add@3",
    ]  # fmt: skip


def test_names_are_unique_whatever_the_model_calls_its_parts():
    module, _ = convert(Namesakes(), recipe="bfp8 quantize_input=true")
    assert list(_rows(module)) == ["layer", "relu@2", "relu@1", "relu@3", "add"]
    assert {("layer@0", "A"), ("layer", "A")} <= measure(module, [torch.ones(2, 6)]).keys()
    module, _ = convert(Namesakes(), recipe="bfp8 quantize_input=true exclude=layer@0")
    assert ("layer@0", "A") not in measure(module, [torch.ones(2, 6)])


@pytest.mark.parametrize("kind", KINDS)
def test_report_measure_and_draw_print_the_same_names(kind, tmp_path):
    model, inputs = shapes.made(kind)
    module, _ = convert(model, recipe="bfp8[0] quantize_logits=true")
    rows, parameters = _rows(module), [name for name, _ in model.named_parameters()]
    measured = measure(module, inputs)
    outputs = {name for name, roles in rows.items() if "A" in roles}
    assert {site for site, role in measured if role == "A"} == outputs
    assert {site for site, role in measured if role == "W"} <= {*rows, *parameters}
    draw(module, tmp_path / "graph.dot")
    source = (tmp_path / "graph.dot").read_text()
    drawn = set(re.findall(r">([^<>]+)<", source))
    if "①" in source:  # blocks that are alike are drawn once, with the names inside them
        outputs = {name for name in outputs if not any(name.endswith(f".{inner}") for inner in drawn)}
    assert outputs <= drawn


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_means_the_one_place_that_it_names(kind):
    every = _activations(kind)
    compute = _activations(kind, "bfp8 placement=compute")
    for name in every:
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
        convert(Reused(), recipe=Recipe.parse("bfp8", exclude=names)).module.code
        for names in (("relu",), ("relu@1", "relu@2", "relu@3"))
    ]
    assert codes[0] == codes[1]


def test_a_pattern_without_an_at_sign_sees_no_number():
    with pytest.raises(RecipeError, match=r"exclude '\*\[12\]' matches nothing"):
        _activations(Reused, exclude=("*[12]",))


def test_the_second_call_of_a_block():
    assert [name for name in _activations(Reused) if name not in _activations(Reused, exclude=("block.*@2",))] == [
        "block.first@2", "block.tanh@2", "block.second@2",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["relu@4", "layer@1", "block@2"])
def test_a_call_that_is_not_there_is_refused_with_the_nearest(name):
    with pytest.raises(RecipeError, match=rf"exclude '{name}' matches nothing in the model; the nearest names are \w+"):
        _activations(Reused, exclude=(name,))


def test_names_do_not_depend_on_the_recipe():
    every = _activations(Reused)
    for placement in ("compute", "compute+activation", "group"):
        assert _activations(Reused, f"bfp8 placement={placement}").keys() <= every.keys()


def test_each_branch_on_the_training_flag_counts_its_own_calls():
    class Deeper(shapes.Two):
        def forward(self, x):
            x = self.first(x)
            return self.second(self.first(x) if self.training else x)

    module, _ = convert(Deeper(), recipe="bfp8 exclude=first@2")
    assert {name: "A" in roles for name, roles in _rows(module).items()} == {
        "first@1": True, "first@2": False, "second": False,
    }  # fmt: skip
    assert {name: "A" in roles for name, roles in _rows(module.eval()).items()} == {"first": True, "second": False}


def test_a_bare_layer_is_named_by_its_type():
    module, _ = convert(nn.Linear(2, 2), recipe="bfp8 quantize_logits=true")
    assert list(_rows(module)) == ["linear"] and ("linear", "A") in measure(module, [torch.ones(1, 2)])
    module, _ = convert(nn.Linear(2, 2), recipe="bfp8 quantize_logits=true exclude=linear")
    assert _rows(module)["linear"].keys() == {"W", "G", "M"}


def test_a_part_is_named_as_the_whole_model_names_it():
    every = _activations(shapes.Checkpointed)
    assert list(every) == ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]


def test_a_weight_that_is_derived_for_each_reader_has_one_row():
    model, inputs = shapes.made(shapes.Normed)
    module, _ = convert(model)
    assert report(module).count("\nspectral.weight ") == 1
    assert ("spectral.weight", "W") in measure(module, inputs)
