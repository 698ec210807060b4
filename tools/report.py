"""Prints, for a model by name, which layer gets which number format: python tools/report.py resnet18 --recipe bfp8"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import models
import swalp_fx
from swalp_fx.capture import ConvertError


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="report.py",
        usage="%(prog)s MODEL [--recipe RECIPE] [--graph] [options]; --help lists them",
        description=__doc__,
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"{', '.join(models.MODELS)}, or one of torchvision's classification models")
    add("--recipe", default="bfp8[0]", help="number formats (default: %(default)s)")
    add("--graph", action="store_true", help="print the rewritten code as well")
    add("--input-size", type=int, metavar="PIXELS", help="a side of the image (default: what the model was made for)")
    add("--channels", type=int, default=3, help="of the image (default: %(default)s)")
    add("--num-classes", type=int, default=10, metavar="N", help="default: %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = command_line().parse_args(argv)
    size = args.input_size or models.default_image_size(args.model)
    try:
        model = models.build(args.model, args.num_classes, args.channels, size)
        module, _ = swalp_fx.convert(model, recipe=args.recipe)
    except (models.ModelError, swalp_fx.FormatError, swalp_fx.RecipeError, ConvertError) as error:
        raise SystemExit(f"report.py: error: {error}") from None
    if args.graph:
        print(module.print_readable(print_output=False))
    print(swalp_fx.report(module, torch.zeros(1, args.channels, size, size)))


if __name__ == "__main__":
    main()
