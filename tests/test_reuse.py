"""Rounding in place: the tables hold on real layers, nothing changes but the memory, and a wrong place is refused."""

import copy
import operator

import pytest
import shapes
import torch
import torch.nn.functional as F
import torchvision
from marks import Traced, assert_refused, captured, letters_of, marked, marks, traced
from tables import crossed
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from swalp_fx import Recipe, convert, nodes
from swalp_fx.passes.proof import VerifyError
from swalp_fx.passes.tables import OPERATIONS

RECIPE = Recipe.parse("bfp6[0]")

OWN_OUTPUT, OWN_GRADIENT, OVERWRITES = (
    {name for name, row in OPERATIONS.items() if what in row.does} for what in ("own", "regrad", "adds")
)

IMAGE, TEXT = (2, 4, 6, 6), (2, 3, 4)
LINE, VOLUME = (2, 4, 6), (2, 4, 4, 4, 4)
ROWS = (5, 4)


def _convolutions():
    for d, shape in enumerate((LINE, IMAGE, VOLUME), 1):
        kernel = (4, 4) + (3,) * d
        yield f"conv{d}d", getattr(F, f"conv{d}d"), [shape, kernel]
        yield f"conv_transpose{d}d", getattr(F, f"conv_transpose{d}d"), [shape, kernel]


def _pools():
    for d, shape in enumerate((LINE, IMAGE, VOLUME), 1):
        for kind in ("max", "avg"):
            pool = getattr(F, f"{kind}_pool{d}d")
            yield f"{kind}_pool{d}d", lambda x, pool=pool: pool(x, 2), [shape]
        for size in (1, 2):
            pool = getattr(F, f"adaptive_avg_pool{d}d")
            yield f"adaptive_avg_pool{d}d", lambda x, pool=pool, size=size: pool(x, size), [shape]


def _activations():
    for name in ("relu", "relu_", "relu6", "gelu", "silu", "mish", "hardswish", "leaky_relu", "sigmoid", "tanh"):
        yield name, getattr(F, name), [IMAGE]


def _norms():
    yield "batch_norm", nn.BatchNorm2d(4), [IMAGE]
    yield "batch_norm", nn.BatchNorm1d(4).eval(), [LINE]
    yield "batch_norm", lambda x: F.batch_norm(x, None, None, training=True), [IMAGE]
    yield "layer_norm", nn.LayerNorm(4), [TEXT]
    yield "layer_norm", lambda x: F.layer_norm(x, (4,)), [TEXT]
    yield "group_norm", nn.GroupNorm(2, 4), [IMAGE]
    yield "group_norm", lambda x: F.group_norm(x, 2), [IMAGE]


def _products():
    yield "linear", F.linear, [TEXT, (3, 4)]
    yield "linear", F.linear, [ROWS, (3, 4), (3,)]
    yield "bilinear", F.bilinear, [ROWS, ROWS, (3, 4, 4)]
    yield "matmul", torch.matmul, [TEXT, (4, 3)]
    yield "matmul", torch.matmul, [(2, 1, 3, 4), (3, 4, 2)]
    yield "matmul", torch.matmul, [ROWS, (4,)]
    yield "mm", torch.mm, [ROWS, (4, 3)]
    yield "bmm", torch.bmm, [TEXT, (2, 4, 3)]
    yield "mv", torch.mv, [ROWS, (4,)]


def _sums():
    for name in ("add", "sub", "mul"):
        for second in (ROWS, (1, 4)):
            yield name, getattr(torch, name), [ROWS, second]
        yield name, lambda x, name=name: getattr(x, name)(1), [ROWS]
        yield name, lambda x, name=name: getattr(x, name)(x), [ROWS]


def _embeddings():
    where = torch.tensor([[1, 2, 2]])
    yield "embedding", lambda weight: F.embedding(where, weight), [ROWS]


def _fills():
    yield "masked_fill", lambda x: x.masked_fill(torch.tensor([True, False, False, True]), 0.0), [ROWS]
    yield "masked_fill", lambda x: x.masked_fill(torch.zeros(5, 4, dtype=torch.bool), 0.0), [ROWS]
    yield "masked_fill", lambda x, value: x.masked_fill(x > 0.5, value), [ROWS, ()]


# (name in the tables, the function, shapes of its inputs)
CALLS = [
    *_convolutions(), *_pools(), *_activations(), *_norms(), *_products(), *_sums(), *_embeddings(), *_fills(),
]  # fmt: skip
# As readers only: they write into memory that is not theirs.
IN_PLACE = [
    (name, lambda x, name=name: getattr(F, name)(x, inplace=True), [IMAGE])
    for name in ("relu", "relu6", "silu", "mish", "hardswish", "leaky_relu")
]


def _of(table, calls):
    named = [(f"{name}-{i}", call, sizes) for i, (name, call, sizes) in enumerate(calls) if name in table]
    return pytest.mark.parametrize(("call", "sizes"), [pytest.param(*each, id=name) for name, *each in named])


def _memory(*tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _inputs(sizes):
    """No leaves, so that they may be overwritten."""
    torch.manual_seed(0)
    return [torch.rand(size, requires_grad=True).clone() for size in sizes]


def _forward(call, sizes):
    """(inputs, output, tensors that autograd keeps)"""
    inputs, kept = _inputs(sizes), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        return inputs, call(*inputs), kept


def _gradients(call, sizes):
    """(gradient of the output, gradients of the inputs), each in the memory that autograd passes."""
    inputs, got = _inputs(sizes), {}
    for i, each in enumerate(inputs):
        each.register_hook(lambda gradient, i=i: got.update({i: gradient}))
    output = call(*inputs)
    given = torch.rand(output.shape)
    output.backward(given)
    return given, [got[i] for i in range(len(inputs))]


def test_every_name_is_tried():
    assert {name for name, *_ in CALLS} == OWN_OUTPUT | OWN_GRADIENT


@_of(OWN_OUTPUT, CALLS)
def test_an_output_of_the_table_is_in_memory_of_its_own(call, sizes):
    inputs, output, kept = _forward(call, sizes)
    assert _memory(output).isdisjoint(_memory(*inputs, *kept))


@_of(OWN_GRADIENT, [*CALLS, *IN_PLACE])
def test_a_gradient_of_the_table_is_in_memory_of_its_own(call, sizes):
    given, (first, *others) = _gradients(call, sizes)
    assert _memory(first).isdisjoint(_memory(given, *others))
    assert torch._debug_has_internal_overlap(first) == 0


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "reciprocal", "amax"])
def test_what_differentiates_by_its_result_is_in_no_table(name):
    _, output, kept = _forward(getattr(torch, name), [ROWS])
    assert _memory(output) & _memory(*kept) and name not in OWN_OUTPUT


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("add", lambda x: x + 1),
        ("cat", lambda x: torch.cat([x, x.detach()])),
        ("flatten", torch.flatten),
        ("Dropout", nn.Dropout().eval()),
        ("sum", torch.sum),
    ],
)
def test_what_hands_on_its_gradient_is_in_no_table(name, call):
    given, (first,) = _gradients(call, [ROWS])
    assert _memory(first) & _memory(given) and name not in OWN_GRADIENT


@pytest.mark.parametrize("name", sorted(OVERWRITES))
def test_a_writer_keeps_nothing(name):
    call = getattr(operator, name, None) or getattr(torch.Tensor, name)
    (written, _), output, kept = _forward(call, [ROWS, ROWS])
    assert output is written and not kept


# Where


def _letters(kind, recipe=RECIPE):
    return marks(traced(kind, recipe)[1].graph, "in_place")


class Residual(nn.Module):
    inputs = (torch.Size(IMAGE),)

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.relu(self.conv(x))
        z = self.bn(self.last(y))
        z += y
        return self.last(self.relu(z))


def test_a_residual_block():
    assert _letters(Residual) == {
        "conv": "A",
        "relu_1": "",  # differentiates by its result, and two read it
        "last_1": "AE",
        "bn": "A",  # a sum hands one gradient to both its terms
        "iadd": "A",  # into bn's memory, which is the sum's alone
        "relu_2": "E",
    }


class _Two(nn.Module):
    """``read`` reads the output of ``make``, and a layer reads the result."""

    def __init__(self, make, read):
        super().__init__()
        self.make, self.read = make, read

    def forward(self, x):
        return torch.erf(self.read(self.make(x)))


class _Keeps(nn.Linear):
    """A forward keeps the tensor that the next layer reads: rounded, and read by two."""

    def forward(self, x):
        self.kept = super().forward(x)
        return self.kept


def _keeping(kept=[]):  # noqa: B006
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda layer, inputs, output: kept.append(output))
    return layer


# make, read, letters of make's node
CASES = [
    (nn.Linear(4, 4), torch.tanh, "AE"),
    (nn.Linear(4, 4), torch.exp, "A"),
    (nn.Linear(4, 4), lambda y: y.tanh() + y.sin(), "A"),
    (nn.Linear(4, 4), lambda y: y + y, "A"),
    (nn.Linear(4, 4), lambda y: (y * 2).flatten(1), "AE"),
    (nn.Linear(4, 4), lambda y: y.flatten(1).exp(), "A"),
    (nn.Linear(4, 4), nn.Dropout(), "A"),
    (nn.Linear(4, 4), nn.Linear(4, 4), "AE"),
    (_Keeps(4, 4), torch.tanh, "A"),
    (_keeping(), torch.tanh, "A"),
    (nn.SiLU(), torch.tanh, "AE"),
    (nn.SiLU(inplace=True), torch.tanh, "E"),
    (lambda x: F.leaky_relu(x, inplace=True), torch.tanh, "E"),
    (torch.sigmoid, torch.tanh, "E"),
    (lambda x: x.mul_(2), torch.tanh, "E"),
    (lambda x: torch.add(x, 1), torch.tanh, "AE"),
    (lambda x: torch.add(x, 1, out=torch.empty(5, 4)), torch.tanh, "E"),
    (lambda x: x.mul(2), lambda y: y.add_(1), "A"),
    (lambda x: x.add_(1), torch.tanh, "E"),
]


def test_where():
    model, graph = captured([_Two(make, read) for make, read, _ in CASES], ROWS)
    assert [letters[0] for letters in letters_of(model, graph, RECIPE, "in_place")] == [case[-1] for case in CASES]


def test_what_writes_into_memory_of_its_own():
    class Writing(nn.Module):
        inputs = (torch.Size([5, 4]),)

        def forward(self, x):
            y = x.mul(2)
            z = y.mul(3).add_(y)  # into the product
            w = z.tanh()
            w += 1  # into tanh's result, rounded in memory of its own
            return w.exp()

    assert _letters(Writing) == {"mul_1": "A", "mul_2": "A", "add": "AE", "tanh": "", "iadd": "A"}


def test_what_the_model_returns_bare_is_left_alone():
    class Both(nn.Module):
        inputs = (torch.Size([5, 4]),)

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            return self.layer(y), y.view(-1)

    assert _letters(Both) == {"layer_1": "E"}
    assert _letters(Both, Recipe.parse(RECIPE, quantize_logits=True)) == {"layer_1": "A", "layer_2": "A"}


def test_an_error_in_float_is_not_rounded_at_all():
    assert set(_letters(Residual, Recipe.parse("bfp6[0] E=float")).values()) == {"A", ""}


def test_the_recipe_can_forbid_it():
    assert Recipe.parse("bfp6[0]").in_place
    recipe = Recipe.parse("bfp6[0] in_place=false")
    assert not recipe.in_place and Recipe.parse(str(recipe)) == recipe
    assert set(_letters(Residual, recipe).values()) == {""}


def test_it_is_seen_in_the_code():
    assert "'bfp6[0]', 'bfp6[0]', 'stochastic', in_place = 'AE')" in traced(Residual, RECIPE)[1].code


# The rewritten graph


def test_the_memory_is_the_same_and_the_tensor_is_not():
    x = torch.rand(ROWS, requires_grad=True) * 2
    y = nodes.quantize_output(x, None, 0, "bfp4", "bfp4", "nearest", in_place="A")
    assert y is not x and not y._is_view() and _memory(x) == _memory(y) and x._version == 1
    error = torch.rand(ROWS)
    before = error.clone()
    (gradient,) = torch.autograd.grad(
        nodes.quantize_output(x, None, 0, "bfp4", "bfp4", "nearest", in_place="E"), x, error
    )
    assert _memory(gradient) == _memory(error) and torch.equal(gradient, nodes.quantize(before, "bfp4"))


@pytest.mark.parametrize("format", ["bfp4", "float"])
def test_autograd_notices_where_the_table_is_wrong(format):
    x = torch.rand(ROWS, requires_grad=True)
    y = nodes.quantize_output(x.exp(), None, 0, format, format, "nearest", in_place="A")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_gradient_of_the_gradient_is_out_of_place():
    x = torch.rand(ROWS, requires_grad=True)
    y = nodes.quantize_output(x * 1, None, 0, "bfp4", "bfp4", "nearest", in_place="AE").pow(3).sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(second, nodes.quantize(6 * nodes.quantize(x.detach(), "bfp4"), "bfp4"))


class Writes(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.leaky, self.last = layer, nn.LeakyReLU(0.3, inplace=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.leaky(self.layer(x)).mul_(1.7))


@pytest.mark.parametrize(
    "layer, x", [(nn.Linear(6, 8), torch.rand(2, 4, 6)), (nn.Conv2d(3, 4, 3, padding=1), torch.rand(3, 5, 8))]
)
def test_outputs_that_are_views_and_written_into_keep_their_error_signals(layer, x):
    model = Writes(layer)
    one, other = (_run(model, (x,), in_place, train=True) for in_place in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("activation", [nn.GELU(), nn.ReLU()])
def test_a_backward_hook_registered_later_runs(activation):
    module, _ = convert(nn.Sequential(nn.Linear(6, 8), activation, nn.Linear(8, 3)), recipe="bfp4[0]")
    seen = []
    module[0].register_full_backward_hook(lambda layer, before, after: seen.append(after))
    module(torch.randn(4, 6, requires_grad=True)).sum().backward()
    assert len(seen) == 1


def _run(model, inputs, in_place, *, train, recipe="bfp6[0]", call=lambda module, *inputs: module(*inputs)):
    """Every tensor that a forward and a backward leave behind."""
    model = copy.deepcopy(model)
    module, _ = convert(model, recipe=Recipe.parse(recipe, in_place=in_place))
    module.train(train)
    inputs = [x.clone().requires_grad_() for x in inputs]
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    torch.manual_seed(1)
    outputs = [out for out in pytree.tree_leaves(call(module, *inputs)) if out.requires_grad]
    torch.autograd.backward(outputs, [torch.randn_like(out) for out in outputs])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    gradients = [x.grad for x in (*inputs, *model.parameters())]
    return [*outputs, *(x for x in gradients if x is not None), *model.buffers()]


def _same(*args, **kwargs):
    found, expected = (_run(*args, in_place, **kwargs) for in_place in (True, False))
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("kind", "train"), crossed([*shapes.ALL, Residual], [True, False]), ids=lambda each: getattr(each, "__name__", each)
)
def test_the_numbers_are_the_same(kind, train):
    assert _same(*shapes.made(kind), train=train)


@pytest.mark.parametrize("recipe", ["float A=e4m3 rounding=nearest", "mxfp6_e3m2 A=float"])
@pytest.mark.parametrize("kind", [shapes.Counting, Residual], ids=lambda kind: kind.__name__)
def test_the_numbers_are_the_same_in_other_formats(kind, recipe):
    assert _same(*shapes.made(kind), recipe=recipe, train=True)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        ("mobilenet_v3_small", 32),
        ("efficientnet_b0", 32),
        ("shufflenet_v2_x0_5", 32),
        ("convnext_tiny", 32),
        ("densenet121", 32),
        ("googlenet", 64),
        ("swin_t", 32),
        ("vit_b_16", 224),
    ],
)
@pytest.mark.slow
def test_the_numbers_of_torchvision_are_the_same(name, size):
    torch.manual_seed(0)
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = getattr(torchvision.models, name)(num_classes=10, **options)
    assert _same(model, [torch.randn(2, 3, size, size)], train=True)


def _autocast(module, *inputs):
    with torch.autocast("cpu", torch.bfloat16):
        return module(*inputs)


def _channels_last(module, *inputs):
    return module.to(memory_format=torch.channels_last)(*(x.to(memory_format=torch.channels_last) for x in inputs))


def _compiled(module, *inputs):
    return torch.compile(module, fullgraph=True, backend="aot_eager")(*inputs)


@pytest.mark.parametrize(
    "call",
    [
        _autocast,
        _channels_last,
        lambda module, *inputs: checkpoint(module, *inputs, use_reentrant=False),
        lambda module, *inputs: checkpoint(module, *inputs, use_reentrant=True),
    ],
    ids=["autocast", "channels_last", "checkpoint", "reentrant checkpoint"],
)
def test_the_numbers_are_the_same_under(call):
    assert _same(*shapes.made(Residual), train=True, call=call)


def test_compiled_it_computes_what_it_computes_eagerly():
    model, inputs = shapes.made(Residual)
    arguments = {"train": False, "recipe": "bfp6[0] rounding=nearest"}
    eager, compiled = (_run(model, inputs, True, **arguments, call=call) for call in (lambda m, *x: m(*x), _compiled))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def test_in_inference():
    model, inputs = shapes.made(Residual)
    module, _ = convert(model.eval(), recipe="bfp6[0]")
    expected = module(*inputs)
    with torch.inference_mode():
        assert torch.equal(module(*inputs), expected)
    with torch.no_grad():
        assert torch.equal(module(*inputs), expected)


# verify: a mark where none may be


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (marked("relu_1", in_place="A"), "node relu_1_q: it overwrites relu_1, which"),
        (marked("relu_2", in_place="AE"), "node relu_2_q: it overwrites relu_2, which"),
        (marked("relu_1", in_place="E"), "node relu_1_q: it overwrites the gradient of"),
        (marked("bn", in_place="AE"), "node bn_q: it overwrites the gradient of"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_wrong_mark_is_refused(spoil, complaint):
    assert_refused(Residual, RECIPE, spoil, complaint)


def test_a_mark_that_the_recipe_forbids_is_refused():
    with pytest.raises(VerifyError, match="where the recipe says not to"):
        Traced(Residual, RECIPE).proved(Recipe.parse(RECIPE, in_place=False))
