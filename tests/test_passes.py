"""classify, assign, insert, verify."""

import copy

import pytest
import shapes
import torch
import torchvision
from torch import nn
from torch.fx import Graph

from swalp_fx import Recipe, check, nodes
from swalp_fx.capture import capture
from swalp_fx.passes import assign, classify, insert, rewrite, verify
from swalp_fx.passes.assign import SITE
from swalp_fx.passes.classify import PART, PARTS
from swalp_fx.passes.verify import MEASURES, MOVES, VerifyError

RECIPE = Recipe.parse("bfp8[0]")


def _parts(model):
    return {node.name: node.meta[PART] for node in classify(capture(model).graph, model).nodes}


def _count(module, function):
    return len(module.graph.find_nodes(op="call_function", target=function))


# classify


def test_no_name_plays_two_parts():
    names = [name for part in PARTS.values() for name in part.split()]
    assert len(names) == len(set(names))


def test_the_prover_knows_the_same_parts():
    for part, names in PARTS.items():
        for name in names.split():
            assert bool(MOVES.fullmatch(name)) == (part == "movement"), name
            assert bool(MEASURES.fullmatch(name)) == (part == "number"), name


def test_what_is_written_into_a_buffer_set_before_is_state():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x):
            self.seen = self.seen * 0.9 + x.detach().mean(0) * 0.1
            self.seen.add_(0.1)
            return self.layer(x + self.seen)

    model = Counts()
    assert _parts(model)["add_"] == "state"
    assert check(model, torch.randn(3, 4)) and rewrite(model, Recipe.parse("bfp6[0]"))


def test_parts_of_a_residual_block():
    assert _parts(shapes.PreBlock(4, 8, 2)) == {
        "x": "input",
        "bn1": "norm",
        "relu": "activation",
        "conv1": "compute",
        "bn2": "norm",
        "relu_1": "activation",
        "conv2": "compute",
        "downsample": "compute",
        "iadd": "arithmetic",
        "output": "output",
    }


def test_sizes_are_numbers_and_what_only_leaves_is_exit():
    parts = _parts(shapes.Plain())
    assert [parts[name] for name in ("size", "getattr_1", "getitem", "mul")] == ["number"] * 4
    assert parts["sigmoid"] == "activation" and parts["view"] == "movement"
    assert parts["argmax"] == "exit"


def test_writes_into_a_buffer_are_state():
    parts = _parts(shapes.Counting())
    assert [parts[name] for name in ("mean", "mul_", "add_")] == ["state"] * 3
    assert parts["sub"] == "arithmetic" and parts["setitem"] == "movement"


@pytest.mark.parametrize("recipe", ["bfp8", "A=bfp8"])
def test_an_embedding_of_positions_is_a_layer(recipe):
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.layer = nn.Embedding(8, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x + self.embedding(torch.arange(x.size(1))))

    parts = _parts(Positions())
    assert (parts["arange"], parts["embedding"]) == ("number", "compute")
    module = rewrite(Positions(), Recipe.parse(recipe))
    assert [node.args[0].name for node in module.graph.nodes if node.target is nodes.quantize_output] == [
        "embedding",
        "add",
    ]


def test_a_call_that_the_table_does_not_name_makes_numbers():
    class Unlisted(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x) + 1

    assert _parts(Unlisted())["special_bessel_j0"] == "arithmetic"


# assign


def test_streams_are_numbered_in_the_order_of_the_graph():
    model, _ = shapes.made(shapes.Twice)
    graph = assign(classify(capture(model).graph, model), model, RECIPE)
    sites = [node.meta[SITE] for node in graph.nodes if SITE in node.meta]
    streams = [[weight.stream for _, weight in site.weights] for site in sites]
    assert streams == [[0, 1], [], [4, 5], [0, 1], [4, 5]]  # layer, relu, norm, layer, norm
    assert [site.output.stream if site.output else None for site in sites] == [2, 3, 6, 7, None]


# insert


def test_the_captured_graph_stays_as_it_is():
    model, _ = shapes.made(shapes.Convnet)
    graph = assign(classify(capture(model).graph, model), model, RECIPE)
    before = str(graph)
    assert insert(graph) is not graph and str(graph) == before


@pytest.mark.parametrize(
    ("name", "weights", "outputs"),
    # vgg16: 13 convolutions, 3 linear layers, 15 ReLU, 5 + 1 pools, without the logits. resnet18: 20 convolutions and
    # batch norms each, 17 ReLU, 8 sums, 2 pools.
    [("vgg16", 32, 36), ("vgg16_bn", 58, 49), ("resnet18", 62, 67)],
)
def test_every_parameter_and_every_output_but_the_logits(name, weights, outputs):
    with torch.device("meta"):
        module = rewrite(getattr(torchvision.models, name)(), RECIPE)
    assert _count(module, nodes.quantize_weight) == weights
    assert _count(module, nodes.quantize_output) == outputs
    assert _count(module, nodes.draw_key) == 1


def test_a_line_of_the_code_reads_as_it_runs():
    code = rewrite(shapes.Convnet(), RECIPE).code
    assert "key = swalp_fx_draw_key(training)" in code
    assert "_0_q = swalp_fx_quantize_output(_0, key, 2, 'bfp8[0]', 'bfp8[0]', 'stochastic', in_place = 'AE')" in code
    assert "_0 = swalp_fx_call_layer(_0_module, {'weight': _0_weight_q, 'bias': _0_bias_q}, input_1)" in code


def test_a_parameter_is_quantized_once_however_it_is_read():
    for kind, count in ((shapes.Tied, 3), (shapes.Twice, 4), (shapes.Direct, 3)):
        assert _count(rewrite(kind(), RECIPE), nodes.quantize_weight) == count


@pytest.mark.parametrize(
    ("recipe", "weights", "outputs", "keys"),
    [
        ("float", 0, 0, 0),
        ("float W=bfp8", 6, 0, 1),
        ("float A=bfp8", 0, 4, 1),
        ("float E=bfp8", 0, 4, 1),
        ("float G=bfp8 M=bfp8", 0, 0, 0),
        ("bfp8 rounding=nearest", 6, 4, 0),
    ],
)
def test_a_role_in_float_has_no_node(recipe, weights, outputs, keys):
    module = rewrite(shapes.Convnet(), Recipe.parse(recipe))
    found = [_count(module, f) for f in (nodes.quantize_weight, nodes.quantize_output, nodes.draw_key)]
    assert found == [weights, outputs, keys]
    assert _count(module, nodes.call_layer) == (3 if weights else 0)


def test_inserted_nodes_keep_the_place_of_what_they_serve():
    module = rewrite(shapes.PreResNet(), RECIPE)
    (node,) = [node for node in module.graph.nodes if node.name == "blocks_1_conv1_q"]
    assert list(node.meta["nn_module_stack"])[-1] == "blocks.1.conv1"
    assert "self.conv1(self.relu(self.bn1(x)))" in node.stack_trace


# verify: each way of being wrong, made by hand in a right graph


def _right():
    model, _ = shapes.made(shapes.Twice)
    captured = capture(model).graph
    return insert(assign(classify(captured, model), model, RECIPE)), captured, model


def _nodes(graph: Graph, function):
    return graph.find_nodes(op="call_function", target=function)


def _unquantized(graph):
    node = _nodes(graph, nodes.quantize_output)[1]
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


def _quantized_twice(graph):
    node = _nodes(graph, nodes.quantize_output)[1]
    with graph.inserting_after(node):
        again = graph.create_node("call_function", node.target, (node, node.args[1], 99, *node.args[3:]))
    node.replace_all_uses_with(again, delete_user_cb=lambda user: user is not again)


def _quantized_beside(graph):
    node = _nodes(graph, nodes.quantize_output)[1]
    with graph.inserting_after(node):
        beside = graph.create_node("call_function", node.target, (node.args[0], node.args[1], 99, *node.args[3:]))
    next(iter(node.users)).replace_input_with(node, beside)


def _input_quantized(graph):
    (x,) = graph.find_nodes(op="placeholder")
    like = _nodes(graph, nodes.quantize_output)[0]
    with graph.inserting_before(_nodes(graph, nodes.call_layer)[0]):
        node = graph.create_node("call_function", like.target, (x, like.args[1], 99, *like.args[3:]))
    x.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def _read_around(graph):
    node = _nodes(graph, nodes.quantize_output)[1]
    node.replace_all_uses_with(node.args[0])


def _bare_weight(graph):
    call = _nodes(graph, nodes.call_layer)[0]
    call.update_arg(1, {**call.args[1], "weight": call.args[1]["weight"].args[0]})


def _unbound_weight(graph):
    call = _nodes(graph, nodes.call_layer)[0]
    call.update_arg(1, {"weight": call.args[1]["weight"]})


def _swapped_weights(graph):
    call = _nodes(graph, nodes.call_layer)[0]
    call.update_arg(1, {"weight": call.args[1]["bias"], "bias": call.args[1]["weight"]})


def _second_weight_node(graph):
    first = _nodes(graph, nodes.quantize_weight)[0]
    with graph.inserting_after(first):
        graph.create_node("call_function", first.target, (*first.args[:2], 99, *first.args[3:]))


def _shared_stream(graph):
    first, second = _nodes(graph, nodes.quantize_output)[:2]
    second.update_arg(2, first.args[2])


def _other_format(graph):
    _nodes(graph, nodes.quantize_output)[0].update_arg(3, "bfp7[0]")


def _other_rounding(graph):
    _nodes(graph, nodes.quantize_weight)[0].update_arg(4, "nearest")


def _second_key(graph):
    (key,) = _nodes(graph, nodes.draw_key)
    with graph.inserting_after(key):
        second = graph.create_node("call_function", nodes.draw_key, key.args)
    _nodes(graph, nodes.quantize_output)[0].update_arg(1, second)


def _other_computation(graph):
    (relu,) = graph.find_nodes(op="call_method", target="relu")
    relu.target = "sigmoid"


def _other_argument(graph):
    call = _nodes(graph, nodes.call_layer)[-1]
    call.update_arg(2, _nodes(graph, nodes.quantize_output)[0])


def _one_node_less(graph):
    (relu,) = graph.find_nodes(op="call_method", target="relu")
    relu.replace_all_uses_with(relu.args[0])
    graph.erase_node(relu)


def test_a_right_graph_is_returned():
    graph, captured, model = _right()
    assert verify(graph, captured, model, RECIPE) is graph


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (_unquantized, "node relu: it is quantized 0 times"),
        (_quantized_twice, "node relu_q: it is quantized by"),
        (_quantized_beside, "node relu: it is quantized 2 times"),
        (_input_quantized, "node x: it is quantized by"),
        (_read_around, "node relu: it is read bare by"),
        (_bare_weight, "node layer: it reads parameter layer.weight bare"),
        (_unbound_weight, "node layer: it binds"),
        (_swapped_weights, "node layer: it binds"),
        (_second_weight_node, "it quantizes a parameter a second time"),
        (_shared_stream, "node relu_q: it shares stream 2 with layer_q"),
        (_other_format, "node layer_q: it rounds by"),
        (_other_rounding, "node layer_weight_q: it rounds by"),
        (_second_key, "draws a second key"),
        (_other_computation, "node relu: it was call_method relu"),
        (_other_argument, "node norm_1: it was"),
        (_one_node_less, "node relu: it was"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_wrong_graph_is_refused_by_node(spoil, complaint):
    graph, captured, model = _right()
    spoil(graph)
    with pytest.raises(VerifyError) as failure:
        verify(graph, captured, model, RECIPE)
    assert complaint in str(failure.value)


def _derived_bare(graph):
    node = next(n for n in _nodes(graph, nodes.quantize_weight) if n.args[0].op == "call_module")
    node.replace_all_uses_with(node.args[0])


def _derived_twice(graph):
    node = next(n for n in _nodes(graph, nodes.quantize_weight) if n.args[0].op == "call_module")
    with graph.inserting_after(node):
        graph.create_node("call_function", node.target, (*node.args[:2], 99, *node.args[3:]))


def _original_quantized(graph):
    like = _nodes(graph, nodes.quantize_weight)[0]
    derived = like.args[0]
    with graph.inserting_before(like):
        original = graph.create_node("get_attr", "conv.parametrizations.weight.original0")
    like.update_arg(0, original)
    graph.erase_node(derived)


def _in_another_mode(graph):
    _nodes(graph, torch._C._set_grad_enabled)[-1].append(_nodes(graph, nodes.quantize_output)[1])


def _without_a_switch(graph):
    graph.erase_node(_nodes(graph, torch._C._set_grad_enabled)[-1])


def _update_quantized(graph):
    (update,) = [node for node in graph.nodes if node.name == "mul_1"]
    like = _nodes(graph, nodes.quantize_output)[0]
    with graph.inserting_after(update):
        node = graph.create_node("call_function", like.target, (update, like.args[1], 99, *like.args[3:]))
    update.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)


def _write_lost(graph):
    graph.erase_node(_nodes(graph, setattr)[0])


@pytest.mark.parametrize(
    ("kind", "spoil", "complaint"),
    [
        (shapes.Normed, _derived_bare, "is a weight read by"),
        (shapes.Normed, _derived_twice, "is a weight read by"),
        (shapes.Normed, _original_quantized, "was "),
        (shapes.NoGradBlock, _in_another_mode, "is in another mode than tanh, which it quantizes"),
        (shapes.NoGradBlock, _without_a_switch, "was "),
        (shapes.Rebound, _update_quantized, "node mul_1: it is quantized by"),
        (shapes.Rebound, _write_lost, "was "),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_a_wrong_graph_of_more_than_layers_is_refused(kind, spoil, complaint):
    model, _ = shapes.made(kind)
    captured = capture(model).graph
    graph = insert(assign(classify(captured, model), model, RECIPE))
    verify(graph, captured, model, RECIPE)
    spoil(graph)
    with pytest.raises(VerifyError) as failure:
        verify(graph, captured, model, RECIPE)
    assert complaint in str(failure.value)


def test_a_recipe_in_float_wants_a_graph_without_nodes():
    graph, captured, model = _right()
    with pytest.raises(VerifyError):
        verify(graph, captured, model, Recipe())
    verify(copy.deepcopy(captured), captured, model, Recipe())
