"""Rewritten models on a GPU: trained, captured in a CUDA graph, under autocast, compiled."""

import itertools

import pytest
import torch
from devices import DEVICES
from torch import nn

from swalp_fx import convert, quantize


def net():
    """Its products are exact under bfp8[0] in any order, so that no library can change a bit."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def inputs(seed, device):
    generator = torch.Generator().manual_seed(seed)
    x = quantize(torch.randn(32, 64, generator=generator), "fixed8.5")
    signal = torch.randint(-3, 4, (32, 10), generator=generator).float()
    return x.to(device), signal.to(device)


def trained(device, steps=20):
    """Weights and averages after steps with powers of two for rates and an error signal on the grid."""
    model = net().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=2**-10, momentum=0.5)
    torch.manual_seed(1)
    lp, swalp = convert(model, optimizer, recipe="bfp8[0]")
    for step in range(steps):
        x, signal = inputs(step, device)
        optimizer.zero_grad()
        (lp(x) * signal).sum().backward()
        optimizer.step()
        swalp.update_average()
    return [p.detach().cpu() for p in (*model.parameters(), *swalp.averaged_model().parameters())]


@pytest.mark.parametrize("device", DEVICES)
def test_training_gives_the_bits_of_one_thread_on_the_cpu(device):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    due = trained("cpu")
    torch.set_num_threads(threads)
    for i, (found, expected) in enumerate(zip(trained(device), due, strict=True)):
        assert torch.equal(found, expected), f"tensor {i}"
    assert not torch.equal(due[0], net()[0].weight)


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast(device):
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    lp, _ = convert(model.to(device), recipe="bfp8[0] quantize_logits=true")
    with torch.autocast(device, torch.bfloat16):
        y = lp(torch.randn(8, 3, 8, 8, device=device))
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and torch.equal(quantize(y, "bfp8[0]"), y)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES[1:])
def test_each_replay_of_a_captured_forward_draws_random_bits_anew(device):
    model = net().to(device)
    x, _ = inputs(0, device)
    lp, _ = convert(model, recipe="bfp8[0] quantize_logits=true")
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(3):
            lp(x).sum().backward()
    torch.cuda.synchronize()
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = lp(x)
        y.square().sum().backward()
    outputs, gradients = [], []
    for _ in range(3):
        graph.replay()
        outputs.append(y.clone())
        gradients.append(model[0].weight.grad.clone())
    for found in (outputs, gradients):
        assert not torch.equal(found[0], found[1]) and not torch.equal(found[1], found[2])
    for each in outputs:
        assert torch.equal(quantize(each, "bfp8[0]"), each)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_generator_cannot_be_captured(device):
    x = torch.randn(100, device=device)
    with (
        pytest.raises(ValueError, match="cannot draw from this generator"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        quantize(x, "bfp8", "stochastic", generator=torch.Generator())


@pytest.mark.parametrize("device", DEVICES[1:])
def test_compiled_in_one_graph(device):
    lp, _ = convert(net().to(device), recipe="bfp8[0]")
    x, _ = inputs(0, device)
    results = []
    for module in (lp, torch.compile(lp, fullgraph=True)):
        torch.manual_seed(5)
        results.append([module(x), module(x)])
    (eager, second), compiled = results
    assert torch.equal(compiled[0], eager) and torch.equal(compiled[1], second) and not torch.equal(eager, second)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_compiled_for_cuda_graphs_each_call_draws_random_bits_anew(device):
    lp, _ = convert(net().to(device), recipe="bfp8[0]")
    x, _ = inputs(0, device)
    compiled = torch.compile(lp, mode="reduce-overhead")
    with torch.no_grad():
        results = [compiled(x).clone() for _ in range(5)]
    assert all(not torch.equal(*pair) for pair in itertools.pairwise(results))


@pytest.mark.parametrize("device", DEVICES[1:])
def test_training_compiled_for_cuda_graphs_has_the_bits_of_training_alone(device):
    lp, _ = convert(net().to(device), recipe="bfp8[0]")
    x, signal = inputs(0, device)
    found = []
    for call in (lp, torch.compile(lp, mode="reduce-overhead")):
        steps = []
        for seed in range(5):
            torch.manual_seed(seed)
            torch.compiler.cudagraph_mark_step_begin()
            lp.zero_grad()
            y = call(x)
            (y * signal).sum().backward()
            steps.append([y.clone(), *(p.grad.clone() for p in lp.parameters())])
        found.append(steps)
    assert all(torch.equal(*pair) for steps in zip(*found, strict=True) for pair in zip(*steps, strict=True))
    assert all(not torch.equal(one[0], other[0]) for one, other in itertools.pairwise(found[1]))


def weights_read(lp):
    """The weights that a forward of layers without biases in float sees: its outputs for an identity matrix."""
    x = torch.eye(lp[0].in_features, device=lp[0].weight.device)
    return lp(x).T


@pytest.mark.parametrize("device", DEVICES)
def test_forwards_see_the_weights_that_a_step_stored(device):
    """Outside of compiled code, in it, and in replays of a CUDA graph that was captured before the step."""
    model = nn.Sequential(nn.Linear(64, 128, bias=False)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=2**-6)
    lp, _ = convert(model, optimizer, recipe="W=nvfp4")
    calls = [lambda: weights_read(lp), torch.compile(lambda: weights_read(lp), backend="aot_eager")]
    if device == "cuda":
        with torch.cuda.stream(torch.cuda.Stream()):
            weights_read(lp)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            read = weights_read(lp)
        calls.append(lambda: (graph.replay(), read)[1])
    for _ in range(3):
        optimizer.zero_grad()
        weights_read(lp).square().sum().backward()
        optimizer.step()
        for call in calls:
            assert torch.equal(call(), model[0].weight)
    model[0].weight.data += 2.0**-20
    for call in calls:
        assert not torch.equal(call(), model[0].weight)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_that_is_moved_is_read_as_stored(device):
    model = nn.Sequential(nn.Linear(64, 128, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=2**-6)
    lp, _ = convert(model, optimizer, recipe="W=nvfp4")
    weights_read(lp).square().sum().backward()
    optimizer.step()
    lp.to(device)
    assert torch.equal(weights_read(lp), model[0].weight)
