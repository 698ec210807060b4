"""The cost of a rewritten graph's nodes beside their arithmetic."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import models
import swalp_fx
from swalp_fx.capture import Conversion, install

FORMATS = [("float", "nearest"), ("bfp8[0]", "nearest"), ("bfp8[0]", "stochastic")]
CHAIN = 100  # nodes; each reads the one before
SHAPE = (8, 8)  # so small that rounding it is next to nothing
KEY = 20190516
WHOLE = ["preresnet20", "preresnet164"]  # their tensors are small too
SECONDS = 1.0  # of repetitions for a row

Run = Callable[[Tensor], Tensor]


def measure(once: Callable[[Callable[[], Any]], float], device: str) -> dict[str, list[dict[str, Any]]]:
    """The table: nodes in a chain, and nodes in whole models. ``once`` times one call, in seconds."""
    chains = [row(what, formats, CHAIN, *passes(once, [run], device)[0]) for what, formats, run in chained(device)]
    return {"nodes": chains + [whole(once, name, device) for name in WHOLE]}


def chained(device: str) -> list[tuple[str, str, Run]]:
    """(name, formats, a chain of such nodes); before them, chains of PyTorch's own nodes."""
    key, layer = torch.tensor(KEY), nn.Linear(*SHAPE).to(device)
    nodes: list[tuple[str, str, Callable[[Tensor, int], Tensor]]] = [
        ("torch.clone", "", lambda x, i: x.clone()),
        ("a linear layer", "", lambda x, i: layer(x)),
    ]
    for spec, rounding in FORMATS:
        formats = f"{spec}, {rounding}"

        def weight(x: Tensor, i: int, spec: str = spec, rounding: str = rounding) -> Tensor:
            return swalp_fx.quantize_weight(x, key, i, spec, rounding)

        def output(x: Tensor, i: int, spec: str = spec, rounding: str = rounding) -> Tensor:
            return swalp_fx.quantize_output(x, key, i, spec, spec, rounding)

        def in_place(x: Tensor, i: int, spec: str = spec, rounding: str = rounding) -> Tensor:
            return swalp_fx.quantize_output(x, key, i, spec, spec, rounding, in_place="AE")

        refuse_unequal(output, in_place, formats)
        nodes += [
            ("quantize_weight", formats, weight),
            ("quantize_output", formats, output),
            ("quantize_output, in place", formats, in_place),
        ]
    return [(what, formats, chain(node)) for what, formats, node in nodes]


def chain(node: Callable[[Tensor, int], Tensor]) -> Run:
    def run(x: Tensor) -> Tensor:
        for i in range(CHAIN):
            x = node(x, i)
        return x

    return run


def refuse_unequal(*nodes_and_formats: Any) -> None:
    """Raises SystemExit unless the nodes give the same output and gradient."""
    *nodes, formats = nodes_and_formats
    results = []
    for node in nodes:
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y = node(x * 1, 0)
        y.backward(torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)))
        results.append((y, x.grad))
    first, *others = results
    if not all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
        raise SystemExit(f"{formats}: in place the numbers differ, so the speed says nothing")


def whole(once: Callable[[Callable[[], Any]], float], name: str, device: str) -> dict[str, Any]:
    """The cost of a node in a model: a model with nodes that round nothing, minus the plain model, by turns."""
    model = models.build(name).to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    if not (found := swalp_fx.check(model, x)):
        raise SystemExit(f"{name}: {found}; so the speed says nothing")
    low = with_identity(copy.deepcopy(model))
    low(x)  # the first call traces
    of_plain, of_low = passes(once, [model, low], device, x)
    (made,) = low.graphs
    quantizers = (swalp_fx.quantize_weight, swalp_fx.quantize_output)
    nodes = sum(node.target in quantizers for node in made.graph.nodes)
    return row(f"{name}, less the float model", "float", nodes, *(b - a for a, b in zip(of_plain, of_low, strict=True)))


def with_identity(model: nn.Module) -> Any:
    """``model``, converted as ``swalp_fx.check`` does: a node in every place, and none of them rounds."""
    install(Conversion(model, swalp_fx.Recipe(rounding="nearest"), identity=True))
    return model


def passes(
    once: Callable[[Callable[[], Any]], float], runs: Sequence[Run], device: str, x: Tensor | None = None
) -> list[tuple[float, float]]:
    """Least seconds of each run's forward and of its backward, by turns."""
    x = torch.randn(SHAPE, device=device, requires_grad=True) if x is None else x
    least = [(math.inf, math.inf)] * len(runs)
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or math.inf in least[0]:
        for i, run in enumerate(runs):
            made: list[Tensor] = []
            forward = once(lambda run=run, made=made: made.append(run(x)))
            error = torch.ones_like(made[0])
            backward = once(lambda made=made, error=error: made[0].backward(error))
            least[i] = min(least[i][0], forward), min(least[i][1], backward)
    return least


def row(what: str, formats: str, nodes: int, forward: float, backward: float) -> dict[str, Any]:
    return {
        "what": what,
        "formats": formats,
        "nodes": nodes,
        "forward us": forward / nodes * 1e6,
        "backward us": backward / nodes * 1e6,
    }
