"""The report of a rewritten module."""

import copy
import csv
import functools
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import shapes
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from swalp_fx import ConvertError, Recipe, Rule, globs
from swalp_fx.converting import convert
from swalp_fx.passes.names import PART, place
from swalp_fx.passes.tables import LAYER_PARTS
from swalp_fx.reports import report


def _of(kind, recipe, shown=True):
    model, inputs = shapes.made(kind)
    module, _ = convert(model, recipe=recipe, example_inputs=inputs)
    return report(module, *(inputs if shown else ()))


def _report(kind, recipe, shown=True):
    return str(_of(kind, recipe, shown))


def test_a_convnet():
    expected = """\
layer    operation    output    formats                       multiply-adds    parameters    bits
-------  -----------  --------  --------------------------  ---------------  ------------  ------
0        Conv2d       2x4x8x8   WA bfp8[0], E e5m2, G bfp4           13,824           112    8.36
1        BatchNorm2d  2x4x8x8   WA bfp8[0], E e5m2, G bfp4                              8   10.00
2        ReLU         2x4x8x8   A bfp8[0], E e5m2
3        MaxPool2d    2x4x4x4   A bfp8[0], E e5m2
6        Linear       2x10      W bfp8[0], G bfp4                     1,280           650    8.14

roles       W weight, A activation, E error, G gradient, M momentum; one not named is in float
parameters  770 values in 6 tensors: 6 in bfp8[0]
bits        6,304, 25.6% of 24,640 in float32; 8.19 an element, scales included
outputs     4 of 5 rounded
rounding    stochastic
inside      100.0% of 15,104 multiply-adds ran in rewritten graphs, 8.5% on rounded operands

in float:
  momentum: the recipe says so
  input: the model's input
  6: the model's output
  Dropout, Flatten: no new numbers"""
    assert _report(shapes.Convnet, "W=bfp8[0] A=bfp8[0] E=e5m2 G=bfp4") == expected


def test_before_the_first_call_it_has_the_parameters_and_their_formats():
    model, inputs = shapes.made(shapes.Convnet)
    module, _ = convert(model, recipe=Recipe.parse("bfp8", rules=(Rule("6", weight="bfp4"),)))
    text = str(report(module))
    assert _rows(text)[-2:] == [
        ["6.weight", "parameter", "W bfp4, GM bfp8", "640", "4.01"],
        ["6.bias", "parameter", "W bfp4, GM bfp8", "10", "4.80"],
    ]
    assert "parameters  770 values in 6 tensors: 4 in bfp8, 2 in bfp4\n" in text
    assert _lines_of("outputs", text) == (
        "outputs layers are known after the first call: call the model once, or pass an input: report(lp, x)"
    )
    module(*inputs)
    assert [row[0] for row in _rows(str(report(module)))] == ["0", "1", "2", "3", "6"]


def test_without_inputs_there_are_no_shapes():
    assert _report(shapes.Convnet, "bfp8", shown=False).splitlines()[0].split() == [
        "layer", "operation", "formats", "parameters", "bits",
    ]  # fmt: skip


def _rows(text):
    return [re.split(r" {2,}", line) for line in text.split("\n\n")[0].splitlines()[2:]]


def test_shared_parameters_are_counted_once():
    assert [row[-2:] for row in _rows(_report(shapes.Tied, "bfp8"))] == [
        ["42", "8.38"],
        ["2x6", "AE bfp8"],
        ["6", "9.33"],
    ]
    assert [row[2:] for row in _rows(_report(shapes.Twice, "bfp8", shown=False))] == [
        ["WAEGM bfp8", "42", "8.38"], ["AE bfp8"], ["WAEGM bfp8", "12", "9.33"], ["WAEGM bfp8"], ["WGM bfp8"],
    ]  # fmt: skip


def test_each_call_of_a_layer_has_a_row_by_whichever_name_it_is_called():
    tanh = nn.Tanh()
    model = nn.Sequential(nn.Sequential(tanh), nn.Sequential(tanh), nn.Linear(6, 6))
    model.append(model[0]).append(model[1])
    module, _ = convert(model, recipe="bfp8", example_inputs=(torch.ones(2, 6),))
    assert [(row[0], row[2]) for row in _rows(str(report(module)))] == [
        ("0.0@1", "AE bfp8"), ("0.0@2", "AE bfp8"), ("2", "WAEGM bfp8"), ("0.0@3", "AE bfp8"), ("0.0@4", "-"),
    ]  # fmt: skip


def test_a_weight_that_is_derived_at_each_call_is_one():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6, bias=False))
    text = str(report(convert(nn.Sequential(*[layer] * 4), recipe="bfp8", example_inputs=(torch.ones(2, 6),)).module))
    assert [row[:3] for row in _rows(text)][:2] == [
        ["0.weight", "derived weight", "WGM bfp8"], ["0.linear@1", "linear", "AE bfp8"],
    ]  # fmt: skip
    assert len(_rows(text)) == 5 and "parametrizations.weight.original: a weight is derived from them, and" in text


def test_parameters_read_by_themselves_have_a_row():
    rows = _rows(_report(shapes.Direct, "bfp8"))
    assert ["scale", "parameter", "6", "WGM bfp8", "6", "9.33"] in rows
    rows = _rows(_report(shapes.Direct, "A=bfp8"))
    assert ["scale", "parameter", "6", "-", "6", "32.00"] in rows


def test_what_stayed_in_float_and_why():
    text = _report(shapes.Unused, "bfp8")
    assert "  spare.weight, spare.bias: never read" in text
    assert "parameters  90 values in 6 tensors: 4 in bfp8\nbits        896, 31.1% of 2,880" in text


class Attentive(nn.Module):
    """Layers with hidden inner steps: PyTorch's attention as a layer and as a function, and recurrent layers."""

    inputs = (torch.Size([2, 5, 6]),)

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.rows = nn.ModuleList([nn.LSTM(6, 6) for _ in range(3)])
        self.out = nn.Linear(6, 6)

    def forward(self, x):
        for row in self.rows:
            x, _ = row(x)
        x, _ = self.attention(x, x, x, need_weights=False)
        return self.out(F.scaled_dot_product_attention(x, x, x))


def test_what_is_called_whole_is_told_and_its_inside_is_not_counted():
    text = _report(Attentive, "bfp8 whole=attention,rows.* exclude=attn_scores,attn_probabilities")
    assert _lines_of("outputs", text) == (
        "outputs 5 of 6 rounded; inside LSTM x 3, MultiheadAttention, scaled_dot_product_attention, "
        "called whole, none (not counted)"
    )
    assert (
        "  inside rows.* (3), attention, scaled_dot_product_attention: called whole, only weights are rounded" in text
    )
    assert _lines_of("inside", text.split("in float:")[0].split("rounding")[1]) == (
        "inside 100.0% of 1,800 multiply-adds ran in rewritten graphs, 20.0% on rounded operands (those of rows.0, "
        "rows.1, rows.2, scaled_dot_product_attention not counted)"
    )


def _lines_of(word, text):
    """The line that begins with ``word``, and the lines that continue it."""
    (found,) = re.findall(rf"^ *{word} .*(?:\n {{4,}}.*)*", text, re.MULTILINE)
    return " ".join(found.split())


class Broken(nn.Module):
    """One that runs in pieces: a part of it as Python, with a product."""

    inputs = (torch.Size([4, 6]),)

    def __init__(self):
        super().__init__()
        self.first, self.second, self.weight = nn.Linear(6, 6), shapes.Tied(), nn.Parameter(torch.randn(6, 6))

    @torch.compiler.disable
    def gap(self, x):
        return torch.relu(x @ self.weight).view(-1, 6)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = torch.relu(self.gap(x))
        return self.second(x)


class Printing(nn.Module):
    """Two layers, with a break between them that changes nothing."""

    inputs = (torch.Size([4, 6]),)

    def __init__(self, prints=True):
        super().__init__()
        self.first, self.second, self.prints = nn.Linear(6, 6), nn.Linear(6, 6), prints

    def forward(self, x):
        x = self.first(x)
        if self.prints:
            print("between two graphs")
        return self.second(x)


@pytest.mark.parametrize("prints", [False, True])
def test_what_an_earlier_graph_rounded_is_a_rounded_operand(prints):
    module, _ = convert(Printing(prints), recipe="bfp8")
    found = _lines_of("inside", str(report(module, torch.randn(4, 6))))
    assert found == "inside 100.0% of 288 multiply-adds ran in rewritten graphs, 50.0% on rounded operands"


class Halving(Printing):
    """Python writes into what the first graph rounded."""

    @torch.compiler.disable
    def halve(self, x):
        x.mul_(0.3)

    def forward(self, x):
        x = self.first(x)
        self.halve(x)
        return self.second(x)


@pytest.mark.filterwarnings("ignore")
def test_what_python_has_changed_since_is_no_rounded_operand():
    module, _ = convert(Halving(), recipe="bfp8")
    found = _lines_of("inside", str(report(module, torch.randn(4, 6).requires_grad_(False))))
    assert found.endswith("0.0% on rounded operands")


def test_a_line_of_another_package_is_named_though_its_name_begins_with_torchs():
    """torchvision's stochastic depth, which Python runs here."""
    depth = torchvision.ops.StochasticDepth(0.5, "row")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.second(torch.compiler.disable(depth.forward)(self.first(x)))

    module, _ = convert(Model(), recipe="bfp8")
    text = str(report(module, torch.randn(4, 6))).replace("\n    ", "")  # a long path ends a line, where a space was
    assert re.search(r"torchvision/ops/stochastic_depth\.py:\d+ ?stochastic_depth", text)


def test_what_runs_outside_of_the_graphs_is_told_with_its_line():
    model, (x,) = shapes.made(Broken)
    module, _ = convert(model, recipe="bfp8")
    text = str(report(module, x))
    gap, call = (f"{Path(__file__).name}:{_line_of(code)}" for code in ("x @ self.weight", "self.gap(x)"))
    assert (
        _lines_of("inside", text)
        == "inside 75.0% of 576 multiply-adds ran in rewritten graphs, 50.0% on rounded operands"
    )
    *_, broke, outside = text.split("outside of the graphs:")[1].replace("\n    ", "").split("\n")
    assert "Broken: forward goes on in Python: " in broke and call in broke
    assert outside.endswith(f"{gap} gap: mm (144 multiply-adds), relu")
    assert "  weight: never read by a graph\n" in text and "\n  x: the model's input\n" in text
    assert [row[0] for row in _rows(text)] == ["first", "relu", "second.first", "second.tanh", "second.second"]


def _line_of(code):
    return next(i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if f"{code})" in line)


def test_what_runs_in_graphs_only_has_nothing_outside():
    assert "outside" not in _report(shapes.Convnet, "bfp8")


def test_a_place_has_one_row_whichever_graphs_it_is_in():
    model, (x,) = shapes.made(shapes.Heads)
    module, _ = convert(model, recipe="bfp8")
    module(x), module.eval()(x)
    text = str(report(module))
    assert [row[0] for row in _rows(text)] == ["first", "relu", "sum", "second"]
    assert "\noutputs     2 of 4 rounded\n" in text


def test_what_one_graph_rounds_and_another_returns_is_told():
    module, _ = convert(shapes.Tied(), recipe="bfp8")
    module(torch.ones(2, 6)), module.first(torch.ones(2, 6))
    text = str(report(module))
    assert ["first", "Linear", "WAEGM bfp8", "42", "8.38"] in _rows(text)
    assert "\n  first: the model's output, in first: Linear" in text


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


@functools.cache
def _converted(name, recipe="bfp8[0]"):
    """A network on the meta device, converted, and an input. Reports leave it as it was."""
    if name == "long names":
        return convert(LongNames(), recipe=recipe).module, torch.ones(1, 6)
    with torch.device("meta"):
        return convert(torchvision.models.get_model(name), recipe=recipe).module, torch.empty(1, 3, 224, 224)


FLOAT_WEIGHTS = "A=bfp8[0] rounding=nearest"


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        *(("long names", recipe) for recipe in ("bfp8[0]", MIXED, FLOAT_WEIGHTS)),
        *(("resnet18", recipe) for recipe in ("bfp8[0]", MIXED)),
        ("vgg16", FLOAT_WEIGHTS),
        ("vit_b_16", "bfp8[0]"),
    ],
)
def test_it_fits_a_hundred_columns(name, recipe):
    module, x = _converted(name, recipe)
    for text in (str(report(module, x)), str(report(module))):
        assert max(map(len, text.splitlines())) <= 100
        (made,) = module.graphs
        outputs = [place(node) for node in made.graph.nodes if node.meta.get(PART) in LAYER_PARTS]
        assert [name for name in _names(text) if name not in module.state_dict()] == outputs


def _names(text):
    """The names in the first column, those that go on in the next lines put together."""
    _, rule, *rows = text.split("\n\n")[0].splitlines()
    column = [row[: rule.index(" ")].rstrip() for row in rows]
    return "".join(cell[2:] if cell.startswith("  ") else f"\n{cell}" for cell in column if cell).split()


def test_a_resnet_has_a_row_a_layer():
    found = report(*_converted("resnet18"))
    rows = str(found).split("\n\n")[0].splitlines()[2:]
    assert len(found.layers) == 68 and rows[3].split() == ["maxpool", "MaxPool2d", "1x64x56x56", "AE", "bfp8[0]"]
    assert rows[0].split()[5:] == ["118,013,952", "9,408", "8.05"]


def test_equal_blocks_are_folded_where_one_asks_for_it():
    module, x = _converted("vit_b_16")
    text = str(report(module, x, fold=True))
    inner = ["in_proj_weight", "in_proj_bias", "linear", "attn_scores", "attn_probabilities"]
    inner += ["scaled_dot_product_attention", "out_proj.weight", "out_proj.bias", "out_proj"]
    attention = [f"self_attention.{name}" for name in inner]
    block = ["ln_1", *attention, "add@1", "ln_2", "mlp.0", "mlp.1", "mlp.3", "add@2"]
    names = _names(text)
    assert [each for each in names if each != "(12)"] == [
        "conv_proj", "class_token", "encoder.pos_embedding", "encoder.add",
        *(f"encoder.layers.encoder_layer_*.{name}" for name in block), "encoder.ln", "heads.head",
    ]  # fmt: skip
    assert names.count("(12)") == len(block)
    assert text.split("\n\n")[1:] == str(report(module, x)).split("\n\n")[1:]


def test_layers_that_differ_are_not_folded():
    model, inputs = shapes.made(shapes.Nested)
    recipe = Recipe.parse("bfp8", rules=(Rule("stages.0.0", weight="bfp4"),))
    rows = _rows(str(report(convert(model, recipe=recipe).module, *inputs, fold=True)))
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
    assert globs.folded(names, {*names, "layer1.2.relu@1", "layer2.0.relu@2"}) == folded


def test_it_leaves_the_module_as_it_was():
    model, inputs = shapes.made(shapes.Counted)
    module, _ = convert(nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(), model))
    module(*inputs).sum().backward()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gradients, state = [parameter.grad for parameter in module.parameters()], torch.get_rng_state()
    report(module, *inputs)
    assert module.training and model.calls == 1 and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(each.grad is gradient for each, gradient in zip(module.parameters(), gradients, strict=True))


def test_an_input_may_be_named():
    model, (x,) = shapes.made(shapes.OptionalInput)
    module, _ = convert(model, recipe="bfp8")
    assert [row[0] for row in _rows(str(report(module, x, mask=x.gt(0), invert=True)))] == [
        "first",
        "mul@1",
        "mul@2",
        "neg",
        "second",
    ]


def test_a_float_model_has_no_report():
    with pytest.raises(ConvertError, match="takes the module that convert returns, not a Tied"):
        report(shapes.Tied())


# ---- the value, and its forms --------------------------------------------------------------------


@functools.cache
def _of_resnet(recipe="int4[-1:128] master=bf16~stochastic average=bfp9[0] state.exp_avg_sq=bf16"):
    with torch.device("meta"):
        model, x = torchvision.models.resnet50(), torch.empty(1, 3, 224, 224)
    return report(convert(model, recipe=recipe).module, x)


@pytest.mark.filterwarnings("ignore:.*an axis is shorter than a run")
def test_bits_are_those_of_real_shapes_and_all_scales():
    found = _of_resnet()
    weights = [each for each in found.parameters if len(each.shape) == 4]
    bits = sum(each.bits for each in weights)
    assert f"{bits / sum(each.values for each in weights):.1f}" == "25.7"
    layer = next(each for each in found.layers if each.name == "layer1.0.conv2")
    assert (layer.values, layer.bits) == (64 * 64 * 9, 64 * 64 * 3 * (3 * 4 + 32))
    (row,) = (row for row in found.rows() if row[0] == layer.name)
    assert row[-2:] == ["36,864", "14.67"]
    assert sum(each.bits for each in found.parameters) == sum(each.bits for each in found.layers)


@pytest.mark.filterwarnings("ignore:.*an axis is shorter than a run")
@pytest.mark.parametrize(
    ("recipe", "formats"),
    [
        ("bfp8[c:4]", "WAEGM bfp8[1:4]"),
        ("mxfp8 G=mxfp8~up M=float", "WAE mxfp8[1:32], G mxfp8[1:32]~up"),
        ("W=bfp8[c:4] rules=[0.bias W=float]", "W bfp8[1:4]/float"),
    ],
)
def test_a_layer_has_the_format_of_its_weight_where_the_recipe_has_one(recipe, formats):
    """A bias, which has one axis, has other blocks."""
    found = _of(shapes.Convnet, recipe)
    assert found.layers[0].rounded == formats and str(found)


@pytest.mark.filterwarnings("ignore:.*an axis is shorter than a run")
def test_what_a_recipe_says_of_the_optimizer_is_told():
    text = str(_of_resnet())
    assert "\nmaster      e8m7~stochastic, which the optimizer steps on\n" in text
    assert "\naverage     bfp9[0]\n" in text and "\nstates      exp_avg_sq e8m7, of the optimizer\n" in text
    rule = Rule("6", states={"exp_avg": "float"})
    lp = convert(shapes.made(shapes.Convnet)[0], recipe=Recipe.parse("bfp8[0] G=bfp8~up", rules=(rule,))).module
    assert "\nstates      exp_avg float in 6, of the optimizer\n" in str(report(lp))
    assert not any(word in str(report(lp)) for word in ("master", "average "))
    recipe = Recipe.parse("bfp8[0] V=bf16~nearest state.exp_avg=e5m2 rules=[6 V=float]")
    lp = convert(shapes.made(shapes.Convnet)[0], recipe=recipe).module
    assert "\nstates      V e8m7~nearest, exp_avg e5m2, V float in 6, of the optimizer\n" in str(report(lp))


class Odd(nn.Module):
    """Characters that each form of a report has to escape, and one of everything that a report names."""

    inputs = (torch.Size([2, 3, 8, 8]),)

    def __init__(self):
        super().__init__()
        self.add_module("a|<b>&", nn.Conv2d(3, 4, 1))
        self.spare = nn.Linear(2, 2)

    def forward(self, x):
        x = dict(self.named_children())["a|<b>&"](x).flatten(2)
        scores = (x @ x.mT).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf).softmax(-1)
        return scores @ torch.sin(torch.arange(4.0) * torch.ones(4, 4)) * 2


def _of_odd():
    return _of(Odd, "mxfp8[0]")


def test_all_forms_say_the_same():
    found = _of_odd()
    names = [each.name for each in found.layers]
    assert names[0] == "a|<b>&" and found.layers[0].formats["W"] == "mxfp8[0]"
    fields = json.loads(found.to_json())
    assert [each["name"] for each in fields["layers"]] == names and fields["recipe"] == found.recipe
    assert fields["layers"][0]["bits"] == 12 * 8 + 4 * 8 + 4 * 8 + 8
    kept = {each["why"]: each["names"] for each in fields["in_float"]}
    assert kept["never read by a graph"] == ["spare.weight", "spare.bias"]
    assert fields["parameters"][0] == {
        "name": "a|<b>&.weight", "shape": [4, 3, 1, 1], "format": "mxfp8[0]", "values": 12, "bits": 128,
    }  # fmt: skip
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [line["layer"] for line in lines] == names and lines[0]["W"] == "mxfp8[0]"
    assert [int(line["multiply_adds"]) for line in lines] == [each.multiply_adds for each in found.layers]
    rows = [line for line in found.to_markdown().splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(names) and rows[2].startswith("| a\\|\\<b>\\& ")
    assert len({row.replace("\\|", "").count("|") for row in rows}) == 1
    for kind in found.in_float:
        assert str(kind) in " ".join(str(found).split()) and f"- {kind}" in _shown(found.to_markdown())


def _shown(markdown):
    """The text that a reader sees: a sign after a backslash as it is, a pair of stars as emphasis."""
    return re.sub(r"\\(.)|(?<=\S)\*([^*]+)\*", lambda found: found[1] or found[2], markdown)


def test_names_in_markdown_keep_their_stars():
    layer = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)))
    lp = convert(nn.Sequential(*(copy.deepcopy(layer) for _ in range(3))), recipe="bfp8").module
    found = report(lp, torch.randn(2, 4), fold=True)
    assert found.rows()[0][0] == "*.*.0 (9)" and "| *.*.0 (9) " in _shown(found.to_markdown())


def test_each_form_is_written_to_a_file(tmp_path):
    found = _of_odd()
    for form in ("markdown", "json", "csv", "html"):
        text = getattr(found, f"to_{form}")(tmp_path / form)
        assert (tmp_path / form).read_bytes().decode() == text == getattr(found, f"to_{form}")()


class Page(HTMLParser):
    """The cells of a page's tables, its text, and the files it loads; every tag must be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.text, self.loads = [], [], "", []
        self.feed(text), self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if "style" not in self.open else ""
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def _is_page_of(text, found):
    page = Page(text)
    shown = [row for row in page.rows if len(row) == len(found.header)]
    assert shown == [found.header, *found.rows()] and len(page.rows) == len(shown) + 1 + len(found.parameters)
    assert all(line in page.text for line in (*found.totals.values(), *map(str, found.in_float), *found.outside))
    return page


def test_a_page_is_whole_and_loads_nothing():
    for found in (_of_odd(), report(*_converted("vit_b_16"), fold=True)):
        page = _is_page_of(found.to_html(), found)
        assert page.loads == [] and not re.search(r"url\(|@import|<script", found.to_html())


BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_a_browser_shows_the_page(tmp_path):
    found = _of_odd()
    found.to_html(tmp_path / "report.html")
    words = ["--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *words, (tmp_path / "report.html").as_uri()], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    _is_page_of(done.stdout, found)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda y: self.layer(y), lambda y: self.layer(y) + 1, (x,)) * 2


def test_what_a_branch_of_cond_computes_is_called_whole_and_not_counted():
    lp = convert(Branches(), recipe="bfp8[0]").module
    told = str(report(lp, torch.ones(2, 4)))
    assert "inside cond: called whole, only weights are rounded" in told and "(those of cond not counted)" in told
