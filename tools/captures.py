"""The cost of a converted model's capture: the trace of the first call, the guards of later calls, and the graphs.

Beside it stands ``torch.compile(backend="eager")`` of the same model: the same front end, without a rewrite.
"""

from __future__ import annotations

import copy
import functools
import gc
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import models
import swalp_fx
from decoder import Decoder
from swalp_fx.capture import local

MODELS = ["vgg16", "cifar_resnet18", "resnet18"]
BATCH, SIZE = 2, 32  # so small that a call is its guards and its launches
FIRST = 7  # first calls of a model, each of a fresh copy
LATER = 2000  # later calls
SIZES = 100  # batches of 1 to so many samples
LENGTHS = 512  # texts of 1 to so many bytes
GENERATED = 64  # bytes, one a call

Once = Callable[[Callable[[], Any]], float]


def measure(once: Once, device: str) -> dict[str, list[dict[str, Any]]]:
    """The tables: calls, and numbers of graphs. ``once`` times one call, in seconds."""
    return {"calls": [calls(once, name, device) for name in MODELS], "graphs": graphs(device)}


def calls(once: Once, name: str, device: str) -> dict[str, Any]:
    """The least time of a model's first calls, and of later calls without their graph."""
    torch.manual_seed(0)
    model = models.build(name, 10, 3, SIZE).to(device)
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=device)
    if not (found := swalp_fx.check(model, images)):
        raise SystemExit(f"{name}: {found}; so the speed says nothing")
    ours, theirs = math.inf, math.inf
    for _ in range(FIRST):
        ours = min(ours, first_call(converted(model), images))
        theirs = min(theirs, first_call(torch.compile(copy.deepcopy(model), backend="eager"), images))
    guards, of_compile = later_calls(once, model, images)
    return {
        "model": name,
        "first call s": ours,
        "of torch.compile s": theirs,
        "ratio": ours / theirs,
        "later call us": guards * 1e6,
        "of torch.compile us": of_compile * 1e6,
    }


def converted(model: nn.Module) -> nn.Module:
    return swalp_fx.convert(copy.deepcopy(model), recipe="bfp8[0]").module


def first_call(model: Any, images: Tensor) -> float:
    """Seconds of the CPU: a trace is Python, of one thread, whatever else the machine does."""
    torch.compiler.reset()  # the front end keeps the graphs of other copies, since they run the same code
    gc.collect()  # garbage of the reset is no cost of this call
    begin = time.process_time()
    model(images)
    return time.process_time() - begin


def later_calls(once: Once, model: nn.Module, images: Tensor) -> tuple[float, float]:
    """The least seconds of a call without its graph, ours and torch.compile's, by turns."""
    watch, backend = Kept(), Kept()
    low = converted(model)
    compiled = torch.compile(model, backend=lambda graph, inputs: functools.partial(backend, graph))
    ours, theirs = math.inf, math.inf
    local.watch = lambda rewritten, args: watch(rewritten.graph_module, *args)
    try:
        low(images), compiled(images)
        for _ in range(LATER):
            ours, theirs = min(ours, once(lambda: low(images))), min(theirs, once(lambda: compiled(images)))
    finally:
        local.watch = None
    return ours, theirs


class Kept:
    """Runs in a graph's place: the graph once, and then nothing."""

    def __init__(self) -> None:
        self.outputs: Any = None

    def __call__(self, graph: Callable[..., Any], *args: Any) -> Any:
        if self.outputs is None:
            self.outputs = graph(*args)
        return self.outputs


def graphs(device: str) -> list[dict[str, Any]]:
    """How many graphs are made if sizes change from call to call."""
    convnet = converted(models.build("convnet", 10, 1, 12).to(device))
    decoder = converted(Decoder(context=LENGTHS, width=8, heads=2, layers=1).to(device))
    caching = converted(Caching(8).to(device)).eval()
    for size in range(2, SIZES + 2):
        convnet(torch.randn(size, 1, 12, 12, device=device))
    for length in range(1, LENGTHS + 1):
        decoder(torch.zeros(1, length, dtype=torch.int64, device=device))
    generate(caching, device)
    return [
        {"what": f"{SIZES} batch sizes of a convnet", "calls": SIZES, "graphs": made(convnet)},
        {"what": f"texts of 1 to {LENGTHS} bytes, a decoder", "calls": LENGTHS, "graphs": made(decoder)},
        {"what": "generation with a cache, byte by byte", "calls": GENERATED, "graphs": made(caching)},
    ]


def made(model: Any) -> int:
    return len(model.graphs)


class Caching(nn.Module):
    """Attention of one head over a cache, which a call extends: bytes [N, T] -> scores [N, T, 256] and the cache."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens, self.all, self.head = nn.Embedding(256, width), nn.Linear(width, 3 * width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor, cache: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Any]:
        query, key, value = self.all(self.tokens(tokens)).chunk(3, -1)
        if cache is not None:
            key, value = (torch.cat(each, 1) for each in zip(cache, (key, value), strict=True))
        weights = torch.matmul(query, key.transpose(1, 2)).softmax(-1)
        return self.head(torch.matmul(weights, value)), (key, value)


@torch.no_grad()
def generate(model: nn.Module, device: str) -> Tensor:
    """Bytes [1, 4 + GENERATED], the likeliest one after another."""
    text = torch.zeros(1, 4, dtype=torch.int64, device=device)
    scores, cache = model(text)
    for _ in range(GENERATED):
        text = torch.cat([text, scores[:, -1:].argmax(-1)], 1)
        scores, cache = model(text[:, -1:], cache)
    return text
