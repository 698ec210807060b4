"""One arithmetic for attention: however it is written, scores, probabilities and result are rounded, and no more."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from graphs import converted, rewritten
from marks import rounded
from tables import crossed
from torch import nn
from torch.utils.checkpoint import checkpoint

from swalp_fx import ConvertError, Recipe, check, convert, report
from swalp_fx.passes import verify
from swalp_fx.passes.captured import Scope
from swalp_fx.passes.names import PART, parameter_subjects
from swalp_fx.passes.proof import VerifyError

WIDTH, HEADS, TOKENS = 24, 2, 40
SIZE = WIDTH // HEADS  # no power of two: a scale is not exact
X = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
FUTURE = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
PADDING = torch.zeros(2, 1, 1, TOKENS, dtype=torch.bool)
PADDING[0, ..., TOKENS - 7 :] = True
EVERY = ["bfp8[0]", "mxfp8", "e4m3"]
FORMATS = [*EVERY[:2], pytest.param(EVERY[2], marks=pytest.mark.slow)]
INSIDE = ["attn_scores", "attn_probabilities", "scaled_dot_product_attention"]


class Attention(nn.Module):
    """Projections around ``function(query, key, value, ...)``, by heads."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.function = function

    def forward(self, x, *rest):
        q, k, v = (
            each(x).unflatten(-1, (HEADS, SIZE)).transpose(-3, -2) for each in (self.query, self.key, self.value)
        )
        return self.out(self.function(q, k, v, *rest).transpose(-3, -2).flatten(-2))


def _bits(model, recipe, *inputs, seed=3):
    """The output and all gradients, in train and in eval mode, and the random state behind them."""
    low = converted(model, recipe if "rounding" in recipe else f"{recipe} rounding=nearest")
    found = []
    for mode in (True, False):
        torch.manual_seed(seed)
        x = inputs[0].clone().requires_grad_()
        y = low.train(mode)(x, *inputs[1:])
        y.square().sum().backward()
        found += [y, x.grad, *(parameter.grad for parameter in low.parameters()), torch.get_rng_state()]
        low.zero_grad()
    assert [each.broke for each in low.graphs] == [None] * len(low.graphs)
    return found


_bits_of = functools.cache(lambda function, recipe: _bits(Attention(function), recipe, X))


def _assert_same_bits(one, other, recipe, *inputs):
    assert all(map(torch.equal, _bits(one, recipe, *inputs), _bits(other, recipe, *inputs)))


def _added(mask, low=-math.inf):
    return torch.zeros(mask.shape).masked_fill(mask, low)


def _fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def _by_hand(q, k, v):
    return (q @ k.transpose(-2, -1) / math.sqrt(SIZE)).softmax(-1) @ v


def _causal_by_hand(q, k, v):
    return (q @ k.transpose(-2, -1) * SIZE**-0.5).masked_fill(FUTURE, -math.inf).softmax(-1) @ v


def _later_scale(q, k, v):
    scores = q @ k.mT
    return (torch.where(FUTURE, -1e9, scores) / SIZE**0.5).softmax(-1) @ v


SPELLED = {
    "scale before": lambda q, k, v: (q * SIZE**-0.5 @ k.transpose(-2, -1)).softmax(-1) @ v,
    "scale split": lambda q, k, v: ((q / SIZE**0.25) @ (k / SIZE**0.25).transpose(-2, -1)).softmax(-1) @ v,
    "scale split, behind a view": lambda q, k, v: (
        ((q / SIZE**0.25).contiguous() @ (SIZE**-0.25 * k.transpose(-2, -1))).softmax(-1) @ v
    ),
    "scale in two": lambda q, k, v: ((q * 0.5) @ k.mT * (2 * SIZE**-0.5)).softmax(-1) @ v,
    "einsum": lambda q, k, v: torch.einsum(
        "bhqk,bhkd->bhqd", (torch.einsum("bhqd,bhkd->bhqk", q, k) / SIZE**0.5).softmax(-1), v
    ),
    "functions": lambda q, k, v: torch.matmul(
        F.softmax(torch.mul(torch.matmul(q, k.permute(0, 1, 3, 2)), SIZE**-0.5), dim=-1), v
    ),
    "fused, its own scale": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=SIZE**-0.5),
    "fused, half of it before": lambda q, k, v: F.scaled_dot_product_attention(q * 2, k, v, scale=SIZE**-0.5 / 2),
    "fused, a mask of nothing": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.zeros(1, TOKENS)),
}
CAUSAL = {
    "fused": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "a mask of truth values": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=~FUTURE),
    "a mask of numbers": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=_added(FUTURE)),
    "added": lambda q, k, v: (q @ k.mT * SIZE**-0.5 + _added(FUTURE, -1e9)).softmax(-1) @ v,
    "filled in": lambda q, k, v: (q @ k.mT * SIZE**-0.5).masked_fill(FUTURE, -1e9).softmax(-1) @ v,
    "where": lambda q, k, v: torch.where(~FUTURE, q * SIZE**-0.5 @ k.mT, -math.inf).softmax(-1) @ v,
    "added in place": lambda q, k, v: (q @ k.mT * SIZE**-0.5).add_(_added(FUTURE)).softmax(-1) @ v,
    "subtracted": lambda q, k, v: (q @ k.mT * SIZE**-0.5 - 1e9 * FUTURE.float()).softmax(-1) @ v,
    "of ones": lambda q, k, v: (q @ k.mT * SIZE**-0.5 + (1 - (~FUTURE).float()) * -10000.0).softmax(-1) @ v,
    "of ones, and a product": lambda q, k, v: (
        (q @ k.mT * SIZE**-0.5 * (~FUTURE).float() + -1e4 * (1 - (~FUTURE).float())).softmax(-1) @ v
    ),
    "of integers": lambda q, k, v: (q @ k.mT * SIZE**-0.5 + (1 - (~FUTURE).long()) * -10000).softmax(-1) @ v,
    "in another shape": lambda q, k, v: (
        ((q @ k.mT * SIZE**-0.5).view(-1, 1, HEADS, TOKENS, TOKENS) + _added(FUTURE)[None, None])
        .view(-1, HEADS, TOKENS, TOKENS)
        .softmax(-1)
        @ v
    ),
    "filled in, in another shape": lambda q, k, v: (
        (q @ k.mT).mul(SIZE**-0.5).flatten(0, 1).masked_fill(FUTURE, -1e9).unflatten(0, (-1, HEADS)).softmax(-1) @ v
    ),
    "in two shapes": lambda q, k, v: (
        ((q @ k.mT).flatten(0, 1) * SIZE**-0.5 + _added(FUTURE & (FUTURE.cumsum(-1) > 3)))
        .unflatten(0, (-1, HEADS))
        .masked_fill(FUTURE, -1e9)
        .softmax(-1)
        @ v
    ),
    "indexed": lambda q, k, v: ((q @ k.mT * SIZE**-0.5)[None] + _added(FUTURE))[0].softmax(-1) @ v,
    "indexed, filled in": lambda q, k, v: (
        (q @ k.mT * SIZE**-0.5)[:, None, ..., :TOKENS].masked_fill(FUTURE, -1e9).squeeze(1).softmax(-1) @ v
    ),
    "expanded": lambda q, k, v: (
        (
            (q @ k.mT * SIZE**-0.5)
            .unsqueeze(0)
            .expand(1, -1, -1, -1, -1)
            .narrow(-1, 0, TOKENS)
            .add(_added(FUTURE))
            .select(0, 0)
        ).softmax(-1)
        @ v
    ),
    "in another order": lambda q, k, v: (
        ((q @ k.mT * SIZE**-0.5).permute(1, 0, 3, 2) + _added(FUTURE.T)).transpose(0, 1).mT.softmax(-1) @ v
    ),
    "of one triangle": lambda q, k, v: ((q @ k.mT * SIZE**-0.5).tril() + _added(FUTURE)).softmax(-1) @ v,
    "bounded": lambda q, k, v: (
        torch.max(q @ k.mT * SIZE**-0.5 + _added(FUTURE), torch.tensor(torch.finfo(torch.float32).min))
        .clamp(min=-1e30)
        .softmax(-1)
        @ v
    ),
    "in float32 and back": lambda q, k, v: _in_float32(q @ k.mT * SIZE**-0.5).type_as(q) @ v,
    "as an exp of a log_softmax": lambda q, k, v: F.log_softmax(q @ k.mT * SIZE**-0.5 + _added(FUTURE), -1).exp() @ v,
    "of its own size": lambda q, k, v: _of_its_own_size(q @ k.mT * SIZE**-0.5).softmax(-1) @ v,
    "in two masks": lambda q, k, v: (
        ((q @ k.mT * SIZE**-0.5).masked_fill(FUTURE & (FUTURE.cumsum(-1) > 3), -math.inf) + _added(FUTURE)).softmax(-1)
        @ v
    ),
}


def _in_float32(scores):
    return F.softmax((scores.float() + _added(FUTURE).type_as(scores)), dim=-1, dtype=torch.float32).type_as(scores)


def _of_its_own_size(scores):
    return scores + torch.full_like(scores, -1e9).triu(1)


@pytest.mark.parametrize(("spelling", "recipe"), crossed(SPELLED, EVERY))
def test_every_spelling_has_the_bits_of_attention_written_by_hand(spelling, recipe):
    assert all(map(torch.equal, _bits_of(SPELLED[spelling], recipe), _bits_of(_by_hand, recipe)))


@pytest.mark.parametrize(("spelling", "recipe"), crossed(CAUSAL, EVERY))
def test_every_spelling_of_causal_attention_has_the_same_bits(spelling, recipe):
    assert all(map(torch.equal, _bits_of(CAUSAL[spelling], recipe), _bits_of(_causal_by_hand, recipe)))


@pytest.mark.parametrize("recipe", FORMATS)
def test_a_padding_mask_that_is_given(recipe):
    def fused(q, k, v, padding):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=~padding)

    def by_hand(q, k, v, padding):
        return (q @ k.mT * SIZE**-0.5).masked_fill(padding, -math.inf).softmax(-1) @ v

    _assert_same_bits(Attention(fused), Attention(by_hand), recipe, X, PADDING)


def test_baddbmm_is_a_product_a_scale_and_a_mask():
    def flat(tensors):
        return [each.flatten(0, 1) for each in tensors]

    def in_one(*given):
        q, k, v = flat(given)
        return (torch.baddbmm(_added(FUTURE), q, k.mT, alpha=SIZE**-0.5).softmax(-1) @ v).unflatten(0, (2, HEADS))

    def by_hand(*given):
        q, k, v = flat(given)
        return ((q @ k.mT * SIZE**-0.5 + _added(FUTURE)).softmax(-1) @ v).unflatten(0, (2, HEADS))

    _assert_same_bits(Attention(in_one), Attention(by_hand), "bfp8[0]", X)


SLOPES = torch.arange(1, 2 * HEADS + 1).view(-1, 1, 1) * torch.arange(TOKENS) * -0.125  # positions, as ALiBi has them


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_baddbmm_by_keywords_in_a_shape_without_heads(beta):
    """As Bloom has it: positions in the product, the mask behind it, in another shape."""

    def in_one(q, k, v):
        alike = {"batch1": q.flatten(0, 1), "batch2": k.flatten(0, 1).mT, "beta": beta, "alpha": SIZE**-0.5}
        scores = SLOPES.baddbmm(**alike).view(-1, HEADS, TOKENS, TOKENS)
        return (scores + _added(FUTURE, torch.finfo(torch.float32).min)).softmax(-1) @ v

    def by_hand(q, k, v):
        scores = q @ k.mT * SIZE**-0.5 + SLOPES.view(-1, HEADS, 1, TOKENS) * beta
        return scores.masked_fill(FUTURE, -math.inf).softmax(-1) @ v

    _assert_same_bits(Attention(in_one), Attention(by_hand), "mxfp8", X)


@pytest.mark.parametrize("recipe", ["bfp8[0]", "mxfp8 rounding=stochastic"])
@pytest.mark.parametrize("mask", [None, ~FUTURE])
def test_dropout_comes_behind_rounding_and_draws_as_pytorch_does(mask, recipe):
    def fused(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, mask, 0.25)

    def by_hand(q, k, v):
        scores = q @ k.mT * SIZE**-0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        return F.dropout(scores.softmax(-1), 0.25) @ v

    low = rewritten(Attention(fused), recipe, X).graph
    (dropout,) = [node for node in low.nodes if node.name.startswith("dropout")]
    assert dropout.args[0].name == "attn_probabilities_q"
    if "stochastic" not in recipe:
        _assert_same_bits(Attention(fused), Attention(by_hand), recipe, X)


def test_grouped_queries():
    def fused(q, k, v):
        q = torch.cat([q, q.flip(1)], 1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[:, 1:3]

    def by_hand(q, k, v):
        q, k, v = torch.cat([q, q.flip(1)], 1), k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return _causal_by_hand(q, k, v)[:, 1:3]

    _assert_same_bits(Attention(fused), Attention(by_hand), "mxfp8", X)


@pytest.mark.parametrize(("keys", "values"), [(1, 2), (2, 1), (4, 2), (1, 4)])
def test_groups_of_keys_and_of_values_may_differ(keys, values):
    def fused(q, k, v):
        q, k, v = (torch.cat([each, each.flip(1)], 1)[:, :heads] for each, heads in ((q, 4), (k, keys), (v, values)))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, 1:3]

    _assert_as_the_model(Attention(fused), X)


def _assert_as_the_model(model, *inputs):
    """With so many bits that rounding is not seen, forward and backward."""
    low = converted(model, "A=e8m22 E=e8m22 rounding=nearest")
    x, again = (inputs[0].clone().requires_grad_() for _ in range(2))
    expected, found = model(x, *inputs[1:]), low(again, *inputs[1:])
    assert "quantize_output(" in str(low.graphs) and all(each.broke is None for each in low.graphs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    found.square().sum().backward()
    torch.testing.assert_close(again.grad, x.grad, rtol=1e-4, atol=1e-4)


FULL = torch.arange(TOKENS).flip(0)
LOW = _added(FUTURE, -1e4)
ONE_HEADS = torch.stack([FUTURE, torch.zeros_like(FUTURE)])


@pytest.mark.parametrize(
    "scores",
    [
        lambda s: s.transpose(-2, -1) + _added(FUTURE),
        lambda s: (s.transpose(0, 1) + _added(FUTURE))[:, :, None].squeeze(2).mT.swapaxes(0, 1),
        lambda s: F.pad(s[..., 1:] + _added(FUTURE)[:, 1:], (1, 0)),
        lambda s: s[:, :1].expand(-1, HEADS, -1, -1) + _added(FUTURE),
        lambda s: torch.clamp(s + _added(FUTURE, -1e4), -2e4, 2.0),
        lambda s: s.flip(-1).masked_fill(FUTURE, -1e9),
        lambda s: torch.where(FUTURE, -math.inf, s.roll(1, -1)),
        lambda s: s[..., FULL] + _added(FUTURE),
        lambda s: s.index_select(-2, FULL) + _added(FUTURE),
        lambda s: (s + _added(FUTURE)).flip(-1),
        lambda s: s[:, [1, 0]].masked_fill(ONE_HEADS, -math.inf),
        lambda s: s[[1, 0]] + _added(ONE_HEADS, -1e9),
        lambda s: s[..., [*range(TOKENS)][::-1]] + _added(FUTURE),
        lambda s: s[True].squeeze(0) + _added(FUTURE),
    ],
)
def test_a_mask_takes_out_what_it_is_laid_on(scores):
    def by_hand(q, k, v):
        return scores(q @ k.mT).softmax(-1) @ v

    _assert_as_the_model(Attention(by_hand), X)


@pytest.mark.parametrize(
    "scores",
    [
        lambda s: (s + LOW) / 5e3,
        lambda s: (s + LOW) * -1,
        lambda s: (s + LOW) * torch.tensor(-1.0),
        lambda s: 3 - (s + LOW),
        lambda s: torch.add(s, LOW, alpha=-1),
        lambda s: torch.add(s, LOW, alpha=1e-4),
        lambda s: s.masked_fill(FUTURE, -1e4) * -1e-4,
    ],
)
def test_a_mask_takes_out_by_what_the_softmax_is_given(scores):
    def by_hand(q, k, v):
        return scores(q @ k.mT * 3).softmax(-1) @ v

    _assert_as_the_model(Attention(by_hand), X)


ROWS = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
ROWS[:5] = True  # of five tokens, every key
FIRST = torch.zeros(TOKENS, dtype=torch.bool)
FIRST[:3] = True  # the keys of three tokens: padding on the left


@pytest.mark.parametrize(
    "scores",
    [
        lambda s: s + _added(ROWS, -1e4),
        lambda s: s + (1 - (~ROWS).float()) * -1e4,
        lambda s: s - 1e4 * ROWS.float(),
        lambda s: s + _added(ROWS | FUTURE, -1e4),
        lambda s: s + _added(ROWS[:, :1], -1e4),
        lambda s: (s - 8e4 * (ROWS | FUTURE).float()) / 8,
        lambda s: s + _added(FUTURE, -1e4) + _added(FIRST, -1e4),
        lambda s: torch.where(FUTURE, -1e4, s) + _added(FIRST, -1e4),
        lambda s: s.masked_fill(FUTURE, -math.inf) + _added(FIRST, -1e4),
        lambda s: s.flatten(0, 1).masked_fill(FUTURE, -math.inf).unflatten(0, (-1, HEADS)) + _added(FIRST, -1e4),
        lambda s: (s + _added(FIRST, -1e4)).unsqueeze(0).masked_fill(FUTURE, -math.inf).squeeze(0),
    ],
)
def test_a_row_that_is_masked_by_ten_thousand_has_the_softmax_of_its_scores(scores):
    def by_hand(q, k, v):
        return scores(q @ k.mT).softmax(-1) @ v

    model = Attention(by_hand)
    low = converted(model, "A=e8m22 E=e8m22 rounding=nearest")
    torch.testing.assert_close(low(X), model(X), rtol=1e-4, atol=2e-5)
    places = [place.split("@")[0] for place in rounded(low.graphs[0].graph)]
    assert places == ["query", "key", "value", "matmul", "softmax", "matmul"]


@pytest.mark.parametrize("low", [-1e9, -math.inf, torch.finfo(torch.float32).min])
def test_a_row_that_is_masked_by_more_has_no_part_in_a_block(low):
    mask = ROWS | FUTURE

    def added(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_added(mask, low))

    def filled_in(q, k, v):
        if low == -math.inf:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=~mask)
        return (q @ k.mT * SIZE**-0.5).masked_fill(mask, low).softmax(-1) @ v

    _assert_same_bits(Attention(added), Attention(filled_in), "bfp8[0]", X)


@pytest.mark.parametrize("axis", [-1, 1])
def test_the_rows_of_an_added_mask_lie_along_the_axis_of_the_softmax(axis):
    def by_hand(q, k, v):
        scores = (q @ k.mT).permute(0, 3, 1, 2)[:, :, None] + _added(ROWS[:, 0], -1e4)  # keys first, queries last
        scores = scores.squeeze(2)
        if axis == -1:
            return scores.permute(0, 2, 3, 1).softmax(-1) @ v
        return scores.softmax(axis).permute(0, 2, 3, 1) @ v

    model = Attention(by_hand)
    low = converted(model, "A=e8m22 E=e8m22 rounding=nearest")
    torch.testing.assert_close(low(X), model(X), rtol=1e-4, atol=2e-5)


def _written_by_index(scores):
    scores = scores.clone()
    scores[..., FUTURE] = -1e9
    return scores.softmax(-1)


def _kept_behind(weights):
    weights = weights * (~FUTURE).float()
    return weights / weights.sum(-1, keepdim=True)


LATER = {
    "by index": (_written_by_index, ["mul"]),
    "on pieces": (lambda s: torch.cat([(each + _added(FUTURE)).softmax(-1) for each in s.chunk(2, 1)], 1), ["mul"]),
    "on copies": (lambda s: (s.expand(2, *s.shape) + _added(FUTURE)).softmax(-1)[0], ["matmul@1"]),
    "on more keys": (
        lambda s: (F.pad(s, (1, 0)) + F.pad(_added(FUTURE), (1, 0))).softmax(-1)[..., 1:], ["matmul@1"],
    ),
    "behind an activation": (lambda s: ((s / 30).tanh() * 30 + _added(FUTURE)).softmax(-1), ["tanh"]),
    "behind the softmax": (lambda s: _kept_behind(s.softmax(-1)), ["matmul@1"]),
    "behind the exp": (lambda s: _kept_behind((s - s.amax(-1, keepdim=True)).exp()), ["sub"]),
    "in a product": (lambda s: torch.addcmul(s, FUTURE.float(), torch.tensor(-1e9)).softmax(-1), ["matmul@1"]),
    "followed": (lambda s: (s[None] + _added(FUTURE))[0].softmax(-1), None),
    "followed, filled in": (lambda s: s.masked_fill(FUTURE, -1e9).softmax(-1), None),
    "no mask": (lambda s: F.dropout(s.softmax(-1), 0.1), None),
}  # fmt: skip


@pytest.mark.parametrize("spelling", LATER)
def test_a_report_names_scores_that_are_rounded_with_those_that_a_mask_takes_out(spelling):
    softmax, names = LATER[spelling]
    low = converted(Attention(lambda q, k, v: softmax(q @ k.mT * SIZE**-0.5) @ v), "bfp8[-1:16] rounding=nearest")
    low(X)
    found = report(low).totals.get("masks")
    assert found == (names and f"{', '.join(names)} rounded together with scores that a mask takes out later")
    later = X.clone()
    later[:, 21:] *= 100
    if spelling != "no mask":  # what is not named does not depend on a later token
        assert torch.equal(low(X)[:, :21], low(later)[:, :21]) is (names is None)


NORMALISED = {
    "its sum": lambda s: (each := (s - s.amax(-1, keepdim=True)).exp()) / each.sum(-1, keepdim=True),
    "its logsumexp": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "its logsumexp, indexed": lambda s: torch.exp(s - torch.logsumexp(s, -1)[..., None]),
}


@pytest.mark.parametrize("recipe", ["bfp8[0]", "mxfp8", "bfp8[-1:16]"])
@pytest.mark.parametrize("softmax", NORMALISED)
def test_before_a_softmax_by_hand_an_added_mask_has_the_bits_of_one_that_is_filled_in(softmax, recipe):
    def added(q, k, v):
        return NORMALISED[softmax](q @ k.mT * SIZE**-0.5 + _added(FUTURE)) @ v

    def filled_in(q, k, v):
        return NORMALISED[softmax]((q @ k.mT * SIZE**-0.5).masked_fill(FUTURE, -math.inf)) @ v

    _assert_same_bits(Attention(added), Attention(filled_in), recipe, X)
    if recipe != "bfp8[0]" and "indexed" not in softmax:  # the logsumexp of many tokens is one block
        later = X.clone()
        later[:, 21:] *= 100
        low = converted(Attention(added), f"{recipe} rounding=nearest")
        assert torch.equal(low(X)[:, :21], low(later)[:, :21])


def _without_gradient(function, *given):
    with torch.no_grad():
        return function(*given)


@pytest.mark.parametrize(
    "scores",
    [
        lambda q, k: _without_gradient(torch.mul, q, 0.5) @ k.mT,
        lambda q, k: (_without_gradient(torch.mul, q, 0.5) * 0.5) @ k.mT,
        lambda q, k: _without_gradient(torch.mul, q @ k.mT, 0.5) / 2,
        lambda q, k: _without_gradient(torch.mul, q @ k.mT, 0.5) + _added(FUTURE),
        lambda q, k: q @ k.mT * 0.5 + _without_gradient(torch.mul, _added(FUTURE), 0.5),
    ],
)
def test_scales_and_masks_stay_on_their_side_of_no_grad(scores):
    def by_hand(q, k, v):
        return scores(q, k).softmax(-1) @ v

    _assert_as_the_model(Attention(by_hand), X)


def _bias_zeroed(q, k):
    bias = torch.arange(TOKENS) * 0.1
    scores = q @ k.mT + bias
    bias.zero_()
    return scores + _added(FUTURE)


def _mask_written_again(q, k):
    mask = _added(FUTURE, -1e9)
    scores = q @ k.mT + mask
    mask.copy_(_added(PADDING[:1], -1e9)[0, 0].expand_as(mask))
    return scores + mask


def _bias_zeroed_behind_a_view(q, k):
    bias = torch.arange(2.0 * TOKENS).view(2, TOKENS)
    scores = q @ k.mT + bias[0]
    bias.view(-1).fill_(0.5)
    return scores + _added(FUTURE)


def _queries_zeroed_behind_their_scale(q, k):
    q = q.clone()
    scaled = q[:] * 0.5
    q.zero_()
    return scaled @ k.mT


def _bias_that_takes_the_scores(q, k):
    bias = torch.zeros(2, HEADS, TOKENS, TOKENS)
    scores = bias.add_(q @ k.mT)
    seen = bias.sigmoid()
    return scores + _added(FUTURE) + seen


@pytest.mark.parametrize(
    "scores",
    [
        _bias_zeroed,
        _mask_written_again,
        _bias_zeroed_behind_a_view,
        _queries_zeroed_behind_their_scale,
        _bias_that_takes_the_scores,
    ],
    ids=lambda scores: scores.__name__.strip("_"),
)
def test_scores_have_what_their_operands_were_before_a_write(scores):
    def by_hand(q, k, v):
        return scores(q, k).softmax(-1) @ v

    _assert_as_the_model(Attention(by_hand), X)


def test_a_mask_that_is_made_without_gradients_behind_the_product_takes_out():
    def made_behind(q, k, v):
        scores = q @ k.mT * SIZE**-0.5
        return (scores + _without_gradient(torch.mul, _added(FUTURE), 2)).softmax(-1) @ v

    _assert_same_bits(Attention(made_behind), Attention(_causal_by_hand), "bfp8[0]", X)


def test_queries_that_are_the_keys():
    def by_hand(q, k, v):
        q = q * SIZE**-0.25
        return torch.einsum("bhqd,bhkd->bhqk", q, q).softmax(-1) @ v

    _assert_as_the_model(Attention(by_hand), X)


@pytest.mark.parametrize("shape", [(TOKENS, WIDTH), (3, 2, TOKENS, WIDTH)])
def test_any_batch_dimensions(shape):
    _assert_same_bits(Attention(_fused), Attention(_by_hand), "bfp8[0]", torch.randn(shape))


def test_other_lengths_come_to_the_same_graph():
    low, other = (
        converted(Attention(each), "mxfp8 rounding=nearest")
        for each in (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            lambda q, k, v: (
                (q @ k.mT * SIZE**-0.5)
                .masked_fill(torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1), -math.inf)
                .softmax(-1)
                @ v
            ),
        )
    )
    for tokens in (40, 24, 33, 7):
        assert torch.equal(low(X[:, :tokens]), other(X[:, :tokens]))
    assert len(low.graphs) == 2


def test_a_row_without_any_key_gives_zeros():
    def all_taken(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(TOKENS, TOKENS, dtype=torch.bool))

    model = Attention(all_taken)
    low = converted(model, "bfp8[0] rounding=nearest W=float")
    assert torch.equal(low(X), model.out.bias.expand(2, TOKENS, WIDTH))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_and_autocast(dtype):
    model = Attention(CAUSAL["fused"])
    half = copy.deepcopy(model).to(dtype)
    expected, found = half(X.to(dtype)), converted(half, "bfp8[0] rounding=nearest")(X.to(dtype))
    assert found.dtype == dtype and (expected - found).abs().max() < 0.1
    with torch.autocast("cpu", dtype):
        expected, found = model(X), converted(model, "bfp8[0] rounding=nearest")(X)
    assert found.dtype == dtype and (expected - found).abs().max() < 0.1


@pytest.mark.parametrize("spelling", [_fused, _by_hand, *(SPELLED[name] for name in ("scale split", "einsum"))])
def test_scores_beyond_float16_before_their_scale_are_held(spelling):
    model = Attention(spelling)
    with torch.no_grad():
        for layer in (model.query, model.key):
            layer.weight *= 140
        q, k = (layer(X).unflatten(-1, (HEADS, SIZE)).transpose(-3, -2) for layer in (model.query, model.key))
        assert 65504 < (q @ k.mT).abs().max() < 65504 / SIZE**-0.5
        low = converted(model.half(), "A=bfp16 E=bfp16 rounding=nearest")
        found, expected = low(X.half()), model.float()(X)
    assert (found - expected).abs().mean() < 0.01
    by_hand = copy.deepcopy(model.half())
    by_hand.function = _by_hand
    _assert_same_bits(model, by_hand, "mxfp8", X.half())


def test_a_power_of_two_of_the_scale_is_on_the_query_and_the_rest_behind_the_product():
    made = rewritten(Attention(_by_hand), "bfp8[0]", X)
    scales = [node for node in made.captured.nodes if node.name.startswith("mul")]
    assert [node.args[1] for node in scales] == [0.25, pytest.approx(4 * SIZE**-0.5)]
    assert [node.meta[PART] for node in scales] == ["inside", "mask"]
    made = rewritten(Attention(lambda q, k, v: (q / 16**0.25 @ (k / 16**0.25).mT).softmax(-1) @ v), "bfp8[0]", X)
    assert [node.args[1] for node in made.captured.nodes if node.name.startswith("mul")] == [0.25]


def test_queries_by_a_power_of_two_are_rounded_operands():
    lp, _ = convert(Attention(lambda q, k, v: (q @ k.mT / 4).softmax(-1) @ v), recipe="bfp8[0] quantize_input=true")
    lp(X)
    assert "100.0% on rounded operands" in str(report(lp, X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_type_with_a_mask_in_float32(dtype):
    def masked(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=_added(FUTURE, -1e9))

    model, x = Attention(masked).to(dtype), X.to(dtype)
    found = converted(model, "mxfp8 rounding=nearest")(x)
    assert found.dtype == dtype and (found - model(x)).abs().max() < 0.1
    _assert_same_bits(model, Attention(CAUSAL["fused"]).to(dtype), "mxfp8", x)


def test_in_a_checkpoint_it_has_the_same_bits():
    def checkpointed(q, k, v):
        return checkpoint(CAUSAL["fused"], q, k, v, use_reentrant=False)

    names = [each.split("@")[0] for each in rounded(rewritten(Attention(CAUSAL["fused"]), "mxfp8", X).graph)]
    assert names == ["query", "key", "value", *INSIDE]
    _assert_same_bits(Attention(checkpointed), Attention(CAUSAL["fused"]), "mxfp8", X)


# Which outputs a recipe rounds


@pytest.mark.parametrize(
    ("recipe", "places"),
    [
        ("bfp8[0]", INSIDE),
        ("bfp8[0] placement=compute", [INSIDE[0], INSIDE[2]]),
        ("bfp8[0] placement=compute+activation", INSIDE),
        ("bfp8[0] placement=group", INSIDE),
        ("bfp8[0] exclude=attn_scores", INSIDE[1:]),
        ("bfp8[0] exclude=*attn_scores,*attn_probabilities", INSIDE[2:]),
        ("bfp8[0] rules=[attn_* A=float E=float]", INSIDE[2:]),
        ("bfp8[0] rules=[* kind=attn_scores A=float E=float]", INSIDE[1:]),
        ("bfp8[0] rules=[* kind=scaled_dot_product_attention A=float E=float]", INSIDE[:2]),
        ("E=bfp8[0]", INSIDE),
    ],
)
def test_what_a_recipe_rounds(recipe, places):
    made = rewritten(Attention(_fused), recipe, X)
    assert [each for each in rounded(made.graph) if each not in ("query", "key", "value")] == places
    is_whole = any(node.target is F.scaled_dot_product_attention for node in made.captured.nodes)
    assert is_whole == (not set(places) & set(INSIDE[:2]))


def test_the_names_of_the_module_come_first():
    places = rounded(rewritten(nn.Sequential(Attention(_fused), nn.Linear(WIDTH, 2)), "bfp8[0]", X).graph)
    assert places == [f"0.{name}" for name in ("query", "key", "value", *INSIDE, "out")]


def test_what_is_called_whole_is_told():
    model, _ = convert(
        Attention(_fused), recipe="bfp8[0] exclude=*attn_scores,*attn_probabilities", example_inputs=(X,)
    )
    assert "inside scaled_dot_product_attention: called whole, only weights are rounded" in str(report(model))
    text = str(report(convert(Attention(_fused), recipe="bfp8[0]", example_inputs=(X,)).module))
    assert "called whole" not in text and "mul: scales and masks on the way to a softmax" in text


@pytest.mark.parametrize("function", [_fused, CAUSAL["fused"], SPELLED["scale split"], CAUSAL["where"]])
def test_where_nothing_is_rounded_all_stays_as_it_is(function):
    assert check(Attention(function), X)
    model = Attention(function)
    with torch.no_grad():
        assert torch.equal(converted(model, "W=float")(X), model(X))


def test_the_proof_refuses_a_fused_product_that_hides_what_is_to_be_rounded():
    model = Attention(_fused)
    made = rewritten(model, "float", X)
    scope, recipe = Scope(parameter_subjects(model)), Recipe.parse("bfp8[0] rounding=nearest")
    with pytest.raises(VerifyError, match="it hides attn_scores, which is to be rounded"):
        verify(made.graph, made.captured, recipe, scope, keyed=False)


# Causality


class Decoder(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.norm, self.attention, self.up = nn.RMSNorm(WIDTH), Attention(function), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for _ in range(2):
            x = x + self.attention(self.norm(x))
            x = x + self.up(x).relu()
        return x


@pytest.mark.parametrize(("spelling", "recipe"), crossed(CAUSAL, ["mxfp8", "mxfp4", "e4m3"]))
def test_an_earlier_output_does_not_depend_on_a_later_token(spelling, recipe):
    torch.manual_seed(0)
    low = converted(Decoder(CAUSAL[spelling]), f"{recipe} rounding=nearest")
    later = X.clone()
    later[:, 21:] *= 100
    assert torch.equal(low(X)[:, :21], low(later)[:, :21])
    assert not torch.equal(low(X)[:, 21:], low(later)[:, 21:])


@pytest.mark.parametrize("spelling", CAUSAL)
def test_nor_under_autocast_where_a_mask_is_in_float32(spelling):
    low = converted(Decoder(CAUSAL[spelling]), "mxfp8 rounding=nearest")
    later = X.clone()
    later[:, 21:] *= 100
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(low(X)[:, :21], low(later)[:, :21])


# PyTorch's own layers


def _heads(given, weight, bias):
    return F.linear(given, weight, bias).unflatten(-1, (3, HEADS, SIZE)).unbind(-3)


class Written(nn.Module):
    """nn.MultiheadAttention for one tensor, by hand, with its parameters."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        layer = self.layer
        q, k, v = (
            each.permute(1, 2, 0, 3) for each in _heads(x.transpose(0, 1), layer.in_proj_weight, layer.in_proj_bias)
        )
        y = _causal_by_hand(q, k, v).permute(2, 0, 1, 3).flatten(2).flatten(0, 1)
        y = F.linear(y, layer.out_proj.weight, layer.out_proj.bias)
        return y.view(TOKENS, -1, WIDTH).transpose(0, 1)


class Called(nn.Module):
    def __init__(self, layer, **given):
        super().__init__()
        self.layer, self.given = layer, given

    def forward(self, x):
        return self.layer(x, x, x, **self.given)[0]


class Functional(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        x, layer = x.transpose(0, 1), self.layer
        y, _ = F.multi_head_attention_forward(
            x, x, x, WIDTH, HEADS, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
            layer.out_proj.weight, layer.out_proj.bias, training=self.training, need_weights=False, attn_mask=FUTURE,
        )  # fmt: skip
        return y.transpose(0, 1)


def _layer():
    torch.manual_seed(0)
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)


@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize(
    "model",
    [
        Called(_layer(), attn_mask=FUTURE, need_weights=False),
        Called(_layer(), attn_mask=_added(FUTURE), need_weights=False),
        Called(_layer(), attn_mask=FUTURE, need_weights=False, is_causal=True),
        Functional(_layer()),
    ],
    ids=["a mask of truth values", "of numbers", "the hint", "the function"],
)
def test_pytorchs_layer_has_the_bits_of_one_written_by_hand(model, recipe):
    _assert_same_bits(model, Written(_layer()), f"{recipe} quantize_logits=true", X)


def _weighted(layer, x):
    x = x.transpose(0, 1)
    y, weights = F.multi_head_attention_forward(
        x, x, x, WIDTH, HEADS, layer.in_proj_weight, layer.in_proj_bias, None, None, False, layer.dropout,
        layer.out_proj.weight, layer.out_proj.bias, training=layer.training, attn_mask=FUTURE,
    )  # fmt: skip
    return y.transpose(0, 1), weights


class Weighted(Functional):
    def forward(self, x):
        return _weighted(self.layer, x)[0]


@pytest.mark.parametrize(
    ("mask", "recipe"),
    crossed(
        [None, FUTURE, _added(FUTURE), FUTURE.expand(2 * HEADS, -1, -1)],
        ["bfp8[0]", "mxfp8", "bfp8[0] placement=compute", "A=bfp8[0]"],
    ),
)
def test_the_layer_that_gives_its_weights_too_has_the_same_bits(mask, recipe):
    plain, weighted = (Called(_layer(), attn_mask=mask, **given) for given in ({"need_weights": False}, {}))
    _assert_same_bits(weighted, plain, recipe, X)
    if mask is FUTURE:
        _assert_same_bits(Weighted(_layer()), plain, recipe, X)


def test_the_weights_that_the_layer_gives_are_rounded_for_its_reader():
    class Read(Called):
        def forward(self, x):
            y, weights = self.layer(x, x, x, average_attn_weights=False, **self.given)
            return y + weights.sum((1, 3))[..., None] * 0.1

    places = rounded(rewritten(Read(_layer(), attn_mask=FUTURE), "bfp8[0]", X).graph)
    assert places == [
        *(f"layer.{name}" for name in ("linear", "bmm@1", "softmax", "bmm@2", "out_proj")),
        "sum",
        "mul",
    ]
    _assert_as_the_model(Read(_layer(), attn_mask=FUTURE), X)


def test_the_projections_are_named_by_the_layers_that_hold_their_weights():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Called(_layer(), need_weights=False), nn.Linear(WIDTH, 2))
    places = rounded(rewritten(model, "bfp8[0] exclude=1.layer.out_proj", X).graph)
    assert places == ["0", "1.layer.linear", *(f"1.layer.{name}" for name in INSIDE)]
    graph = rewritten(model, "bfp8[0] rules=[1.layer.out_proj float]", X).graph
    assert rounded(graph) == places
    weights = [node.name for node in graph.nodes if "quantize_weight" in str(node.target)]
    assert "_1_layer_in_proj_weight_q" in weights and not any("out_proj" in name for name in weights)


@pytest.mark.parametrize("whole", [False, True])
def test_the_layer_is_whole_where_the_recipe_says_so(whole):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Called(_layer(), need_weights=False), nn.Linear(WIDTH, 2))
    made = rewritten(model, f"bfp8[0]{' whole=1.layer' if whole else ''}", X)
    inner = [f"1.layer.{name}" for name in ("linear", *INSIDE, "out_proj")]
    assert rounded(made.graph) == ["0", *(["1.layer"] if whole else inner)]


def test_a_rule_for_the_layer_by_its_kind_reaches_what_is_inside():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Called(_layer(), need_weights=False), nn.Linear(WIDTH, 2))
    assert rounded(rewritten(model, "bfp8[0] rules=[* kind=MultiheadAttention A=float E=float]", X).graph) == ["0"]
    made = rewritten(model, "bfp8[0] rules=[* kind=MultiheadAttention A=e4m3 E=e5m2]", X)
    found = [node.args[3] for node in made.graph.nodes if "quantize_output" in str(node.target)]
    assert found == ["bfp8[0]", *["e4m3"] * 5]


def _transformers():
    given = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
    torch.manual_seed(0)
    yield nn.TransformerEncoderLayer(**given)
    yield nn.TransformerEncoderLayer(**given, norm_first=True, activation="gelu")
    yield nn.TransformerEncoder(nn.TransformerEncoderLayer(**given), 2)


@pytest.mark.parametrize("recipe", FORMATS)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model", list(_transformers()), ids=["layer", "norm first", "encoder"])
def test_the_fused_evaluation_of_transformer_layers_has_the_bits_of_training(model, padded, recipe):
    given = {"src_key_padding_mask": PADDING[:, 0, 0]} if padded else {}
    low = converted(model, f"{recipe} rounding=nearest")
    expected = low.train()(X, **given)
    with torch.no_grad():
        assert torch.equal(low.eval()(X, **given), expected)
        compiled = torch.compile(converted(model.eval(), f"{recipe} rounding=nearest"), backend="eager")
        assert torch.equal(compiled(X, **given), expected)
    places = rounded(low.graphs[-1].graph)
    assert [each.rpartition(".")[2] for each in places if "attn_" in each.rpartition(".")[2]][:2] == INSIDE[:2]


def test_where_nothing_is_rounded_the_fused_evaluation_stays():
    model = next(_transformers()).eval()
    with torch.no_grad():
        made = rewritten(model, "W=bfp8", X)
        assert torch.equal(converted(model, "float")(X), model(X))
    assert [node.name for node in made.captured.nodes if node.op == "call_function"] == [
        "_transformer_encoder_layer_fwd"
    ]
    assert check(model, X)


def test_the_fused_evaluation_of_a_model_in_float_is_as_it_was():
    model = next(_transformers()).eval()
    with torch.no_grad():
        before = model(X)
        converted(model, "bfp8[0]")(X)
        assert torch.equal(model(X), before) and torch.backends.mha.get_fastpath_enabled()


# Bad inputs


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(3, 5)),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=FUTURE.int()),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=1.5),
        lambda q, k, v: F.scaled_dot_product_attention(q, k[..., :5], v),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v.double()),
        lambda q, k, v: F.scaled_dot_product_attention(torch.cat([q, q[:, :1]], 1), k, v, enable_gqa=True),
    ],
)
def test_bad_inputs_raise_what_pytorch_raises(function):
    model = Attention(function)
    with pytest.raises(Exception) as expected:
        model(X)
    with pytest.raises(type(expected.value)):
        converted(model, "bfp8[0]")(X)


def test_a_mask_and_the_causal_one_besides_where_pytorch_takes_both():
    model = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, ~PADDING, is_causal=True))
    try:
        expected = model(X)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            converted(model, "bfp8[0]")(X)
    else:
        assert (converted(model, "bfp16[0] rounding=nearest")(X) - expected).abs().max() < 0.01


def test_sizes_that_a_kernel_of_pytorch_does_not_look_at():
    model = nn.Sequential(Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k[..., :5, :], v)))
    with pytest.raises(ConvertError, match=r"^0 gives scaled_dot_product_attention tensors that do not fit: .*5"):
        converted(model, "bfp8[0]")(X)


def test_a_padding_mask_of_another_shape():
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    wrong = torch.zeros(TOKENS, 2, dtype=torch.bool)
    with pytest.raises(AssertionError, match=r"Expected key_padded_mask\.shape"):
        converted(model, "bfp8[0]")(X, src_key_padding_mask=wrong)


def test_that_pytorchs_layers_are_traced_into_outlives_the_rules_of_the_front_end():
    """torch.distributed.init_process_group makes them anew."""
    torch._dynamo.trace_rules.clear_lru_cache()
    torch.manual_seed(0)
    model = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    lp = convert(model, recipe="bfp8[0] quantize_logits=true", example_inputs=(X, X, X)).module
    assert "softmax(" in lp.graphs[0].code and "multi_head_attention_forward" not in lp.graphs[0].code
