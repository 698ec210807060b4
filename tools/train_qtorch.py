"""Trains one network in float, with QPyTorch and with swalp_fx, by turns: python tools/train_qtorch.py

--own is the recipe of QPyTorch's example on CIFAR-10 instead: W, A, E and G in 8-bit floats to nearest, M and the
master in 16-bit floats stochastically, the loss multiplied by 1000.

The network is the small convnet. Both round W, A, E, G and M stochastically to block floating point, one exponent a
row. As in QPyTorch's SWALP example, they round the outputs of convolutions and linear layers, except the last. As with
QPyTorch's dim=0, each element of a bias has its own exponent. Each batch goes to all three in turn, so a slow machine
slows all of them. Test errors are measured with the weights in the float network.

Needs qtorch (pip install qtorch ninja setuptools), which compiles itself when it is first imported. No seed reaches
its random numbers, so its errors are others at each run.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import date
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

import data
import models
import qpytorch
import swalp_fx
from command import CommandLine, number, run, show
from environment import machine
from progress import bar
from settings import DEFAULTS, EVERYWHERE, OPTIMIZERS, Settings, learning_rate
from steps import Contender
from swalp_fx.random import fold_in

CLASSIFIER = "9"  # the convnet's last layer; the example leaves its outputs in float


def settings_from(args: argparse.Namespace) -> Settings:
    """A warm-up of half of the epochs, then one rate, and an average of every step's weights."""
    own = {"dataset": args.dataset, "model": "convnet", "epochs": args.epochs, "average_from": args.epochs // 2}
    own |= {"average_every": 1, "lr": 0.05, "average_lr": 0.05, "batch_size": 32, "samples": args.samples, "seed": 0}
    return Settings(**{**EVERYWHERE, **DEFAULTS[args.dataset], **own})


def contenders(model: nn.Module, settings: Settings, bits: int | None) -> list[Contender]:
    """Float, QPyTorch and swalp_fx, each with a copy of ``model``; without ``bits``, in QPyTorch's own recipe."""
    exact, theirs, ours = (copy.deepcopy(model) for _ in range(3))
    sgd, of_theirs, of_ours = (OPTIMIZERS["sgd"].make(each.parameters(), settings) for each in (exact, theirs, ours))
    if bits is None:
        lower = qpytorch.in_its_own(theirs, of_theirs)
        of_ours.register_step_pre_hook(_unscale)  # before the optimizer pass rounds
        recipe = f"{qpytorch.OWN} exclude={CLASSIFIER}"
        module, _ = swalp_fx.convert(ours, of_ours, recipe=recipe, seed=settings.seed)
        return [
            Contender("float", exact, sgd),
            Contender("QPyTorch, its example", theirs, lower, scale=qpytorch.SCALE),
            Contender("swalp_fx, the same recipe", module, of_ours, scale=qpytorch.SCALE),
        ]
    lower = qpytorch.in_low_precision(theirs, of_theirs, bits, (nn.Conv2d, nn.Linear))
    module, _ = swalp_fx.convert(ours, of_ours, recipe=recipe_of(bits), seed=settings.seed)
    return [
        Contender("float", exact, sgd),
        Contender(f"QPyTorch, {bits} bits, dim 0", theirs, lower),
        Contender(f"swalp_fx, bfp{bits}[0]", module, of_ours),
    ]


def _unscale(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.mul_(1 / qpytorch.SCALE)


def recipe_of(bits: int) -> swalp_fx.Recipe:
    """The recipe for QPyTorch's ``dim=0``: each element of a bias has its own exponent."""
    each = f"bfp{bits}[-1:1]"
    text = f"bfp{bits}[0] placement=compute exclude={CLASSIFIER}"
    return swalp_fx.Recipe.parse(text, rules=(swalp_fx.Rule("*.bias", W=each, G=each, M=each),))


def train(dataset: data.Dataset, settings: Settings, bits: int | None, on_step: Callable[[], Any]) -> dict[str, dict]:
    """For each contender: test errors in %, ``warm-up`` at its end and ``average``; ``ms``, the CPU time of a step."""
    torch.manual_seed(settings.seed)
    model = models.build(settings.model, dataset.classes, *dataset.shape)
    lines = [(each, swalp_fx.Average()) for each in contenders(model, settings, bits)]
    found: dict[str, dict[str, float]] = {each.name: {} for each, _ in lines}
    for epoch in range(settings.epochs):
        if epoch == settings.average_from:
            for each, _ in lines:
                found[each.name]["warm-up"] = error(model, _parameters(each), dataset)
        batches = dataset.train(settings.batch_size, fold_in(settings.seed, epoch))
        for step, batch in enumerate(batches):
            for each, average in lines:
                each.optimizer.param_groups[0]["lr"] = learning_rate(epoch + step / len(batches), settings)
                each.step(cpu_seconds, *batch)
                if epoch >= settings.average_from:
                    average.update(_parameters(each))
            on_step()
    for each, average in lines:
        found[each.name]["average"] = error(model, average.means, dataset)
        found[each.name]["ms"] = 1e3 * statistics.median(map(sum, each.seconds))
    return found


def cpu_seconds(call: Callable[[], Any]) -> float:
    begin = time.process_time()
    call()
    return time.process_time() - begin


def _parameters(contender: Contender) -> dict[str, Tensor]:
    return dict(contender.model.named_parameters())


@torch.no_grad()
def error(model: nn.Module, weights: Mapping[str, Tensor], dataset: data.Dataset) -> float:
    """Test error in % of ``model`` with these parameters; it has no buffers."""
    wrong = [
        torch.func.functional_call(model, dict(weights), (inputs,)).argmax(-1) != targets
        for inputs, targets in dataset.test()
    ]
    return 100 * torch.cat(wrong).double().mean().item()


def table(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """A row a contender: means over seeds and deviations; and how often the time of a float step one takes."""
    rows = []
    for name in runs[0]:
        of = {key: [each[name][key] for each in runs] for key in runs[0][name]}
        ratios = [ms / each["float"]["ms"] for ms, each in zip(of["ms"], runs, strict=True)]
        errors = [_cell(of[key]) for key in ("warm-up", "average")]
        rows.append([name, *errors, f"{statistics.mean(of['ms']):.2f}", f"{statistics.mean(ratios):.2f}"])
    headers = ["", "SGD (end of warm-up)", "average", "ms a step", "ratio to float"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _cell(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def command_line() -> CommandLine:
    count = number(int, 1, "a whole number of 1 or more")
    parser = CommandLine(
        prog="train_qtorch.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    recipe = parser.add_mutually_exclusive_group().add_argument
    recipe("--bits", type=number(int, 2, "a whole number of 2 to 16", high=17), default=5, help="default: %(default)s")
    recipe("--own", action="store_true", help="the recipe of QPyTorch's example on CIFAR-10")
    add("--seeds", type=count, default=5, metavar="N", help="default: %(default)s")
    add("--epochs", type=number(int, 2, "a whole number of 2 or more"), default=8, help="default: %(default)s")
    add("--samples", type=count, default=3000, metavar="N", help="of an epoch (default: %(default)s)")
    add("--dataset", choices=("fashion-mnist", "digits"), default="fashion-mnist", help="default: %(default)s")
    add("--data", metavar="DIR", help="where torchvision.datasets keeps the images (default: data)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = command_line()
    args = parser.parse_args(argv)
    qpytorch.refuse_missing(parser)
    settings = settings_from(args)
    try:
        dataset = data.load(args.dataset, args.data)
    except data.DataError as error:
        parser.refuse(error)
    if args.samples > dataset.samples:
        parser.refuse(f"--samples {args.samples} is more than the {dataset.samples} there are; use fewer")
    torch.set_num_threads(1)
    dataset = replace(dataset, epoch=args.samples)
    with bar("qtorch", args.seeds * args.epochs * len(dataset.train(settings.batch_size))) as progress:
        bits = None if args.own else args.bits
        runs = [train(dataset, replace(settings, seed=seed), bits, progress.update) for seed in range(args.seeds)]
    show(f"{table(runs)}\n\n{qpytorch.versions()}, {machine()}, {date.today()}")


if __name__ == "__main__":
    run(main)
