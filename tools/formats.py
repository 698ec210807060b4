"""Prints the facts of number formats, the named ones or those given: python tools/formats.py "bfp6[-1:16]" e4m3"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tabulate import tabulate

import swalp_fx
from command import CommandLine, run, show
from swalp_fx.formats import PRESETS, WHOLE, Format

HEADERS = (
    "name",
    "spec",
    "element bits",
    "scale",
    "bits per element",
    "codes",
    "range",
    "min normal",
    "min subnormal",
    "scale range",
)


def facts(name: str, format: Format) -> tuple[str, ...]:
    """One row of the table, under HEADERS."""
    return (
        f"`{name}`",
        f"`{format}`",
        str(format.element_bits),
        scale(format),
        f"{format.bits:g}",
        f"{format.codes:,}",
        interval(format.min, format.max),
        number(format.min_normal),
        number(format.min_subnormal),
        interval(*format.scales) if format.scale_bits else "",
    )


def scale(format: Format) -> str:
    if not format.scale_bits:
        return ""
    sharers = f"{format.block.size} elements" if format.block.size else "tensor" if format.block == WHOLE else "slice"
    return f"{format.scale_bits} bits per {sharers}"


def interval(low: float, high: float) -> str:
    return f"±{number(high)}" if low == -high else f"{number(low)} to {number(high)}"


def number(value: float) -> str:
    """Exact, as a person would write it, or five digits after a ~ where many more would be needed."""
    fraction, exponent = math.frexp(value)
    if fraction == 0.5 and not 2**-3 <= value <= 2**10:
        return f"2^{exponent - 1}"
    exact = f"{value:.8g}"
    return exact if float(exact) == value else f"~{value:.5g}"


def table(formats: Sequence[tuple[str, Format]]) -> str:
    return tabulate(
        [facts(*row) for row in formats], headers=HEADERS, tablefmt="github", disable_numparse=True, stralign="left"
    )


def command_line() -> CommandLine:
    parser = CommandLine(prog="formats.py", description=__doc__)
    parser.add_argument("spec", nargs="*", help="a format, such as bfp8[0] (default: every named format)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line()
    args = parser.parse_args(argv)
    try:
        rows = [(spec, swalp_fx.parse(spec)) for spec in args.spec] or list(PRESETS.items())
    except swalp_fx.FormatError as error:
        parser.refuse(error)
    show(table(rows))


if __name__ == "__main__":
    run(main)
