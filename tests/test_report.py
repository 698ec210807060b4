"""The report of a rewritten module."""

import re

import pytest
import shapes
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from swalp_fx import Recipe, Rule, table
from swalp_fx.capture import ConvertError
from swalp_fx.convert import convert
from swalp_fx.passes.classify import LAYER_PARTS, PART, place
from swalp_fx.report import report


def _report(kind, recipe, shown=True):
    model, inputs = shapes.made(kind)
    return report(convert(model, recipe=recipe).module, *(inputs if shown else ()))


def test_a_convnet():
    expected = """\
layer    operation    output    formats                       parameters
-------  -----------  --------  --------------------------  ------------
0        Conv2d       2x4x8x8   WA bfp8[0], E e5m2, G bfp4           112
1        BatchNorm2d  2x4x8x8   WA bfp8[0], E e5m2, G bfp4             8
2        ReLU         2x4x8x8   A bfp8[0], E e5m2
3        MaxPool2d    2x4x4x4   A bfp8[0], E e5m2
6        Linear       2x10      W bfp8[0], G bfp4                    650

roles       W weight, A activation, E error, G gradient, M momentum; one not named is in float
parameters  770 values in 6 tensors: 6 in bfp8[0]
bits        6,160, 25.0% of 24,640 in float32 (shared exponents not counted)
outputs     4 of 5 rounded
rounding    stochastic

in float:
  momentum: the recipe says so
  input: the model's input
  6: the model's output
  Dropout, Flatten: no new numbers"""
    assert _report(shapes.Convnet, "W=bfp8[0] A=bfp8[0] E=e5m2 G=bfp4") == expected


def test_without_inputs_there_are_no_shapes():
    assert _report(shapes.Convnet, "bfp8", shown=False).splitlines()[0].split() == [
        "layer", "operation", "formats", "parameters",
    ]  # fmt: skip


def _rows(text):
    return [re.split(r" {2,}", line) for line in text.split("\n\n")[0].splitlines()[2:]]


def test_shared_parameters_are_counted_once():
    assert [row[-1] for row in _rows(_report(shapes.Tied, "bfp8"))] == ["42", "AE bfp8", "6"]
    assert [row[3:] for row in _rows(_report(shapes.Twice, "bfp8"))] == [
        ["WAEGM bfp8", "42"], ["AE bfp8"], ["WAEGM bfp8", "12"], ["WAEGM bfp8"], ["WGM bfp8"],
    ]  # fmt: skip


def test_parameters_read_by_themselves_have_a_row():
    rows = _rows(_report(shapes.Direct, "bfp8"))
    assert ["scale", "parameter", "6", "WGM bfp8", "6"] in rows
    rows = _rows(_report(shapes.Direct, "A=bfp8"))
    assert ["scale", "parameter", "6", "-", "6"] in rows


def test_what_stayed_in_float_and_why():
    text = _report(shapes.Unused, "bfp8")
    assert "  spare.weight, spare.bias: never read" in text
    assert "parameters  90 values in 6 tensors: 4 in bfp8\nbits        864, 30.0% of 2,880" in text


class Opaque(nn.Module):
    def forward(self, x):
        return x.exp() / x.exp().sum()


class Attentive(nn.Module):
    """What computes much inside: PyTorch's attention as a layer and as a function, and a user's layer called whole."""

    inputs = (torch.Size([2, 5, 6]),)

    def __init__(self):
        super().__init__()
        self.attention, self.opaque = nn.MultiheadAttention(6, 2, batch_first=True), Opaque()
        self.rows = nn.ModuleList([nn.LSTM(6, 6) for _ in range(3)])
        self.out = nn.Linear(6, 6)

    def forward(self, x):
        for row in self.rows:
            x, _ = row(x)
        x, _ = self.attention(x, x, x)
        return self.out(self.opaque(F.scaled_dot_product_attention(x, x, x)))


def test_what_is_called_whole_is_told_and_its_inside_is_not_counted():
    model, inputs = shapes.made(Attentive)
    text = report(convert(model, recipe="bfp8", leaves=[Opaque]).module, *inputs)
    assert _lines_of("outputs", text) == (
        "outputs 6 of 7 rounded; inside LSTM x 3, MultiheadAttention, scaled_dot_product_attention, Opaque, "
        "called whole, none (not counted)"
    )
    assert _lines_of("inside", text) == (
        "inside rows.* (3), attention, scaled_dot_product_attention, opaque: called whole, only weights are rounded"
    )


def _lines_of(word, text):
    """The line that begins with ``word``, with those in which it goes on."""
    (found,) = re.findall(rf"^ *{word} .*(?:\n {{4,}}.*)*", text, re.MULTILINE)
    return " ".join(found.split())


def test_what_is_outside_of_the_parts_is_not_counted():
    class Loop(shapes.Two):
        def forward(self, x):
            return self.second(self.first(x) * 2) if x.sum() > 0 else x

    with pytest.warns(UserWarning, match="cannot trace Loop"):
        module, _ = convert(Loop())
    assert "\noutputs     2 of 2 rounded; outside of the rewritten modules none (not counted)\n" in report(module)


def test_what_has_one_reason_has_one_line():
    class Chooser(shapes.Two):
        def forward(self, x):
            return F.linear(self.first(x), self.second.weight, self.second.bias) if x.sum() < 1e9 else x

    with pytest.warns(UserWarning, match="Rewritten instead: 6"):
        module, _ = convert(nn.Sequential(Chooser(), Chooser(), Chooser()))
    text = report(module, torch.ones(2, 6))
    assert _lines_of("0, 1, 2, outside", text).startswith("0, 1, 2, outside of their rewritten modules: cannot trace")
    assert "  *.second.weight (3), *.second.bias (3), where linear reads them outside of the rewritten modules" in text


def test_error_signals_are_counted_where_they_differ():
    assert "\noutputs     0 of 5 rounded, 4 of their error signals\n" in _report(shapes.Convnet, "E=bfp8")
    assert "\noutputs     4 of 5 rounded\n" in _report(shapes.Convnet, "A=bfp8 E=e5m2")


class LongNames(nn.Module):
    def __init__(self, depth=6):
        super().__init__()
        self.the_module_with_the_longest_name = nn.Linear(6, 6) if depth == 0 else LongNames(depth - 1)
        self.second = nn.Linear(6, 6)

    def forward(self, x):
        return self.second(self.the_module_with_the_longest_name(x))


MIXED = "W=bfp8[-1:16] A=mxfp8_e5m2 E=mxfp6_e3m2 G=bfp4[0] M=fixed16.8"


def _on_meta(name):
    with torch.device("meta"):
        return torchvision.models.get_model(name), torch.empty(1, 3, 224, 224)


@pytest.mark.parametrize("recipe", ["bfp8[0]", MIXED, "A=bfp8[0] rounding=nearest"])
@pytest.mark.parametrize("name", ["resnet18", "vgg16", "vit_b_16", "long names"])
def test_it_fits_a_hundred_columns(name, recipe):
    model, x = (LongNames(), torch.ones(1, 6)) if name == "long names" else _on_meta(name)
    module, _ = convert(model, recipe=recipe)
    for text in (report(module), report(module, x)):
        assert max(map(len, text.splitlines())) <= 100
        outputs = [place(node) for node in module.graph.nodes if node.meta.get(PART) in LAYER_PARTS]
        assert [name for name in _names(text) if name not in module.state_dict()] == outputs


def _names(text):
    """The names in the first column, those that go on in the next lines put together."""
    _, rule, *rows = text.split("\n\n")[0].splitlines()
    column = [row[: rule.index(" ")].rstrip() for row in rows]
    return "".join(cell[2:] if cell.startswith("  ") else f"\n{cell}" for cell in column if cell).split()


def test_a_resnet_has_a_row_a_layer():
    model, x = _on_meta("resnet18")
    rows = report(convert(model).module, x).split("\n\n")[0].splitlines()[2:]
    assert len(rows) == 68 and rows[3].split() == ["maxpool", "MaxPool2d", "1x64x56x56", "AE", "bfp8[0]"]


def test_equal_blocks_are_folded_where_one_asks_for_it():
    model, x = _on_meta("vit_b_16")
    module, _ = convert(model)
    text = report(module, x, fold=True)
    block = ["ln_1", "self_attention", "add@1", "ln_2", "mlp.0", "mlp.1", "mlp.3", "add@2"]
    assert _names(text.replace(" (12)", "")) == [
        "conv_proj", "class_token", "encoder.pos_embedding", "encoder.add",
        *(f"encoder.layers.encoder_layer_*.{name}" for name in block), "encoder.ln", "heads.head",
    ]  # fmt: skip
    assert text.count(" (12)") == len(block) + 1  # and once in the list of what is called whole
    assert text.split("\n\n")[1:] == report(module, x).split("\n\n")[1:]


def test_layers_that_differ_are_not_folded():
    model, inputs = shapes.made(shapes.Nested)
    recipe = Recipe.parse("bfp8", rules=(Rule("stages.0.0", weight="bfp4"),))
    rows = _rows(report(convert(model, recipe=recipe).module, *inputs, fold=True))
    assert [row[0] for row in rows][:2] == ["stages.0.0", "stages.0.1.0"]


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["fc"], ["fc"]),
        (["a.0.b", "a.1.b", "c"], ["a.*.b (2)", "c"]),
        (["layer1.0.relu@1", "layer1.1.relu@1"], ["layer1.*.relu@1 (2 of 3)"]),
        (["a1.b", "a2.c", "a2.b"], ["a*.b (2)", "a2.c"]),
    ],
)
def test_names_that_differ_in_numbers_are_folded(names, folded):
    assert table.folded(names, {*names, "layer1.2.relu@1", "layer2.0.relu@2"}) == folded


def test_branches_on_a_flag_are_reported():
    class Branching(nn.Module):
        def forward(self, x):
            return x * 2 if self.training else x

    module, _ = convert(nn.Sequential(Branching()))
    assert report(module).splitlines()[-1].startswith("branches: 0 on the training flag; each branch has a graph")


def test_it_leaves_the_module_as_it_was():
    model, inputs = shapes.made(shapes.Convnet)
    module, _ = convert(model)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    report(module, *inputs)
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_float_model_has_no_report():
    with pytest.raises(ConvertError, match="takes the module that convert returns, not a Tied"):
        report(shapes.Tied())
