"""Prints, for a model by name, which layer gets which number format: python tools/report.py resnet18 --recipe bfp8"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

import files
import models
import swalp_fx
import trial
from command import CommandLine, number, run, show

# The ending of a file -> the report as it stands in there.
FORMS: dict[str, Callable[[swalp_fx.Report], str]] = {
    ".txt": lambda report: f"{report}\n",
    ".md": swalp_fx.Report.to_markdown,
    ".json": swalp_fx.Report.to_json,
    ".csv": swalp_fx.Report.to_csv,
    ".html": swalp_fx.Report.to_html,
}


def command_line() -> CommandLine:
    parser = CommandLine(
        prog="report.py",
        usage="%(prog)s MODEL [--recipe RECIPE] [--to FILE] [--graph] [--draw FILE] [options]",
        description=__doc__,
    )
    count = number(int, 1, "a whole number of 1 or more")
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"{', '.join(models.MODELS)}, or one of torchvision's classification models")
    add("--recipe", default="bfp8[0]", help="number formats (default: %(default)s)")
    add("--to", metavar="FILE", type=_target, help=f"write the report to a file too: {', '.join(FORMS)}")
    add("--graph", action="store_true", help="print the rewritten code as well")
    add(
        "--draw",
        metavar="FILE",
        type=Path,
        help="draw the rewritten graph, equal blocks once: .svg, .png, .pdf (by Graphviz), or its source, .dot",
    )
    add("--input-size", type=count, metavar="N", help="pixels a side, or bytes of text (default: what it was made for)")
    add("--channels", type=count, metavar="N", help="of the image (default: 3)")
    add("--num-classes", type=count, metavar="N", help="default: 10; the 256 bytes for text")
    return parser


def _target(name: str) -> Path:
    path = Path(name)
    if path.suffix not in FORMS:
        raise argparse.ArgumentTypeError(
            f"cannot write a report to {name}: its name must end in one of {', '.join(FORMS)}"
        )
    return path


def reported(args: argparse.Namespace) -> str:
    """The report, and before it the rewritten code if asked for. Raises the errors that a command line may have."""
    *channels, size = models.default_shape(args.model)
    shape = (*([args.channels] if args.channels else channels), args.input_size or size)
    recipe = swalp_fx.Recipe.parse(args.recipe)
    model = models.build(args.model, args.num_classes, *shape)
    trial.of_model(args.model, model, *shape)
    module, _ = swalp_fx.convert(model.eval(), recipe=recipe)  # train mode may want more than one sample
    with trial.of_recipe(args.recipe):
        report = swalp_fx.report(module, models.example(*shape))
    if args.to:
        files.write(args.to, FORMS[args.to.suffix](report).encode())
    if args.draw:
        draw(module, args.draw)
    return f"{module.graphs}\n{report}" if args.graph else str(report)


def draw(module: nn.Module, path: Path) -> None:
    """Draws to ``path``, or raises FileError and leaves the file as it was."""
    with tempfile.TemporaryDirectory() as folder:
        beside = Path(folder) / path.name
        try:
            swalp_fx.draw(module, beside)
        except (ValueError, RuntimeError) as error:  # of the ending; of Graphviz, which is not there or failed
            names = (str(each.with_suffix("")) for each in (beside, path))
            raise files.FileError(str(error).replace(*names)) from None
        files.write(path, beside.read_bytes())


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line()
    try:
        text = reported(parser.parse_args(argv))
    except trial.INPUT_ERRORS as error:
        parser.refuse(error)
    show(text)


if __name__ == "__main__":
    run(main)
