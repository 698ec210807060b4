"""classify, assign, insert, verify."""

import pytest
import shapes
import torch
import torchvision
from graphs import converted, rewritten
from marks import Traced, assert_refused, rounded, traced
from torch import nn
from torch.fx import Graph

from swalp_fx import Recipe, check, nodes
from swalp_fx.passes import insert
from swalp_fx.passes.assign import SITE
from swalp_fx.passes.names import PART, place
from swalp_fx.passes.proof import VerifyError
from swalp_fx.passes.rounding import Rounding
from swalp_fx.random import SITES, stream_of

RECIPE = Recipe.parse("bfp8[0]")


def _parts(kind):
    """Name or place -> part, of each node except a graph's inputs and its own constants."""
    _, made = traced(kind, RECIPE)
    return {node.name: node.meta[PART] for node in made.captured.nodes if node.meta[PART] not in ("parameter", "state")}


def _count(graph, function):
    return len(graph.find_nodes(op="call_function", target=function))


# classify


def test_what_is_written_into_a_buffer_set_before_is_state():
    class Counts(nn.Module):
        inputs = (torch.Size([3, 4]),)

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            self.seen = self.seen * 0.9 + x.detach().mean(0) * 0.1
            self.seen.add_(0.1)
            return self.layer(x + self.seen)

    assert "add_" not in _parts(Counts)  # it is state
    assert check(Counts(), torch.randn(3, 4))


def test_parts_of_a_residual_block():
    class Block(shapes.PreBlock):
        inputs = (torch.Size([2, 4, 6, 6]),)

        def __init__(self):
            super().__init__(4, 8, 2)

    _, made = traced(Block, RECIPE)
    places = {place(node): node.meta[PART] for node in made.captured.nodes}
    assert {name: part for name, part in places.items() if part not in ("parameter", "state")} == {
        "x": "input",
        "bn1": "norm",
        "relu@1": "activation",
        "conv1": "compute",
        "bn2": "norm",
        "relu@2": "activation",
        "conv2": "compute",
        "downsample": "compute",
        "iadd": "arithmetic",
        "output": "output",
    }


def test_what_only_leaves_is_exit():
    parts = _parts(shapes.Plain)
    assert parts["sigmoid"] == "activation" and parts["y"] == "movement"
    assert parts["argmax"] == "exit"


def test_sizes_that_change_are_numbers():
    class Sizes(nn.Module):
        inputs = (torch.Size([2, 3]),)

        def forward(self, x):
            n = torch.tensor(x.shape[0])
            return x.tanh() * n.mul(2)

    assert [_parts(Sizes)[name] for name in ("n", "mul")] == ["number"] * 2


def test_writes_into_a_buffer_are_state():
    _, made = traced(shapes.Counting, RECIPE)
    parts = {node.name: node.meta[PART] for node in made.captured.nodes}
    assert [parts[name] for name in ("mul_", "add_")] == ["state"] * 2
    assert parts["y_1"] == "arithmetic" and parts["setitem"] == "movement"


@pytest.mark.parametrize("recipe", ["bfp8", "A=bfp8"])
def test_an_embedding_of_positions_is_a_layer(recipe):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = nn.Embedding(8, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x + self.embedding(torch.arange(x.size(1))))

    made = rewritten(Positions(), recipe, torch.randn(2, 3, 4))
    assert [node.meta[PART] for node in made.captured.nodes if node.name in ("arange", "embedding")] == [
        "number",
        "compute",
    ]
    assert rounded(made.graph) == ["embedding", "add"]


def _hooked(x):
    x.register_hook(lambda gradient: gradient * 3)
    return x.tanh()


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda x: torch.special.bessel_j0(x) + 1, {"bessel_j0": "arithmetic"}),
        (lambda x: x.data.T + x.mT + x.H, {"data": "movement", "T": "movement", "mT": "movement", "H": "movement"}),
        (_hooked, {"register_hook": "movement"}),
    ],
    ids=["what no table names", "attributes", "a hook"],
)
def test_parts_of_what_the_front_end_spells_in_its_own_way(call, parts):
    class Calls(nn.Module):
        def forward(self, x):
            return call(x * 2).exp()

    made = rewritten(Calls(), RECIPE, torch.randn(3, 3, requires_grad=True))
    for name, part in parts.items():
        found = [node.meta[PART] for node in made.captured.nodes if _spelled(node) == name]
        assert found and set(found) == {part}, name


def _spelled(node):
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return {"_get_data_attr": "data", "numpy_T": "T", "matrix_H": "H", "special_bessel_j0": "bessel_j0"}.get(name, name)


# assign


def test_a_stream_says_which_place_it_is_of():
    _, made = traced(shapes.Twice, RECIPE)
    sites = {place(node): node.meta[SITE] for node in made.captured.nodes if SITE in node.meta}
    assert {name: site.weight.stream for name, site in sites.items() if site.weight} == {
        name: stream_of(name) for name in ("layer.weight", "layer.bias", "norm.weight", "norm.bias")
    }
    assert {name: site.output.stream for name, site in sites.items() if site.output} == {
        "layer@1": stream_of("layer", "linear", "0", ""),
        "relu": stream_of("relu", "relu", "0", ""),
        "norm@1": stream_of("norm", "batch_norm", "0", ""),
        "layer@2": stream_of("layer", "linear", "1", ""),
    }


def test_two_places_with_one_hash_have_two_streams():
    names, x = ("layer100484", "layer104043"), torch.randn(2, 2)
    assert stream_of(f"{names[0]}.weight") == stream_of(f"{names[1]}.weight")
    model = nn.Sequential()
    for name in names:
        model.add_module(name, nn.Linear(2, 2, bias=False))
    streams = [
        [node.args[2] for node in _nodes(rewritten(model, RECIPE, x).graph, nodes.quantize_weight)] for _ in range(2)
    ]
    assert len(set(streams[0])) == 2 and streams[0] == streams[1]


# insert


def test_the_captured_graph_stays_as_it_is():
    _, made = traced(shapes.Convnet, RECIPE)
    before = str(made.captured)
    assert insert(made.captured, keyed=True) is not made.captured and str(made.captured) == before


@pytest.mark.parametrize(
    ("name", "weights", "outputs"),
    # vgg11_bn: 8 convolutions and batch norms each, 3 linear layers, 10 ReLU, 5 + 1 pools, without the logits.
    # resnet18: 20 convolutions and batch norms each, 17 ReLU, 8 sums, 2 pools.
    [("vgg11_bn", 38, 34), ("resnet18", 62, 67)],
)
def test_every_parameter_and_every_output_but_the_logits(name, weights, outputs):
    with torch.device("meta"):
        graph = rewritten(getattr(torchvision.models, name)(), RECIPE, torch.randn(2, 3, 64, 64)).graph
    assert _count(graph, nodes.quantize_weight) == weights
    assert _count(graph, nodes.quantize_output) == outputs


def test_a_rounding_has_the_arguments_of_its_node_by_name():
    made = traced(shapes.Convnet, RECIPE)[1]
    found = list(Rounding.all(made.graph))
    assert {each.node for each in found} == {*_nodes(made.graph, nodes.quantize_weight)} | {
        *_nodes(made.graph, nodes.quantize_output)
    }
    weight, output = (next(each for each in found if role in each.quantizers) for role in "WA")
    assert (place(weight.source), weight.stream, weight.rounding) == ("0.weight", stream_of("0.weight"), "stochastic")
    assert (weight.quantizers, output.quantizers) == ({"W": "bfp8[0]"}, {"A": "bfp8[0]", "E": "bfp8[0]"})
    assert weight.forward == "bfp8[0]" and Rounding.of(weight.node, "W") == weight
    assert Rounding.of(weight.node, "A") is Rounding.of(weight.source) is Rounding.of(3) is None
    assert output.in_place and output.key is weight.key is next(iter(made.graph.nodes))


def test_a_line_of_the_code_reads_as_it_runs():
    code = traced(shapes.Convnet, RECIPE)[1].code
    assert "def forward(self, key, _0_weight, _0_bias, " in code
    stream = stream_of("0", "conv2d", "0", "")
    assert f"_0_q = swalp_fx_quantize_output(_0, key, {stream}, 'bfp8[0]', 'bfp8[0]', 'stochastic', in_place = " in code
    assert "_0 = torch.conv2d(input_1, _0_weight_q, _0_bias_q, (1, 1), (1, 1), (1, 1), 1)" in code


@pytest.mark.parametrize(("kind", "count"), [(shapes.Tied, 3), (shapes.Twice, 4), (shapes.Direct, 3)])
def test_a_parameter_is_quantized_once_however_it_is_read(kind, count):
    assert _count(traced(kind, RECIPE)[1].graph, nodes.quantize_weight) == count


@pytest.mark.parametrize(
    ("recipe", "weights", "outputs", "keyed"),
    [
        ("float", 0, 0, False),
        ("float W=bfp8", 6, 0, True),
        ("float A=bfp8", 0, 4, True),
        ("float E=bfp8", 0, 4, True),
        ("float G=bfp8 M=bfp8", 0, 0, False),
        ("bfp8 rounding=nearest", 6, 4, False),
    ],
)
def test_a_role_in_float_has_no_node(recipe, weights, outputs, keyed):
    graph = traced(shapes.Convnet, Recipe.parse(recipe))[1].graph
    assert [_count(graph, f) for f in (nodes.quantize_weight, nodes.quantize_output)] == [weights, outputs]
    assert (next(iter(graph.nodes)).name == "key") == keyed


def test_inserted_nodes_keep_the_place_of_what_they_serve():
    (node,) = [node for node in traced(shapes.PreResNet, RECIPE)[1].graph.nodes if node.name == "blocks_1_conv1_q"]
    assert "self.conv1(self.relu(self.bn1(x)))" in node.stack_trace
    assert place(node.args[0]) == "blocks.1.conv1"


def test_what_a_buffer_is_set_to_is_rounded():
    class Carried(shapes.Carried):
        def forward(self, x):
            self.hidden = torch.tanh(self.first(x) + self.second(self.hidden.detach())).detach()
            return self.second(x)

    assert rounded(traced(shapes.Carried, RECIPE)[1].graph) == ["first", "second", "add", "tanh"]
    assert rounded(traced(Carried, RECIPE)[1].graph) == ["first", "second@1", "add", "tanh"]


# checkpoints


def test_a_checkpoint_changes_no_number():
    """Its graph rounds like its blocks without a checkpoint, by the same streams, and not the model's outputs."""

    class Plain(shapes.Checkpointed):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    found = []
    for kind in (shapes.Checkpointed, Plain):
        torch.manual_seed(0)
        model, inputs = shapes.made(kind)
        for block in model.blocks:
            block[1].p = 0.0
        low = converted(model, "bfp4[0]")
        x = inputs[0].clone().requires_grad_()
        torch.manual_seed(1)
        out = low(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(parameter.grad for parameter in low.parameters())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_in_a_checkpoint_weights_come_rounded_and_streams_are_its_own():
    _, made = traced(shapes.Checkpointed, RECIPE)
    bodies = [body.graph for _, body in made.graph_module.named_children()]
    assert _count(made.graph, nodes.quantize_weight) == 4 and len(bodies) == 2
    assert [_count(body, nodes.quantize_weight) for body in bodies] == [0, 0]
    found = [node.args[2] for body in bodies for node in _nodes(body, nodes.quantize_output)]
    assert len(found) == len(set(found)) == 3  # the model returns the last tanh


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_derived_weight_is_rounded_and_what_derives_it_is_not(checkpointed):
    class Derived(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
            self.orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(8, 8, bias=False))

        def forward(self, x):
            x = self.orthogonal(x)
            return (
                torch.utils.checkpoint.checkpoint(self.conv, x, use_reentrant=False) if checkpointed else self.conv(x)
            )

    made = rewritten(Derived(), RECIPE, torch.randn(2, 4, 8))
    graphs = [made.graph, *(body.graph for _, body in made.graph_module.named_children())]
    weights = [place(node.args[0]) for graph in graphs for node in _nodes(graph, nodes.quantize_weight)]
    assert sorted(weights) == ["conv.bias", "conv.weight", "orthogonal.weight"]


def test_a_weight_that_is_derived_twice_is_rounded_twice():
    weights = [place(node.args[0]) for node in _nodes(traced(shapes.Normed, RECIPE)[1].graph, nodes.quantize_weight)]
    assert weights.count("spectral.weight") == 2


# verify: each way of being wrong, made by hand in a right graph


def _nodes(graph: Graph, function):
    return graph.find_nodes(op="call_function", target=function)


def _of(graph, name):
    (node,) = [node for node in graph.nodes if node.name == name]
    return node


def _unquantized(graph):
    node = _of(graph, "relu_q")
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def _quantized_twice(graph):
    node = _of(graph, "relu_q")
    with graph.inserting_after(node):
        again = graph.create_node("call_function", node.target, (node, node.args[1], 99, *node.args[3:]))
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def _quantized_beside(graph):
    node = _of(graph, "relu_q")
    with graph.inserting_after(node):
        beside = graph.create_node("call_function", node.target, (node.args[0], node.args[1], 99, *node.args[3:]))
    next(iter(node.users)).replace_input_with(node, beside)


def _quantize(graph, node):
    like = _nodes(graph, nodes.quantize_output)[0]
    with graph.inserting_after(node):
        new = graph.create_node("call_function", like.target, (node, like.args[1], 99, *like.args[3:]))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _input_quantized(graph):
    (x,) = [node for node in graph.find_nodes(op="placeholder") if node.name == "x"]
    like = _nodes(graph, nodes.quantize_output)[0]
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        new = graph.create_node("call_function", like.target, (x, like.args[1], 99, *like.args[3:]))
    x.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _read_around(graph):
    node = _of(graph, "relu_q")
    node.replace_all_uses_with(node.args[0])


def _returned_rounded(graph):
    like, logits = _of(graph, "relu_q"), _of(graph, "norm_2")
    with graph.inserting_after(logits):
        new = graph.create_node("call_function", like.target, (logits, like.args[1], 99, *like.args[3:]))
    logits.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _bare_weight(graph):
    _of(graph, "layer_1").replace_input_with(_of(graph, "layer_weight_q"), _of(graph, "layer_weight"))


def _swapped_weights(graph):
    call = _of(graph, "layer_1")
    call.args = (call.args[0], call.args[2], call.args[1])


def _second_weight_node(graph):
    first = _of(graph, "layer_weight_q")
    with graph.inserting_after(first):
        graph.create_node("call_function", first.target, (*first.args[:2], 99, *first.args[3:]))


def _as_an_output(graph):
    weight, output = _of(graph, "layer_weight_q"), _of(graph, "layer_1_q")
    weight.target, weight.args = output.target, (*weight.args[:2], 99, *output.args[3:])


def _shared_stream(graph):
    _of(graph, "relu_q").update_arg(2, _of(graph, "layer_1_q").args[2])


def _stream_of_an_error(graph):
    _of(graph, "relu_q").update_arg(2, SITES)


def _other_format(graph):
    _of(graph, "layer_1_q").update_arg(3, "bfp7[0]")


def _other_rounding(graph):
    _of(graph, "layer_weight_q").update_arg(4, "nearest")


def _no_key(graph):
    _of(graph, "layer_1_q").update_arg(1, None)


def _key_computed_with(graph):
    _of(graph, "layer_1").replace_input_with(_of(graph, "x"), _of(graph, "key"))


def _other_computation(graph):
    (relu,) = graph.find_nodes(op="call_method", target="relu")
    relu.target = "sigmoid"


def _other_argument(graph):
    _of(graph, "norm_2").update_arg(0, _of(graph, "layer_1_q"))


def _one_node_less(graph):
    (relu,) = graph.find_nodes(op="call_method", target="relu")
    relu.replace_all_uses_with(relu.args[0])
    graph.erase_node(relu)


def test_a_right_graph_is_returned():
    right = Traced(shapes.Twice, RECIPE)
    assert right.proved() is right.graph


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_unquantized, "node relu: it is quantized 0 times"),
        (_quantized_twice, "node relu: it is read rounded by [quantize_output]"),
        (_quantized_beside, "node relu: it is quantized 2 times"),
        (_input_quantized, "node x: it is quantized by"),
        (_returned_rounded, "node norm_2: it is quantized by"),
        (_read_around, "node relu: it is read bare by"),
        (_bare_weight, "node layer_weight: it is read bare by [layer_1]"),
        (_swapped_weights, "node layer_1: it was"),
        (_second_weight_node, "node layer_weight: it is quantized 2 times"),
        (_as_an_output, "node layer_weight_q: it is no quantize_weight"),
        (_shared_stream, "node relu_q: it shares stream"),
        (_stream_of_an_error, "node relu_q: it has stream"),
        (_other_format, "node layer_1_q: it rounds by"),
        (_other_rounding, "node layer_weight_q: it rounds by"),
        (_no_key, "node layer_1_q: it draws from None, not from the key"),
        (_key_computed_with, "node layer_1: it was"),
        (_other_computation, "node relu: it was call_method relu"),
        (_other_argument, "node norm_2: it was"),
        (_one_node_less, "node add_: it"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_wrong_graph_is_refused_by_node(spoil, complaint):
    assert_refused(shapes.Twice, Recipe.parse("bfp8[0] in_place=false"), spoil, complaint)


def _derived_bare(graph):
    node = _of(graph, "conv_weight_q")
    node.replace_all_uses_with(node.args[0])


def _derived_twice(graph):
    _second(graph, _of(graph, "conv_weight_q"))


def _second(graph, node):
    with graph.inserting_after(node):
        graph.create_node("call_function", node.target, (*node.args[:2], 99, *node.args[3:]))


def _original_quantized(graph):
    original, like = _of(graph, "conv_parametrizations_weight_original1"), _of(graph, "conv_weight_q")
    with graph.inserting_before(_of(graph, "conv_weight")):
        new = graph.create_node("call_function", like.target, (original, like.args[1], 99, *like.args[3:]))
    original.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _in_another_mode(graph):
    _nodes(graph, torch._C._set_grad_enabled)[-1].append(_of(graph, "tanh_1_q"))


def _without_a_switch(graph):
    graph.erase_node(_nodes(graph, torch._C._set_grad_enabled)[-1])


def _update_quantized(graph):
    _quantize(graph, _of(graph, "mul_2"))


def _kept_bare(graph):
    graph.output_node().replace_input_with(_of(graph, "tanh_q"), _of(graph, "tanh"))


def _write_lost(graph):
    (given,) = graph.output_node().args
    graph.output_node().args = ((given[0], given[0], given[2]),)


def _movement_quantized(graph):
    _quantize(graph, _of(graph, "y"))


def _body_without_a_key(graph):
    _nodes(graph, nodes.checkpointed)[0].update_arg(1, None)


@pytest.mark.parametrize(
    ("kind", "spoil", "complaint"),
    [
        (shapes.Normed, _derived_bare, "is read bare by [conv_conv1d]"),
        (shapes.Normed, _derived_twice, "is quantized 2 times"),
        (shapes.Normed, _original_quantized, "is quantized by"),
        (shapes.NoGradBlock, _in_another_mode, "is in another mode than tanh_1, which it quantizes"),
        (shapes.NoGradBlock, _without_a_switch, "was "),
        (shapes.Rebound, _update_quantized, "node mul_2: it is quantized by"),
        (shapes.Rebound, _write_lost, "was "),
        (shapes.Carried, _kept_bare, "is read bare by [output"),
        (shapes.Plain, _movement_quantized, "node y: it is quantized by"),
        (shapes.Checkpointed, _body_without_a_key, "draws from None"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_wrong_graph_of_more_than_layers_is_refused(kind, spoil, complaint):
    assert_refused(kind, RECIPE, spoil, complaint)


def test_a_stream_that_a_checkpoint_has_too_is_refused():
    class Around(shapes.Checkpointed):
        def forward(self, x):
            return super().forward(x).exp().erf()

    made = Traced(Around, RECIPE)
    body = next(iter(made.bodies.values())).graph
    _of(made.graph, "exp_q").update_arg(2, _nodes(body, nodes.quantize_output)[0].args[2])
    with pytest.raises(VerifyError, match="shares stream"):
        made.proved()


def test_a_recipe_in_float_wants_a_graph_without_nodes():
    with pytest.raises(VerifyError, match="should not be"):
        Traced(shapes.Twice, RECIPE).proved(Recipe())
    assert Traced(shapes.Twice, Recipe()).proved()


@pytest.mark.parametrize("kind", [*shapes.ALL, *shapes.MORE, *shapes.PYTHON], ids=lambda kind: kind.__name__)
def test_pass_and_prover_agree(kind):
    """Each graph that is made is proved, or the call raises."""
    model, inputs = shapes.made(kind)
    low = converted(model, "bfp8[0] placement=group quantize_input=true")
    low(*inputs)
    assert low.graphs
