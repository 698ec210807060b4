"""The bits that CUDA kernels must give, as hashes of the CPU's bits: no oracle has to run beside the GPU.

    python tests/cuda_cases.py          # compute the hashes on the CPU and write them to tests/cuda_hashes.json

One case is one path through csrc/cuda/quantize.cu, in every dtype and rounding that it serves. Inputs are made by
integer arithmetic alone, so every version of torch makes the same ones, on every device.
"""

import ctypes
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from swalp_fx.ops import quantize, quantize_, quantize_foreach_

HASHES = Path(__file__).parent / "cuda_hashes.json"
KEY, STREAM = 0x0123456789ABCDEF, 2**40 + 7
FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = (FLOAT32, FLOAT64, BFLOAT16, FLOAT16)
USUAL = ("nearest", "stochastic")


def words(numel: int, seed: int) -> Tensor:
    """63 random bits a number: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), in integers that wrap."""

    def shift(z: Tensor, bits: int) -> Tensor:
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = (torch.arange(numel) + (seed << 40)) * -0x61C8864680B583EB
    z = (z ^ shift(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shift(z, 27)) * -0x6B2FB644ECCEEE15
    return shift(z ^ shift(z, 31), 1)


@functools.lru_cache(maxsize=4)
def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Rows of many scales, with NaN, infinities and zeros among them, and a row of zeros. Not to be written to."""
    numel, rows = math.prod(shape), shape[0] if len(shape) > 1 else 1
    mantissas = (words(numel, 1) & 0xFFFFFF).double() / 2**24 - 0.5
    exponents = words(rows, 2) % 40 - 30
    scales = ((exponents + 1023) << 52).view(FLOAT64)  # powers of two, made of their bits
    x = (mantissas.view(rows, -1) * scales[:, None]).to(dtype)
    flat = x.view(-1)
    flat[7::97], flat[8::89], flat[9::83], flat[10::13] = math.nan, math.inf, -math.inf, 0.0
    if rows > 2:
        x[rows // 2] = 0.0
    return x.view(shape)


def hash_of(x: Tensor) -> str:
    """Of the bits of ``x`` in row-major order, any NaN being equal to any other."""
    x = torch.where(x.isnan(), math.nan, x).cpu().contiguous()
    memory = ctypes.string_at(x.data_ptr(), x.numel() * x.element_size()) if x.numel() else b""
    return hashlib.sha256(memory).hexdigest()[:16]


# ---- layouts: the same numbers, elsewhere in memory ----------------------------------------------


def as_is(x: Tensor) -> Tensor:
    return x.clone()


def channels_last(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.channels_last)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def sliced(x: Tensor) -> Tensor:
    """The middle of wider rows: memory with gaps."""
    return torch.nn.functional.pad(x, (2, 3))[..., 2:-3]


def misaligned(x: Tensor) -> Tensor:
    """Dense, one element behind where 16-byte accesses may begin."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@dataclass(frozen=True)
class Case:
    """Tensors of ``shape`` in ``layout``, rounded to ``spec``; ``path`` serves them."""

    path: str
    spec: str
    shape: tuple[int, ...]
    layout: Callable[[Tensor], Tensor] = as_is
    roundings: tuple[str, ...] = USUAL
    dtypes: tuple[torch.dtype, ...] = DTYPES

    def __str__(self) -> str:
        return f"{self.path}: {self.spec} {'x'.join(map(str, self.shape))} {self.layout.__name__}"

    def hashes(self, device: str) -> Iterator[tuple[str, str]]:
        """(name, hash of the result), of every rounding and dtype; in place the bits must be the same."""
        for dtype in self.dtypes:
            x = self.layout(values(self.shape, dtype).to(device))
            for rounding in self.roundings:
                result = hash_of(quantize(x, self.spec, rounding, key=KEY, stream=STREAM))
                in_place = quantize_(torch.empty_like(x).copy_(x), self.spec, rounding, key=KEY, stream=STREAM)
                if hash_of(in_place) != result:
                    result = f"{result} but in place {hash_of(in_place)}"
                yield f"{self}, {rounding}, {str(dtype).removeprefix('torch.')}", result


@dataclass(frozen=True)
class ListCase:
    """Tensors of several shapes and dtypes, more than one launch takes, rounded in one call."""

    spec: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...] = (FLOAT32, BFLOAT16, FLOAT64)
    roundings: tuple[str, ...] = USUAL

    def __str__(self) -> str:
        return f"list: {self.spec}, {len(self.shapes)} tensors"

    def hashes(self, device: str) -> Iterator[tuple[str, str]]:
        for rounding in self.roundings:
            given = enumerate(self.shapes)
            xs = [values(shape, self.dtypes[i % len(self.dtypes)]).to(device, copy=True) for i, shape in given]
            quantize_foreach_(xs, self.spec, rounding, key=KEY, streams=range(len(xs)))
            yield f"{self}, {rounding}", hashlib.sha256(" ".join(map(hash_of, xs)).encode()).hexdigest()[:16]


MANY = tuple([(3, 5), (64,), (40, 70), (1,), (7, 1024), (130, 9), (2048,), (300, 1000)][i % 8] for i in range(150))
OTHER = ("toward_zero", "down", "up", "nearest_away", "nearest_up", "stochastic8", "stochastic24")

CASES = (
    *(Case("quads, elementwise", spec, (37, 1003)) for spec in ("fixed8.6", "e4m3", "e5m2", "bf16", "fp16", "e2m1")),
    *(
        Case("quads, tiles", spec, (24, 1024))
        for spec in ("bfp8[-1:16]", "bfp4[-1:128]+twos", "mxfp8", "mxfp4", "nvfp4")
    ),
    *(Case("quads, tiles", spec, (3, 352)) for spec in ("mxint8", "int8[-1:32]")),
    *(Case("quads, the whole tensor", spec, (29, 1021)) for spec in ("bfp8", "int8")),
    *(Case("quads, rows", "bfp8[0]", shape) for shape in ((3, 200_004), (7, 9001))),
    *(Case("rows", spec, (11, 4100)) for spec in ("bfp8[0]", "bfp4[0]+twos", "int8[0]", "mxfp8[-1:9999]")),
    *(Case("rows, short", spec, (50, 301)) for spec in ("bfp8[0]", "int8[0]", "bfp8[0,1]", "bfp8[-1:7]")),
    Case("rows, one", "bfp8[0]", (1000,)),
    *(Case("tiles, channels_last", spec, (6, 20, 9, 11), channels_last) for spec in ("e4m3", "bfp8[0]", "bfp8[1]")),
    Case("tiles, channels_last", "bfp8[0]", (2, 33, 40, 40), channels_last),
    *(Case("tiles, transposed", spec, (130, 94), transposed) for spec in ("fixed8.6", "bfp8[0]", "bfp8", "mxfp4")),
    *(Case("tiles, runs of memory", spec, (50, 301)) for spec in ("bfp4[0:100]", "bfp8[1]", "bfp8[-1:100]")),
    *(Case("tiles, misaligned", spec, (50, 1024), misaligned) for spec in ("fixed8.6", "bfp8[0]", "bfp8")),
    Case("elements, NVFP4", "nvfp4[0:7]", (50, 304)),
    *(Case("elements, roundings", spec, (30, 1030), roundings=OTHER) for spec in ("fixed8.6", "bfp8[0]", "e4m3")),
    Case("elements, roundings", "nvfp4", (30, 1030), roundings=OTHER, dtypes=(FLOAT32, BFLOAT16)),
    *(Case("a copy, for gaps", spec, (50, 1024), sliced) for spec in ("fixed8.6", "bfp8[0]")),
    *(ListCase(spec, MANY) for spec in ("fixed8.6", "bfp8[0]", "bfp8", "mxfp8", "nvfp4")),
)
# More than one wave of thread blocks, which then stride on.
LARGE = (
    Case("quads, elementwise", "e4m3", (5000, 4099), dtypes=(BFLOAT16,)),
    Case("quads, tiles", "mxfp8", (5000, 4096), dtypes=(BFLOAT16,)),
    Case("quads, tiles", "nvfp4", (1000, 4096), dtypes=(BFLOAT16,)),
    Case("quads, the whole tensor", "bfp8", (5000, 4099), dtypes=(BFLOAT16,)),
    Case("rows", "bfp8[0]", (5000, 4100), dtypes=(BFLOAT16,)),
    Case("tiles, channels_last", "bfp8[0]", (64, 64, 40, 40), channels_last, dtypes=(FLOAT32,)),
)


def compute(cases: tuple[Case | ListCase, ...], device: str) -> dict[str, str]:
    return {name: result for case in cases for name, result in case.hashes(device)}


def due() -> dict[str, str]:
    """The hashes that are kept beside this file."""
    return json.loads(HASHES.read_text())


if __name__ == "__main__":
    HASHES.write_text(json.dumps(compute(CASES + LARGE, "cpu"), indent=0, sort_keys=True) + "\n")
