"""Compares nearest rounding bit for bit with QPyTorch's on the CPU: python tools/compare_qtorch.py

Needs qtorch (pip install qtorch ninja), which compiles itself when it is first imported. Every difference is counted
under the reason for it; one without a reason is printed, and the exit status is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from tabulate import tabulate
from torch import Tensor

import qpytorch
import swalp_fx
from command import CommandLine, run, show
from swalp_fx import Format
from swalp_fx.formats import Float, Integer, PowerOfTwo, Slices

ROWS, COLUMNS = 512, 1024
NO_REASON = "no reason"


@dataclass(frozen=True)
class Case:
    """One of QPyTorch's number formats: their call's arguments, and ours of the same meaning."""

    function: str
    arguments: tuple[int | bool, ...]
    format: Format
    rounding: str

    def theirs(self, quant: ModuleType, x: Tensor, rounding: str = "nearest") -> Tensor:
        """``x`` rounded by QPyTorch. It calls its own rounding nearest too, however it treats ties."""
        return getattr(quant, self.function)(x, *self.arguments, rounding=rounding)

    def ours(self, x: Tensor) -> Tensor:
        return swalp_fx.quantize(x, self.format, self.rounding)

    @property
    def call(self) -> str:
        return f"{self.function}(x, {', '.join(map(str, self.arguments))})"


def fixed(wl: int, fl: int, symmetric: bool = False) -> Case:
    format = Format(Integer(wl, fl, "sym" if symmetric else "twos"))
    return Case("fixed_point_quantize", (wl, fl, True, symmetric), format, "nearest")


def block(wl: int, dim: int = -1) -> Case:
    format = Format(Integer(wl, wl - 2, "mag"), PowerOfTwo(), Slices(() if dim == -1 else (dim,)))
    return Case("block_quantize", (wl, dim), format, "nearest_up")


def float_(exp: int, man: int) -> Case:
    # They spend the highest exponent on numbers, except that 8 bits leave it to float32's infinities.
    return Case("float_quantize", (exp, man), Format(Float(exp, man, "ieee" if exp == 8 else "finite")), "nearest_away")


CASES = [
    *(fixed(8, 6), fixed(8, 6, True), fixed(4, 2), fixed(16, 10), fixed(24, 12)),
    *(block(8), block(8, 0), block(8, 1), block(6, 0), block(4, 0), block(2, 0), block(16, 0)),
    *(float_(5, 2), float_(4, 3), float_(3, 2), float_(2, 1), float_(5, 10), float_(6, 9), float_(8, 7)),
]

# ---- why they differ -----------------------------------------------------------------------------

DOUBLE_ROUNDING = "double rounding"


def reasons(case: Case, x: Tensor, theirs: Tensor, ours: Tensor) -> dict[str, Tensor]:
    """Reason -> the places where it explains a difference of theirs and ours. x is finite."""
    error, others = REASONS[case.function](x, case.format)
    # Their float32 sum can only matter where its error reaches from x to the midpoint of the two results.
    nearness = (x.double() - (theirs.double() + ours.double()) / 2).abs()
    return {"sign of zero": (theirs == 0) & (ours == 0), **others, DOUBLE_ROUNDING: (error > 0) & (nearness <= error)}


def _error_of_sum(a: Tensor, b: Tensor) -> Tensor:
    """How far the float32 sum of float32 a and b lies from their sum."""
    return ((a + b).double() - (a.double() + b.double())).abs()


def _of_fixed(x: Tensor, format: Format) -> tuple[Tensor, dict[str, Tensor]]:
    """They add a half, in units of the step, and take it off again before they round."""
    return _error_of_sum(x / format.min_subnormal, torch.tensor(0.5)) * format.min_subnormal, {}


def _of_block(x: Tensor, format: Format) -> tuple[Tensor, dict[str, Tensor]]:
    """They add 6 times the block's power of two: the last place of the sum is a fixed distance above x's."""
    spanned = [d for d in range(x.dim()) if d not in format.block.dims]
    maximum = x.abs().amax(spanned, keepdim=True).expand_as(x)
    exponent = torch.frexp(maximum).exponent - 1
    base = torch.where(maximum > 0, 6 * torch.exp2(exponent.double()), 0.0).float()
    # float32 holds no 6 * 2^126, and no exponent in the bits of a subnormal maximum.
    others = {"subnormal block": (exponent < -126) & (maximum > 0), "huge block": exponent > 125}
    return _error_of_sum(x, base), others


def _of_float(x: Tensor, format: Format) -> tuple[Tensor, dict[str, Tensor]]:
    """They add the smallest normal number to numbers below it."""
    smallest = torch.tensor(format.min_normal)
    error = torch.where(x.abs() < smallest, _error_of_sum(x, torch.copysign(smallest, x)), 0.0)
    # With 8 bits there is nothing above the highest exponent to clip at.
    return error, {"overflow": (x.abs() > format.max) & (format.max > 2.0**127)}


REASONS: dict[str, Callable] = {
    "fixed_point_quantize": _of_fixed,
    "block_quantize": _of_block,
    "float_quantize": _of_float,
}


# ---- values --------------------------------------------------------------------------------------


def values(case: Case, seed: int = 0) -> list[Tensor]:
    """Finite tensors [ROWS, COLUMNS]: numbers of every binade; numbers of the format's binades; the format's numbers,
    the midpoints between them, and the float32 beside each."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ROWS, COLUMNS)
    if case.format.scale_bits:  # a power of two a row, or one for all
        scale = torch.exp2(torch.randint(-140, 127, (ROWS, 1), generator=generator).double())
        scale = scale if case.format.block == Slices((0,)) else torch.tensor(2.0**10)
        wide = (
            torch.randn(shape, generator=generator) * scale * torch.exp2(-40 * torch.rand(shape, generator=generator))
        )
    else:
        lowest, highest = (torch.tensor(each).log2() for each in (case.format.min_subnormal, case.format.max))
        scale = torch.exp2(torch.empty(ROWS, 1).uniform_(lowest - 2, highest + 1, generator=generator).double())
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator).int().view(torch.float32)
        wide = torch.where(bits.isfinite(), bits, 0.0)
    spread = (torch.randn(shape, generator=generator) * scale).clamp(-(2.0**127), 2.0**127)
    below, above = (swalp_fx.quantize(spread, case.format, rounding) for rounding in ("down", "up"))
    middle = (below + above) / 2
    beside = torch.nextafter(middle.float(), torch.randn(shape, generator=generator) * torch.inf)
    return [wide.float(), spread.float(), below.float(), middle.float(), beside]


# ---- the comparison ------------------------------------------------------------------------------


def compare(case: Case, quant: ModuleType) -> dict[str, int]:
    """The number of values, the number with the same bits, and the number of differences for each reason."""
    counts = {"values": 0, "equal": 0}
    for x in values(case):
        theirs, ours = case.theirs(quant, x), case.ours(x)
        left = theirs.view(torch.int32) != ours.view(torch.int32)
        counts["values"] += x.numel()
        counts["equal"] += int((~left).sum())
        for reason, holds in reasons(case, x, theirs, ours).items():
            counts[reason] = counts.get(reason, 0) + int((left & holds).sum())
            left &= ~holds
        counts[NO_REASON] = counts.get(NO_REASON, 0) + int(left.sum())
        for value, a, b in zip(x[left][:3].tolist(), theirs[left][:3].tolist(), ours[left][:3].tolist(), strict=True):
            print(f"{case.call} and {case.format} {case.rounding} differ at {value!r}: theirs {a!r}, ours {b!r}")
    return counts


def table(quant: ModuleType) -> tuple[str, int]:
    """The comparison of all CASES, and how many differences have no reason."""
    counts = {case: compare(case, quant) for case in CASES}
    columns = (
        "values",
        "equal",
        "sign of zero",
        DOUBLE_ROUNDING,
        "subnormal block",
        "huge block",
        "overflow",
        NO_REASON,
    )
    rows = [[c.call, str(c.format), c.rounding, *(f"{n.get(k, 0):,}" for k in columns)] for c, n in counts.items()]
    return _table(rows, ("QPyTorch", "format", "rounding", *columns)), sum(n[NO_REASON] for n in counts.values())


SPECIAL = [
    (block(4), [1.97, -1.97, 0.125, -0.375]),
    (block(8), [float("nan"), 1.0, 0.3]),
    (block(8), [float("inf"), 1.0, 0.3]),
    (block(8, 0), [1.0, 0.3, -0.7]),
    (fixed(8, 6), [float("nan"), float("inf"), -0.001]),
    (float_(4, 3), [float("nan"), float("inf"), 300.0, -1e9]),
    (float_(5, 2), [float("nan"), float("-inf"), 60000.0, 1e9]),
    (float_(8, 7), [float("nan"), float("inf"), 3.4e38, 1.0]),
    (float_(8, 23), [1.0, -0.3, 0.0]),
]


def special_values(quant: ModuleType) -> str:
    rows = [
        (case.call, f"{case.format} {case.rounding}", *(_numbers(v) for v in (x, case.theirs(quant, x), case.ours(x))))
        for case, x in ((case, torch.tensor(numbers)) for case, numbers in SPECIAL)
    ]
    return _table(rows, ("QPyTorch", "ours", "x", "theirs", "ours"))


DRAWS = 10_000_000


def stochastic(quant: ModuleType) -> str:
    """How often a representable value moves, and how far the mean of another lies from it, in steps."""
    rows = []
    torch.manual_seed(0)
    for case, on, off in (
        (fixed(8, 6), 97 / 64, 0.3),
        (fixed(16, 6), 6145 / 64, 0.3),
        (block(8), 97 / 64, 0.3),
        (float_(5, 2), 1.25, 1.3),
    ):
        moved, means = [], []
        for value in (on, off):
            x = torch.full((DRAWS,), value)
            x[0] = 1.5  # the block's maximum
            for result in (case.theirs(quant, x, "stochastic"), swalp_fx.quantize(x, case.format, "stochastic", key=0)):
                moved.append(int((result != x)[1:].sum()))
                means.append((result[1:].double() - x[1:].double()).mean().item())
        rows.append((case.call, on, f"{moved[0]:,}", f"{moved[1]:,}", off, f"{means[2]:+.1e}", f"{means[3]:+.1e}"))
    return _table(rows, ("QPyTorch", "on the grid", "moved, theirs", "ours", "off it", "mean error, theirs", "ours"))


def _numbers(x: Tensor) -> str:
    return ", ".join(f"{v:.5g}" for v in x.tolist())


def _table(rows: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = CommandLine(prog="compare_qtorch.py", description=__doc__)
    parser.parse_args(argv)
    qpytorch.refuse_missing(parser)
    from qtorch import quant

    show(f"{qpytorch.versions()}\n")
    text, unexplained = table(quant)
    show("\n\n".join([text, special_values(quant), f"Stochastic, {DRAWS:,} draws:", stochastic(quant)]))
    if unexplained:
        raise SystemExit(f"compare_qtorch.py: {unexplained:,} differences have no reason")


if __name__ == "__main__":
    run(main)
