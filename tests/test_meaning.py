"""Rounding follows a designer's meaning: no constant, no angle and no mask is rounded; a norm only at its output."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from graphs import converted, rewritten
from marks import rounded
from tables import crossed
from torch import nn
from torch.utils.checkpoint import checkpoint

from swalp_fx import Recipe, RecipeError, convert, nodes, report
from swalp_fx.passes.names import PART, place

WIDTH, TOKENS = 16, 8
X = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def _model(function, **parameters):
    """linear, then ``function`` of (module, x), then linear."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.before, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            for name, value in parameters.items():
                if isinstance(value, nn.Module | nn.Parameter):
                    setattr(self, name, value)
                else:
                    self.register_buffer(name, value)

        def forward(self, x, *rest):
            return self.after(function(self, self.before(x), *rest))

    return Model()


def _between(function, *inputs, recipe="bfp8[0]", **parameters):
    """The places that are rounded between the two linear layers."""
    places = rounded(rewritten(_model(function, **parameters), recipe, *(inputs or (X,))).graph)
    assert places.pop(0) == "before"
    return places


def _meant(function, meaning, *inputs, **parameters):
    made = rewritten(_model(function, **parameters), "bfp8[0]", *(inputs or (X,)))
    return [place(node) for node in made.captured.nodes if node.meta[PART] == meaning]


# Norms


class RMS(nn.Module):
    """Llama's: mean of squares, root, product with a weight."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


class LayerNorm(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        return self.weight * (x - mean) / (x.std(-1, keepdim=True, correction=0).square() + 1e-5).sqrt() + self.bias


class Channels(nn.Module):
    """ConvNeXt's, over the second axis, with a weight of one long axis."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, TOKENS, 1))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        return self.weight * ((x - mean) / ((x - mean).pow(2).mean(1, keepdim=True) + 1e-5).sqrt())


class Normalize(nn.Module):
    """lucidrains': F.normalize, the root of the width, a weight."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return F.normalize(x, dim=-1) * WIDTH**0.5 * self.gamma


class Response(nn.Module):
    """ConvNeXt V2's global response norm, with its residual path."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.ones(1, 1, WIDTH)) for _ in range(2))

    def forward(self, x):
        size = x.norm(p=2, dim=1, keepdim=True)
        return self.weight * (x * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.bias + x


class Batch(nn.Module):
    """Batch norm: statistics measured in training are kept for later."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))

    def forward(self, x):
        mean, variance = self.mean, self.variance
        if self.training:
            variance, mean = torch.var_mean(x, (0, 1), correction=0)
            self.mean = self.mean * 0.9 + mean.detach() * 0.1
            self.variance.mul_(0.9).add_(variance.detach() * 0.1)
        return (x - mean) / (variance + 1e-5).sqrt() * self.weight + self.bias


NORMS = [nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH), RMS(), LayerNorm(), Channels(), Normalize(), Response()]
NORMS += [Batch(), Batch().eval()]


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: type(norm).__name__)
def test_a_module_that_is_a_norm_is_rounded_once(norm):
    assert _between(lambda model, x: model.norm(x), norm=copy.deepcopy(norm)) == ["norm"]


def _mean_square(_, x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _with_weight(model, x):
    variance = x.float().square().mean(-1, keepdim=True)
    return (1 + model.weight.float()) * (x.float() * (variance + 1e-6).pow(-0.5)).to(x.dtype)


def _product_of_two(_, x):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def _by_var(model, x):
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True) + 1e-5) * model.weight + model.bias


def _by_std(_, x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-5)


def _by_var_mean(_, x):
    variance, mean = torch.var_mean(x, -1, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + 1e-5)


def _by_deviation(_, x):
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def _by_moments(_, x):
    mean = x.sum(-1, keepdim=True) / WIDTH
    return (x - mean) / ((x * x).mean(-1, keepdim=True) - mean * mean + 1e-5).sqrt()


def _by_length(_, x):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)


def _by_function(model, x):
    return F.rms_norm(x, (WIDTH,), model.weight)


def _in_groups(_, x):
    grouped = x.view(2, TOKENS, 4, -1)
    grouped = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, keepdim=True) + 1e-5).sqrt()
    return grouped.view(x.shape)


SPELLINGS = [_mean_square, _with_weight, _product_of_two, _by_var, _by_std, _by_var_mean, _by_deviation, _by_moments]
SPELLINGS += [_by_length, _by_function, _in_groups]


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda each: each.__name__.strip("_"))
def test_a_norm_that_is_written_in_functions_is_rounded_once(spelling):
    def within(model, x):
        return spelling(model, x).tanh() + x

    vectors = {"weight": nn.Parameter(torch.ones(WIDTH)), "bias": nn.Parameter(torch.zeros(WIDTH))}
    norm = "rms_norm" if spelling is _by_function else "norm"
    assert _between(within, **vectors) == [norm, "tanh", "add"]


class Adaptive(nn.Module):
    """Holds a product: a norm and more."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return _mean_square(None, x) * self.linear(x)


class Squeeze(nn.Module):
    """Scales by its statistic, without a root."""

    def forward(self, x):
        return x * x.mean(-1, keepdim=True).sigmoid()


class Pool(nn.Module):
    """Returns its statistic."""

    def forward(self, x):
        return x.std(1).sqrt()


@pytest.mark.parametrize(
    ("module", "places"),
    [
        (Adaptive(), ["norm.norm", "norm.linear", "norm.mul"]),
        (Squeeze(), ["norm.mean", "norm.sigmoid", "norm.mul"]),
        (Pool(), ["norm.std", "norm.sqrt"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_is_no_norm(module, places):
    assert _between(lambda model, x: model.norm(x), norm=module) == places


def test_what_others_read_of_a_norm_is_rounded_too():
    def reversible(_, x):
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return ((x - mean) / std).tanh() * std + mean

    assert _between(reversible) == ["norm@1", "norm@2", "norm@3", "tanh", "mul", "add"]


def test_one_large_token_and_one_of_zeros():
    x = X.clone()
    x[0, 3] *= 30
    x[1, 5] = 0
    outputs = []
    for norm in (nn.RMSNorm(WIDTH, eps=1e-6), RMS()):
        model = _model(lambda model, x: model.norm(x), norm=norm)
        nn.init.eye_(model.before.weight)
        nn.init.zeros_(model.before.bias)
        outputs.append(converted(model, "bfp8[0] rounding=nearest")(x))
    assert torch.equal(*outputs) and outputs[0].isfinite().all()


# Constants


def _rotary(model, x):
    angle = torch.arange(x.shape[1])[:, None] * model.frequencies
    turned = torch.cat([-x[..., WIDTH // 2 :], x[..., : WIDTH // 2]], -1)
    return x * torch.cat([angle, angle], -1).cos() + turned * torch.cat([angle, angle], -1).sin()


def _complex_rotary(model, x):
    angle = torch.outer(torch.arange(x.shape[1]), model.frequencies)
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(2)


FREQUENCIES = 1 / 100 ** (torch.arange(WIDTH // 2) / (WIDTH // 2))


def test_rotary_angles_are_constants():
    assert _between(_rotary, frequencies=FREQUENCIES) == ["neg", "mul@2", "mul@3", "add"]
    assert _meant(_rotary, "constant", frequencies=FREQUENCIES) == ["mul@1", "cos", "sin"]


def test_complex_rotary_angles_are_constants():
    assert _between(_complex_rotary, frequencies=FREQUENCIES) == ["mul"]
    assert _meant(_complex_rotary, "constant", frequencies=FREQUENCIES) == ["outer", "polar"]


def test_what_is_made_of_tokens_and_of_an_integer_mask_is_constant():
    def masked(_, x, mask):
        return x * ((1.0 - mask.float()) * 0.3 + 0.5)[..., None]

    assert _between(masked, X, torch.ones(2, TOKENS, dtype=torch.int64)) == ["mul@2"]


def test_a_constant_in_the_size_of_an_activation_is_a_constant():
    def sized(model, x):
        return x * model.table.cos().expand_as(x).sin().reshape_as(x)

    assert _meant(sized, "constant", table=torch.randn(WIDTH)) == ["cos", "sin"]
    assert _between(sized, table=torch.randn(WIDTH)) == ["mul"]


def test_a_constant_is_rounded_where_it_meets_numbers_and_where_the_recipe_names_it():
    def placed(model, x):
        return x + model.frequencies.repeat(2).exp()

    assert _between(placed, frequencies=FREQUENCIES) == ["add"]
    assert _between(placed, recipe="bfp8[0] include=exp", frequencies=FREQUENCIES) == ["exp", "add"]


def test_a_table_of_positions_that_is_learned_is_rounded():
    assert _between(lambda model, x: x + model.table(torch.arange(TOKENS)), table=nn.Embedding(TOKENS, WIDTH)) == [
        "table",
        "add",
    ]


def test_what_only_sin_and_cos_read_is_an_angle():
    def time(model, x, step):
        angle = step[:, None] * model.frequencies * 2
        return x + torch.cat([angle.sin(), angle.cos()], -1)[:, None]

    assert _between(time, X, torch.rand(2), frequencies=FREQUENCIES) == ["sin", "cos", "add"]
    assert _meant(time, "angle", X, torch.rand(2), frequencies=FREQUENCIES) == ["mul@1", "mul@2"]


def test_what_a_product_gives_is_no_angle():
    assert _between(lambda model, x: model.inner(x).sin(), inner=nn.Linear(WIDTH, WIDTH)) == ["inner", "sin"]


@pytest.mark.parametrize(
    ("mixed", "is_rounded"),
    [
        (lambda x: x.masked_fill(x > 0, 0.3), True),
        (lambda x: x.masked_fill(x > 0, 0.0), False),
        (lambda x: F.pad(x, (1, 1))[..., 1:-1], False),
        (lambda x: F.pad(x, (1, 1), value=0.3)[..., 1:-1], True),
        (lambda x: torch.cat([x, torch.full_like(x, 0.3)], 1), True),
        (lambda x: torch.cat([x, torch.zeros_like(x)], 1), False),
        (lambda x: torch.cat([torch.tensor([]), x], 1), False),
        (lambda x: torch.cat([x, torch.linspace(0, 1, WIDTH).expand(2, 1, -1)], 1), True),
        (lambda x: torch.where(x > 0, x, 0.3), True),
        (lambda x: torch.where(x > 0, x, 0.0), False),
        (lambda x: torch.where(x > 0, 0.3, 0.7), True),
        (lambda x: x.index_fill(1, torch.tensor([0]), 0.3), True),
        (lambda x: (x * 99).int().float()[..., :], True),
        (lambda x: (x > 0).float(), False),
    ],
)
def test_a_constant_that_movement_mixes_in(mixed, is_rounded):
    places = [each for each in _between(lambda _, x: mixed(x)) if each != "mul"]
    assert len(places) == is_rounded


# Masks


class Attention(nn.Module):
    """Causal attention; ``masked`` says how scores of later tokens are taken out."""

    def __init__(self, masked):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.masked = masked

    def forward(self, x, *mask):
        scores = self.query(x) @ self.key(x).transpose(-2, -1) / math.sqrt(WIDTH)
        return self.out(self.masked(scores, *mask).softmax(-1) @ self.value(x))


FUTURE = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
BELOW = {"inf": -math.inf, "finfo.min": torch.finfo(torch.float32).min, "-1e9": -1e9}


def _filled(scores):
    return scores.masked_fill(FUTURE, -math.inf)


def _off(scores):
    return scores - scores.amax(-1, keepdim=True).detach() * 0


def _spellings():
    for name, low in BELOW.items():
        mask = torch.zeros(TOKENS, TOKENS).masked_fill(FUTURE, low)
        yield f"+ {name}", lambda scores, mask=mask: scores + mask, ()
        yield f"+ {name}, an input", lambda scores, mask: scores + mask, (mask,)
        yield f"+= {name}", lambda scores, mask=mask: scores.add_(mask), ()
        yield f"where {name}", lambda scores, low=low: torch.where(FUTURE, low, scores), ()
    kept = (~FUTURE).float()
    yield "of zeros and ones", lambda scores, kept: scores + (1 - kept) * -1e9, (kept,)
    yield "off its maximum", lambda scores: _off(scores + torch.zeros_like(scores).masked_fill(FUTURE, -1e9)), ()
    yield "before the scale", lambda scores: (scores + torch.zeros_like(scores).masked_fill(FUTURE, -1e9)) * 1.0, ()


@pytest.mark.parametrize(
    ("spelling", "recipe"),
    crossed(_spellings(), ["bfp8[0]", "int8[0,1]", "e4m3", "bfp16[0]"]),
    ids=lambda each: each if isinstance(each, str) else each[0],
)
def test_a_mask_that_is_added_has_the_bits_of_one_that_is_filled_in(spelling, recipe):
    _, masked, given = spelling
    results = []
    for each, inputs in ((_filled, (X,)), (masked, (X, *given))):
        model = converted(Attention(each), recipe)
        torch.manual_seed(3)
        x = inputs[0].clone().requires_grad_()
        y = model(x, *inputs[1:])
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("mask", [-100.0, -math.inf], ids=["Swin's", "of tokens that are padding"])
def test_scores_are_rounded_and_what_a_mask_makes_of_them_is_not(mask):
    places = rounded(
        rewritten(Attention(lambda scores, given: scores + given), "bfp8[0]", X, torch.full((TOKENS,), mask)).graph
    )
    assert places == ["query", "key", "matmul@1", "softmax", "value", "matmul@2"]


class Biased(nn.Module):
    """T5's: a table of relative positions that is learned, and the mask in it."""

    def __init__(self, joined):
        super().__init__()
        self.table, self.joined = nn.Embedding(2 * TOKENS, 1), joined
        self.attention = Attention(self.add)

    def add(self, scores):
        distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS
        bias, mask = self.table(distance).squeeze(-1), torch.zeros(TOKENS, TOKENS).masked_fill(FUTURE, -math.inf)
        return scores + (bias + mask) if self.joined else (scores + bias) + mask

    def forward(self, x):
        return self.attention(x)


@pytest.mark.parametrize(("joined", "added"), [(False, ["add@1"]), (True, [])])
def test_a_table_of_relative_positions_that_is_learned_is_rounded_and_the_mask_in_it_is_not(joined, added):
    places = [each.removeprefix("attention.") for each in rounded(rewritten(Biased(joined), "bfp8[0]", X).graph)]
    assert [each for each in places if each in ("table", "add", "add@1", "add@2")] == ["table", *added]
    assert converted(Biased(joined), "bfp8[0]")(X).isfinite().all()


@pytest.mark.parametrize(("joined", "added"), [(False, ["add@1"]), (True, [])])
def test_a_table_of_relative_positions_may_be_a_parameter(joined, added):
    def relative(model, x):
        bias = model.table[torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS]
        scores, mask = x @ x.mT, torch.zeros(TOKENS, TOKENS).masked_fill(FUTURE, -math.inf)
        return (scores + (bias + mask) if joined else (scores + bias) + mask).softmax(-1) @ x

    table = nn.Parameter(torch.randn(2 * TOKENS))
    assert _between(relative, table=table) == ["matmul@1", *added, "softmax", "matmul@2"]
    assert _read_weights(rewritten(_model(relative, table=table), "bfp8[0]", X)).count("table") == 1


def _read_weights(made):
    return [place(node.args[0]) for node in made.graph.find_nodes(op="call_function", target=nodes.quantize_weight)]


class Windows(nn.Module):
    """Swin's: windows of a shifted sequence, a table of relative positions, -100 between regions."""

    HEADS, SIZE = 2, 4

    def __init__(self, masked):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.masked = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), masked
        self.table = nn.Parameter(torch.randn(2 * self.SIZE - 1, self.HEADS))
        self.register_buffer("index", torch.arange(self.SIZE)[:, None] - torch.arange(self.SIZE) + self.SIZE - 1)
        region = (torch.arange(TOKENS) + 2).remainder(TOKENS).div(3, rounding_mode="floor").view(-1, self.SIZE)
        self.register_buffer("apart", region[:, None] != region[:, :, None])

    def forward(self, x):
        windows = x.roll(-2, 1).view(-1, self.SIZE, WIDTH)
        q, k, v = self.qkv(windows).unflatten(-1, (3, self.HEADS, -1)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(self.SIZE, self.SIZE, -1).permute(2, 0, 1)
        scores = q * (WIDTH // self.HEADS) ** -0.5 @ k.transpose(-2, -1) + bias[None]
        scores = self.masked(scores.view(x.shape[0], -1, *scores.shape[1:]), self.apart[None, :, None])
        y = (scores.flatten(0, 1).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.out(y.view(x.shape).roll(2, 1)).tanh() + 1


WINDOWED = {
    "none": lambda scores, apart: scores,
    "-100": lambda scores, apart: scores + apart.float() * -100.0,
    "added": lambda scores, apart: scores + apart.float() * -1e9,
    "filled in": lambda scores, apart: scores.masked_fill(apart, -1e9),
}


@pytest.mark.parametrize("masked", WINDOWED)
def test_in_windows_scores_with_their_table_are_rounded_and_the_mask_is_not(masked):
    made = rewritten(Windows(WINDOWED[masked]), "bfp8[0]", X)
    assert [each.partition("@")[0] for each in rounded(made.graph)] == [
        *("qkv", "matmul", "add", "softmax", "matmul", "out", "tanh")
    ]
    assert _read_weights(made).count("table") == 1
    model = Windows(WINDOWED[masked])
    found, due = converted(model, "bfp12[0] rounding=nearest")(X), model(X)
    assert (found - due).abs().max() < 0.01
    if masked == "added":
        filled_in = converted(Windows(WINDOWED["filled in"]), "bfp8[0]")
        torch.manual_seed(3)
        expected = filled_in(X)
        torch.manual_seed(3)
        assert torch.equal(converted(model, "bfp8[0]")(X), expected)


def test_cross_attention_has_the_bits_of_the_fused_product():
    memory, padding = torch.randn(2, 5, WIDTH), torch.zeros(2, 5, dtype=torch.bool)
    padding[0, 3:] = True

    def fused(model, x, memory, padding):
        k, v = model.memory(memory).chunk(2, -1)
        return F.scaled_dot_product_attention(x, k, v, attn_mask=~padding[:, None])

    def by_hand(model, x, memory, padding):
        k, v = model.memory(memory).chunk(2, -1)
        return (x @ k.mT / math.sqrt(WIDTH)).masked_fill(padding[:, None], -math.inf).softmax(-1) @ v

    outputs = []
    for each in (fused, by_hand):
        torch.manual_seed(1)
        model = _model(each, memory=nn.Linear(WIDTH, 2 * WIDTH))
        outputs.append(converted(model, "bfp8[0] rounding=nearest")(X, memory, padding))
    assert torch.equal(*outputs)


def test_before_a_softmax_by_hand_a_mask_is_no_number_of_the_model():
    def by_hand(_, x):
        masked = x @ x.transpose(1, 2) + torch.zeros(TOKENS, TOKENS).masked_fill(FUTURE, -math.inf)
        weights = (masked - masked.amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True) @ x

    assert _between(by_hand) == ["matmul@1", "amax", "exp", "sum", "truediv", "matmul@2"]


def test_alibi_is_no_number_of_the_model():
    def alibi(scores):
        distance = torch.arange(TOKENS) - torch.arange(TOKENS)[:, None]
        return scores + distance * 0.0625 + torch.zeros(TOKENS, TOKENS).masked_fill(FUTURE, -math.inf)

    assert "add" not in "".join(rounded(rewritten(Attention(alibi), "bfp8[0]", X).graph))


def test_the_mask_that_a_fused_product_takes_is_no_number_of_the_model():
    def fused(_, x, kept):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=(1 - kept) * -1e9)

    inside = ["attn_scores", "attn_probabilities"]
    assert _between(fused, X, torch.ones(TOKENS, TOKENS)) == [*inside, "scaled_dot_product_attention"]
    whole = "bfp8[0] exclude=*attn_scores,*attn_probabilities"
    assert _between(fused, X, torch.ones(TOKENS, TOKENS), recipe=whole) == ["scaled_dot_product_attention"]


@pytest.mark.parametrize("recipe", ["fixed16.8", "e4m3"])
@pytest.mark.parametrize(
    "masked", [_filled, lambda scores: scores + torch.zeros_like(scores).masked_fill(FUTURE, -1e9)]
)
def test_where_blocks_lie_within_a_token_an_earlier_output_does_not_depend_on_a_later_one(masked, recipe):
    model = converted(Attention(masked), f"{recipe} rounding=nearest")
    later = X.clone()
    later[:, 5:] *= 100
    assert torch.equal(model(X)[:, :5], model(later)[:, :5])


@pytest.mark.parametrize("checkpointed", [True, False])
def test_in_a_checkpoint_all_of_this_means_the_same(checkpointed):
    def inner(model, x, place, mask):
        turned = x * (place * model.frequencies).repeat(1, 2).cos()
        weights = (_with_weight(model, turned) @ turned.transpose(1, 2) + mask).softmax(-1)
        return model.norm(weights @ x)

    def outer(model, x):
        place, mask = torch.arange(TOKENS)[:, None], torch.zeros(TOKENS, TOKENS).masked_fill(FUTURE, -math.inf)
        if checkpointed:
            return checkpoint(inner, model, x, place, mask, use_reentrant=False)
        return inner(model, x, place, mask)

    low = converted(
        _model(outer, norm=RMS(), weight=nn.Parameter(torch.ones(WIDTH)), frequencies=FREQUENCIES), "bfp4[0]"
    )
    torch.manual_seed(1)
    low(X).square().sum().backward()
    graphs = [low.graphs[0].graph, *(body.graph for _, body in low.graphs[0].graph_module.named_children())]
    assert [place for graph in graphs for place in rounded(graph) if place != "before"] == [
        "mul@2",
        "norm@1",
        "matmul@1",
        "softmax",
        "matmul@2",
        "norm@2",
    ]


# Modules that the recipe calls whole


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.second(self.first(x).tanh()) * 2


@pytest.mark.parametrize(
    ("module", "recipe", "places"),
    [
        (Mixer(), "bfp8[0]", ["norm.first", "norm.tanh", "norm.second", "norm.mul"]),
        (Mixer(), "bfp8[0] whole=norm", ["norm"]),
        (Mixer(), "bfp8[0] whole=norm,!norm", ["norm.first", "norm.tanh", "norm.second", "norm.mul"]),
        (Mixer(), "bfp8[0] whole=norm placement=compute", ["norm"]),
        (RMS(), "bfp8[0] whole=!norm", ["norm.pow", "norm.mean", "norm.add", "norm.rsqrt", "norm.mul@1", "norm.mul@2"]),
        (RMS(), "bfp8[0] placement=compute", []),
    ],
)
def test_a_module_that_the_recipe_calls_whole(module, recipe, places):
    assert _between(lambda model, x: model.norm(x), recipe=recipe, norm=module) == places


def test_in_a_module_that_is_called_whole_weights_are_rounded():
    made = rewritten(_model(lambda model, x: model.norm(x), norm=Mixer()), "bfp8[0] whole=norm", X)
    read = [place(node.args[0]) for node in made.graph.find_nodes(op="call_function", target=nodes.quantize_weight)]
    assert [name for name in read if name.startswith("norm.")] == [
        f"norm.{layer}.{name}" for layer in ("first", "second") for name in ("weight", "bias")
    ]


def test_whole_is_read_from_text_and_written_to_it():
    recipe = Recipe.parse("bfp8[0] whole=norm*,!norm2")
    assert recipe.whole == ("norm*", "!norm2") and Recipe.parse(str(recipe)) == recipe
    assert [recipe.is_whole(path) for path in ("norm1", "norm2", "other", "norm")] == [True, False, None, True]


@pytest.mark.parametrize("glob", ["norn", "!norn", "norm.mul", "re:nor"])
def test_whole_that_matches_no_module_is_an_error(glob):
    with pytest.raises(
        RecipeError, match=rf"whole '{glob}' matches nothing in the model; the nearest names are .*norm"
    ):
        converted(_model(lambda model, x: model.norm(x), norm=Mixer()), f"bfp8[0] whole={glob}")


def test_the_report_lists_what_is_no_number_of_the_model():
    def forward(model, x, step):
        scores = x @ x.transpose(1, 2) * 0.3 + torch.zeros(TOKENS, TOKENS).masked_fill(FUTURE, -math.inf)
        angle = step[:, None, None] * model.frequencies.repeat(2)
        return model.norm(scores.softmax(-1) @ _rotary(model, x) + angle.sin())

    model, _ = convert(_model(forward, norm=RMS(), frequencies=FREQUENCIES), recipe="bfp8[0]")
    model(X, torch.rand(2))
    text = " ".join(str(report(model)).split())
    assert "mul@3, cos, sin@1: constants, made of no parameter" in text
    assert "mul@1, add@1: scales and masks on the way to a softmax" in text
    assert "mul@2: angles, which only sin and cos read" in text
    assert "inside norm: a norm is one operation, only its output is rounded" in text
