"""Prints what is rounded today in cases that were once wrong, beside what it was then: python tools/meaning.py

A row is a case: what is right, what the first days gave, what today's code gives, and the test that holds it. Today's
value is computed here. Those of the first days are as they were measured on 2026-11-26, on models of the same kind.
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import swalp_fx
from command import CommandLine, run, show
from rotary import RotaryDecoder
from swalp_fx.passes.tables import part_of

INF = math.inf
NEAREST = "rounding=nearest"
HEADERS = ("case", "right", "first days", "today", "test")


class Case(NamedTuple):
    what: str
    right: str
    before: str
    today: Callable[[], str]
    test: str  # file::test, in tests


class Model(nn.Module):
    """A linear layer, a function of its output, and one more layer: an output that a layer reads is rounded."""

    def __init__(self, function: Callable[..., Any], width: int = 24, **members: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Linear(width, width), nn.LazyLinear(1)
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, x: Tensor, *rest: Any) -> Any:
        return self.function(self, self.before(x), *rest)


def sample(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def converted(model: nn.Module, recipe: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return swalp_fx.convert(copy.deepcopy(model), recipe=f"{recipe} {NEAREST}").module


def of(function: Callable[..., Any], recipe: str, *inputs: Tensor, **members: Any) -> Tensor:
    """The output of a model of ``function``, converted; its output is rounded."""
    model = Model(function, inputs[0].shape[-1], **members)
    del model.after
    return converted(model, f"{recipe} quantize_logits=true")(*inputs)


def places(function: Callable[..., Any], *inputs: Tensor, **members: Any) -> list[str]:
    """The places that are rounded between the first layer and the output."""
    model = Model(lambda own, x, *rest: function(own, x, *rest), inputs[0].shape[-1], **members)
    del model.after
    lp = converted(model, "bfp8[0] quantize_logits=true")
    lp(*inputs)
    return [each.name for each in swalp_fx.report(lp).layers if each.formats.get("A") and each.name != "before"]


def equal(one: Tensor, other: Tensor) -> str:
    return "equal bits" if torch.equal(one, other) else f"differ by {(one - other).abs().max():.2g}"


def error(found: Tensor, due: Tensor) -> str:
    return f"{((found - due).norm() / due.norm()).item():.2g}"


# ---- what is rounded that should not be ---------------------------------------------------------------


def copying() -> str:
    """The accuracies of a small rotary decoder that copies the byte three places back: float, and converted."""
    torch.manual_seed(0)
    model = RotaryDecoder(16, 32, width=64, heads=2, layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        text = torch.randint(16, (32, 32), generator=generator)
        loss = F.cross_entropy(model(text)[:, 3:].flatten(0, 1), text[:, :-3].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    text = torch.randint(16, (64, 32), generator=generator)

    def accuracy(each: nn.Module) -> str:
        return f"{(each.eval()(text)[:, 3:].argmax(-1) == text[:, :-3]).float().mean().item():.3f}"

    return f"float {accuracy(model)}; " + ", ".join(
        f"{spec} {accuracy(converted(model, spec))}" for spec in ("bfp8[0]", "e4m3", "int8[0]")
    )


class RMS(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        variance = x.pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance + 1e-6))


def norm_by_hand() -> str:
    x = sample(2, 40, 24)
    x[0, 3] *= 30
    x[1, 5] = 0
    found = []
    for norm in (RMS(24), nn.RMSNorm(24, eps=1e-6)):
        model = nn.Sequential(nn.Linear(24, 24, bias=False), norm)
        nn.init.eye_(model[0].weight)
        found.append(converted(model, "bfp8[0] quantize_logits=true")(x))
    return f"{equal(*found)} with nn.RMSNorm, {'finite' if found[0].isfinite().all() else 'NaN'}"


TOKENS = 32
FUTURE = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
Mask = Callable[[Tensor], Tensor]


def attention(mask: Mask) -> Callable[..., Any]:
    return lambda _, x: mask(x @ x.mT * 24**-0.5).softmax(-1) @ x


def added(low: float) -> Mask:
    return lambda scores: scores + torch.zeros(TOKENS, TOKENS).masked_fill(FUTURE, low)


def filled(scores: Tensor) -> Tensor:
    return scores.masked_fill(FUTURE, -INF)


def masks() -> str:
    x = sample(2, TOKENS, 24)
    due = of(attention(filled), "bfp8[0]", x)
    spelled = {"-inf": added(-INF), "finfo.min": added(torch.finfo(torch.float32).min), "-1e9": added(-1e9)}
    return "; ".join(f"{name}: {equal(of(attention(mask), 'bfp8[0]', x), due)}" for name, mask in spelled.items())


def swin() -> str:
    x = sample(2, TOKENS, 24)
    model = Model(attention(added(-100.0)), 24)
    del model.after
    due = model(x)
    return error(converted(model, "bfp8[0]")(x), due)


def leaks() -> str:
    x = sample(2, TOKENS, 24)
    later = x.clone()
    later[:, 20:] *= 100
    found = []
    for spec in ("bfp16[0]", "mxfp8"):
        model = Model(attention(added(-INF)), 24)
        del model.after
        lp = converted(model, spec)
        found.append(f"{spec} {(lp(x) - lp(later))[:, :20].abs().max().item():.2g}")
    return ", ".join(found)


def fused() -> str:
    x = sample(2, TOKENS, 24)
    given = of(lambda _, x: F.scaled_dot_product_attention(x, x, x, is_causal=True), "bfp8[0]", x)
    return equal(given, of(attention(filled), "bfp8[0]", x))


def lstm() -> str:
    torch.manual_seed(0)
    lp = converted(nn.Sequential(nn.LSTM(6, 5)), "bfp8[0]")
    lp(sample(3, 4, 6))
    rounded = sum("A" in each.formats for each in swalp_fx.report(lp).layers)
    nodes = sum("recurrent" in str(node.target) for node in lp.graphs[0].graph.nodes if node.op == "call_function")
    return f"{nodes} node, {rounded} places a step"


def tiles() -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = nn.Sequential(nn.Conv2d(256, 256, 3), nn.Conv2d(256, 64, 1))
        swalp_fx.convert(model, recipe="W=int4[-1:128]")
    said = str(caught[0].message).split(": ")[1].split(", since")[0]
    return f"a warning: {said}"


def pointwise() -> str:
    weight = nn.Conv2d(256, 64, 1).weight.detach()
    along = swalp_fx.quantize(weight, "nvfp4[1:16]")
    model = nn.Sequential(nn.Conv2d(256, 64, 1, bias=False), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(weight)
    x = sample(1, 256, 4, 4)
    return equal(converted(model, "W=nvfp4")(x), F.conv2d(x, along).relu()) + " along channels"


def one_dimension() -> str:
    lp = converted(nn.Sequential(nn.Linear(64, 64)), "mxfp8[1:32]")
    lp(sample(2, 64))
    (of_bias,) = [node.args[3] for node in lp.graphs[0].graph.nodes if node.name == "_0_bias_q"]
    return f"runs; the bias in {of_bias}"


def operands() -> str:
    lp = converted(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), "mxfp8")
    lp(sample(2, 64))
    found = [node for node in lp.graphs[0].graph.nodes if node.name == "_0_q"]
    return f"{len(found)} rounding for all readers"


def second_time() -> str:
    changed = []
    for recipe in ("W=bfp4[0]+twos~nearest", "W=nvfp4~toward_zero"):
        model = nn.Sequential(nn.Linear(64, 64, bias=False))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        lp, _ = swalp_fx.convert(model, optimizer, recipe=recipe)
        lp(torch.eye(64)).sum().backward()
        optimizer.step()
        changed.append((lp(torch.eye(64)) != model[0].weight.T).float().mean().item())
    return ", ".join(f"{share:.0%}" for share in changed)


def infinity() -> str:
    x = torch.tensor([1, 2.72, INF, 0.37])
    return "; ".join(
        f"{spec} {[*map(_short, swalp_fx.quantize(x, spec).tolist())]}" for spec in ("mxfp8", "mxfp8_e5m2")
    )


def _short(value: float) -> float:
    return round(value, 3)


def ties() -> str:
    x = torch.tensor([1.5, 3.0])
    return f"e5m0 of 1.5 and 3: {swalp_fx.quantize(x, 'e5m0').tolist()}"


def clipped() -> str:
    x = torch.full((100_000, 1), 7.9)
    means = {spec: swalp_fx.quantize(x, spec, "stochastic", key=5).mean().item() for spec in ("mxfp4", "mxfp4+rceil")}
    return ", ".join(f"{spec} {mean:.2f}" for spec, mean in means.items())


def products() -> str:
    lp = converted(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "bfp8[0]")
    text = " ".join(str(swalp_fx.report(lp, sample(2, 8))).split())
    return "inside " + text.partition("inside ")[2].partition(" in float")[0]


def beyond() -> str:
    x = torch.tensor([65504.0], dtype=torch.float16)
    return ", ".join(f"{spec} {swalp_fx.quantize(x, spec).item():g}" for spec in ("bf16", "e8m3", "e6m3", "fixed8.-10"))


def tangent() -> str:
    x, given = sample(3, 4), sample(3, 4, seed=2)
    of_op = torch.func.jvp(lambda x: swalp_fx.quantize(x, "bfp8[0]"), (x,), (given,))[1]
    lp = converted(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "float")
    lp(x)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(lp(forward_ad.make_dual(x, given)))
    return f"{equal(of_op, given)}; of a module: {'none' if dual.tangent is None else 'a tangent'}"


class ConvNorm(nn.Module):
    """Named a norm; it holds a product."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def named_norm() -> str:
    return ", ".join(places(lambda own, x: own.inner(x), sample(2, 24), inner=ConvNorm(24)))


def spellings() -> str:
    x = sample(2, TOKENS, 24)
    scale = 24**-0.5
    ways = [
        lambda _, x: (x @ x.mT * scale).softmax(-1) @ x,
        lambda _, x: ((x * scale) @ x.mT).softmax(-1) @ x,
        lambda _, x: ((x * scale**0.5) @ (x * scale**0.5).mT).softmax(-1) @ x,
        lambda _, x: (x @ x.mT / 24**0.5).softmax(-1) @ x,
    ]
    first, *others = (of(way, "bfp8[0]", x) for way in ways)
    return ", ".join(dict.fromkeys(equal(first, other) for other in others))


def angle() -> str:
    def time(own: Any, x: Tensor, step: Tensor) -> Tensor:
        turned = step[:, None] * own.frequencies
        return x + torch.cat([turned.sin(), turned.cos()], -1)

    return ", ".join(places(time, sample(2, 24), torch.rand(2), frequencies=torch.arange(12) / 12))


# ---- operations ----------------------------------------------------------------------------------------


def calls(forward: Callable[..., Any], **members: Any) -> str:
    """Whether several calls of the model of ``forward`` give what the model gives, under identity formats."""
    model = Model(forward, 4, **members)
    del model.after
    lp = converted(model, "float")
    for seed in range(3):
        x = sample(2 + seed, 4, seed=seed)
        found = []
        for each in (model, lp):
            torch.manual_seed(seed)
            found.append(each(x))
        if not torch.equal(*found):
            return f"differs at call {seed + 1}"
    return "equal at 3 calls"


def fresh() -> str:
    def adding(_: Any, x: Tensor) -> Tensor:
        sums = torch.zeros(len(x), 4)
        for _i in range(3):
            sums += torch.tanh(x)
        return sums

    return calls(adding)


def branches() -> str:
    def by_type(_: Any, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not isinstance(x.shape, tuple) or str(x.dtype) != "torch.float32":
            return -x
        return x * {2: 3.0}.get(x.shape[0], 1.0) * (2 if f"{x.shape[0]} rows" == "3 rows" else 1)

    return calls(by_type)


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sgn(x)


def zeros_without_memory() -> str:
    lp = converted(nn.Sequential(nn.Linear(4, 4), Sign(), nn.Linear(4, 4)), "bfp8[0]")
    lp(sample(2, 4)).sum().backward()
    return "a gradient of zeros" if not lp[0].weight.grad.any() else "a gradient"


class First(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor) -> Tensor:
        return x * other

    @staticmethod
    def backward(ctx: Any, error: Tensor) -> tuple[Tensor, None]:
        return error, None


def undefined() -> str:
    model = Model(lambda own, x: First.apply(x, own.far(x)), 4, far=nn.Linear(4, 4))
    del model.after
    lp = converted(model, "bfp8[0]")
    lp(sample(2, 4)).sum().backward()
    return f"gradient {'None' if lp.far.weight.grad is None else 'zeros'}"


def random_state() -> str:
    def seeded(_: Any, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            noise = torch.rand(4)
        state = torch.get_rng_state()
        first = torch.rand(4)
        torch.set_rng_state(state)
        return x * noise + torch.rand(4) * first

    return calls(seeded)


def complex_part() -> str:
    x = sample(2, 24)
    found = of(lambda _, x: torch.fft.fft2(x).real, "W=float A=bfp8[0]", x)
    return equal(found, swalp_fx.quantize(found.contiguous(), "bfp8[0]")) + " when rounded again"


def exported() -> str:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Unflatten(1, (2, 4)), nn.Flatten(), nn.Linear(8, 6))
    low = converted(torch.export.export(model, (sample(2, 6),)).module(), "bfp8[0] quantize_logits=true")
    low(sample(2, 6))
    return ", ".join(each.operation for each in swalp_fx.report(low).layers if each.operation != "parameter")


def wide_names() -> str:
    found = []
    with torch.library._scoped_library("swalp_tool", "DEF") as library:
        library.define("fused_dropout(Tensor x) -> Tensor")
        library.impl("fused_dropout", lambda x: x * 0.3, "CompositeImplicitAutograd")
        for call in (
            lambda x: torch.native_dropout(x, 0.5, True)[0],
            torch.ops.swalp_tool.fused_dropout,
            lambda x: torch.mul(x, x.is_complex()),
        ):
            found.append(places(lambda _, x, call=call: call(x), sample(2, 4)))
    return "runs; rounded: " + ", ".join(name for each in found for name in each)


def bare_name() -> str:
    with torch.library._scoped_library("swalp_tool", "DEF") as library:
        library.define("fold(Tensor x) -> Tensor")
        library.impl("fold", lambda x: x * 0.3, "CompositeImplicitAutograd")
        return "rounded: " + ", ".join(places(lambda _, x: torch.ops.swalp_tool.fold(x), sample(2, 4)))


INDEX = torch.tensor([[0, 0, 1, 1]])
NEW = {
    "normal": lambda x: torch.normal(x, 0.1),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()) * 0.3,
    "int": lambda x: (x * 127).int() / 127,
    "comparison": lambda x: (x > 0).float() * 0.3,
    "full_like": lambda x: x + torch.full_like(x, 0.3),
    "alpha_dropout": lambda x: F.alpha_dropout(x, training=True),
    "scatter": lambda x: x.scatter(1, INDEX.expand(2, -1), x, reduce="add"),
    "fold": lambda x: F.fold(F.unfold(x.view(1, 1, 2, 4), 2), (2, 4), 2),
    "masked_fill": lambda x: x.masked_fill(INDEX[0].bool(), 0.3),
    "where": lambda x: torch.where(INDEX.bool(), x, 0.3),
    "pad": lambda x: F.pad(x, (1, 1), value=0.3),
    "index_fill": lambda x: x.index_fill(1, INDEX[0, :1], 0.3),
    "cat": lambda x: torch.cat([x, torch.full((2, 1), 0.3)], 1),
}
MOVED = {
    "reshape_as": lambda x: x.reshape_as(torch.empty(4, 2)),
    "split_with_sizes": lambda x: torch.split_with_sizes(x, [1, 3], 1)[1],
    "as_strided": lambda x: x.as_strided((2, 2), (4, 1)),
    "take": lambda x: x.take(INDEX),
    "column_stack": lambda x: torch.column_stack([x, x]),
    "fliplr": torch.fliplr,
    "meshgrid": lambda x: torch.meshgrid(x[0], x[1], indexing="ij")[0],
    "block_diag": lambda x: torch.block_diag(x, x),
    "cartesian_prod": lambda x: torch.cartesian_prod(x[0], x[1]),
    "combinations": lambda x: torch.combinations(x[0]),
    "diag": lambda x: x[0].diag(),
    "diag_embed": torch.diag_embed,
    "fftshift": torch.fft.fftshift,
    "msort": torch.msort,
    "select_scatter": lambda x: x.select_scatter(x[1], 0, 0),
    "slice_scatter": lambda x: x.slice_scatter(x[:1], 0, 0, 1),
    "max_unpool1d": lambda x: F.max_unpool1d(*F.max_pool1d(x[None], 2, return_indices=True), 2),
}
POOLS = [f"{start}max_pool{n}d_with_indices" for start in ("", "adaptive_") for n in (1, 2, 3)]
POOLS += [f"fractional_max_pool{n}d" for n in (2, 3)]
SELECTS = ["maximum", "minimum", "fmax", "fmin", "cummax", "cummin", "median", "mode", "kthvalue", "aminmax"]


def parts(names: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(str(part_of(name)) for name in names))


def last_is(rounded: bool, cases: dict[str, Callable[..., Any]]) -> str:
    """How many of ``cases`` are rounded where a layer reads them, or are not."""
    wrong = []
    for name, call in cases.items():
        model = Model(lambda _, x, call=call: call(x).exp(), 4)
        del model.after
        lp = converted(model, "bfp8[0]")
        lp(sample(2, 4))
        (exp,) = [node for node in lp.graphs[-1].graph.nodes if node.name == "exp"]
        source = exp.all_input_nodes[0]
        while source.op == "call_function" and "getitem" in source.name:
            source = source.all_input_nodes[0]
        made = "quantize_output" in str(source.target) and "before" not in source.name
        if made is not rounded:
            wrong.append(name)
    return f"{len(cases) - len(wrong)} of {len(cases)}" + (f", not {', '.join(wrong)}" if wrong else "")


CASES = (
    Case("rotary angles: a decoder that copies, accuracy", "as float", "bfp8[0] .105, e4m3 .140, int8[0] .676", copying,
         "test_meaning.py::test_rotary_angles_are_constants"),
    Case("an RMS norm by hand, one token 30 times larger, one of zeros", "as nn.RMSNorm, finite", "error .88, NaN",
         norm_by_hand, "test_meaning.py::test_one_large_token_and_one_of_zeros"),
    Case("masks that are added, beside masked_fill", "equal bits", "24 % error; -inf leaks", masks,
         "test_attention.py::test_every_spelling_of_causal_attention_has_the_same_bits"),
    Case("Swin's mask of -100, error at 8 bits", "the rounding's own", "12 %", swin,
         "test_meaning.py::test_in_windows_scores_with_their_table_are_rounded_and_the_mask_is_not"),
    Case("an earlier token's change by a later one", "0 where blocks lie in a token", ".41 at bfp16", leaks,
         "test_attention.py::test_an_earlier_output_does_not_depend_on_a_later_token"),
    Case("the fused product, beside attention by hand", "equal bits", "not rounded inside", fused,
         "test_attention.py::test_every_spelling_has_the_bits_of_attention_written_by_hand"),
    Case("an LSTM", "as its steps by hand", "called whole", lstm,
         "test_recurrent.py::test_a_layer_has_the_bits_of_what_one_writes_by_hand"),
    Case("runs along a kernel, int4[-1:128]", "a warning with the real bits", "25.7 bits, said 4.25", tiles,
         "test_fit.py::test_runs_on_a_kernel_are_warned_of_with_their_real_bits_and_the_remedy"),
    Case("nvfp4 on a 1 x 1 convolution", "runs along channels", "runs of one", pointwise,
         "test_fit.py::test_a_parameter_has_runs_along_what_its_layer_contracts"),
    Case("mxfp8[1:32] on a bias", "one block, or refused by name", "fails at the first forward", one_dimension,
         "test_fit.py::test_a_bias_in_runs_along_the_second_axis_is_one_block"),
    Case("operands of a layer's three products, mxfp8", "each along the axis it is contracted over", "each output once",
         operands, "test_passes.py::test_every_parameter_and_every_output_but_the_logits"),
    Case("weights that the forward changes again: bfp4[0]+twos, nvfp4 toward zero", "0 %", "47 %, drift of 32 %",
         second_time, "test_stored.py::test_forwards_see_the_weights_that_a_step_stored"),
    Case("an infinity in a block: [1, 2.72, inf, .37]", "the others as ever; inf where there is one", "3.5; 1.75",
         infinity,
         "test_laws.py::test_a_nan_or_infinity_leaves_the_others_as_they_were"),
    Case("a block's maximum of 7.9, mean of draws", "said to be biased, or 7.9", "6, said to be unbiased", clipped,
         "test_laws.py::test_what_is_clipped_before_the_draw_is_biased"),
    Case("ties between powers of two", "up; said in formats.md", "up; not said", ties,
         "test_formats.py::test_without_mantissa_bits_ties_go_up"),
    Case("what report counts", "the share of products on rounded operands", "29 of 29 outputs", products,
         "test_report.py::test_a_convnet"),
    Case("65504 in float16", "finite", "inf in all four", beyond,
         "test_measure.py::test_a_finite_float16_that_the_format_takes_beyond_is_clipped_or_infinite"),
    Case("a forward derivative", "passes as it is", "dropped; an error", tangent,
         "test_derivatives.py::test_a_tangent_passes_as_it_is"),
    Case("a norm by name that holds a product: its places", "the product, the norm", "(not told apart)", named_norm,
         "test_meaning.py::test_what_is_no_norm"),
    Case("scales before, behind or split", "equal bits", ".04 to .05", spellings,
         "test_attention.py::test_every_spelling_has_the_bits_of_attention_written_by_hand"),
    Case("a floating time step: its places", "sin, cos, add", "its angle too", angle,
         "test_meaning.py::test_what_only_sin_and_cos_read_is_an_angle"),
)  # fmt: skip
OF_OPERATIONS = (
    Case("a tensor made in forward and written into", "equal at each call", "differs at call 2", fresh,
         "test_capture.py::test_it_computes_what_the_model_computes_at_every_call"),
    Case("branches on a type, a text, a size", "equal at each call", "one branch for all", branches,
         "test_capture.py::test_it_computes_what_the_model_computes_at_every_call"),
    Case("the backward of sgn: zeros without memory", "a gradient of zeros", "segmentation fault", zeros_without_memory,
         "test_derivatives.py::test_a_gradient_of_zeros_without_memory_is_trained_with"),
    Case("a parameter that gets no gradient", "gradient None", "gradient zeros", undefined,
         "test_derivatives.py::test_weight_decay_leaves_a_branch_without_gradient_as_it_is"),
    Case("a random state set in forward", "equal at each call", "dropped", random_state,
         "test_capture.py::test_it_computes_what_the_model_computes_at_every_call"),
    Case("the real part of fft2", "on the grid", "never rounded", complex_part,
         "test_operations.py::test_a_complex_activation_is_rounded_by_its_real_and_its_imaginary_part"),
    Case("torch.export: the operations of a graph", "linear, relu, linear", "no parts", exported,
         "test_operations.py::test_overloads_of_aten_are_their_operations"),
    Case("native_dropout, an operator named fused_dropout, mul by a truth value", "runs", "please report this model",
         wide_names, "test_operations.py::test_names_that_look_like_others_run"),
    Case("an operator of others, named fold", "rounded", "trusted as movement", bare_name,
         "test_operations.py::test_an_operator_that_others_have_registered_is_not_trusted_by_its_name"),
    Case("new numbers: rounded", "all", "none", lambda: last_is(True, NEW),
         "test_operations.py::test_what_makes_new_numbers_is_rounded"),
    Case("no new numbers: not rounded again", "all", "none", lambda: last_is(False, MOVED),
         "test_operations.py::test_what_moves_is_not_rounded_again"),
    Case("poolings that give indices: their part", "pooling", "arithmetic", lambda: parts(POOLS),
         "test_operations.py::test_selections_are_pooling"),
    Case("selections, maximum to aminmax: their part", "pooling", "arithmetic", lambda: parts(SELECTS),
         "test_operations.py::test_selections_are_pooling"),
    Case("clamp_min, clamp_max: their part", "activation", "arithmetic", lambda: parts(["clamp_min", "clamp_max"]),
         "test_operations.py::test_selections_are_pooling"),
)  # fmt: skip
TITLES = {"What is rounded": CASES, "Operations": OF_OPERATIONS}


def command_line() -> CommandLine:
    return CommandLine(prog="meaning.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)


def row(case: Case, today: str) -> str:
    file, _, name = case.test.partition("::")
    return f"| {case.what} | {case.right} | {case.before} | {today} | [{name}](../tests/{file}) |"


def table(cases: Sequence[Case]) -> str:
    return "\n".join(
        [f"| {' | '.join(HEADERS)} |", "|---" * len(HEADERS) + "|", *(row(each, each.today()) for each in cases)]
    )


def main(argv: Sequence[str] | None = None) -> None:
    command_line().parse_args(argv)
    for title, cases in TITLES.items():
        show(f"## {title}\n\n{table(cases)}\n")


if __name__ == "__main__":
    run(main)
