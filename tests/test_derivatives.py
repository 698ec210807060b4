"""Gradients through the nodes other than ordinary ones: none, zeros without memory, tangents of either mode."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from swalp_fx import NotRewritten, convert, nodes, quantize, random

KEY = torch.tensor(1234)
SPEC = "bfp4[0]"
THROUGH = {
    "op": lambda x: quantize(x, SPEC, "stochastic", key=KEY),
    "weight": lambda x: nodes.quantize_weight(x, KEY, 7, SPEC, "stochastic"),
    "output": lambda x: nodes.quantize_output(x, KEY, 7, SPEC, SPEC, "stochastic"),
    "output in float": lambda x: nodes.quantize_output(x, KEY, 7, "float", "float", "stochastic"),
    "in place": lambda x: nodes.quantize_output(x * 1, KEY, 7, SPEC, SPEC, "stochastic", in_place="AE"),
    "error kept": lambda x: nodes.quantize_output(x * 1, KEY, 7, SPEC, SPEC, "stochastic", in_place="A", kept="E"),
}


@pytest.fixture(params=THROUGH)
def through(request):
    return THROUGH[request.param]


# ---- backward ------------------------------------------------------------------------------------


class First(torch.autograd.Function):
    """The first of two; the second gets no gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, y):
        return x * y

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, error):
        return error, None


@pytest.mark.parametrize("create_graph", [False, True])
def test_where_no_gradient_comes_none_goes_on(through, create_graph):
    x, y = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    product = First.apply(x, through(y))
    found = torch.autograd.grad(product.sum(), (x, y), create_graph=create_graph, allow_unused=True)
    assert torch.equal(found[0], torch.ones(3, 4)) and found[1] is None


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f, **k: torch.func.vmap(torch.func.grad(f, **k))])
def test_under_a_transform_it_is_zeros_as_of_any_function(through, transform):
    def loss(x, y):
        return First.apply(x, through(y)).sum()

    found = transform(loss, argnums=(0, 1))(torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    assert torch.equal(found[0], torch.ones(2, 3, 4)) and torch.equal(found[1], torch.zeros(2, 3, 4))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.near, self.far = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return First.apply(self.near(x), torch.tanh(self.far(x)))


@pytest.mark.parametrize("recipe", ["float", "bfp8[0]", "bfp8[0] W=float", "bfp8[0] A=float", "bfp8[0] E=float"])
def test_weight_decay_leaves_a_branch_without_gradient_as_it_is(recipe):
    """As in the model itself: an optimizer steps only parameters with a gradient."""
    torch.manual_seed(0)
    model = Branches()
    lp, _ = convert(model, recipe=recipe)
    stepper = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    before = [p.clone() for p in model.far.parameters()]
    lp(torch.randn(2, 4)).sum().backward()
    stepper.step()
    assert all(p.grad is not None for p in model.near.parameters())
    assert all(p.grad is None for p in model.far.parameters())
    assert all(torch.equal(p, old) for p, old in zip(model.far.parameters(), before, strict=True))


SIGNALS = {
    "zeros without memory": lambda: torch._efficientzerotensor((3, 4)),
    "a negated view": lambda: torch._neg_view(torch.randn(3, 4)),
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "transposed": lambda: torch.randn(4, 3).t(),
}


@pytest.mark.parametrize("in_place", ["", "E", "AE"])
@pytest.mark.parametrize("kind", SIGNALS)
def test_an_error_signal_is_rounded_whatever_its_memory_is(kind, in_place):
    signal = SIGNALS[kind]()
    due = quantize(signal.clone(), SPEC, "stochastic", key=KEY, stream=random.error_stream(7))
    x = torch.randn(3, 4, requires_grad=True)
    y = nodes.quantize_output(x * 1, KEY, 7, SPEC, SPEC, "stochastic", in_place=in_place)
    y.backward(signal)
    assert torch.equal(x.grad, due)


class Sign(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return torch.sgn(x) + torch.sgn(self.scale).sum()


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_gradient_of_zeros_without_memory_is_trained_with(optimizer):
    model = nn.Sequential(nn.Linear(4, 4), Sign(), nn.Linear(4, 4))
    stepper = optimizer(model.parameters(), lr=0.1, weight_decay=0.01)
    lp, _ = convert(model, stepper, recipe="bfp8[0] M=float")
    for _ in range(2):
        stepper.zero_grad()
        lp(torch.randn(2, 4)).sum().backward()
        assert not model[0].weight.grad.any() and model[1].scale.grad._is_zerotensor()
        stepper.step()
    for p in model.parameters():
        assert torch.equal(quantize(p, "bfp8[0]"), p)


# ---- forward -------------------------------------------------------------------------------------


def test_a_tangent_passes_as_it_is(through):
    """The derivative is the identity, forward and backward; only error signals are rounded."""
    x, tangent = torch.randn(3, 4), torch.randn(3, 4)
    y, found = torch.func.jvp(through, (x,), (tangent,))
    assert torch.equal(y, through(x)) and torch.equal(found, tangent)
    assert torch.equal(torch.func.linearize(through, x)[1](tangent), tangent)
    for leaf in (x, x.clone().requires_grad_()):
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(through(forward_ad.make_dual(leaf, tangent)))
        assert torch.equal(dual.primal, y) and torch.equal(dual.tangent, tangent)


def test_a_tangent_is_a_tensor_of_its_own(through):
    tangent = torch.randn(3, 4)
    before = tangent.clone()
    with forward_ad.dual_level():
        through(forward_ad.make_dual(torch.randn(3, 4), tangent)).mul_(2)
    assert torch.equal(tangent, before)


def test_second_derivatives_forward_over_backward_are_those_of_the_identity(through):
    x = torch.randn(3, 4)
    found = torch.func.hessian(lambda x: through(x).pow(3).sum())(x)
    assert torch.allclose(found.view(12, 12), torch.diag(6 * through(x).flatten()))


@pytest.mark.parametrize("in_place", ["", "AE"])
def test_a_tangent_of_an_error_signal_passes_as_it_is(in_place):
    x, tangent = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    y = nodes.quantize_output(x * 1, KEY, 7, SPEC, SPEC, "stochastic", in_place=in_place)
    with forward_ad.dual_level():
        (gradient,) = torch.autograd.grad(y, x, forward_ad.make_dual(torch.randn(3, 4), tangent))
        assert torch.equal(forward_ad.unpack_dual(gradient).tangent, tangent)


@pytest.mark.parametrize("is_made", [False, True], ids=["before its graph", "by its graph"])
def test_forward_derivatives_of_a_converted_model_are_those_backward_or_refused(is_made):
    """From torch 2.14 on, PyTorch's front end makes no graph under a dual level; one that is there runs."""
    torch.manual_seed(0)
    lp, _ = convert(
        nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), recipe="bfp6[0] E=float rounding=nearest"
    )
    x, tangent = torch.randn(2, 4), torch.randn(2, 4)
    if is_made:
        lp(x)
    if not is_made and torch.__version__ >= "2.14":
        with forward_ad.dual_level(), pytest.raises(NotRewritten, match=r"forward_ad runs the original code"):
            lp(forward_ad.make_dual(x, tangent))
        return
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(lp(forward_ad.make_dual(x, tangent))).tangent
    due = torch.einsum("biaj,aj->bi", torch.autograd.functional.jacobian(lp, x), tangent)
    assert torch.allclose(found, due) and not torch.equal(due, torch.zeros(2, 3))


def test_torch_func_of_a_converted_model_is_refused_forward_too():
    lp, _ = convert(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    x = torch.randn(2, 4)
    with pytest.raises(NotRewritten, match=r"forward_ad runs the original code|a transform of torch.func is around"):
        torch.func.jvp(lp, (x,), (x,))


def test_torch_compile_gives_tangents_too(through):
    """By running the code as it is: compiled, the tangent would be zeros."""
    x, tangent = torch.randn(3, 4), torch.randn(3, 4)
    compiled = torch.compile(lambda x, v: torch.func.jvp(through, (x,), (v,)), backend="eager")
    y, found = compiled(x, tangent)
    assert torch.equal(y, through(x)) and torch.equal(found, tangent)


@pytest.mark.parametrize("dim", range(3))
@pytest.mark.parametrize("spec", ["bfp4[0]", "fixed4.2", "mxfp4"])
def test_vmap_gives_of_each_sample_what_it_gives_alone(spec, dim):
    x = torch.randn(3, 4, 5)

    def rounded(x):
        return quantize(x, spec, "stochastic", key=7)

    of_each = torch.stack([rounded(sample) for sample in x.unbind(dim)], dim)
    assert torch.equal(torch.func.vmap(rounded, in_dims=dim, out_dims=dim)(x), of_each)
    assert torch.func.vmap(rounded)(x[:0]).shape == (0, 4, 5)


# ---- many error signals at once ------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_batched_backward_gives_of_each_error_signal_what_it_gives_alone(through, create_graph):
    x, errors = torch.randn(3, 4, requires_grad=True), torch.randn(5, 3, 4)
    y = through(x)
    alone = [torch.autograd.grad(y, x, error, retain_graph=True)[0] for error in errors]
    (found,) = torch.autograd.grad(y, x, errors, is_grads_batched=True, create_graph=create_graph)
    assert torch.equal(found, torch.stack(alone))


class Recurrent(nn.LSTM):
    def forward(self, x):
        return super().forward(x[None])[0][0]


MODELS = {
    "layers": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3)),
    "an lstm": lambda: Recurrent(4, 4),
    "a convolution": lambda: nn.Sequential(nn.Unflatten(0, (1, 1, -1)), nn.Conv2d(1, 2, 2), nn.Flatten(0, 1)),
}


@pytest.mark.parametrize("recipe", [SPEC, f"{SPEC} rounding=nearest", "mxfp4"])
@pytest.mark.parametrize("made", MODELS)
@pytest.mark.filterwarnings("ignore:.*bits an element")
def test_a_batched_backward_through_a_converted_model_has_the_bits_of_one_by_one(made, recipe):
    torch.manual_seed(0)
    lp, _ = convert(MODELS[made](), recipe=recipe)
    x = torch.randn(5, 4, requires_grad=True)
    y, of = lp(x), (x, *lp.parameters())
    errors = torch.randn(4, *y.shape)
    alone = zip(*(torch.autograd.grad(y, of, error, retain_graph=True) for error in errors), strict=True)
    found = torch.autograd.grad(y, of, errors, is_grads_batched=True)
    assert all(torch.equal(each, torch.stack(due)) for each, due in zip(found, alone, strict=True))


def test_a_vectorized_jacobian_is_that_of_a_loop():
    torch.manual_seed(0)
    lp, _ = convert(MODELS["layers"](), recipe=f"{SPEC} rounding=nearest")
    x = torch.randn(2, 4)
    due, found = (torch.autograd.functional.jacobian(lp, x, vectorize=each) for each in (False, True))
    assert torch.equal(found, due) and not torch.equal(due, torch.zeros_like(due))
