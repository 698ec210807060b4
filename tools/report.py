"""Prints, for a model by name, which layer gets which number format: python tools/report.py resnet18 --recipe bfp8"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import models
import swalp_fx


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py",
        usage="%(prog)s MODEL [--recipe RECIPE] [--graph] [--draw FILE] [options]; --help lists them",
        description=__doc__,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"{', '.join(models.MODELS)}, or one of torchvision's classification models")
    add("--recipe", default="bfp8[0]", help="number formats (default: %(default)s)")
    add("--graph", action="store_true", help="print the rewritten code as well")
    add(
        "--draw",
        metavar="FILE",
        help="draw the rewritten graph, equal blocks once: .svg, .png, .pdf (by Graphviz), or its source, .dot",
    )
    add("--input-size", type=int, metavar="N", help="pixels a side, or bytes of text (default: what it was made for)")
    add("--channels", type=int, metavar="N", help="of the image (default: 3)")
    add("--num-classes", type=int, metavar="N", help="default: 10; the 256 bytes for text")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = command_line().parse_args(argv)
    *channels, size = models.default_shape(args.model)
    shape = (*([args.channels] if args.channels else channels), args.input_size or size)
    try:
        model = models.build(args.model, args.num_classes, *shape)
        module, _ = swalp_fx.convert(model, recipe=args.recipe)
        if args.draw:
            swalp_fx.draw(module, args.draw)
    except (models.ModelError, ValueError, RuntimeError, OSError) as error:
        raise SystemExit(f"report.py: error: {error}") from None
    if args.graph:
        print(module.print_readable(print_output=False))
    print(swalp_fx.report(module, models.example(*shape)))


if __name__ == "__main__":
    main()
