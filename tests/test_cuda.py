"""CUDA gives the CPU's bits: every format, rounding, dtype and layout."""

import itertools

import pytest
import torch
from devices import NEEDS_GPU
from tables import ALL_ROUNDINGS, DTYPES, FORMATS, KEY, STREAM, assert_same_bits, every_half, hard_values

from swalp_fx import ops, parse, quantize, quantize_, random, reference
from swalp_fx.ops import quantize_foreach_

pytestmark = NEEDS_GPU
DEVICE = "cuda"
DRAWS = {"key": KEY, "stream": STREAM}


def assert_follows_cpu(x, spec, rounding):
    """``x`` is on the CPU. Its copy on the GPU keeps its strides."""
    there = quantize(x.to(DEVICE), spec, rounding, **DRAWS)
    assert there.device.type == DEVICE
    assert_same_bits(there.cpu(), quantize(x, spec, rounding, **DRAWS), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", FORMATS)
def test_every_format_dtype_and_rounding(spec, dtype):
    halves = [every_half(dtype)] if dtype.itemsize == 2 else []
    for x, rounding in itertools.product([*hard_values(spec, dtype), *halves], ALL_ROUNDINGS):
        assert_follows_cpu(x, spec, rounding)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("spec", ["fixed8.6", "bfp8[0]", "bfp8", "e4m3"])
def test_the_oracle(spec, rounding):
    """Not by way of the CPU op alone."""
    for x in hard_values(spec, torch.float32, seed=2):
        result = quantize(x.to(DEVICE), spec, rounding, **DRAWS).cpu()
        assert_same_bits(result, reference.quantize(x, spec, rounding, **DRAWS), x)


# ---- shapes and layouts --------------------------------------------------------------------------

BLOCKS = ["fixed8.6", "bfp8", "bfp8[0]", "bfp8[1]", "bfp8[-1]", "bfp8[0,1]", "bfp8[0,-1]", "e4m3"]


def layouts(x):
    """``x``, four-dimensional, as tensors of the same values laid out in other ways."""
    yield x
    yield x.contiguous(memory_format=torch.channels_last)
    yield x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    yield x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    yield torch.nn.functional.pad(x, (2, 3, 1, 1))[:, :, 1:-1, 2:-3]
    yield x.repeat_interleave(2, 3)[..., ::2]
    yield torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "up"])
@pytest.mark.parametrize("spec", BLOCKS)
def test_layouts(spec, rounding):
    for dtype in DTYPES:
        x = torch.randn(4, 6, 10, 14).to(dtype)
        due = quantize(x, spec, rounding, **DRAWS)
        for there in layouts(x.to(DEVICE)):
            assert_same_bits(quantize(there, spec, rounding, **DRAWS).cpu(), due)
            in_place = torch.empty_strided(there.shape, there.stride(), dtype=dtype, device=DEVICE).copy_(there)
            assert quantize_(in_place, spec, rounding, **DRAWS) is in_place
            assert_same_bits(in_place.cpu(), due)
        expanded = x.to(DEVICE)[:, :1].expand(4, 6, 10, 14)
        assert_same_bits(
            quantize(expanded, spec, rounding, **DRAWS).cpu(), quantize(expanded.cpu(), spec, rounding, **DRAWS)
        )


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (1,),
        (3,),
        (1, 1),
        (7, 1),
        (1, 7),
        (5, 31),
        (5, 32),
        (5, 33),
        (3, 1023),
        (3, 4097),
        (2, 1_000_003),
        (100_003, 3),
    ],
    ids=str,
)
def test_sizes(shape):
    """Around a warp, a thread block and a vector's width, with NaN, infinities and a zero block."""
    x = torch.randn(shape)
    if x.dim() > 1:
        x *= torch.exp2(torch.randint(-100, 100, (shape[0], 1)).float())
        x.view(-1)[::19] = torch.inf
        x.view(-1)[::23] = torch.nan
        x[-1] = 0.0
    for spec, rounding, dtype in itertools.product(
        ("fixed8.6", "bfp8", "bfp8[0]", "bfp8[1]", "e4m3"), ("nearest", "stochastic"), DTYPES
    ):
        assert_follows_cpu(x.to(dtype), spec, rounding)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)], ids=str)
def test_nothing_to_do(shape):
    for spec in BLOCKS[:4]:
        assert quantize(torch.empty(shape, device=DEVICE), spec).shape == shape


def test_more_than_two_to_the_31_elements():
    n = 2**31 + 1000
    if torch.cuda.get_device_properties(0).total_memory < 4 * 2 * n:
        pytest.skip("needs 17 GB of GPU memory")
    x = torch.full((n,), 0.3, dtype=torch.bfloat16, device=DEVICE)
    for spec in ("fixed8.3", "bfp4"):
        quantize_(x.fill_(0.3), spec, "stochastic", **DRAWS)
        start = n - 2000
        format = parse(spec)
        due = [
            reference.quantize_number(torch.tensor(0.3).bfloat16().item(), format, "stochastic", draw=draw)
            for draw in (random.draw(KEY, STREAM, i) for i in range(start, n))
        ]
        assert x[start:].tolist() == due


def test_a_row_of_more_than_two_to_the_31_elements():
    """Its maximum is its last element, and its last elements draw by their index."""
    n = 2**31 + 1000
    if torch.cuda.get_device_properties(0).total_memory < 4 * 2 * n:
        pytest.skip("needs 17 GB of GPU memory")
    x = torch.full((2, n), 0.3, dtype=torch.bfloat16, device=DEVICE)
    x[0, -1] = 100.0
    quantize_(x, "bfp8[0]", "stochastic", **DRAWS)
    assert x[0, -1] == 100.0 and ((x[0] == 0.0) | (x[0] == 1.0)).sum() == n - 1
    draws = torch.tensor([random.draw(KEY, STREAM, i) for i in range(2 * n - 2000, 2 * n)])
    tail = torch.full((2000,), 0.3, dtype=torch.bfloat16)
    assert torch.equal(x[1, -2000:].cpu(), reference.quantize(tail, "bfp8", "stochastic", draws=draws))


# ---- keys, streams, capture ----------------------------------------------------------------------


def test_the_key_may_lie_on_either_device():
    x = torch.rand(10_000)
    due = quantize(x, "fixed8.4", "stochastic", key=5)
    for key in (5, torch.tensor(5), torch.tensor([5], device=DEVICE)):
        assert_same_bits(quantize(x.to(DEVICE), "fixed8.4", "stochastic", key=key).cpu(), due)


def test_a_list_may_lie_on_both_devices():
    tensors = [torch.randn(30, 40), torch.randn(7, 9).to(DEVICE), torch.randn(100).to(DEVICE), torch.randn(3, 3)]
    due = [quantize(x, "bfp8[0]", "stochastic", key=KEY, stream=stream) for stream, x in enumerate(tensors)]
    quantize_foreach_(tensors, "bfp8[0]", "stochastic", key=KEY, streams=range(4))
    for result, expected in zip(tensors, due, strict=True):
        assert_same_bits(result, expected)


def test_the_current_stream_is_used():
    """Behind a slow producer on a side stream, a kernel on another stream would read too early."""
    side = torch.cuda.Stream()
    x = torch.randn(4096, 4096, device=DEVICE)
    due = quantize(x * x, "bfp8[0]")
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        result = quantize(x * x, "bfp8[0]")
    side.synchronize()
    assert_same_bits(result, due)


@pytest.mark.parametrize("spec", BLOCKS)
def test_capture_in_a_cuda_graph(spec):
    """A replay reads the key from the device anew."""
    x = torch.randn(4, 6, 10, 14, device=DEVICE)
    key = torch.tensor([1], device=DEVICE)
    quantize(x, spec, "stochastic", key=key)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = quantize(x, spec, "stochastic", key=key)
    for value in (1, 2):
        key.fill_(value)
        graph.replay()
        assert_same_bits(result, quantize(x, spec, "stochastic", key=value))


@pytest.mark.parametrize("spec", ["fixed8.6", "bfp8[0]", "e4m3"])
def test_opcheck_and_gradient(spec):
    x = torch.randn(3, 4, 5, 6, device=DEVICE, requires_grad=True)
    quantize(x, spec).backward(torch.ones_like(x))
    assert torch.equal(x.grad, torch.ones_like(x))
    op = torch.ops.swalp_fx.quantize.default
    torch.library.opcheck(op, (x, *ops._find(spec, "stochastic"), torch.tensor(5), 2))


def test_a_key_on_another_device_is_refused():
    with pytest.raises(RuntimeError, match="key"):
        quantize(torch.rand(3), "fixed8.4", "stochastic", key=torch.tensor(5, device=DEVICE))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="only one GPU is present")
def test_a_tensors_own_device_is_used():
    x = torch.randn(1000)
    due = quantize(x, "bfp8", "stochastic", key=5)
    result = quantize(x.to("cuda:1"), "bfp8", "stochastic", key=5)
    assert result.device.index == 1 and torch.cuda.current_device() == 0
    assert_same_bits(result.cpu(), due)
