"""The stages of tools/gpu.py: each is a function that yields its results, and raises if something is wrong."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parents[1]
KEY = 20190516
SANITIZED = 75  # seconds for each tool of compute-sanitizer
Row = dict[str, Any]


class StageError(Exception):
    """A wrong result of a stage."""


# ---- build -------------------------------------------------------------------------------------------


def build() -> Iterator[Row]:
    there = all(importlib.util.find_spec(f"swalp_fx.{name}") for name in ("_C", "_C_cuda"))
    if not there:
        subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=True)
    for path in sorted(ROOT.glob("swalp_fx/*.so")):
        yield {"module": path.name, "bytes": path.stat().st_size, "built": not there}


# ---- smoke -------------------------------------------------------------------------------------------


def smoke() -> Iterator[Row]:
    import swalp_fx

    major, minor = torch.cuda.get_device_capability()
    yield {
        "device": torch.cuda.get_device_name(),
        "capability": f"{major}.{minor}",
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "GiB": round(torch.cuda.get_device_properties(0).total_memory / 2**30),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    x = torch.randn(64, 1000)
    for spec in ("fixed8.6", "e4m3", "bfp8", "bfp8[0]", "mxfp8", "nvfp4"):
        due = swalp_fx.quantize(x, spec, "stochastic", key=KEY)
        if not torch.equal(swalp_fx.quantize(x.cuda(), spec, "stochastic", key=KEY).cpu(), due):
            raise StageError(f"{spec}: CUDA and the CPU give different bits")
        yield {"spec": spec, "equal": True}


# ---- sanitizer ---------------------------------------------------------------------------------------


def sanitizer() -> Iterator[Row]:
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        yield {"tool": "compute-sanitizer", "found": "is not installed"}
        return
    # Each tensor in memory of its own, so that a read beyond its end is seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-k", "small and float32 or list"]
    for name in ("memcheck", "racecheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9", *pytest, "tests/test_cuda_hashes.py"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=SANITIZED)
        said = (result.stdout + result.stderr).strip().splitlines()
        yield {"tool": name, "status": result.returncode, "found": said[-1] if said else ""}
        if result.returncode:
            raise StageError(f"{name}:\n" + "\n".join(said[-60:]))


# ---- bandwidth ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """A tensor to round: its path, and how many times the rounding must read and write its bytes."""

    path: str
    spec: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    format: torch.memory_format = torch.contiguous_format
    passes: int = 2  # a read and a write; 3 where the blocks do not fit in a cache, and are read twice


MI = 2**20
TRAFFIC = (
    Traffic("elementwise", "fixed8.6", (64, MI)),
    Traffic("elementwise", "e4m3", (64, MI)),
    Traffic("elementwise", "e4m3", (64, MI), torch.bfloat16),
    Traffic("rows, few and long", "bfp8[0]", (32, 2 * MI), passes=3),
    Traffic("rows, activations of ResNet-50", "bfp8[0]", (64, 256, 56, 56), passes=3),
    Traffic("rows, activations of ResNet-50", "bfp8[0]", (64, 256, 56, 56), torch.bfloat16, passes=3),
    Traffic("rows, activations of ResNet-50", "bfp8[0]", (64, 2048, 7, 7), passes=3),
    Traffic("rows, many", "bfp8[0]", (64 * 1024, 1024)),
    Traffic("rows, a weight", "bfp8[0]", (512, 512, 3, 3)),
    Traffic("tiles of 16", "bfp8[-1:16]", (64, MI)),
    Traffic("tiles of 32", "mxfp8", (64, MI)),
    Traffic("tiles of 32", "mxfp4", (64, MI), torch.bfloat16),
    Traffic("whole tensor", "bfp8", (64, MI), passes=3),
    Traffic("real scale, rows", "int8[0]", (64 * 1024, 1024)),
    Traffic("NVFP4", "nvfp4", (64, MI), passes=3),
    Traffic("channels_last", "bfp8[0]", (64, 256, 56, 56), torch.float32, torch.channels_last, passes=3),
    Traffic("channels_last", "bfp8[0]", (64, 256, 56, 56), torch.bfloat16, torch.channels_last, passes=3),
    Traffic("channels_last", "bfp8[0]", (64, 2048, 7, 7), torch.bfloat16, torch.channels_last, passes=3),
    Traffic("channels_last", "e4m3", (64, 256, 56, 56), torch.bfloat16, torch.channels_last),
)


def milliseconds(call: Callable[[], Any], budget: float = 120.0) -> float:
    """Milliseconds of one call among many in a row: the least mean of three runs, by CUDA events."""

    def run(count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    run(2)
    count = max(2, min(200, int(budget / 3 / max(run(2), 1e-3))))
    return min(run(count) for _ in range(3))


def bandwidth() -> Iterator[Row]:
    from swalp_fx import quantize_

    for traffic in TRAFFIC:
        x = torch.randn(traffic.shape, device="cuda").to(traffic.dtype).contiguous(memory_format=traffic.format)
        y = torch.empty_like(x)
        of_copy = milliseconds(lambda x=x, y=y: y.copy_(x))
        for rounding in ("nearest", "stochastic"):
            call = lambda x=x, t=traffic, r=rounding: quantize_(x, t.spec, r, key=KEY)  # noqa: E731
            yield _rate(traffic, rounding, x, milliseconds(call), of_copy)
        del x, y
    yield from _lists()


def _rate(traffic: Traffic, rounding: str, x: Tensor, ms: float, of_copy: float) -> Row:
    size = x.numel() * x.element_size()
    return {
        "path": traffic.path,
        "spec": traffic.spec,
        "tensor": f"{'x'.join(map(str, traffic.shape))} {str(x.dtype).removeprefix('torch.')}",
        "rounding": rounding,
        "ms": round(ms, 4),
        "GB/s moved": round(traffic.passes * size / ms / 1e6),
        "copy GB/s": round(2 * size / of_copy / 1e6),
        "ratio to copy": round(ms / of_copy, 2),
    }


def _lists() -> Iterator[Row]:
    """The parameters of ResNet-50, in one call; the copy is torch's of a list."""
    import torchvision

    from swalp_fx.ops import quantize_foreach_

    model = torchvision.models.resnet50()
    xs = [parameter.detach().cuda() for parameter in model.parameters()]
    ys = [torch.empty_like(x) for x in xs]
    of_copy = milliseconds(lambda: torch._foreach_copy_(ys, xs))
    size = sum(x.numel() * x.element_size() for x in xs)
    for rounding in ("nearest", "stochastic"):
        ms = milliseconds(lambda r=rounding: quantize_foreach_(xs, "bfp8[0]", r, key=KEY, streams=range(len(xs))))
        yield {
            "path": f"a list of {len(xs)} tensors",
            "spec": "bfp8[0]",
            "tensor": "ResNet-50's parameters float32",
            "rounding": rounding,
            "ms": round(ms, 4),
            "GB/s moved": round(2 * size / ms / 1e6),
            "copy GB/s": round(2 * size / of_copy / 1e6),
            "ratio to copy": round(ms / of_copy, 2),
        }


# ---- steps -------------------------------------------------------------------------------------------

BATCH, SIZE = 64, 224


def steps() -> Iterator[Row]:
    torch.backends.cudnn.benchmark = True
    # All times before the first profile: a profiler that has run slows every later launch.
    timed = [
        (name, half, recipe, step, milliseconds(step, budget=2000.0))
        for name in ("resnet18", "resnet50")
        for half in (False, True)
        for recipe, step in _steps_of(name, half)
    ]
    of_float: dict[str, float] = {}
    for name, half, recipe, step, ms in timed:
        kernels = _kernels(step)
        ours = {kernel: of for kernel, of in kernels.items() if "quantize_" in kernel or "maxim" in kernel}
        # The pace of the whole loop, and the time in which the GPU has work, without the host's delays.
        times = {"ms": ms, "GPU ms": sum(of for _, of in kernels.values())}
        of_float = of_float if recipe else times
        yield {
            "model": name,
            "arithmetic": "bfloat16, channels_last" if half else "float32",
            "step": recipe or "float",
            **{kind: round(of, 2) for kind, of in times.items()},
            **{f"{kind} over float": round(of / of_float[kind], 2) for kind, of in times.items()},
            "launches": sum(count for count, _ in kernels.values()),
            "rounding launches": sum(count for count, _ in ours.values()),
            "rounding ms": round(sum(of for _, of in ours.values()), 2),
            "kernels": {kernel: [count, round(of, 3)] for kernel, (count, of) in ours.items()},
        }


def _steps_of(name: str, half: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """(recipe, step), of float32 or of bfloat16 by autocast in channels_last: as it is, and in bfp8[0]."""
    import torchvision

    import swalp_fx

    memory = torch.channels_last if half else torch.contiguous_format
    original = getattr(torchvision.models, name)(num_classes=1000).cuda().to(memory_format=memory)
    images = torch.randn(BATCH, 3, SIZE, SIZE, device="cuda").contiguous(memory_format=memory)
    labels = torch.randint(1000, (BATCH,), device="cuda")
    for recipe in ("", "bfp8[0]"):
        module: nn.Module = copy.deepcopy(original)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
        if recipe:
            module = swalp_fx.convert(module, optimizer, recipe=recipe).module

        def step(module: nn.Module = module, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                loss = nn.functional.cross_entropy(module(images), labels)
            loss.backward()
            optimizer.step()

        step()
        yield recipe, step


def _kernels(step: Callable[[], None]) -> dict[str, tuple[int, float]]:
    """Name -> (launches, milliseconds on the GPU), of one step's kernels and copies."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = _short(event.name)
            counts[name] += 1
            times[name] += event.device_time_total / 1e3
    return {name: (counts[name], times[name]) for name in counts}


def _short(kernel: str) -> str:
    """``quantize_rows<float, OnPowerOfTwo<Integers>, RoundStochastic>`` of a kernel's whole signature."""
    kernel = re.sub(r"\(anonymous namespace\)|swalp_fx::|^void |::$", "", kernel)
    return kernel.split("(")[0].lstrip(":")[:90]
