"""The report of a rewritten module."""

import pytest
import shapes
import torch
from torch import nn

from swalp_fx.capture import ConvertError
from swalp_fx.convert import convert
from swalp_fx.report import report


def _report(kind, recipe, shown=True):
    model, inputs = shapes.made(kind)
    return report(convert(model, recipe=recipe).module, *(inputs if shown else ()))


def test_a_convnet():
    expected = """\
layer    operation    output    W        A        E     G     M      parameters
-------  -----------  --------  -------  -------  ----  ----  ---  ------------
0        Conv2d       2x4x8x8   bfp8[0]  bfp8[0]  e5m2  bfp4  -             112
1        BatchNorm2d  2x4x8x8   bfp8[0]  bfp8[0]  e5m2  bfp4  -               8
2        ReLU         2x4x8x8   -        bfp8[0]  e5m2  -     -
3        MaxPool2d    2x4x4x4   -        bfp8[0]  e5m2  -     -
6        Linear       2x10      bfp8[0]  -        -     bfp4  -             650

parameters  770 values in 6 tensors: 6 in bfp8[0]
bits        6,160, 25.0% of 24,640 in float32 (shared exponents not counted)
outputs     4 of 5 rounded
rounding    stochastic

in float:
  momentum: the recipe says so
  input_1: the model's input
  6: the model's output
  Dropout, Flatten: no new numbers"""
    assert _report(shapes.Convnet, "W=bfp8[0] A=bfp8[0] E=e5m2 G=bfp4") == expected


def test_without_inputs_there_are_no_shapes():
    assert _report(shapes.Convnet, "bfp8", shown=False).splitlines()[0].split() == [
        "layer", "operation", "W", "A", "E", "G", "M", "parameters",
    ]  # fmt: skip


def _rows(text):
    return [line.split() for line in text.split("\n\n")[0].splitlines()[2:]]


def test_shared_parameters_are_counted_once():
    assert [row[-1] for row in _rows(_report(shapes.Tied, "bfp8"))] == ["42", "-", "6"]
    assert [row[-1] for row in _rows(_report(shapes.Twice, "bfp8"))] == ["42", "-", "12", "bfp8", "bfp8"]


def test_parameters_read_by_themselves_have_a_row():
    rows = _rows(_report(shapes.Direct, "bfp8"))
    assert ["scale", "parameter", "6", "bfp8", "-", "-", "bfp8", "bfp8", "6"] in rows
    rows = _rows(_report(shapes.Direct, "A=bfp8"))
    assert ["scale", "parameter", "6", "-", "-", "-", "-", "-", "6"] in rows


def test_what_stayed_in_float_and_why():
    text = _report(shapes.Unused, "bfp8")
    assert "  spare.weight, spare.bias: never read" in text
    assert "parameters  90 values in 6 tensors: 4 in bfp8\nbits        864, 30.0% of 2,880" in text
    assert "  inside lstm, attention: called whole, with quantized weights" in _report(shapes.Recurrent, "bfp8")


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
