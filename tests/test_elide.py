"""Roundings that are left out: numbers stay the same, only work is saved, and a wrong mark is refused."""

import pytest
import torch
import torch.nn.functional as F
from graphs import rewritten
from marks import Traced, assert_refused, captured, letters_of, marked, marks, traced
from torch import nn

from swalp_fx import Recipe, Rule, check, convert, nodes, quantize
from swalp_fx.passes.proof import VerifyError
from swalp_fx.passes.tables import OPERATIONS

RECIPE = Recipe.parse("bfp6[0]")
IMAGE = (2, 4, 6, 6)
FLOAT, BFP6 = "float", "bfp6[0]"

MASKING = {"relu": torch.relu, "relu_": torch.relu_}
POOLING = {
    name: pool
    for d in (1, 2)
    for name, pool in (
        (f"max_pool{d}d", lambda x, d=d: getattr(F, f"max_pool{d}d")(x, 3, 2, 1, ceil_mode=True)),
        (f"adaptive_max_pool{d}d", lambda x, d=d: getattr(F, f"adaptive_max_pool{d}d")(x, 3)),
    )
}


def test_every_name_is_tried():
    for what, tried in (("masks", MASKING), ("selects", POOLING)):
        assert {name for name, row in OPERATIONS.items() if what in row.does} == set(tried)


@pytest.mark.parametrize("name", MASKING)
def test_a_mask_passes_numbers_or_zeros_both_ways(name):
    leaf = torch.randn(IMAGE, requires_grad=True)
    x, error = leaf * 1, torch.randn(IMAGE)
    before = x.detach().clone()
    y = MASKING[name](x)
    y.backward(error)
    assert ((y == before) | (y == 0)).all() and ((leaf.grad == error) | (leaf.grad == 0)).all()


@pytest.mark.parametrize("batched", [True, False], ids=["batch", "single"])
@pytest.mark.parametrize("name", POOLING)
def test_a_pool_passes_numbers_of_the_same_row(name, batched):
    sides = (5,) * int(name[-2])
    x = torch.randn((2, 3, *sides) if batched else (3, *sides))
    for row, pooled in zip(x, POOLING[name](x), strict=True):
        assert torch.isin(pooled, row).all()


@pytest.mark.parametrize("call", [*MASKING.values(), *POOLING.values()], ids=[*MASKING, *POOLING])
def test_the_dtype_is_the_same_under_autocast(call):
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            assert call(torch.randn((2, 6, 6) if call in _OF_LINES else IMAGE, dtype=dtype)).dtype == dtype


_OF_LINES = [pool for name, pool in POOLING.items() if "1d" in name]


# Where


def _kept(kind, recipe=RECIPE):
    return marks(traced(kind, recipe)[1].graph, "kept")


class Residual(nn.Module):
    inputs = (torch.Size(IMAGE),)

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.pool, self.last = nn.MaxPool2d(2, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.pool(self.relu(self.bn(self.conv(x))))
        z = self.bn(self.last(y))
        z += y
        return self.last(self.relu(z))


def test_a_residual_block():
    assert _kept(Residual) == {
        "conv": "",
        "bn_1": "E",  # a mask of relu_1_q's output
        "relu_1": "A",  # a mask of bn_1_q
        "pool": "A",  # some of relu_1_q
        "last_1": "",
        "bn_2": "E",  # the very error signal of the sum
        "iadd": "E",
        "relu_2": "A",
    }


class _Two(nn.Module):
    """``mask`` reads the output of ``make``, and ``read`` the output of ``mask``; then follows a layer."""

    def __init__(self, make, mask, read):
        super().__init__()
        self.make, self.mask, self.read = make, mask, read

    def forward(self, x):
        return torch.erf(self.read(self.mask(self.make(x))))


def _both(x):
    return torch.relu(x) + x


def _written(write):
    def mask(x):
        write(x)
        return torch.relu(x)

    return mask


def _in_no_grad(x):
    with torch.no_grad():
        x += 0.3
    return torch.relu(x)


def _onto_itself(x):
    x += x
    return x


def _onto(x):
    y = x.mul(2)
    y += x
    return y


def _by_its_own_forward():
    layer = nn.ReLU()
    layer.forward = lambda x: torch.relu(x) + 0.1
    return layer


class _Added(nn.ReLU):
    def forward(self, x):
        return super().forward(x) + 0.1


@torch.library.custom_op("swalp_fx_tests::relu", mutates_args=())
def _another_relu(x: torch.Tensor) -> torch.Tensor:
    return x.tanh()


@_another_relu.register_fake
def _(x):
    return torch.empty_like(x)


_another_relu.register_autograd(lambda ctx, gradient: gradient)

# mask, read, recipe, letters
CASES = [
    (nn.ReLU(), torch.tanh, "bfp6[0]", ["E", "A", ""]),
    (nn.ReLU(inplace=True), torch.tanh, "bfp6[0]", ["E", "A", ""]),
    (lambda x: x.relu(), torch.tanh, "bfp6[0]", ["E", "A", ""]),
    (lambda x: F.relu(x, inplace=True), torch.tanh, "bfp6[0]", ["E", "A", ""]),
    (F.relu_, torch.tanh, "bfp6[0]", ["E", "A", ""]),
    # No mask: a bound, a slope, a scale; or no tensor of the table at all.
    (nn.ReLU6(), torch.tanh, "bfp6[0]", ["", "", ""]),
    (nn.LeakyReLU(), torch.tanh, "bfp6[0]", ["", "", ""]),
    (nn.Dropout(), torch.relu, "bfp6[0]", ["", ""]),
    # Other code of a user's; and of a layer that runs other code than its type's, only the end is rounded.
    (_Added(), torch.tanh, "bfp6[0]", ["E", "A", "", ""]),
    (_by_its_own_forward(), torch.tanh, "bfp6[0]", ["", "", ""]),
    (torch.ops.swalp_fx_tests.relu, torch.tanh, "bfp6[0]", ["", "", ""]),
    # Formats: other numbers after the mask, roles in float, and blocks with a part left out.
    (nn.ReLU(), torch.tanh, "bfp6[0] E=float", ["", "A", ""]),
    (nn.ReLU(), torch.tanh, "bfp6[0] A=float", ["E", "", ""]),
    (nn.ReLU(), torch.tanh, "bfp6[0] A=e4m3 E=bfp6+twos", ["", "A", ""]),
    (nn.ReLU(), torch.tanh, "mxfp8", ["", "", ""]),
    (nn.ReLU(), torch.tanh, "mxfp8_e5m2", ["E", "A", ""]),
    (nn.ReLU(), torch.tanh, "int8[0]", ["", "", ""]),
    (nn.ReLU(), torch.tanh, "bfp6[0] placement=compute+activation", ["E", "A", ""]),
    (nn.ReLU(), torch.tanh, "bfp6[0] in_place=false", ["", "", ""]),
    # Nodes that pass on a part: no error signal, and not across blocks.
    (nn.MaxPool1d(1), torch.tanh, "bfp6[0]", ["", "A", ""]),
    (nn.MaxPool1d(1), torch.tanh, "fixed8.4", ["", "A", ""]),
    (nn.MaxPool1d(1), torch.tanh, "bfp6", ["", "A", ""]),
    (nn.MaxPool1d(1), torch.tanh, "bfp6[1]", ["", "", ""]),
    (nn.MaxPool1d(1), torch.tanh, "bfp6[0,1]", ["", "", ""]),
    (nn.MaxPool1d(1), torch.tanh, "bfp6[-1:16]", ["", "", ""]),
    # A node that writes into memory to be shared, or hands it on, gets memory of its own.
    (nn.ReLU(), lambda y: y.add_(1), "bfp6[0]", ["E", "E", ""]),
    (nn.ReLU(), nn.SiLU(inplace=True), "bfp6[0]", ["E", "", ""]),
    (nn.ReLU(), lambda y: y.view(-1, 6).mul_(2), "bfp6[0]", ["E", "", ""]),
    (nn.ReLU(), lambda y: y.view(-1, 6).tanh(), "bfp6[0]", ["E", "A", ""]),
    (nn.ReLU(), _onto, "bfp6[0]", ["E", "A", "E", ""]),
    (nn.ReLU(), lambda y: torch.add(y, 1, out=torch.empty(2, 4, 6)), "bfp6[0]", ["E", "A", ""]),
    (nn.ReLU(), lambda y: torch.add(y, 1, out=y), "bfp6[0]", ["E", "", ""]),
    (nn.ReLU(), lambda y: torch._foreach_add([y], 1)[0], "bfp6[0]", ["E", "", ""]),
    # The masked tensor is written into after its rounding: by name, in a view, in a list, by a hook or by itself.
    (_written(lambda x: x.__setitem__(0, 0.3)), torch.tanh, "bfp6[0]", ["", "", ""]),
    (_written(lambda x: x.view(-1).mul_(0.3)), torch.tanh, "bfp6[0] placement=compute+activation", ["", "", ""]),
    (_written(lambda x: x.data.mul_(0.3)), torch.tanh, "bfp6[0] placement=compute+activation", ["", "", ""]),
    (_written(lambda x: torch._foreach_mul_([x], 0.3)), torch.tanh, "bfp6[0]", ["", "", ""]),
    (_written(lambda x: torch.add(x, 1, out=x)), torch.tanh, "bfp6[0] placement=compute+activation", ["", "", ""]),
    (_written(lambda x: F.leaky_relu(x, 0.1, True)), torch.tanh, "bfp6[0]", ["", "E", "A", ""]),
    (_written(torch.sum), torch.tanh, "bfp6[0]", ["", "A", ""]),
    # A window between padding and padding has a maximum of -infinity.
    (nn.MaxPool1d(2, 1, padding=1, dilation=4), torch.tanh, "bfp6[0]", ["", "", ""]),
    (lambda x: F.max_pool1d(x, 2, 1, 1, 4), torch.tanh, "bfp6[0]", ["", "", ""]),
    (lambda x: F.max_pool1d(x, 2, 1, 1), torch.tanh, "bfp6[0]", ["", "A", ""]),
    # In a no_grad block there is no error signal to round.
    (_in_no_grad, torch.tanh, "bfp6[0]", ["", "", "A", ""]),
    (torch.ops.aten.relu.default, torch.tanh, "bfp6[0]", ["E", "A", ""]),
    (lambda x: torch.ops.aten.relu(x), torch.tanh, "bfp6[0]", ["E", "A", ""]),
    # Two readers, with summed error signals; and one that reads twice.
    (_both, torch.tanh, "bfp6[0]", ["", "A", "", ""]),
    (_onto_itself, torch.tanh, "bfp6[0]", ["", "", ""]),
]


@pytest.fixture(scope="module")
def graph_of_cases():
    return captured([_Two(nn.Linear(6, 6), mask, read) for mask, read, *_ in CASES], (2, 4, 6))


@pytest.mark.parametrize("recipe", dict.fromkeys(recipe for _, _, recipe, _ in CASES))
def test_where(graph_of_cases, recipe):
    found = letters_of(*graph_of_cases, Recipe.parse(recipe), "kept")
    wanted = {i: letters for i, (*_, by, letters) in enumerate(CASES) if by == recipe}
    assert {i: found[i] for i in wanted} == wanted


def test_what_is_written_into_under_no_grad_keeps_its_gradient():
    model = _Two(nn.Linear(6, 6), _in_no_grad, torch.tanh)
    assert check(model, torch.randn(4, 6))
    model(x := torch.randn(4, 6)).sum().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    module, _ = convert(model, recipe="bfp24")
    module(x).sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_by_a_rule_the_formats_may_differ():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    recipe = Recipe.parse("bfp4[0]", rules=(Rule("*", kind="activation", activation="bfp6[0]", error="bfp4[0]"),))
    graph = rewritten(model, recipe, torch.randn(2, 6)).graph
    assert marks(graph, "kept") == {"_0": "E", "_1": ""}


def test_what_the_model_returns_is_its_own():
    class Both(nn.Module):
        inputs = (torch.Size([4, 6]),)

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x):
            y = torch.relu(self.layer(x))
            return self.layer(y), y.view(-1)

    assert _kept(Both) == {"layer_1": "", "relu": ""}
    # The error signal of all that it returns is rounded in one place.
    assert _kept(Both, Recipe.parse(RECIPE, quantize_logits=True))["layer_1"] == "E"


def test_what_a_buffer_becomes_is_its_own():
    class Remembers(nn.Module):
        inputs = (torch.Size([2, 6]),)

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("last", torch.zeros(2, 6))

        def forward(self, x):
            y = torch.relu(self.layer(x))
            self.last = y.detach()
            return self.layer(y)

    assert _kept(Remembers)["relu"] == ""


def test_it_is_seen_in_the_code():
    code = traced(Residual, RECIPE)[1].code
    assert "'bfp6[0]', 'bfp6[0]', 'stochastic', kept = 'E', in_place = 'A')" in code


# The rewritten graph


def _node(x, **letters):
    return nodes.quantize_output(x, None, 0, BFP6, BFP6, "nearest", **letters)


def _shares(x, y):
    return x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()


def test_a_kept_activation_is_another_tensor_in_the_same_memory():
    x = torch.randn(5, 4, requires_grad=True) * 1
    y, error = _node(x, kept="A"), torch.randn(5, 4)
    assert y is not x and _shares(x, y) and x._version == 0
    (gradient,) = torch.autograd.grad(y, x, error)
    assert torch.equal(gradient, quantize(error, BFP6))


@pytest.mark.parametrize("in_place", ["", "A"])
def test_a_kept_error_signal_passes_as_it_is(in_place):
    x = torch.randn(5, 4, requires_grad=True) * 1
    before, error = x.detach().clone(), torch.randn(5, 4)
    y = _node(x, kept="E", in_place=in_place)
    assert torch.equal(y, quantize(before, BFP6)) and _shares(x, y) == bool(in_place)
    assert x._version == len(in_place)  # so that autograd would notice
    assert torch.autograd.grad(y.sum() if y is x else y, x, None if y is x else error)[0] is not None
    if y is not x:
        assert torch.equal(torch.autograd.grad(_node(x, kept="E"), x, error)[0], error)


def test_kept_both_ways_a_tensor_is_itself():
    x = torch.randn(5, 4, requires_grad=True) * 1
    assert _node(x, kept="AE") is x


def test_a_transform_rounds_all_the_same():
    x = torch.randn(3, 5, 4)
    whole = torch.func.vmap(lambda each: _node(each, kept="AE"))(x)
    assert torch.equal(whole, torch.stack([quantize(each, BFP6) for each in x]))


def test_the_work_is_left_out(monkeypatch):
    """Of the roundings of 8 outputs, both ways, the six that the first test names."""
    module, _ = convert(Residual(), recipe="bfp6[0] W=float")
    rounded = []

    def counting(function):
        return lambda x, *how: rounded.append(how[0]) or function(x, *how)

    monkeypatch.setattr(nodes, "round_", counting(nodes.round_))
    monkeypatch.setattr(nodes, "rounded", counting(nodes.rounded))
    module(torch.randn(IMAGE)).sum().backward()
    assert len(rounded) == 2 * 8 - 6


# verify: a mark where none may be


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (marked("conv", kept="A"), "node conv_q: it does not round conv, which"),
        (marked("iadd", kept="A"), "node iadd_q: it does not round iadd, which"),
        (marked("conv", kept="E"), "node conv_q: it does not round the gradient of [bn_1]"),
        (marked("relu_1", kept="E"), "node relu_1_q: it does not round the gradient of [pool]"),
        (marked("pool", kept="E"), "node pool_q: it does not round the gradient of [last_1, iadd]"),
        (marked("relu_1", kept="A", in_place="A"), "node relu_1_q: it overwrites relu_1"),
        (marked("bn_1", kept="E", in_place="AE"), "node bn_1_q: it is both to round in place and not to round (E)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_wrong_mark_is_refused(spoil, complaint):
    assert_refused(Residual, RECIPE, spoil, complaint)


@pytest.mark.parametrize("read", [lambda y: y.add_(1), lambda y: y.view(-1, 6).mul_(2), nn.SiLU(inplace=True)])
def test_a_mark_on_what_is_written_into_is_refused(read):
    class Written(_Two):
        inputs = (torch.Size([4, 6]),)

        def __init__(self):
            super().__init__(nn.Linear(6, 6), nn.ReLU(), read)

    complaint = r"mask_q: it shares the memory of mask with|add_q: it overwrites add,"
    assert_refused(Written, RECIPE, marked("mask", kept="A"), complaint)


def test_a_mark_that_the_recipe_forbids_is_refused():
    made = Traced(Residual, RECIPE)
    for node in made.graph.find_nodes(op="call_function", target=nodes.quantize_output):
        node.kwargs = {name: letters for name, letters in node.kwargs.items() if name == "kept"}
    with pytest.raises(VerifyError, match="leaves out a rounding where the recipe says not to"):
        made.proved(Recipe.parse(RECIPE, in_place=False))
