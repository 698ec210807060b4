"""The picture of a rewritten module."""

import re
import shutil

import pytest
import shapes
import torch
from torch import nn

import swalp_fx
from swalp_fx import ConvertError, convert, draw, nodes

needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")


def _source(model, path, recipe="bfp8[0]"):
    draw(convert(model, recipe=recipe).module, path / "graph.dot")
    return (path / "graph.dot").read_text()


def _edges(source):
    """(from, to) -> its style."""
    return {(a, b): style for a, b, style in re.findall(r'"p\d+_(\w+)" -> "p\d+_(\w+)" \[(.*)\]', source)}


def _chips(source, name):
    """The (fill, text) of each part of a node."""
    (label,) = re.findall(rf'"p0_{name}" \[label=<(.*)>\]', source)
    return re.findall(r'<td bgcolor="([^"]+)"><font[^>]*>([^<]+)<', label)


@pytest.mark.parametrize("kind", shapes.ALL)
def test_every_quantize_node_is_drawn_with_its_formats(kind, tmp_path):
    model, _ = shapes.made(kind)
    module = convert(model, recipe="W=fixed8.6 A=bfp8[0] E=e5m2").module
    draw(module, tmp_path / "graph.dot")
    source = (tmp_path / "graph.dot").read_text()
    for node in module.graph.nodes:
        if node.target is nodes.quantize_weight:
            ((_, text),) = _chips(source, node.name)
            assert text == f"{node.args[0].target.rpartition('.')[2]} fixed8.6"
        elif node.target is nodes.quantize_output:
            assert [text for _, text in _chips(source, node.name)] == ["A ↓ bfp8[0]", "E ↑ e5m2"]
    assert source.count("{") == source.count("}")


def test_the_graph_of_a_residual_block(tmp_path):
    source = _source(shapes.PreBlock(4, 4, 1), tmp_path)
    edges = {(a, b): "dashed" if "dashed" in style else "solid" for (a, b), style in _edges(source).items()}
    assert edges == {
        ("x", "bn1"): "dashed", ("bn1_weight_q", "bn1"): "solid", ("bn1_bias_q", "bn1"): "solid",
        ("bn1", "bn1_q"): "dashed", ("bn1_q", "relu"): "solid", ("relu", "relu_q"): "dashed",
        ("relu_q", "conv1"): "solid", ("conv1_weight_q", "conv1"): "solid", ("conv1", "conv1_q"): "dashed",
        ("conv1_q", "bn2"): "solid", ("bn2_weight_q", "bn2"): "solid", ("bn2_bias_q", "bn2"): "solid",
        ("bn2", "bn2_q"): "dashed", ("bn2_q", "relu_1"): "solid", ("relu_1", "relu_1_q"): "dashed",
        ("relu_1_q", "conv2"): "solid", ("conv2_weight_q", "conv2"): "solid", ("conv2", "conv2_q"): "dashed",
        ("conv2_q", "iadd"): "solid", ("x", "iadd"): "dashed", ("iadd", "output"): "dashed",
    }  # fmt: skip
    assert "PreBlock" in source and "key" not in source and "training" not in source


def test_what_moves_stays_rounded_and_a_role_in_float_is_white(tmp_path):
    source = _source(shapes.Branchy(), tmp_path, "A=bfp8 E=float W=float")
    edges = _edges(source)
    assert "solid" in edges["left_q", "cat"] and "solid" in edges["cat", "norm"]
    (activation, error) = _chips(source, "left_q")
    assert activation[0] != "#ffffff" and error == ("#ffffff", "E ↑ float")
    assert "weight float" not in source  # a layer's own, which the layer stands for


def test_an_error_signal_alone_leaves_the_forward_in_float(tmp_path):
    source = _source(shapes.Tied(), tmp_path, "E=bfp8")
    assert "dashed" in _edges(source)["first_q", "tanh"]
    assert [fill == "#ffffff" for fill, _ in _chips(source, "first_q")] == [True, False]


def test_a_parameter_that_forward_reads_by_itself(tmp_path):
    model, _ = shapes.made(shapes.Direct)
    assert _chips(_source(model, tmp_path, "A=bfp8"), "scale") == [("#ffffff", "scale float")]


def test_modules_are_frames_one_inside_the_other(tmp_path):
    source = _source(nn.Sequential(shapes.Convnet(), nn.Sequential(nn.Sequential(nn.Linear(10, 10)))), tmp_path)
    names = re.findall(r'subgraph cluster_\w+ {\n.*label="([^"]*)"', source)
    assert names == ["0", "1", "1.0"]


def test_a_model_in_parts_is_drawn_part_by_part(tmp_path):
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = shapes.Tied(), nn.Linear(6, 6)

        def forward(self, x):
            return self.second(self.first(x)) if x.sum() > 0 else x

    with pytest.warns(UserWarning, match="cannot trace Loop"):
        module, _ = convert(Loop())
    draw(module, tmp_path / "graph.dot")
    source = (tmp_path / "graph.dot").read_text()
    assert re.findall(r'label="(first|second)"', source) == ["first", "second"]
    assert '"p0_second"' in source and '"p1_linear"' in source


@needs_graphviz
@pytest.mark.parametrize(("name", "start"), [("g.svg", b"<?xml"), ("g.png", b"\x89PNG"), ("g.pdf", b"%PDF")])
def test_pictures(name, start, tmp_path):
    model, _ = shapes.made(shapes.PreResNet)
    draw(convert(model).module, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@needs_graphviz
def test_graphviz_reads_every_shape(tmp_path):
    for kind in shapes.ALL:
        model, _ = shapes.made(kind)
        draw(convert(model).module, tmp_path / f"{kind.__name__}.svg")


def test_without_graphviz_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    module, _ = convert(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match=r"g\.svg without Graphviz; install it \(apt-get.*\), or draw to .*g\.dot"):
        draw(module, tmp_path / "g.svg")
    assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path):
    module, _ = convert(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"graph\.jpg: its name must end in one of \.svg, \.png, \.pdf, \.dot, \.gv"):
        draw(module, tmp_path / "graph.jpg")
    with pytest.raises(ConvertError, match="draw takes the module that convert returns, not a Linear"):
        draw(nn.Linear(2, 2), tmp_path / "graph.dot")


def test_it_leaves_the_module_as_it_was(tmp_path):
    model, (x,) = shapes.made(shapes.Convnet)
    module, _ = convert(model)
    code = module.code
    draw(module, tmp_path / "graph.dot")
    assert module.code == code and module.training
    assert swalp_fx.draw is draw and torch.isfinite(module(x)).all()
