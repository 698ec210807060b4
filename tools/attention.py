"""The cost of rounded attention, beside the fused product in float: a forward alone, and with its backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swalp_fx

SHAPE = (1, 8, 1024, 64)  # samples, heads, tokens, width
FORMAT = "bfp8[0]"
RECIPE = f"{FORMAT} quantize_logits=true"  # the result too, as a layer behind it would read it
WHOLE = "exclude=*attn_scores,*attn_probabilities"  # the fused product: only its result is rounded
TURNS = 5  # behind one that warms up


class Fused(nn.Module):
    """PyTorch's own product: queries, keys and values of SHAPE -> the same shape."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)


class ByHand(Fused):
    """The same in steps, with all scores in memory."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        if self.causal:
            tokens = scores.shape[-1]
            future = torch.ones(tokens, tokens, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        return scores.softmax(-1) @ value


def contenders(causal: bool) -> dict[str, nn.Module]:
    """Name -> contender. The first is the one that the others are compared to."""
    return {
        "fused, in float": Fused(causal),
        "by hand, in float": ByHand(causal),
        FORMAT: swalp_fx.convert(Fused(causal), recipe=RECIPE).module,
        f"{FORMAT} {WHOLE}": swalp_fx.convert(Fused(causal), recipe=f"{RECIPE} {WHOLE}").module,
    }


def measure(once: Callable[[Callable[[], Any]], float], device: str) -> dict[str, list[dict[str, Any]]]:
    """The table: the least of all turns. ``once`` times one call, in seconds."""
    return {"rows": [row for causal in (False, True) for row in rows(once, causal, device)]}


def rows(once: Callable[[Callable[[], Any]], float], causal: bool, device: str) -> list[dict[str, Any]]:
    given = [torch.randn(SHAPE, device=device, requires_grad=True) for _ in range(3)]
    models = contenders(causal)
    refuse_unequal(models, given)
    least: dict[str, tuple[float, float]] = dict.fromkeys(models, (math.inf, math.inf))
    for turn in range(TURNS + 1):
        for name, model in models.items():
            took = once(lambda model=model: forward(model, given)), once(lambda model=model: step(model, given))
            if turn:
                least[name] = min(least[name][0], took[0]), min(least[name][1], took[1])
    of_forward, of_step = next(iter(least.values()))
    return [
        {
            "attention": "causal" if causal else "full",
            "computed": name,
            "forward ms": alone * 1e3,
            "ratio of forwards": alone / of_forward,
            "with backward ms": both * 1e3,
            "ratio to fused": both / of_step,
        }
        for name, (alone, both) in least.items()
    ]


@torch.no_grad()
def forward(model: nn.Module, given: list[Tensor]) -> Tensor:
    return model(*given)


def step(model: nn.Module, given: list[Tensor]) -> None:
    torch.autograd.grad(model(*given).sum(), given)


def refuse_unequal(models: dict[str, nn.Module], given: list[Tensor]) -> None:
    """Raises SystemExit unless the products agree in float, and the rewrite computes the same as the model."""
    fused, by_hand, *_ = models.values()
    if not torch.allclose(forward(fused, given), forward(by_hand, given), atol=1e-5):
        raise SystemExit("the fused product differs from that by hand, so the speed says nothing")
    if not (found := swalp_fx.check(by_hand, *given)):
        raise SystemExit(f"attention: {found}; so the speed says nothing")
