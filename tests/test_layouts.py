"""An element's result is a function of its value, its block and its row-major index, wherever it lies in memory."""

import itertools
import threading

import pytest
import torch
from tables import DTYPES, KEY, STREAM, assert_same_bits

from swalp_fx import quantize, quantize_
from swalp_fx.ops import quantize_foreach_

SPECS = ["fixed8.6", "e4m3", "bf16", "bfp8", "bfp8[0]", "bfp8[1]", "bfp8[-1]", "bfp4[0,-1]", "bfp8[-1:16]", "bfp4[1:3]"]
SPECS += ["mxfp8", "mxfp4[0:4]", "int8[0]", "int4[-1:8]", "nvfp4", "nvfp4[1:3]"]
ROUNDINGS = ["nearest", "up", "stochastic", "stochastic1", "stochastic8", "stochastic24"]

# Sizes around the steps of the kernels: runs, vectors of 8 and 16, a block of 128 random bits.
SHAPES = [
    (3, 5, 7, 9),
    (2, 20, 7, 33),
    (33, 3, 16, 17),
    (40, 70),
    (3, 16, 300),
    (2, 64, 20, 20),
    (5, 1, 129, 8),
    (70, 2000),
]
CUTS = [slice(None), slice(None, -3), slice(1, -1), slice(None, None, 2), slice(2, None, 3)]


def laid_out(shape, order, cuts, dtype, seed):
    """Memory, and a tensor of ``shape`` in it: the dimensions as ``order`` has them, each cut as ``cuts`` say.

    Its blocks differ in scale; one index of each dimension is zero, and NaN and infinity are among the rest.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = [
        len(range(n)) * (cut.step or 1) + 8 if cut != slice(None) else n for n, cut in zip(shape, cuts, strict=True)
    ]
    values = torch.randn(whole, generator=generator)
    for d, n in enumerate(whole):
        scale = torch.exp2(torch.randint(-20, 20, (n,), generator=generator).float())
        scale[n // 2] = 0.0
        values *= scale.view(-1, *[1] * (len(whole) - 1 - d))
    values.view(-1)[::101] = torch.nan
    values.view(-1)[::203] = -torch.inf
    memory = values.to(dtype).permute(order).contiguous()
    x = memory.permute([order.index(d) for d in range(len(shape))])[tuple(cuts)]
    return memory, x[tuple(slice(n) for n in shape)]


def cases(count):
    """``count`` layouts, each with a seed: every shape in turn, orders and cuts at random."""
    generator = torch.Generator().manual_seed(1)

    def pick(choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    for seed, shape in zip(range(count), itertools.cycle(SHAPES)):
        order = pick(list(itertools.permutations(range(len(shape)))))
        cut = pick([False, True])
        yield seed, shape, order, tuple(pick(CUTS) if cut else slice(None) for _ in shape)


CASES = list(cases(32))


@pytest.mark.parametrize("seed, shape, order, cuts", CASES)
def test_a_layout_is_no_matter(seed, shape, order, cuts):
    """Fresh, in place and in a list, in every dtype; memory between the elements is left alone."""
    for i, spec in enumerate(SPECS):
        dtype, rounding = DTYPES[(seed + i) % 4], ROUNDINGS[(seed // 4 + i) % 6]
        memory, x = laid_out(shape, order, cuts, dtype, seed)
        due = quantize(x.clone(memory_format=torch.contiguous_format), spec, rounding, key=KEY, stream=STREAM)
        before = memory.clone()
        assert_same_bits(quantize(x, spec, rounding, key=KEY, stream=STREAM), due)
        assert_same_bits(memory, before)
        for listed in (False, True):
            memory.copy_(before)
            if listed:
                quantize_foreach_([x, torch.ones(100, 300)], spec, rounding, key=KEY, streams=[STREAM, 0])
            else:
                quantize_(x, spec, rounding, key=KEY, stream=STREAM)
            assert_same_bits(x, due)
            x.copy_(torch.zeros_like(x))
            between = before.clone()
            between.as_strided(x.shape, x.stride(), x.storage_offset()).zero_()
            assert_same_bits(memory, between)


@pytest.mark.parametrize("spec", ["e4m3", "bfp8", "bfp8[0]", "bfp8[1]", "int8[1]", "nvfp4"])
def test_threads_are_no_matter_in_any_layout(spec):
    x = torch.randn(8, 70, 33, 31, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    try:
        for order in [(0, 2, 3, 1), (3, 2, 1, 0), (1, 2, 3, 0)]:
            turned = x.permute(order).contiguous().permute([order.index(d) for d in range(4)])
            for rounding, cut in itertools.product(
                ("nearest", "stochastic"), (slice(None), slice(-3), slice(0, None, 2))
            ):
                due = quantize(turned[..., cut].contiguous(), spec, rounding, key=KEY)
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    assert_same_bits(quantize(turned[..., cut], spec, rounding, key=KEY), due)
                    assert_same_bits(quantize_(turned.clone()[..., cut], spec, rounding, key=KEY), due)
    finally:
        torch.set_num_threads(before)


def test_an_overlap_is_copied_first():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).unfold(0, 100, 50)
    due = quantize(x.contiguous(), "bfp8[0]", "stochastic", key=KEY)
    assert_same_bits(quantize(x, "bfp8[0]", "stochastic", key=KEY), due)


def test_a_thread_with_a_small_stack_rounds_what_any_other_does(one_thread):
    """256 KB, less than two boxes of random bits and one of float64 take."""
    x = torch.randn(4, 64, 20, 20)
    given = [x.contiguous(memory_format=torch.channels_last), x.double().transpose(0, 1), x[..., ::2], x.bfloat16().mT]
    calls = [(each, spec, rounding) for each in given for spec in SPECS for rounding in ROUNDINGS[:3]]
    due = [quantize(*call, key=KEY) for call in calls]
    found = []
    before = threading.stack_size(256 << 10)
    try:
        thread = threading.Thread(target=lambda: found.extend(quantize(*call, key=KEY) for call in calls))
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    for result, expected in zip(found, due, strict=True):
        assert_same_bits(result, expected)
