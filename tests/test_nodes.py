"""The functions that a rewritten graph calls."""

import copy

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import swalp_fx
from swalp_fx import nodes, quantize
from swalp_fx.capture import capture

KEY = torch.tensor(1234)


def test_a_key_is_drawn_in_training_only_and_seeded_by_torch():
    torch.manual_seed(0)
    first = nodes.draw_key(True)
    torch.manual_seed(0)
    assert torch.equal(nodes.draw_key(True), first)
    assert nodes.draw_key(False) is None


def test_a_weight_is_quantized_and_its_gradient_is_not():
    x = torch.randn(4, 6, requires_grad=True)
    y = nodes.quantize_weight(x, KEY, 7, "bfp4[0]", "stochastic")
    assert torch.equal(y, quantize(x, "bfp4[0]", "stochastic", key=KEY, stream=7))
    error = torch.randn(4, 6)
    y.backward(error)
    assert torch.equal(x.grad, error)


@pytest.mark.parametrize("format", ["bfp4[0]", "fixed8.6", "mxfp8", "float"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_weight_that_rounding_keeps_is_itself(mode, format):
    """So that a forward behind a step, which has rounded the weights, copies none of them."""
    x = nn.Parameter(quantize(torch.randn(4, 6), format, "stochastic"))
    with mode():
        assert nodes.quantize_weight(x, KEY, 7, format, "stochastic") is x
        x.data[2, 3] += 2.0**-20  # leaves no trace but the number
        if format != "float":
            y = nodes.quantize_weight(x, KEY, 7, format, "stochastic")
            assert torch.equal(y, quantize(x, format, "stochastic", key=KEY, stream=7)) and y is not x


@pytest.mark.parametrize("trace", [torch.jit.trace, lambda module, x: make_fx(module)(x)], ids=["jit", "make_fx"])
def test_a_trace_rounds_weights_that_may_be_others_when_it_runs(trace):
    weight = nn.Parameter(quantize(torch.randn(4, 6), "bfp4[0]"))
    traced = trace(lambda x: nodes.quantize_weight(x, None, 7, "bfp4[0]", "nearest"), weight)
    other = torch.randn(4, 6)
    assert torch.equal(traced(other), quantize(other, "bfp4[0]"))


@pytest.mark.parametrize("format", ["int8[0]", "nvfp4"])
def test_a_weight_on_a_real_scale_is_always_rounded(format):
    x = nn.Parameter(quantize(torch.randn(4, 32), format))
    assert nodes.quantize_weight(x, KEY, 7, format, "stochastic") is not x


@pytest.mark.parametrize(("activation", "error"), [("bfp4[0]", "e4m3"), ("float", "bfp4[0]"), ("bfp4[0]", "float")])
def test_an_output_is_quantized_both_ways(activation, error):
    x = torch.randn(4, 6, requires_grad=True)
    y = nodes.quantize_output(x, KEY, 7, activation, error, "stochastic")
    assert torch.equal(y, quantize(x, activation, "stochastic", key=KEY, stream=7))
    signal = torch.randn(4, 6)
    y.backward(signal)
    error_stream = 7 | nodes.ERROR_STREAM
    assert torch.equal(x.grad, quantize(signal, error, "stochastic", key=KEY, stream=error_stream))


def test_without_a_key_stochastic_is_nearest_and_draws_nothing():
    x = torch.randn(50)
    state = torch.get_rng_state()
    nearest = quantize(x, "bfp4")
    assert torch.equal(nodes.quantize_weight(x, None, 0, "bfp4", "stochastic"), nearest)
    assert torch.equal(nodes.quantize_output(x, None, 0, "bfp4", "bfp4", "stochastic"), nearest)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("format", ["float", "bfp8[0]"])
def test_the_result_is_a_tensor_of_its_own(format):
    x = torch.randn(4, 6, requires_grad=True)
    y = nodes.quantize_output(x, None, 0, format, format, "nearest")
    before = x.detach().clone()
    y.relu_()  # raises on a view, and would show in x
    assert torch.equal(x, before)


def test_tensors_of_a_nest_have_streams_of_their_own_and_the_rest_passes():
    x = torch.rand(40)
    indices = torch.arange(3)
    (first, second), third, size, nothing = nodes.quantize_output(
        ((x, x), indices, 5, None), KEY, 0, "bfp4", "bfp4", "stochastic"
    )
    assert third is indices and size == 5 and nothing is None
    assert torch.equal(first, quantize(x, "bfp4", "stochastic", key=KEY, stream=0))
    assert torch.equal(second, quantize(x, "bfp4", "stochastic", key=KEY, stream=nodes.TENSOR_STREAM))


def test_a_layer_is_called_with_the_weights_given_and_keeps_its_own():
    layer = nn.BatchNorm1d(3)
    x = torch.randn(8, 3)
    weights = {"weight": torch.full((3,), 2.0), "bias": torch.ones(3)}
    y = nodes.call_layer(layer, weights, x)
    assert torch.allclose(y.mean(0), torch.ones(3), atol=1e-6)
    assert layer.num_batches_tracked == 1
    assert torch.equal(layer.weight, torch.ones(3)) and set(weights) == {"weight", "bias"}


def test_a_layer_that_raises_has_its_own_weights_back():
    layer = nn.Linear(3, 3)
    own = dict(layer.named_parameters())
    with pytest.raises(RuntimeError, match="shapes"):
        nodes.call_layer(layer, {"weight": torch.ones(3, 3)}, torch.ones(2, 4))
    with pytest.raises(KeyError, match="wait"):
        nodes.call_layer(layer, {"weight": torch.ones(3, 3), "wait": torch.ones(3)}, torch.ones(2, 3))
    assert all(getattr(layer, name) is parameter for name, parameter in own.items())


def _attention():
    return nn.MultiheadAttention(4, 2, batch_first=True), [torch.randn(2, 3, 4)] * 3


def _shared():
    shared = nn.Linear(4, 4)
    return nn.Sequential(shared, nn.Tanh(), shared), [torch.randn(2, 4)]


def _parametrized():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), [torch.randn(2, 4)]


@pytest.mark.parametrize(
    "made",
    [
        _attention,
        _shared,
        _parametrized,
        lambda: (nn.LSTM(4, 4, 2), [torch.randn(3, 2, 4)]),
        lambda: (nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), [torch.randn(2, 3, 4)]),
    ],
)
def test_a_layer_computes_as_by_functional_call_and_runs_its_hooks_once(made):
    layer, inputs = made()
    weights = {name: p.detach() * 2 for name, p in layer.named_parameters(remove_duplicate=False)}
    own = dict(layer.named_parameters())
    # On a copy: it does not give a module that has two names its own weights back.
    due = torch.func.functional_call(copy.deepcopy(layer), dict(weights), tuple(inputs), tie_weights=False)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    found = nodes.call_layer(layer, weights, *inputs)
    leaves = [torch.utils._pytree.tree_leaves(each) for each in (found, due)]
    assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True))
    assert calls == ["before", "after"]
    assert all(parameter is own[name] for name, parameter in layer.named_parameters())


@pytest.mark.parametrize("in_place", ["", "AE"])
def test_an_output_is_quantized_under_the_transforms_of_torch_func(in_place):
    def loss(x):
        return nodes.quantize_output(x * 2, None, 0, "bfp4", "bfp5", "nearest", in_place=in_place).square().sum()

    x = torch.randn(4, 6, requires_grad=True)
    loss(x).backward()
    assert torch.equal(torch.func.grad(loss)(x.detach()), x.grad)


class _Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        key = nodes.draw_key(self.training)
        weight = nodes.quantize_weight(self.layer.weight, key, 0, "bfp8", "stochastic")
        y = nodes.call_layer(self.layer, {"weight": weight}, x)
        return nodes.quantize_output(y, key, 1, "bfp8", "bfp8", "stochastic")


def test_another_trace_records_them():
    graph = capture(_Body()).graph
    called = [node.target for node in graph.nodes if node.op == "call_function"]
    assert called == [nodes.draw_key, nodes.quantize_weight, nodes.call_layer, nodes.quantize_output]


def test_generated_code_and_pickles_find_them_in_the_package():
    for name in nodes.__all__:
        assert getattr(swalp_fx, name) is getattr(nodes, name)
        assert getattr(nodes, name).__module__ == "swalp_fx"


def test_a_trace_that_would_freeze_the_key_is_refused():
    with pytest.raises(RuntimeError, match="freeze the random key"):
        torch.fx.symbolic_trace(_Body())
    torch.fx.symbolic_trace(_Body().eval())
