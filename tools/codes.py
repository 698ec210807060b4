"""How fast ``encode`` writes codes, beside ``quantize``, which writes the same numbers as floats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from swalp_fx import decode, encode, quantize

SPECS = ["fixed8.6", "bfp8[0]", "e4m3", "int8[0]", "mxfp8", "nvfp4"]
ROUNDINGS = ["nearest", "stochastic"]
COLUMNS = 1024
KEY = torch.tensor(20190516)


def measure(beside: Callable[..., tuple[float, float]], counts: Sequence[int], device: str) -> dict[str, list[dict]]:
    """beside: least seconds of two calls, run by turns (Clock.beside)."""
    rows: list[dict[str, Any]] = []
    for numel in counts:
        x = torch.randn(numel // COLUMNS, COLUMNS, device=device)
        for spec in SPECS:
            for rounding in ROUNDINGS:

                def codes(x: torch.Tensor = x, spec: str = spec, rounding: str = rounding) -> Any:
                    return encode(x, spec, rounding, key=KEY)

                def floats(x: torch.Tensor = x, spec: str = spec, rounding: str = rounding) -> torch.Tensor:
                    return quantize(x, spec, rounding, key=KEY)

                part = x[:64]
                if not torch.equal(decode(codes(part)), floats(part)):
                    raise SystemExit(f"{spec}, {rounding}: codes are of other numbers, so their speed says nothing")
                of_codes, of_floats = beside(codes, floats)
                rows.append(
                    {
                        "what": spec,
                        "rounding": rounding,
                        "elements": numel,
                        "encode ms": of_codes * 1e3,
                        "quantize ms": of_floats * 1e3,
                        "ratio to quantize": of_codes / of_floats,
                    }
                )
    return {"rows": rows}
