"""How fast the op, codes, attention, a graph's nodes, its capture, a training step and an optimizer's step are.

Each is measured against its like, in one run.

    python tools/benchmark.py op                  # the op, against a copy of the same tensor and against its peers
    python tools/benchmark.py op --device cuda --elements 64M --json benchmark.json
    python tools/benchmark.py codes               # encode, which writes codes, beside quantize, which writes floats
    python tools/benchmark.py attention           # rounded, and in float, beside the fused product
    python tools/benchmark.py graph               # the cost of a node beside its arithmetic
    python tools/benchmark.py capture             # first and later calls, and how many graphs changing sizes make
    python tools/benchmark.py recurrent           # recurrent layers, against PyTorch's fused calls
    python tools/benchmark.py step --models vgg16 # a training step, against the same step in float
    python tools/benchmark.py step --models rotary vit
    python tools/benchmark.py optimizer           # the optimizer's step, and its memory, against the plain optimizer's

Each first checks that the results agree: the op with the oracle, the graph with the model, a step that rounds
nothing with the plain one. Nothing wrong is timed.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

import attention
import captures
import codes
import files
import loops
import models
import optimizers
import overhead
import steps
import swalp_fx
import trial
from command import CommandLine, number, run, sentence, show
from environment import environment
from swalp_fx import reference

SPECS = ["fixed8.6", "e4m3", "e5m2", "bf16", "bfp8", "bfp8[0]", "bfp8[-1:16]", "mxfp8", "mxfp4", "int8[0]", "nvfp4"]
ROUNDINGS = ["nearest", "stochastic"]
LAYOUT_SPECS = ["fixed8.6", "e4m3", "bfp8", "bfp8[0]"]
LAYOUT_SHAPE = (32, 64, 32, 32)
COLUMNS = 1024
KEY = 20190516
THREADS = 1024  # beyond which OpenMP may find no memory for them, and end the process
SECONDS = 0.5  # of repetitions for a row
# Of a column, where they are not two behind the point.
DIGITS = {"ms": ".3f", "encode ms": ".3f", "quantize ms": ".3f", "GB/s": ".1f"}
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}


def elements(text: str) -> int:
    """``64M`` is 2^26; a multiple of a row of 1024."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    count = int(match[1]) * UNITS[match[2]] if match else 0
    if count < COLUMNS or count % COLUMNS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of {COLUMNS} elements; use 1M or 64M")
    return count


class Clock:
    """Times calls on one device: the least of many repetitions, so that other work on the machine shows least."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        if self.cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3
        begin_time = time.perf_counter()
        call()
        return time.perf_counter() - begin_time

    def work(self, call: Callable[[], Any]) -> float:
        """Seconds of the CPU that one call takes in all threads, whatever else runs; on a GPU those of ``once``."""
        if self.cuda:
            return self.once(call)
        begin_time = time.process_time()
        call()
        return time.process_time() - begin_time

    def beside(self, call: Callable[[], Any], copy: Callable[[], Any]) -> tuple[float, float]:
        """Least seconds of ``call`` and of ``copy``, run by turns."""
        self.once(call), self.once(copy)  # warm up
        pairs = [(self.once(call), self.once(copy)) for _ in range(3)]
        count = min(1000, int(SECONDS / max(1e-6, sum(min(times) for times in zip(*pairs, strict=True)))))
        pairs += [(self.once(call), self.once(copy)) for _ in range(count)]
        of_call, of_copy = zip(*pairs, strict=True)
        return min(of_call), min(of_copy)


def agrees(spec: str, rounding: str, device: str) -> bool:
    x = torch.randn(64, COLUMNS, generator=torch.Generator().manual_seed(0))
    due = reference.quantize(x, spec, rounding, key=KEY)
    return torch.equal(swalp_fx.quantize_(x.to(device, copy=True), spec, rounding, key=KEY).cpu(), due)


def block_float_in_torch(x: Tensor) -> Tensor:
    """bfp8[0] in plain torch operations, to nearest."""
    step = torch.exp2(torch.floor(torch.log2(x.abs().amax(1, keepdim=True))) - 6)
    return torch.clamp(torch.round(x / step), -127, 127) * step


def peers(x: Tensor) -> dict[str, Callable[[], Any]]:
    """Other roundings of a tensor: each out of place, into fresh memory, to nearest."""
    found: dict[str, Callable[[], Any]] = {
        "plain torch, bfp8[0]": lambda: block_float_in_torch(x),
        "torch.fake_quantize_per_tensor_affine": lambda: torch.fake_quantize_per_tensor_affine(x, 1 / 64, 0, -128, 127),
        "float8_e4m3fn and back": lambda: x.to(torch.float8_e4m3fn).float(),
        "bfloat16 and back": lambda: x.bfloat16().float(),
        "swalp_fx.quantize, bfp8[0]": lambda: swalp_fx.quantize(x, "bfp8[0]"),
    }
    compiled = torch.compile(block_float_in_torch)
    try:
        compiled(x)
        found["torch.compile of plain torch, bfp8[0]"] = lambda: compiled(x)
    except Exception as error:  # whatever the compiler at hand fails with
        print(f"torch.compile does not work here: {str(error).splitlines()[0]}", file=sys.stderr)
    try:
        from qtorch.quant import block_quantize
    except ImportError:
        return found
    found["qtorch.block_quantize, dim 0"] = lambda: block_quantize(x, wl=8, dim=0, rounding="nearest")
    return found


def row(name: str, rounding: str, numel: int, seconds: float, copy: float) -> dict[str, Any]:
    return {
        "what": name,
        "rounding": rounding,
        "elements": numel,
        "ms": seconds * 1e3,
        "G elements/s": numel / seconds / 1e9,
        "GB/s": 8 * numel / seconds / 1e9,  # float32, read and written
        "ratio to copy": seconds / copy,
    }


def measure(counts: Sequence[int], device: str) -> list[dict[str, Any]]:
    clock = Clock(device)
    rows = []
    for numel in counts:
        x = torch.randn(numel // COLUMNS, COLUMNS, device=device)
        y = torch.empty_like(x)

        def copy(x: Tensor = x, y: Tensor = y) -> None:
            y.copy_(x)

        for spec in SPECS:
            for rounding in ROUNDINGS:
                if not agrees(spec, rounding, device):
                    raise SystemExit(f"{spec}, {rounding}: the op differs from the oracle, so its speed says nothing")
                seconds, of_copy = clock.beside(
                    lambda spec=spec, rounding=rounding, x=x: swalp_fx.quantize_(x, spec, rounding, key=KEY), copy
                )
                rows.append(row(spec, rounding, numel, seconds, of_copy))
        x.normal_()
        for name, call in peers(x).items():
            rows.append(row(f"{name} (fresh memory)", "nearest", numel, *clock.beside(call, copy)))
    return rows


def layouts(device: str) -> dict[str, Tensor]:
    """Tensors of one shape, the first of them contiguous."""
    n, c, h, w = LAYOUT_SHAPE
    x = torch.randn(LAYOUT_SHAPE, device=device)
    return {
        "contiguous": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "x.permute(3, 2, 1, 0)": torch.randn(w, h, c, n, device=device).permute(3, 2, 1, 0),
        "x.permute(3, 0, 1, 2)": torch.randn(c, h, w, n, device=device).permute(3, 0, 1, 2),
        "x[..., :-3]": torch.randn(n, c, h, w + 3, device=device)[..., :-3],
        "x[..., ::2]": torch.randn(n, c, h, 2 * w, device=device)[..., ::2],
    }


def measure_layouts(device: str) -> list[dict[str, Any]]:
    """Each layout by turns with the contiguous tensor, after a check that both have the same bits."""
    clock = Clock(device)
    rows = []
    tensors = layouts(device)
    for spec in LAYOUT_SPECS:
        for rounding in ROUNDINGS:

            def rounded_in_place(x: Tensor, spec: str = spec, rounding: str = rounding) -> Tensor:
                return swalp_fx.quantize_(x, spec, rounding, key=KEY)

            for name, x in tensors.items():
                x.normal_()
                due = rounded_in_place(x.clone(memory_format=torch.contiguous_format))
                if not torch.equal(rounded_in_place(x), due):
                    raise SystemExit(f"{spec}, {rounding}: {name} differs from contiguous, so its speed says nothing")
                seconds, of_contiguous = clock.beside(
                    lambda x=x, call=rounded_in_place: call(x),
                    lambda x=tensors["contiguous"], call=rounded_in_place: call(x),
                )
                rows.append(
                    {
                        "what": spec,
                        "rounding": rounding,
                        "layout": name,
                        "ms": seconds * 1e3,
                        "ratio to contiguous": seconds / of_contiguous,
                    }
                )
    return rows


def command_line() -> CommandLine:
    parser = CommandLine(prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    threads = number(int, 1, f"a whole number of 1 to {THREADS}", high=THREADS + 1)
    add = parser.add_argument
    kinds = ["op", "codes", "attention", "graph", "capture", "recurrent", "step", "optimizer"]
    add("what", choices=kinds, help="op: quantize_ in place, on float32")
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    add(
        "--elements",
        type=elements,
        nargs="+",
        metavar="N",
        help="of op and codes: [elements / 1024, 1024], such as 64M (default: 1M and 64M)",
    )
    add(
        "--models",
        nargs="+",
        metavar="NAME",
        help=f"of step: names, as tools/train.py takes them (default: {', '.join(steps.MODELS)})",
    )
    add("--threads", type=threads, metavar="N", default=torch.get_num_threads(), help="default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write what was measured here too")
    return parser


def refuse_unmeasurable(args: argparse.Namespace, parser: CommandLine) -> None:
    """Refuses bad input before minutes of measuring: a model that does not fit, or a file that cannot be written."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.refuse("--device cuda: torch finds no GPU; use --device cpu")
    for option, of in (("elements", ("op", "codes")), ("models", ("step",))):
        if getattr(args, option) is not None and args.what not in of:
            parser.refuse(f"--{option} is an option of {' and '.join(of)}, not of {args.what}")
    try:
        if args.json:
            files.refuse_unwritable(args.json)
        if args.what in ("graph", "capture", "optimizer"):
            models.names()  # torchvision's among them
        for name in (args.models or steps.MODELS) if args.what == "step" else ():
            steps.made(name)
    except trial.INPUT_ERRORS as error:
        parser.refuse(error)
    for count in args.elements or ():
        try:
            torch.empty(2, count, device=args.device)  # as much as is measured, and its copy
        except RuntimeError as error:
            parser.refuse(f"--elements {count:,}: memory does not hold so many ({sentence(error)}); use fewer")


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line()
    args = parser.parse_args(argv)
    refuse_unmeasurable(args, parser)
    torch.set_num_threads(args.threads)
    of = environment(args.device)
    about = {
        "command": shlex.join(["python", "tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)]),
        **{name: of[name] for name in ("machine", "threads", "torch", "date")},
    }
    clock = Clock(args.device)
    counts = args.elements or [elements("1M"), elements("64M")]
    if args.what == "op":
        tables = {"rows": measure(counts, args.device), "layouts": measure_layouts(args.device)}
    elif args.what == "codes":
        tables = codes.measure(clock.beside, counts, args.device)
    elif args.what == "attention":
        tables = attention.measure(clock.work, args.device)
    elif args.what == "graph":
        tables = overhead.measure(clock.work, args.device)
    elif args.what == "capture":
        tables = captures.measure(clock.once, args.device)
    elif args.what == "recurrent":
        tables = loops.measure(clock.once, args.device)
    elif args.what == "optimizer":
        tables = optimizers.measure(clock.once, args.device)
    else:
        tables = steps.measure(clock.once, args.models or steps.MODELS, args.device)
    show("\n".join(f"{name}: {value}" for name, value in about.items()))
    for rows in tables.values():
        show("\n" + tabulate(rows, headers="keys", floatfmt=[DIGITS.get(name, ".2f") for name in rows[0]], intfmt=","))
    if args.json:
        try:
            files.write_json(args.json, {**about, **tables})
        except files.FileError as error:
            parser.refuse(error)


if __name__ == "__main__":
    run(main)
