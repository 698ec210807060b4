"""How long a recurrent layer takes with all its places rounded, beside PyTorch's fused call in float, by turns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import overhead
import swalp_fx

LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
RECIPE, NEAR = "bfp8[0]", "bfp16[0] rounding=nearest"
TIMES, BATCH, HIDDEN = 100, 32, 256
TURNS = 5  # seconds


class Output(nn.Module):
    """The layer, and one more operation: an output that a model only returns is not rounded."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0] + 0


def measure(once: Callable[[Callable[[], Any]], float], device: str) -> dict[str, list[dict[str, Any]]]:
    """The table: forward and backward of each layer. ``once`` times one call, in seconds."""
    rows = []
    for kind in LAYERS:
        torch.manual_seed(0)
        model = Output(kind(HIDDEN, HIDDEN)).to(device)
        x = torch.randn(TIMES, BATCH, HIDDEN, device=device, requires_grad=True)
        refuse_far(model, x)
        low = swalp_fx.convert(copy.deepcopy(model), recipe=RECIPE).module
        low(x)  # makes the graph
        turns = [overhead.passes(once, [model, low], device, x) for _ in range(TURNS)]
        found = [tuple(map(min, zip(*each, strict=True))) for each in zip(*turns, strict=True)]
        of_float = sum(found[0])
        for name, (forward, backward) in zip(("float, fused", f"swalp_fx {RECIPE}"), found, strict=True):
            rows.append(
                {
                    "layer": kind.__name__,
                    "call": name,
                    "forward ms": forward * 1e3,
                    "backward ms": backward * 1e3,
                    "ratio to float": (forward + backward) / of_float,
                }
            )
    return {"rows": rows}


def refuse_far(model: nn.Module, x: Tensor) -> None:
    """Raises SystemExit unless the loop of steps equals the fused call, small rounding errors aside."""
    low = swalp_fx.convert(copy.deepcopy(model), recipe=NEAR).module
    if not torch.allclose(low(x), model(x), atol=1e-2):
        raise SystemExit(f"{type(model.layer).__name__}: the loop gives other numbers, so the speed says nothing")
