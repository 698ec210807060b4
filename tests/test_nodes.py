"""The functions that a rewritten graph calls."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import swalp_fx
from swalp_fx import nodes, quantize, random

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
def test_a_weight_on_a_real_scale_is_rounded_if_no_step_has_stored_it(format):
    x = nn.Parameter(quantize(torch.randn(4, 32), format))
    assert nodes.quantize_weight(x, KEY, 7, format, "stochastic") is not x


@pytest.mark.parametrize(("activation", "error"), [("bfp4[0]", "e4m3"), ("float", "bfp4[0]"), ("bfp4[0]", "float")])
def test_an_output_is_quantized_both_ways(activation, error):
    x = torch.randn(4, 6, requires_grad=True)
    y = nodes.quantize_output(x, KEY, 7, activation, error, "stochastic")
    assert torch.equal(y, quantize(x, activation, "stochastic", key=KEY, stream=7))
    signal = torch.randn(4, 6)
    y.backward(signal)
    error_stream = random.error_stream(7)
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
    assert torch.equal(second, quantize(x, "bfp4", "stochastic", key=KEY, stream=random.tensor_stream(0, 1)))


@pytest.mark.parametrize("how", [{}, {"use_reentrant": True}, {"preserve_rng_state": False}])
def test_a_checkpoint_is_given_its_key_again_when_backward_computes_it_again(how):
    calls = []

    def body(key, x):
        calls.append(key)
        return quantize(torch.tanh(x), "bfp4", "stochastic", key=key, stream=3)

    x = torch.randn(4, 6, requires_grad=True)
    nodes.checkpointed(body, KEY, x, **how).square().sum().backward()
    found, x.grad = x.grad, None
    body(KEY, x).square().sum().backward()
    assert torch.equal(x.grad, found) and len(calls) == 3 and all(torch.equal(key, KEY) for key in calls)


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
        y = nn.functional.linear(x, weight, self.layer.bias)
        return nodes.quantize_output(y, key, 1, "bfp8", "bfp8", "stochastic")


def test_generated_code_and_pickles_find_them_in_the_package():
    for name in nodes.__all__:
        assert getattr(swalp_fx, name) is getattr(nodes, name)
        assert getattr(nodes, name).__module__ == "swalp_fx"


def test_a_trace_that_would_freeze_the_key_is_refused():
    with pytest.raises(RuntimeError, match="freeze the random key"):
        torch.fx.symbolic_trace(_Body())
    torch.fx.symbolic_trace(_Body().eval())
