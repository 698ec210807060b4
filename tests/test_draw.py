"""The picture of a rewritten module."""

import functools
import re
import shutil
import struct
from collections import Counter

import pytest
import shapes
import torch
import torchvision
from torch import nn

import swalp_fx
from swalp_fx import ConvertError, Rule, convert, draw, nodes
from swalp_fx.capture import conversion_of
from swalp_fx.reports.drawing.draw import _roots
from swalp_fx.reports.drawing.fold import RANKS, panels
from swalp_fx.reports.drawing.kinds import Box, ranks
from swalp_fx.reports.drawing.labels import TIMES
from swalp_fx.reports.graphs import inlined

needs_graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")


def _drawn(module, path):
    draw(module, path / "graph.dot")
    return (path / "graph.dot").read_text(encoding="utf-8")


def _source(model, path, x, recipe="bfp8[0]", rules=()):
    recipe = swalp_fx.Recipe.parse(recipe, rules=rules)
    return _drawn(convert(model, recipe=recipe, example_inputs=(x,)).module, path)


X = torch.ones(4, 6)
IMAGES = torch.ones(2, 4, 8, 8)


def _edges(source):
    """(from, to) -> its style."""
    return {(a, b): style for a, b, style in re.findall(r'"p\d+_(\w+)" -> "p\d+_(\w+)" \[(.*)\]', source)}


def _chips(source, name=r"\w+"):
    """The (fill, text) of each part of the nodes of that name."""
    labels = re.findall(rf'"[pq]\d+_{name}" \[label=<(.*)>\]', source)
    return [chip for label in labels for chip in re.findall(r'<td bgcolor="([^"]+)"><font[^>]*>([^<]+)<', label)]


def _boxes(source):
    """The folded blocks: their number, type and how often in a run, and their names."""
    found = re.findall(r'bgcolor="#e4e4e4"><tr><td><b>(\S+) ([^<]*)</b><br/><font[^>]*>([^<]*)<', source)
    return [(number, block.replace(TIMES, "x"), names) for number, block, names in found]


def _titles(source):
    """The number and type of each panel, and its names, with how many are alike."""
    pattern = r'label=<<font color="#222222"><b>([^<]*)</b></font><font[^>]*>(.*?)<br align="left"/></font>'
    return [(block, names.replace('<br align="left"/>', " ").strip()) for block, names in re.findall(pattern, source)]


@pytest.mark.parametrize("kind", shapes.ALL)
def test_every_quantize_node_is_drawn_with_its_formats(kind, tmp_path):
    model, inputs = shapes.made(kind)
    module, _ = convert(model, recipe="W=fixed8.6 A=bfp8[0] E=e5m2", example_inputs=inputs)
    source = _drawn(module, tmp_path)
    targets = Counter(node.target for made in module.graphs for node in inlined(made.graph_module).graph.nodes)
    # A number, a tensor without dimensions, is one block: [0] is not said of it.
    specs = Counter(text.split(" ")[-1].removesuffix("[0]") for _, text in _chips(source) if text[-5:] != "float")
    outputs = targets[nodes.quantize_output]
    weights = targets[nodes.quantize_weight]
    assert specs == +Counter({"fixed8.6": weights, "bfp8": outputs, "e5m2": outputs})
    assert source.count("{") == source.count("}")


def test_the_graph_of_a_residual_block(tmp_path):
    source = _source(shapes.PreBlock(4, 4, 1), tmp_path, IMAGES)
    edges = {(a, b): "dashed" if "dashed" in style else "solid" for (a, b), style in _edges(source).items()}
    assert edges == {
        ("x", "bn1"): "dashed", ("bn1_weight_q", "bn1"): "solid",
        ("bn1", "bn1_q"): "dashed", ("bn1_q", "relu_1"): "solid", ("relu_1", "relu_1_q"): "dashed",
        ("relu_1_q", "conv1"): "solid", ("conv1_weight_q", "conv1"): "solid", ("conv1", "conv1_q"): "dashed",
        ("conv1_q", "bn2"): "solid", ("bn2_weight_q", "bn2"): "solid",
        ("bn2", "bn2_q"): "dashed", ("bn2_q", "relu_2"): "solid", ("relu_2", "relu_2_q"): "dashed",
        ("relu_2_q", "conv2"): "solid", ("conv2_weight_q", "conv2"): "solid", ("conv2", "conv2_q"): "dashed",
        ("conv2_q", "iadd"): "solid", ("x", "iadd"): "dashed", ("iadd", "output"): "dashed",
    }  # fmt: skip
    assert [text for _, text in _chips(source, "bn1_weight_q")] == ["weight bfp8[0]", "bias bfp8[0]"]
    assert "PreBlock" in source and "key" not in source and "training" not in source


def test_what_moves_stays_rounded_and_a_role_in_float_is_white(tmp_path):
    source = _source(shapes.Branchy(), tmp_path, IMAGES[:, :3], "A=bfp8 E=float W=float")
    edges = _edges(source)
    assert "solid" in edges["left_q", "cat"] and "solid" in edges["cat", "norm"]
    (activation, error) = _chips(source, "left_q")
    assert activation[0] != "#ffffff" and error == ("#ffffff", "E ↑ float")
    assert "weight float" not in source  # a layer's own, which the layer stands for


def test_an_error_signal_alone_leaves_the_forward_in_float(tmp_path):
    source = _source(shapes.Tied(), tmp_path, X, "E=bfp8")
    assert "dashed" in _edges(source)["first_q", "tanh"]
    assert [fill == "#ffffff" for fill, _ in _chips(source, "first_q")] == [True, False]


def test_a_parameter_that_forward_reads_by_itself(tmp_path):
    assert _chips(_source(shapes.Direct(), tmp_path, X, "A=bfp8"), "scale") == [("#ffffff", "scale float")]


def test_parameters_are_named_as_their_reader_names_them(tmp_path):
    texts = [text for _, text in _chips(_source(shapes.Recurrent(), tmp_path, torch.ones(2, 5, 6)))]
    assert {"in_proj_weight bfp8[0]", "out_proj.weight bfp8[0]", "weight_ih_l0 bfp8[0]"} <= set(texts)
    assert "weight bfp8[0]" in [text for _, text in _chips(_source(shapes.Normed(), tmp_path, torch.ones(2, 4, 8)))]


def _frames(source):
    return [name for name in re.findall(r'subgraph "cluster_\w+[^"]*" {\n.*label="([^"]*)"', source) if name]


def test_modules_are_frames_one_inside_the_other(tmp_path):
    model = nn.Sequential(shapes.Convnet(), nn.Sequential(nn.Sequential(nn.Linear(10, 10))))
    source = _source(model, tmp_path, IMAGES[:, :3])
    assert _frames(source) == ["0", "1", "1.0"]


class Branching(nn.Module):
    """It cannot be captured whole."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        for child in self.children():
            x = child(x) if x.sum() > 0 else x
        return x


def _in_pieces(path, **children):
    """Drawn in eval mode: there only values decide."""
    return _source(Branching(**children).eval(), path, X)


def test_a_small_model_in_pieces_is_drawn_piece_by_piece(tmp_path):
    source = _in_pieces(tmp_path, first=shapes.Tied(), second=nn.Linear(6, 6))
    assert _frames(source) == ["first", "second"]
    assert '"p0_first_second"' in source and '"p1_second"' in source


def test_graphs_that_look_alike_are_drawn_once(tmp_path):
    module, _ = convert(shapes.Heads())
    module(X), module(X[:1]), module(X[:3]), module.eval()(X)
    assert len(module.graphs) > 2
    assert _drawn(module.train(), tmp_path).count("<i>output</i>") == 1
    assert '"p0_sum' in _drawn(module, tmp_path) and '"p0_sum' not in _drawn(module.eval(), tmp_path)


class States(nn.Module):
    """Reads two of a layer's outputs."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 6, batch_first=True)

    def forward(self, x):
        y, (state, _) = self.lstm(x)
        return y.mean(1) + state[0]


def test_a_layer_with_several_outputs_is_one_box(tmp_path):
    source = _source(States(), tmp_path, torch.ones(2, 5, 6), "bfp8[0] whole=lstm")
    assert source.count("<b>LSTM</b>") == 1
    assert "lstm@1, lstm@2" in source and {("lstm_1", "lstm_1_q"), ("lstm_1", "lstm_2_q")} <= _edges(source).keys()


def test_a_checkpoint_is_drawn_as_what_it_runs(tmp_path):
    source = _source(shapes.Checkpointed(), tmp_path, X)
    assert _frames(source) == ["blocks.0", "blocks.1"] and "checkpoint" not in source
    assert "solid" in _edges(source)["blocks_0_2_q", "blocks_1_0"]


# ---- large models: blocks that are alike are drawn once ------------------------------------------


class Block(nn.Module):
    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.norm, self.inner, self.act, self.outer = nn.LayerNorm(6), nn.Linear(6, 8), activation(), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.outer(self.act(self.inner(self.norm(x))))


class Stack(nn.Module):
    """Blocks one behind the other, between two layers."""

    def __init__(self, *blocks):
        super().__init__()
        self.stem, self.blocks, self.head = nn.Linear(6, 6), nn.ModuleList(blocks), nn.Linear(6, 6)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _stack(*activations):
    return Stack(*map(Block, activations))


R, G = nn.ReLU, nn.GELU


def test_a_run_of_blocks_is_one_box_and_one_panel(tmp_path):
    source = _source(_stack(R, R, R, R, R), tmp_path, X)
    assert _boxes(source) == [("①", "Block x 5", "blocks.0 … 4")]
    assert _titles(source) == [("① Block", "5 alike: blocks.0 … 4")]
    texts = Counter(text for _, text in _chips(source))
    assert texts["A ↓ bfp8[0]"] == 1 + 5  # the stem's and a block's


def test_blocks_that_come_again_are_drawn_once(tmp_path):
    source = _source(_stack(R, R, G, R, G, G, G), tmp_path, X)
    assert [box[:2] for box in _boxes(source)] == [
        ("①", "Block x 2"), ("②", "Block"), ("①", "Block"), ("②", "Block x 3"),
    ]  # fmt: skip
    assert _titles(source) == [
        ("① Block", "3 alike: blocks.0, blocks.1, blocks.3"),
        ("② Block", "4 alike: blocks.2, blocks.4 … 6"),
    ]


def test_blocks_in_other_formats_are_not_alike(tmp_path):
    rules = (Rule("blocks.2.inner", weight="bfp4[0]"),)
    source = _source(_stack(R, R, R, R, R), tmp_path, X, rules=rules)
    assert [box[1:] for box in _boxes(source)] == [
        ("Block x 2", "blocks.0, blocks.1"), ("Block x 2", "blocks.3, blocks.4"),
    ]  # fmt: skip
    assert [text for _, text in _chips(source)].count("weight bfp4[0]") == 1


def test_blocks_of_other_sizes_are_alike(tmp_path):
    blocks = [Block() for _ in range(4)]
    blocks[1].inner, blocks[1].outer = nn.Linear(6, 99), nn.Linear(99, 6)
    assert _boxes(_source(Stack(*blocks), tmp_path, X)) == [("①", "Block x 4", "blocks.0 … 3")]


def test_a_block_that_is_called_again_has_its_parameters_once(tmp_path):
    source = _source(Stack(*[Block()] * 5), tmp_path, X)
    assert _boxes(source) == [("①", "Block x 5", "blocks.0@1 … 5")]
    assert Counter(text for _, text in _chips(source))["weight bfp8[0]"] == 2 + 3  # stem, head; norm, inner, outer
    assert "inner@" not in source


def test_a_weight_of_another_block_comes_in_beside_the_input(tmp_path):
    model = _stack(R, R, R, R)
    for block in model.blocks:
        block.inner.weight = model.blocks[0].inner.weight
    source = _source(model, tmp_path, X)
    assert [box[1:] for box in _boxes(source)] == [("Block x 3", "blocks.1 … 3")]
    # The stem's and the head's; norm, inner and outer of the first block; and of those that are alike.
    assert Counter(text for _, text in _chips(source))["weight bfp8[0]"] == 2 + 3 + 3


class Gathering(Block):
    def forward(self, *x):
        return super().forward(torch.cat(x))


class DenselyGathering(Stack):
    def forward(self, x):
        kept = [self.stem(x)]
        for block in self.blocks:
            kept.append(block(*kept))
        return self.head(torch.cat(kept))


class Parallel(Stack):
    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.cat([block(x) for block in self.blocks]))


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (DenselyGathering(*(Gathering() for _ in range(4))), "blocks.0 … 3, each reads all before it"),
        (Parallel(*map(Block, [R] * 4)), "blocks.0 … 3, side by side"),
    ],
    ids=["dense", "parallel"],
)
def test_a_run_says_how_its_blocks_hang_together(model, names, tmp_path):
    assert _boxes(_source(model, tmp_path, X)) == [("①", f"{type(model.blocks[0]).__name__} x 4", names)]


def test_blocks_that_others_read_between_stay_apart(tmp_path):
    """One box would hide which of them is read."""

    class Taps(Stack):
        def forward(self, x):
            x, taps = self.stem(x), []
            for block in self.blocks:
                x = block(x)
                taps.append(x)
            return self.head(sum(torch.sigmoid(tap) for tap in taps))

    assert len(_boxes(_source(Taps(*map(Block, [R] * 4)), tmp_path, X))) == 4


def test_a_sequence_that_repeats_is_a_block_too(tmp_path):
    layers = [layer for _ in range(10) for layer in (nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6))]
    source = _source(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), *layers, nn.Linear(6, 6)), tmp_path, X)
    assert _boxes(source) == [("①", "Linear, ReLU, LayerNorm x 10", "2 … 31")]
    assert _titles(source) == [("① Linear, ReLU, LayerNorm", "10 alike: 2 … 31")]


def test_panels_show_the_outermost_frames_only(tmp_path):
    inner = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 6))
    source = _source(nn.Sequential(nn.Linear(6, 6), inner, *_stack(R, R, R, R).blocks, nn.Linear(6, 6)), tmp_path, X)
    assert _frames(source) == ["1"]


class Flat(nn.Module):
    """Nothing repeats, and there is no module but the root to fold."""

    def __init__(self, steps):
        super().__init__()
        self.choices = [(step * step + step // 3) % 5 for step in range(steps)]

    def forward(self, x):
        for choice in self.choices:
            x = (torch.sin, torch.exp, torch.tanh, torch.abs, torch.sqrt)[choice](x)
        return x


def _layers_drawn(panel, panel_of):
    """Layers of the graph that a panel stands for, those in its boxes as often as they are called."""
    inside = (
        len(item.calls) * _layers_drawn(panel_of[item.kind], panel_of) for item in panel.items if isinstance(item, Box)
    )
    return sum(inside) + sum(bool(item.operation) for item in panel.items if not isinstance(item, Box))


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("googlenet", "densenet", "mobilenet_v3_small")]


@pytest.fixture(scope="module", params=["resnet18", "vgg16", "swin", "flat", *SLOW])
def large(request):
    return _large(request.param)


LARGE = {  # fewer blocks than in torchvision if those take long to trace
    "flat": lambda: Flat(200),
    "googlenet": lambda: torchvision.models.googlenet(init_weights=False),
    "densenet": lambda: torchvision.models.DenseNet(4, (6, 12), 8),
    "swin": lambda: torchvision.models.SwinTransformer([4, 4], 12, [2, 4], [2, 2], [7, 7]),
}


@functools.cache
def _large(name):
    with torch.device("meta"):  # weights are not drawn
        model = LARGE[name]() if name in LARGE else torchvision.models.get_model(name)
        x = torch.empty(2, 3, 224, 224)
    return convert(model, example_inputs=(x,)).module


def test_no_panel_is_too_long_and_no_layer_is_lost(large):
    (root,) = _roots(conversion_of(large))
    found = panels([root])
    panel_of = {panel.kind: panel for panel in found}
    assert _layers_drawn(found[0], panel_of) == sum(bool(mark.operation) for mark in root.marks)
    assert all(ranks(panel.items) <= RANKS for panel in found)
    assert [panel.kind.number for panel in found] == list(range(len(found)))


def test_every_edge_joins_two_nodes(large, tmp_path):
    draw(large, tmp_path / "graph.dot")
    source = (tmp_path / "graph.dot").read_text(encoding="utf-8")
    ids = {*re.findall(r'^ *"(\w+)" \[label', source, re.MULTILINE), "legend"}
    ends = re.findall(r'"(\w+)" -> "?(\w+)"?', source)
    assert ends and ids.issuperset(end for pair in ends for end in pair)


@needs_graphviz
@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "vgg16"])
def test_a_network_fits_on_a_page(name, tmp_path):
    draw(_large(name), tmp_path / "g.png")
    width, height = struct.unpack(">II", (tmp_path / "g.png").read_bytes()[16:24])
    assert 800 < width < 4000 and 800 < height < 4000


# ---- files ---------------------------------------------------------------------------------------


@needs_graphviz
@pytest.mark.parametrize(("name", "start"), [("g.svg", b"<?xml"), ("g.png", b"\x89PNG"), ("g.pdf", b"%PDF")])
def test_pictures(name, start, tmp_path):
    model, inputs = shapes.made(shapes.PreResNet)
    draw(convert(model, example_inputs=inputs).module, tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@needs_graphviz
def test_graphviz_reads_every_shape(tmp_path):
    for kind in shapes.ALL:
        model, inputs = shapes.made(kind)
        draw(convert(model, example_inputs=inputs).module, tmp_path / f"{kind.__name__}.svg")


def test_without_graphviz_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    module, _ = convert(nn.Sequential(nn.Linear(2, 2)), example_inputs=(torch.ones(1, 2),))
    with pytest.raises(RuntimeError, match=r"g\.svg without Graphviz; install it \(apt-get.*\), or draw to .*g\.dot"):
        draw(module, tmp_path / "g.svg")
    assert not list(tmp_path.iterdir())


def test_bad_input(tmp_path):
    module, _ = convert(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"graph\.jpg: its name must end in one of \.svg, \.png, \.pdf, \.dot, \.gv"):
        draw(module, tmp_path / "graph.jpg")
    with pytest.raises(ConvertError, match="draw takes the module that convert returns, not a Linear"):
        draw(nn.Linear(2, 2), tmp_path / "graph.dot")
    with pytest.raises(ConvertError, match="draw finds no graph yet; call the module once, or give example_inputs"):
        draw(module, tmp_path / "graph.dot")
    assert not list(tmp_path.iterdir())


def test_it_leaves_the_module_as_it_was(tmp_path):
    model, (x,) = shapes.made(shapes.Convnet)
    module, _ = convert(model, example_inputs=(x,))
    (made,) = module.graphs
    code = made.code
    draw(module, tmp_path / "graph.dot")
    assert made.code == code and module.training and list(module.graphs) == [made]
    assert swalp_fx.draw is draw and torch.isfinite(module(x)).all()
