"""The compiled op against the oracle at zero tolerance, on every layout, and as torch sees it."""

import itertools

import pytest
import torch
from tables import (
    ALL_ROUNDINGS,
    DTYPES,
    FORMATS,
    KEY,
    STREAM,
    assert_same_bits,
    crossed,
    draws,
    every_half,
    hard_values,
)

from swalp_fx import FLOAT, FormatError, RecipeError, ops, parse, quantize, quantize_, reference
from swalp_fx.ops import keeps, quantize_foreach_, round_, rounded
from swalp_fx.random import draw_key

# One format for each op, and each way blocks can lie.
ONE_OF_EACH = [
    *("fixed8.6", "e4m3", "bfp8", "bfp8[0]", "bfp8[1]", "bfp8[-1]", "bfp8[0,1]", "bfp8[0,-1]"),
    *("bfp8[-1:16]", "bfp4[0:4]", "mxfp8", "mxint8[-1:4]", "int8[0]", "int4[-1:8]", "nvfp4"),
]


def assert_follows_oracle(x, spec, rounding):
    result = quantize(x, spec, rounding, key=KEY, stream=STREAM)
    assert_same_bits(result, reference.quantize(x, spec, rounding, draws=draws(rounding, x.numel())), x)


# ---- the oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("spec", FORMATS)
def test_a_million_float32_values(spec, rounding):
    for x in hard_values(spec, torch.float32):
        assert_follows_oracle(x, spec, rounding)


@pytest.mark.parametrize("rounding", ALL_ROUNDINGS)
@pytest.mark.parametrize("spec", FORMATS)
def test_every_bfloat16_pattern(spec, rounding):
    assert_follows_oracle(every_half(torch.bfloat16), spec, rounding)


@pytest.mark.parametrize(("spec", "dtype"), crossed(FORMATS, DTYPES))
def test_every_dtype_and_rounding(spec, dtype):
    for x, rounding in itertools.product(hard_values(spec, dtype, side=64), ALL_ROUNDINGS):
        assert_follows_oracle(x, spec, rounding)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", FORMATS)
def test_sweep(spec, dtype):
    """A million values of every dtype, and all 65,536 of float16 and bfloat16, under every rounding."""
    halves = [every_half(dtype)] if dtype.itemsize == 2 else []
    for x, rounding in itertools.product([*hard_values(spec, dtype, seed=1), *halves], ALL_ROUNDINGS):
        assert_follows_oracle(x, spec, rounding)


@pytest.mark.parametrize("spec", ["bfp8", "bfp8[0]", "bfp8[1]", "bfp8[0,1]"])
def test_blocks_of_every_size(spec):
    """From one element to more than a thread's piece, with NaN, infinities and zero blocks among them."""
    generator = torch.Generator().manual_seed(0)
    for shape in [
        (1, 1),
        (3, 1),
        (1, 5),
        (2, 63),
        (5, 65),
        (3, 4, 7),
        (2, 3, 5, 7),
        (2, 50_000),
        (70_000, 2),
        (1, 140_000),
    ]:
        scale = torch.exp2(torch.randint(-140, 120, (shape[0], *[1] * (len(shape) - 1)), generator=generator).float())
        x = torch.randn(shape, generator=generator) * scale
        x.view(-1)[::17] = torch.inf
        x.view(-1)[::23] = torch.nan
        x[-1] = 0.0
        assert_follows_oracle(x, spec, "nearest")
        assert_follows_oracle(x, spec, "stochastic")


@pytest.mark.parametrize("spec", ["bfp4[-1:4]", "bfp4[0:4]", "mxfp4[1:4]", "int4[-1:4]", "nvfp4[-2:4]", "bfp8[-1:16]"])
@pytest.mark.parametrize("shape", [(5, 5), (9, 6), (3, 17), (2, 5, 9), (5, 2, 33), (2, 5, 5, 13)], ids=str)
def test_the_last_run_of_an_axis_may_be_short(shape, spec):
    """Down to one element: its neighbours in memory are in other runs."""
    scale = torch.exp2(torch.randint(-9, 9, shape, generator=torch.Generator().manual_seed(0)).float())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    for laid_out in (
        x,
        x.transpose(0, -1).contiguous().transpose(0, -1),
        x.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        for rounding in ("nearest", "stochastic"):
            assert_follows_oracle(laid_out, spec, rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_block_of_zeros_has_a_float32_for_its_scale(dtype):
    """It shows where a codebook has no zero: the lowest number comes out, times a scale that a float32 holds."""
    scale = torch.tensor(torch.finfo(torch.float32).max) / 11
    x = torch.zeros(3, dtype=dtype)
    assert_same_bits(quantize(x, "{1,11}[]"), scale.to(dtype).expand(3))
    assert_same_bits(reference.quantize(x, "{1,11}[]"), scale.to(dtype).expand(3))


# Elements with numbers down to float32's smallest, and others.
UNDERFLOWING = [f"{each}+scale366" for each in ("e8m0", "e8m10", "bf16", "e8m23", "int8", "{-1,0,1}")]


@pytest.mark.parametrize("spec", UNDERFLOWING)
def test_a_quotient_that_underflows_is_beside_zero(spec):
    x = torch.tensor([1e-45, 1e-44, 2.56e-43]) * torch.tensor([[1.0], [-1.0]])
    assert ((x / 366) == 0).all()
    for rounding in ALL_ROUNDINGS:
        assert_follows_oracle(x, spec, rounding)
    above = parse(spec).min_subnormal * 366
    assert torch.equal(quantize(x, spec, "nearest"), torch.zeros(2, 3))
    assert torch.equal(quantize(x, spec, "up"), torch.tensor([[above] * 3, [0.0] * 3]))
    assert torch.equal(quantize(x, spec, "down"), torch.tensor([[0.0] * 3, [-above] * 3]))


@pytest.mark.parametrize("largest", [2.0**-149, 3e-42, 1e-41, 1e-40, 1e-38])
def test_a_scale_that_underflows_makes_no_nan_of_zeros(largest):
    x = torch.zeros(3, 16)
    x[0], x[1, 3] = largest, largest / 4000
    assert not quantize(x, "nvfp4").isnan().any()
    for rounding in ("nearest", "up", "stochastic"):
        assert_follows_oracle(x, "nvfp4", rounding)


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 1, 2**32, 2**63 - 1])
def test_every_key_and_stream(key, stream):
    x = torch.rand(300) * 2 - 1
    due = reference.quantize(x, "fixed8.4", "stochastic", key=key, stream=stream)
    assert_same_bits(quantize(x, "fixed8.4", "stochastic", key=key, stream=stream), due)
    signed = (key + 2**63) % 2**64 - 2**63
    for shape in ((), (1,), (1, 1)):
        as_tensor = torch.tensor(signed).reshape(shape)
        assert_same_bits(quantize(x, "fixed8.4", "stochastic", key=as_tensor, stream=stream), due)


# ---- layouts -------------------------------------------------------------------------------------


def layouts():
    """Name, and a tensor of [4, 6, 10, 14] values laid out in its own way (a few differ in shape)."""
    x = torch.randn(4, 6, 10, 14, generator=torch.Generator().manual_seed(0))
    yield "contiguous", x
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "transposed", x.transpose(0, 1).contiguous().transpose(0, 1)
    yield "reversed", x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    yield "rotated", x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    yield "expanded", x[:, :1].expand(4, 6, 10, 14)
    yield "sliced", torch.nn.functional.pad(x, (2, 3, 1, 1))[:, :, 1:-1, 2:-3]
    yield "strided", torch.randn(4, 6, 10, 28, generator=torch.Generator().manual_seed(1))[..., ::2]
    yield "offset", torch.randn(3361, generator=torch.Generator().manual_seed(2))[1:].view(4, 6, 10, 14)
    yield "ones among the sizes", x.reshape(24, 1, 140, 1).transpose(1, 3)
    yield "empty", x[:, :0]
    yield "two dimensions", x.reshape(24, 140).t()


LAYOUTS = dict(layouts())


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "up"])
@pytest.mark.parametrize("spec", ONE_OF_EACH)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, spec, rounding):
    x = LAYOUTS[layout]
    drawing = {"key": KEY, "stream": STREAM}
    due = quantize(x.contiguous(), spec, rounding, **drawing)
    assert_same_bits(due, reference.quantize(x, spec, rounding, **drawing))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        typed = x.to(dtype)
        assert_same_bits(
            quantize(typed, spec, rounding, **drawing), quantize(typed.contiguous(), spec, rounding, **drawing)
        )
    assert_same_bits(quantize(x, spec, rounding, **drawing), due)
    if layout != "expanded":  # in place, an expanded tensor writes one element many times
        in_place = torch.empty_strided(x.shape, x.stride()).copy_(x)
        assert quantize_(in_place, spec, rounding, **drawing) is in_place
        assert_same_bits(in_place, due)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "reversed", "rotated", "offset"])
def test_dense_layouts_are_kept(layout):
    x = LAYOUTS[layout]
    for spec in ONE_OF_EACH:
        assert quantize(x, spec).stride() == x.stride()


def test_in_place_on_a_slice_leaves_the_rest():
    whole = torch.full((8, 8), 0.3)
    quantize_(whole[::2, 1:3], "fixed8.2")
    due = torch.full((8, 8), 0.3)
    due[::2, 1:3] = 0.25
    assert_same_bits(whole, due)


@pytest.mark.parametrize("spec", FORMATS)
def test_no_dimension(spec):
    for value in (0.3, -1e-40, 0.0, -0.0, torch.inf, torch.nan):
        for rounding in ALL_ROUNDINGS:
            assert_follows_oracle(torch.tensor(value), spec, rounding)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4)])
@pytest.mark.parametrize("spec", ["fixed8.6", "bfp8", "bfp8[0]", "bfp8[1]", "e4m3"])
def test_nothing_to_do(spec, shape):
    assert quantize(torch.empty(shape), spec).shape == shape
    assert quantize_(torch.empty(shape), spec, "stochastic", key=3).shape == shape


def test_the_result_is_fresh():
    x = torch.tensor([[0.5, 1.0]])
    for spec in ("float", *FORMATS):
        result = quantize(x, spec)
        assert result.data_ptr() != x.data_ptr() and not result._is_view()
        result.zero_()
    assert x.tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("spec", ONE_OF_EACH)
def test_the_number_of_threads_is_no_matter(spec, rounding):
    before = torch.get_num_threads()
    x = torch.randn(6, 7, 120, 130, generator=torch.Generator().manual_seed(0))
    tensors = [x, x.contiguous(memory_format=torch.channels_last), x.reshape(42, -1)]
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append([quantize(t, spec, rounding, key=KEY) for t in tensors])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert_same_bits(one, two)


# ---- the op as part of torch ---------------------------------------------------------------------

SPACE = torch.ops.swalp_fx
# Of each kind of product.
OPCHECKED = ["fixed8.6", "e4m3", "bfp8[0]", "mxfp8", "int8[-1:2]", "nvfp4", "nf4", "e5m2[2x2]+inf"]


@pytest.mark.parametrize(("spec", "rounding"), crossed(OPCHECKED, ["nearest", "stochastic"]))
def test_opcheck(spec, rounding):
    numbers = ops._find(spec, rounding)
    key = torch.tensor(5) if rounding == "stochastic" else None
    for x in (
        torch.randn(3, 4),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(()),
    ):
        if "x" in spec and x.dim() < 2:
            continue
        torch.library.opcheck(SPACE.quantize.default, (x.requires_grad_(), *numbers, key, 2))
        torch.library.opcheck(SPACE.quantize_.default, (x.detach().clone(), *numbers, key, 2))


# ---- past the dispatcher -------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "stochastic24", "up"])
@pytest.mark.parametrize(("spec", "dtype"), crossed(FORMATS, DTYPES))
def test_a_plan_rounds_as_the_op_does(dtype, spec, rounding):
    """Of tensors without gaps; the rest goes to the op."""
    key = torch.tensor(KEY)
    for layout, given in [*LAYOUTS.items(), ("scalar", torch.tensor(0.3)), ("empty", torch.empty(0, 4, 4, 4))]:
        x = given if dtype is torch.float32 else given.to(dtype)
        due = quantize(x, spec, rounding, key=key, stream=STREAM)
        found = rounded(x, spec, rounding, key, STREAM)
        assert_same_bits(found, due)
        assert found.stride() == due.stride() and (found.data_ptr() != x.data_ptr() or x.numel() == 0)
        if layout != "expanded":
            y = torch.empty_strided(x.shape, x.stride(), dtype=dtype).copy_(x)
            assert round_(y, spec, rounding, key, STREAM) is y
            assert_same_bits(y, due)


def test_plans_are_made_once_for_tensors_alike(monkeypatch):
    made, plans = [], {}
    monkeypatch.setattr(ops, "_PLANS", plans)
    monkeypatch.setattr(ops, "MOST_PLANS", 3)
    monkeypatch.setattr(ops, "_new_plan", lambda *call, real=ops._new_plan: made.append(call) or real(*call))
    key = torch.tensor(KEY)
    for _ in range(3):
        for x in (torch.rand(3, 4), torch.rand(4, 3).T, torch.rand(3, 4).half()):
            rounded(x, "bfp8[0]", "stochastic", key, 0)
    assert len(made) == len(plans) == 3
    rounded(torch.rand(3, 4), "bfp8[0]", "nearest", key, 0)
    assert len(made) == 4 and len(plans) == 1  # sizes that never come again fill no memory


@pytest.mark.parametrize(
    "x",
    [
        torch.rand(3, 4)[:, ::2],
        torch._neg_view(torch.rand(3, 4)),
        torch.rand(3, 4).as_subclass(type("Other", (torch.Tensor,), {})),
    ],
    ids=["gaps", "negated", "a subclass"],
)
def test_what_is_no_plain_memory_goes_to_the_op(x):
    key = torch.tensor(KEY)
    assert ops._plan(x, "bfp8[0]", "stochastic", key) is None
    due = quantize(x, "bfp8[0]", "stochastic", key=key)
    assert torch.equal(rounded(x, "bfp8[0]", "stochastic", key, 0), due)


@pytest.mark.parametrize("key", [torch.tensor(3.0), torch.tensor([1, 2]), torch.tensor(3, dtype=torch.int32), None])
def test_a_key_that_is_none_is_refused_all_the_same(key):
    rounded(torch.rand(3, 4), "bfp8[0]", "stochastic", torch.tensor(3), 0)
    with pytest.raises(RuntimeError, match=r"needs a key|must be a tensor of one int64"):
        rounded(torch.rand(3, 4), "bfp8[0]", "stochastic", key, 0)


def test_a_block_that_is_none_is_refused_all_the_same():
    with pytest.raises(RuntimeError, match="block dimension 2 does not exist in a tensor of 2 dimensions"):
        rounded(torch.rand(3, 4), "bfp8[2]", "stochastic", torch.tensor(3), 0)


# ---- numbers that rounding keeps -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", ["float", *FORMATS])
def test_what_is_known_to_be_kept_is_kept_by_every_rounding(spec, dtype):
    for x in () if spec == "float" else hard_values(spec, dtype, side=64):
        for each in (x, quantize(x, spec), quantize(quantize(x, spec), spec)):
            if keeps(each, spec):
                for rounding in ALL_ROUNDINGS:
                    assert_same_bits(quantize(each, spec, rounding, key=KEY, stream=STREAM), each, each)
    assert keeps(torch.randn(3, dtype=dtype), "float")


# Formats with blocks that are scattered in memory, in tensors of (96, 32, 40).
SCATTERED = ("bfp8", "bfp8[1]", "bfp8[-1]", "bfp8[-1:16]", "mxfp8")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 32), (), (0, 3), (96, 32, 40)])
@pytest.mark.parametrize("spec", [spec for spec in ONE_OF_EACH if not spec.startswith(("int", "nvfp4"))])
def test_what_is_representable_is_known_to_be_kept(spec, shape, dtype):
    """Up to 16384 elements in any format, and beyond in most; but not one number off the grid."""
    x = quantize(torch.randn(shape, dtype=dtype), spec)
    known = x.numel() <= 2**14 or spec not in SCATTERED
    for each in (x, x.mT.contiguous().mT) if x.dim() == 3 and spec in ("fixed8.6", "e4m3", "bfp8[0]") else (x,):
        assert keeps(each, spec) is known
        for at in (0, x.numel() // 2, x.numel() - 1) if x.numel() > 1 else ():
            y = each.clone()
            y[tuple(torch.unravel_index(torch.tensor(at), y.shape))] = 0.3
            is_kept = torch.equal(quantize(y, spec), y)
            assert keeps(y, spec) is (known and is_kept)


@pytest.mark.parametrize("spec", ["int8[0]", "nvfp4"])
def test_on_a_real_scale_nothing_is_known_to_be_kept(spec):
    assert not keeps(torch.zeros(4, 32), spec)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("spec", OPCHECKED)
def test_a_list_of_tensors_is_as_many_calls(spec, rounding):
    """Each tensor with its own stream, whatever its size, dtype and layout."""
    tensors = [torch.randn(30, 40), torch.randn(7, 5).t(), torch.randn(64, dtype=torch.float64), torch.randn(0, 3)]
    streams, key = [4, 0, 2**40, 1], torch.tensor(5)
    if "x" in spec:
        tensors[2] = tensors[2].view(4, 16)
    numbers = ops._find(spec, rounding)
    due = [SPACE.quantize(x, *numbers, key, stream) for x, stream in zip(tensors, streams, strict=True)]
    SPACE.quantize_foreach_(tensors, *numbers, key, streams)
    for result, expected in zip(tensors, due, strict=True):
        assert_same_bits(result, expected)
    with pytest.raises(RuntimeError, match="4 tensors but 3 streams; give each tensor one"):
        SPACE.quantize_foreach_(tensors, *numbers, key, streams[:3])


@pytest.mark.parametrize("spec", OPCHECKED)
def test_a_list_with_a_tensor_that_is_refused_is_left_as_it_was(spec):
    tensors = [torch.full((3, 3), 0.123456), torch.ones(3, 3, dtype=torch.int64)]
    with pytest.raises(RuntimeError, match="x must be float32, float64, float16 or bfloat16"):
        SPACE.quantize_foreach_(tensors, *ops._find(spec, "nearest"), None, [0, 1])
    assert torch.equal(tensors[0], torch.full((3, 3), 0.123456))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "stochastic8"])
@pytest.mark.parametrize("spec", ["float", *ONE_OF_EACH])
def test_a_list_is_rounded_as_its_tensors_are(spec, rounding):
    tensors = [torch.randn(6, 7), torch.randn(4, 10, dtype=torch.float64).t(), torch.randn(6, 3).bfloat16()]
    tensors += [torch.zeros(0, 3), torch.randn(40)]
    streams = [3, 2**40, 0, 5, 3]
    due = [quantize(x, spec, rounding, key=KEY, stream=stream) for x, stream in zip(tensors, streams, strict=True)]
    versions = [x._version for x in tensors]
    quantize_foreach_(tensors, spec, rounding, key=KEY, streams=streams)
    for result, expected, version in zip(tensors, due, versions, strict=True):
        assert_same_bits(result, expected)
        assert result._version == version + (spec != "float")


def test_a_list_draws_one_key_for_all():
    one, other = torch.full((1000,), 0.3), torch.full((1000,), 0.3)
    quantize_foreach_(
        [one, other], "fixed8.4", "stochastic", streams=[0, 1], generator=torch.Generator().manual_seed(2)
    )
    key = draw_key(torch.Generator().manual_seed(2))
    for stream, result in enumerate((one, other)):
        assert_same_bits(result, quantize(torch.full((1000,), 0.3), "fixed8.4", "stochastic", key=key, stream=stream))


def test_a_tensor_given_twice_is_rounded_twice_in_order():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    due = quantize(quantize(x, "bfp4+twos", "stochastic", key=1, stream=5), "bfp4+twos", "stochastic", key=1, stream=4)
    quantize_foreach_([x, torch.rand(3), x.view(10, 100)], "bfp4+twos", "stochastic", key=1, streams=[5, 0, 4])
    assert_same_bits(x, due)


def test_an_empty_list_is_nothing_to_do():
    quantize_foreach_([], "bfp8", "stochastic", streams=[])


@pytest.mark.parametrize("spec", ["float", "bfp8"])
@pytest.mark.parametrize(
    "last, streams, error, message",
    [
        (torch.ones(2), [0], ValueError, "2 tensors but 1 streams; give each tensor one"),
        (torch.ones(2).long(), [0, 1], TypeError, "takes a floating-point tensor, not torch.int64"),
        ([1.0], [0, 1], TypeError, "takes a tensor, not list"),
        (torch.ones(2, requires_grad=True), [0, 1], RuntimeError, "quantize_foreach_ has no gradient"),
    ],
)
def test_a_list_is_refused_before_any_of_it_changes(spec, last, streams, error, message):
    first = torch.full((3,), 0.123456)
    with pytest.raises(error, match=message):
        quantize_foreach_([first, last], spec, streams=streams)
    assert torch.equal(first, torch.full((3,), 0.123456)) and first._version == 0


@pytest.mark.parametrize("spec", ["float", *ONE_OF_EACH])
def test_the_gradient_is_that_of_the_identity(spec):
    x = torch.randn(3, 4, requires_grad=True)
    weight = torch.randn(3, 4)
    (quantize(x, spec) * weight).sum().backward()
    assert_same_bits(x.grad, weight)


def test_no_gradient_where_none_is_wanted():
    assert not quantize(torch.randn(3), "bfp8").requires_grad
    with torch.no_grad():
        assert not quantize(torch.randn(3, requires_grad=True), "bfp8").requires_grad


@pytest.mark.parametrize("spec", ["fixed8.6", "bfp8[0]", "e4m3"])
def test_fake_tensors_have_the_results_shape_and_strides(spec):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name in ("contiguous", "channels_last", "rotated", "sliced", "expanded", "strided"):
        x = LAYOUTS[name]
        due = quantize(x, spec)
        with FakeTensorMode() as mode:
            fake = quantize(mode.from_tensor(x), spec)
        assert (fake.shape, fake.dtype, fake.stride()) == (due.shape, due.dtype, due.stride()), name


# ---- keys ----------------------------------------------------------------------------------------


def test_manual_seed_rules_what_is_drawn():
    x = torch.rand(200)
    torch.manual_seed(1)
    first, second = (quantize(x, "fixed8.4", "stochastic") for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(quantize(x, "fixed8.4", "stochastic"), first)
    one, other = (quantize(x, "fixed8.4", "stochastic", generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(one, other)


def test_nearest_draws_nothing():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    for rounding in ("nearest", "toward_zero", "down", "up", "nearest_away"):
        quantize(torch.rand(200), "fixed8.4", rounding, generator=torch.Generator())
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    for _ in range(5):
        torch.rand(200)
    assert torch.equal(after, torch.get_rng_state())


def test_streams_differ():
    x = torch.full((1000,), 0.3)
    assert not torch.equal(
        quantize(x, "fixed8.4", "stochastic", key=1, stream=0), quantize(x, "fixed8.4", "stochastic", key=1, stream=1)
    )


def test_an_elements_word_depends_on_its_index_alone():
    x = torch.rand(5000)
    whole = quantize(x, "fixed8.4", "stochastic", key=1)
    for n in (1, 63, 64, 65, 4999):
        assert torch.equal(quantize(x[:n], "fixed8.4", "stochastic", key=1), whole[:n])


# ---- specs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ALL_ROUNDINGS)
def test_float_changes_nothing(rounding):
    x = hard_values("e4m3", torch.float32, side=64)[0]
    assert_same_bits(quantize(x, "float", rounding), x)
    assert_same_bits(quantize_(x.clone(), FLOAT, rounding), x)


@pytest.mark.parametrize("spec", FORMATS)
def test_a_spec_and_its_format_are_one(spec):
    x = torch.randn(3, 4)
    assert_same_bits(quantize(x, spec), quantize(x, parse(spec)))


# ---- errors --------------------------------------------------------------------------------------

X = torch.ones(2, 3)

REFUSED_BY_PYTHON = [
    (lambda: quantize(X, "bfp88"), FormatError, "word length 88 is out of range; use 2 to 24 bits"),
    (lambda: quantize(X, "e9m2"), FormatError, "9 exponent bits are out of range; use 2 to 8"),
    (lambda: quantize(X, "int17"), FormatError, "word length 17 is out of range; use 2 to 16 bits"),
    (lambda: quantize(X, "bfp8[-1:0]"), FormatError, "size 0 is out of range; use 1 or more"),
    (lambda: quantize(X, "bfp8[2]"), RuntimeError, "block dimension 2 does not exist in a tensor of 2 dimensions"),
    (lambda: quantize(X, "mxfp4[-3:8]"), RuntimeError, "block axis -3 does not exist in a tensor of 2 dimensions"),
    (lambda: quantize(X, "bfp8", "stochastic", key=torch.tensor([1, 2])), RuntimeError, "tensor of one int64"),
    (lambda: quantize(X, "posit8"), FormatError, "unknown format spec 'posit8'"),
    (lambda: quantize(X, "bfp8", "nearst"), RecipeError, "unknown rounding 'nearst'; did you mean nearest"),
    (lambda: quantize(X, "bfp8", "stochastic0"), RecipeError, "unknown rounding 'stochastic0'"),
    (lambda: quantize(X, "bfp8", "stochastic25"), RecipeError, "unknown rounding 'stochastic25'"),
    (lambda: quantize(X.long(), "bfp8"), TypeError, "not torch.int64; convert it with .float"),
    (lambda: quantize(X.bool(), "float"), TypeError, "not torch.bool"),
    (lambda: quantize(X.to(torch.complex64), "bfp8"), TypeError, "not torch.complex64"),
    (lambda: quantize([1.0], "bfp8"), TypeError, "takes a tensor, not list"),
    (lambda: quantize_(X.long(), "bfp8"), TypeError, "not torch.int64"),
]


KEY_MESSAGE = "the key must be a tensor of one int64; pass torch.tensor"
BFP8 = {
    **{"man": 7, "least": 1, "lowest": -127 / 64, "highest": 127 / 64, "subnormals": True, "beyond": 0, "table": []},
    **{"scale": 1, "of_scale": [-128, 127, 2], "dims": [], "sizes": []},
    **{"rounding": 0, "random_bits": 16, "key": None, "stream": 0},
}
# Difference from bfp8 -> the error.
REFUSED_BY_THE_OP = [
    ({"man": -1}, "man = -1 is out of range; use 0 to 23"),
    ({"man": 24}, "man = 24 is out of range"),
    ({"least": -127}, "least = -127 is out of range; use -126 to 126"),
    ({"highest": 0}, "highest = 0 is out of range; use a positive number"),
    ({"beyond": 4}, "beyond = 4 is out of range; use 0 to 3"),
    ({"table": [1.0]}, "the table does not ascend"),
    ({"table": [1.0, 0.0]}, "the table does not ascend; sort it"),
    ({"table": [0.0] * 257}, "numbers of the table = 257 is out of range; use 0 to 256"),
    ({"scale": 6}, "scale = 6 is out of range; use 0 to 5"),
    ({"of_scale": [1.0]}, "of_scale has 1 numbers; give it 3"),
    ({"of_scale": [-129, 127, 2]}, "smallest exponent = -129 is out of range; use -128 to 0"),
    ({"of_scale": [-128, 128, 2]}, "largest exponent = 128 is out of range; use 0 to 127"),
    ({"of_scale": [-128, 127, 1]}, "significand = 1 is out of range"),
    ({"scale": 3, "of_scale": [0]}, "static scale = 0 is out of range"),
    ({"scale": 4, "of_scale": [23, 0, 1]}, "man of scales = 23 is out of range; use 0 to 22"),
    ({"dims": [2]}, "block dimension 2 does not exist in a tensor of 2 dim.*; use -2 to 1"),
    ({"dims": [0, -3]}, "block dimension -3 does not exist"),
    ({"dims": [2], "sizes": [4]}, "block axis 2 does not exist in a tensor of 2 dim.*; use -2 to 1"),
    ({"dims": [-1], "sizes": [0]}, "block size = 0 is out of range; use 1 or more"),
    ({"dims": [-1], "sizes": [4, 4]}, "1 dims but 2 sizes; give each one"),
    ({"dims": [0, 1, 2], "sizes": [4, 4, 4]}, "the block has 3 axes, and x 2; use a tensor with more"),
    ({"rounding": 7}, "rounding = 7 is out of range"),
    ({"rounding": -1}, "rounding = -1 is out of range"),
    ({"random_bits": 25}, "random_bits = 25 is out of range; use 1 to 24"),
    ({"random_bits": 0}, "random_bits = 0 is out of range"),
    ({"rounding": 1}, "stochastic rounding needs a key"),
    ({"rounding": 1, "key": torch.tensor(1.0)}, KEY_MESSAGE),
    ({"rounding": 1, "key": torch.tensor([1, 2])}, KEY_MESSAGE),
    ({"rounding": 1, "key": torch.tensor(1).int()}, KEY_MESSAGE),
    ({"rounding": 1, "key": torch.tensor([], dtype=torch.long)}, KEY_MESSAGE),
    *[
        ({"x": X.to(dtype)}, "x must be float32, float64, float16 or bfloat16, not")
        for dtype in (torch.int, torch.bool)
    ],
    ({"x": X.to(torch.complex64)}, "x must be float32, float64, float16 or bfloat16"),
]


@pytest.mark.parametrize("call, error, message", REFUSED_BY_PYTHON)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["", "_"], ids=["fresh", "in place"])
@pytest.mark.parametrize("changes, message", REFUSED_BY_THE_OP)
def test_refusals_by_the_op(changes, message, form):
    arguments = {"x": X, **BFP8, **changes}
    before = arguments["x"].clone()
    with pytest.raises(RuntimeError, match=f"^swalp_fx::quantize: {message}"):
        getattr(SPACE, f"quantize{form}")(*arguments.values())
    assert torch.equal(arguments["x"], before)
