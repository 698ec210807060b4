"""Writes vectors for a hardware test bench: python tools/vectors.py "bfp8[0]" --rounding stochastic --n 1024

One line a number, all hexadecimal: the bits of the float32 input, the random bits that stochastic rounding adds, the
stored code and scale, and the bits of the float32 output.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import files
import swalp_fx
from command import SEED, CommandLine, number, run, show
from swalp_fx import Codes, Format, reference
from swalp_fx.codes import tiles
from swalp_fx.formats import Runs
from swalp_fx.recipe import parse_rounding

COLUMNS = ("input", "random", "code", "scale", "output")
ROW = 32  # numbers along the last axis, where blocks reach over several axes


def shape_of(format: Format, n: int) -> tuple[int, ...]:
    """A row of ``n`` numbers; or rows of ROW, the last one filled up, where blocks lie across several axes."""
    block = format.block
    if block.rank == 0 or (isinstance(block, Runs) and block.rank == 1):
        return (n,)
    return (-(-n // ROW), *[1] * (block.rank - 2), ROW)


def inputs(format: Format, shape: Sequence[int], seed: int) -> Tensor:
    """Numbers over all binades of an element, the midpoints of neighbours, numbers beside these, and zeros."""
    generator = torch.Generator().manual_seed(seed)

    def some(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    element = format.element
    low = max(math.floor(math.log2(element.min_subnormal)) - 2, -126)
    binades = some(low, min(element.max_exponent + 2, 127))
    x = torch.randn(shape, generator=generator).clamp(-1.9, 1.9) * torch.exp2(binades)
    below, above = (swalp_fx.quantize(x, format, rounding) for rounding in ("down", "up"))
    middle = (below / 2 + above / 2).nan_to_num()
    beside = (middle.view(torch.int32) + some(-1, 2).int()).view(torch.float32)
    of_each = torch.stack([x, below, middle, beside, torch.copysign(torch.zeros(()), x)])
    kind = torch.tensor([0] * 6 + [1] * 3 + [2] * 3 + [3] * 3 + [4])[some(0, 16)]
    chosen = of_each.gather(0, kind[None])[0]
    return chosen.where(chosen.isfinite(), x)


def lines(x: Tensor, format: Format, rounding: str, seed: int) -> Iterator[str]:
    """The lines of the file: its title, the columns' names, and a line a number in row-major order."""
    codes = swalp_fx.encode(x, format, rounding, key=seed)
    name, bits = parse_rounding(rounding)
    draws = reference.random_draws(seed, 0, x.numel(), bits) if name == "stochastic" else None
    columns = [
        hexadecimal(x.view(torch.int32), 32),
        [""] * x.numel() if draws is None else hexadecimal(draws, bits),
        hexadecimal(codes.integers, format.element_bits),
        scales(codes),
        hexadecimal(swalp_fx.decode(codes).view(torch.int32), 32),
    ]
    yield f"# format {format}, rounding {rounding}, shape {'x'.join(map(str, x.shape))}, seed {seed}"
    yield ",".join(COLUMNS)
    yield from map(",".join, zip(*columns, strict=True))


def scales(codes: Codes) -> list[str]:
    """The stored scale of each number; for two levels, or with a zero point, two numbers with a colon between."""
    sizes = codes.format.block.sizes(codes.shape)
    words = []
    for each in codes.scales:
        integers = each.view(torch.int32) if each.is_floating_point() else each
        of_elements = tiles.spread(integers, codes.shape, sizes) if each.dim() else integers.expand(codes.shape)
        words.append(hexadecimal(of_elements, 8 * each.element_size()))
    return list(map(":".join, zip(*words, strict=True))) if words else [""] * codes.shape.numel()


def hexadecimal(integers: Tensor, bits: int) -> list[str]:
    return [f"{value & (2**bits - 1):0{-(-bits // 4)}x}" for value in integers.flatten().tolist()]


def command_line() -> CommandLine:
    parser = CommandLine(prog="vectors.py", description=__doc__)
    parser.add_argument("format", help="a format, such as bfp8[0]")
    parser.add_argument("--rounding", default="nearest", help="a rounding (default: nearest)")
    whole = number(int, 1, "a whole number of 1 or more")
    parser.add_argument(
        "--n", type=whole, default=1024, help="how many numbers, filled up to whole rows where blocks need rows"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the numbers and of the random bits (default: 0)")
    parser.add_argument("--out", type=Path, help="a file to write (default: standard output)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line()
    args = parser.parse_args(argv)
    try:
        format = swalp_fx.parse(args.format)
        x = inputs(format, shape_of(format, args.n), args.seed)
        text = "\n".join(lines(x, format, args.rounding, args.seed))
        if args.out is None:
            return show(text)
        files.write(args.out, (text + "\n").encode())
    except (ValueError, RuntimeError) as error:
        parser.refuse(error)


if __name__ == "__main__":
    run(main)
