"""Tensors with unusual memory: none, negatives, shared by elements or by tensors."""

import pytest
import torch
from tables import KEY, assert_same_bits

from swalp_fx import nodes, quantize, quantize_
from swalp_fx.ops import keeps, quantize_foreach_, round_, rounded

SPECS = ["fixed8.6", "e4m3", "bfp8[0]", "mxfp8", "int8[0]", "nvfp4"]  # one for each op
DRAWN = torch.tensor(KEY)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "up"])
@pytest.mark.parametrize("spec", SPECS)
def test_zeros_without_memory_are_zeros(spec, rounding):
    """Such as the gradient of torch.sgn. There is a plan for their shape, which would read from address 0."""
    rounded(torch.randn(3, 4), spec, rounding, DRAWN, 0)
    zeros = torch._efficientzerotensor((3, 4))
    fresh = quantize(zeros, spec, rounding, key=KEY), rounded(zeros, spec, rounding, DRAWN, 0)
    in_place = quantize_(zeros, spec, rounding, key=KEY), round_(zeros, spec, rounding, DRAWN, 0)
    for result in fresh + in_place:
        assert_same_bits(result.clone(), torch.zeros(3, 4))
    assert in_place[0] is zeros and in_place[1] is zeros
    assert not any(result._is_zerotensor() for result in fresh) and not keeps(zeros, spec)


@pytest.mark.parametrize("spec", SPECS)
def test_a_key_without_memory_is_zero(spec):
    zero = torch._efficientzerotensor((), dtype=torch.int64)
    x = torch.randn(5, 40)
    due = quantize(x, spec, "stochastic", key=0)
    assert_same_bits(quantize(x, spec, "stochastic", key=zero), due)
    assert_same_bits(rounded(x, spec, "stochastic", zero, 0), due)
    assert_same_bits(quantize_(x.clone(), spec, "stochastic", key=zero), due)


@pytest.mark.parametrize("spec", SPECS)
def test_a_negated_view_is_rounded_in_place(spec):
    """Its memory then holds the negatives of the rounded numbers."""
    x = torch.randn(5, 40)
    due = quantize(-x, spec, "stochastic", key=KEY)
    for write in (
        lambda y: quantize_(y, spec, "stochastic", key=KEY),
        lambda y: round_(y, spec, "stochastic", DRAWN, 0),
    ):
        memory = x.clone()
        view = torch._neg_view(memory)
        assert write(view) is view
        assert_same_bits(view.resolve_neg(), due)
        assert_same_bits(memory, -due)


@pytest.mark.parametrize("spec", SPECS)
def test_a_list_may_hold_all_of_these(spec):
    given = [torch.randn(5, 40), torch._efficientzerotensor((3,)), torch._neg_view(torch.randn(5, 40)), torch.randn(3)]
    given.append(given[2])
    due = [quantize(x, spec, "stochastic", key=KEY, stream=i) for i, x in enumerate(given)]
    due[2] = due[4] = quantize(due[2], spec, "stochastic", key=KEY, stream=4)
    quantize_foreach_(given, spec, "stochastic", key=KEY, streams=range(5))
    for result, expected in zip(given, due, strict=True):
        assert_same_bits(result.clone().resolve_neg(), expected)


# ---- refused -------------------------------------------------------------------------------------


def freed(shape):
    x = torch.randn(shape)
    x.untyped_storage().resize_(0)
    return x


# Made when a test runs: some warn that they are experimental.
REFUSED = {
    "sparse": (lambda: torch.eye(4).to_sparse(), "a dense tensor, not one in torch.sparse_coo; convert it with .to_de"),
    "sparse rows": (lambda: torch.eye(4).to_sparse_csr(), "a dense tensor, not one in torch.sparse_csr; convert it"),
    "mkldnn": (lambda: torch.eye(4).to_mkldnn(), "a dense tensor, not one in torch._mkldnn; convert it with .to_dense"),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "not a nested one; round each of x.un",
    ),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        "not a nested one; round each of x.unbind",
    ),
    "freed": (lambda: freed((4, 4)), "x has no memory, as where its storage was freed; round it while it has some"),
}
ENTRIES = {
    "quantize": lambda x: quantize(x, "bfp8[0]"),
    "quantize_": lambda x: quantize_(x, "bfp8[0]"),
    "rounded": lambda x: rounded(x, "bfp8[0]", "nearest", None, 0),
    "round_": lambda x: round_(x, "bfp8[0]", "nearest", None, 0),
    "quantize_weight": lambda x: nodes.quantize_weight(x, None, 0, "bfp8[0]", "nearest"),
    "quantize_output": lambda x: nodes.quantize_output(x, None, 0, "bfp8[0]", "bfp8[0]", "nearest"),
    "in place": lambda x: nodes.quantize_output(x, None, 0, "bfp8[0]", "bfp8[0]", "nearest", in_place="AE"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_memory_of_its_own_is_refused_in_a_sentence(kind, entry):
    make, message = REFUSED[kind]
    rounded(torch.randn(4, 4), "bfp8[0]", "nearest", None, 0)  # so that there is a plan for its shape
    with pytest.raises((TypeError, RuntimeError), match=message) as caught:
        ENTRIES[entry](make())
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_list_with_one_of_them_is_left_as_it_was(kind):
    make, message = REFUSED[kind]
    assert_list_is_refused([make()], message)


def expanded():
    return torch.randn(3, 1).expand(3, 4)


def windows():
    return torch.randn(10).unfold(0, 4, 2)


SHARE = "elements of x share memory, so that they cannot be rounded in place; clone it first"


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("make", [expanded, windows])
def test_in_place_elements_that_share_memory_are_refused(make, spec):
    x = make()
    before = x.clone()
    for write in (lambda: quantize_(x, spec), lambda: round_(x, spec, "nearest", None, 0)):
        with pytest.raises(RuntimeError, match=SHARE):
            write()
    assert torch.equal(x, before)
    assert_list_is_refused([x], SHARE)
    assert_list_is_refused([x], SHARE, spec)


def assert_list_is_refused(last, message, spec="bfp8[0]"):
    """Before the tensors ahead of it are changed."""
    first = [torch.full((3, 4), 0.123456), torch.full((300, 400), 0.123456).t()]
    with pytest.raises((TypeError, RuntimeError), match=message):
        quantize_foreach_([*first, *last], spec, streams=range(2 + len(last)))
    for x in first:
        assert torch.equal(x, torch.full_like(x, 0.123456)) and x._version == 0


@pytest.mark.parametrize("spec", SPECS)
def test_in_place_elements_in_turns_share_no_memory(spec):
    """Their strides alone do not tell: rows 3 apart, of elements 2 apart."""
    memory = torch.randn(10)
    x = memory.as_strided((2, 3), (3, 2))
    due = quantize(x, spec, "stochastic", key=KEY)
    rest = memory[[1, 6, 8, 9]]
    assert_same_bits(quantize_(x, spec, "stochastic", key=KEY), due)
    assert torch.equal(memory[[1, 6, 8, 9]], rest)


# ---- lists of tensors that share memory ----------------------------------------------------------


@pytest.mark.parametrize("size", [40, 40_000])
@pytest.mark.parametrize("spec", ["fixed8.4", "bfp4", "nvfp4"])
@pytest.mark.parametrize(
    "of",
    [
        lambda x: [x[:-8], x[8:]],
        lambda x: [x, x[::3], x],
        lambda x: [x[:, ::2], x[:, 1::2], torch.randn(3)],
        lambda x: [x.unfold(0, 5, 5), x.t()],
        lambda x: [x[:4], x[4:]],
    ],
    ids=["overlapping", "parts and whole", "in turns", "other views", "apart"],
)
def test_a_list_is_rounded_in_its_order(of, spec, size):
    one = torch.randn(20, size // 20)
    other = one.clone()
    state = torch.get_rng_state()
    for stream, x in enumerate(of(other)):
        quantize_(x, spec, "stochastic", key=KEY, stream=stream)
    torch.set_rng_state(state)
    given = of(one)
    quantize_foreach_(given, spec, "stochastic", key=KEY, streams=range(len(given)))
    assert_same_bits(one, other)
