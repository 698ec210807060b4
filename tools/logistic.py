"""Theorem 2: logistic regression on images, where the average's error is quadratic in the step of the weights.

The theorem bounds the distance of the limit, delta^2. One chain after T steps does not show it: the average still
varies, in proportion to delta / T, and this hides delta^2. Independent chains estimate the limit without bias.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate
from torch import Tensor, nn

import data
import drawing
import swalp_fx
from drawing import BLACK, BLUE, GREEN, GREY, VERMILION
from progress import bar

CHUNK = 500  # steps that draw their samples together
SCALE = 32.0  # mean squared length of an input, whatever its pixels, so that one learning rate serves all data sets
LOOKS = 10  # how often the last weights are measured; the mean is the level of SGD
FITTED = (2, 6)  # bits; with more of them the gradient's own noise flattens every line
LARGEST = 10_000  # images, of the larger data sets
POOLED = 14  # pixels a side, of the larger images


@dataclass(frozen=True)
class Settings:
    seed: int = 0
    dataset: str = "digits"
    data: str | None = None  # the folder of the data set
    chains: int = 32  # independent runs of each width
    integer_bits: int = 2  # the sign among them: weights lie in [-2, 2)
    fractional_bits: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    l2: float = 0.05
    lr: float = 0.1
    batch_size: int = 16
    warmup: int = 1000  # steps before the average begins
    steps: int = 10_000  # after the warm-up; each one's weights are averaged


FULL = Settings(chains=64, steps=60_000)


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", choices=("digits", "fashion-mnist"), help="digits comes with scikit-learn (default)")
    add("--data", metavar="DIR", help="where torchvision.datasets keeps the images (default: data)")


@dataclass(frozen=True)
class Problem:
    """Inputs [n, d] with a constant 1 among them, labels [n], and the optimum [classes, d]; float64."""

    inputs: Tensor
    labels: Tensor
    optimum: Tensor
    l2: float

    def gradient(self, weights: Tensor) -> Tensor:
        """The gradient of the regularised loss over all the data, at each of ``weights`` [..., classes, d]."""
        classes, d = self.optimum.shape
        error = torch.softmax((weights.reshape(-1, d) @ self.inputs.T).unflatten(0, (-1, classes)), 1)
        error -= F.one_hot(self.labels, classes).T
        data_part = (error.flatten(0, 1) @ self.inputs).view(weights.shape) / len(self.inputs)
        return data_part + self.l2 * weights

    def squared_distance(self, weights: Tensor) -> Tensor:
        return (weights - self.optimum).square().sum((-1, -2))

    def squared_gradient(self, weights: Tensor) -> Tensor:
        return self.gradient(weights).square().sum((-1, -2))


def problem(settings: Settings) -> Problem:
    """Raises DataError if the images are not there."""
    images, labels = _images(settings)
    inputs = images - images.mean(0)
    inputs *= (SCALE / inputs.square().sum(1).mean()).sqrt()
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=inputs.dtype)], 1)
    return Problem(inputs, labels, _optimum(inputs, labels, settings.l2), settings.l2)


def _images(settings: Settings) -> tuple[Tensor, Tensor]:
    """Pixels [n, pixels], float64, and labels [n]."""
    if settings.data and settings.dataset == "digits":
        raise data.DataError("digits come with scikit-learn, and --data has no say; add --dataset fashion-mnist")
    dataset = data.load(settings.dataset, settings.data)
    images = torch.cat([dataset.train_inputs, dataset.test_inputs])[:LARGEST].double()
    labels = torch.cat([dataset.train_targets, dataset.test_targets])[:LARGEST]
    if images.shape[-1] > POOLED:
        images = F.adaptive_avg_pool2d(images, POOLED)
    return images.flatten(1), labels


def _optimum(inputs: Tensor, labels: Tensor, l2: float) -> Tensor:
    weights = torch.zeros(int(labels.max()) + 1, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights],
        max_iter=2000,
        tolerance_grad=1e-10,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(inputs @ weights.T, labels) + l2 / 2 * weights.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return weights.detach()


class Regressions(nn.Module):
    """Chains of a logistic regression for each width, on the same batches: [S, n, d] -> [S, widths, classes, n]."""

    def __init__(self, widths: list[str], chains: int, classes: int, d: int) -> None:
        super().__init__()
        self.widths, self.classes = widths, classes
        for width in widths:
            self.register_parameter(width, nn.Parameter(torch.zeros(chains, classes, d)))

    def forward(self, inputs: Tensor) -> Tensor:
        weights = torch.cat([getattr(self, width) for width in self.widths], dim=1)
        # Samples last: a softmax over neighbouring numbers is several times slower.
        return torch.bmm(weights, inputs.transpose(1, 2)).unflatten(1, (len(self.widths), self.classes))


def run(settings: Settings) -> dict[str, Any]:
    """``distance`` and ``gradient``, each squared: line -> its value at each of ``bits``; ``float``: line -> its value.

    SGD-LP is the mean over chains and over the time of the average. SWALP at T, T/2 and T/4 is the mean over chains.
    The limit is an unbiased estimate: it may be negative if it is smaller than its error.
    """
    given = problem(settings)
    torch.manual_seed(settings.seed)
    widths = {f"bits{bits}": f"fixed{bits + settings.integer_bits}.{bits}" for bits in settings.fractional_bits}
    names = ["exact", *widths]
    model = Regressions(names, settings.chains, *given.optimum.shape)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr, weight_decay=settings.l2)
    rules = tuple(swalp_fx.Rule(name, weight=format) for name, format in widths.items())
    recipe = swalp_fx.Recipe.parse("float", rules=rules)
    _, swalp = swalp_fx.convert(model, optimizer, recipe=recipe, seed=settings.seed)

    last, averages = [], {}
    fractions = {settings.steps // part: f"T/{part}" if part > 1 else "T" for part in (4, 2, 1)}
    for step, (inputs, labels) in enumerate(_batches(given, settings), start=1 - settings.warmup):
        optimizer.zero_grad()
        logits = model(inputs)
        labels = labels.unsqueeze(1).expand(-1, len(names), -1)
        # A sum over chains and widths: each has the gradient that it would have alone.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1), reduction="sum")
        loss.div(settings.batch_size).backward()
        optimizer.step()
        if step > 0:
            swalp.update_average()
            if step % max(1, settings.steps // LOOKS) == 0:
                last.append(_measured(given, {name: model.get_parameter(name) for name in names}, _mean))
        if step in fractions:
            averages[fractions[step]] = {name: mean.clone() for name, mean in swalp.state_dict()["average"].items()}

    lines = {"SGD-LP": {key: np.mean([each[key] for each in last], axis=0) for key in last[0]}}
    lines |= {f"SWALP at {part}": _measured(given, means, _mean) for part, means in averages.items()}
    lines["SWALP limit"] = _measured(given, averages["T"], _limit)
    record = {
        "bits": list(settings.fractional_bits),
        "distance": {line: values["distance"][1:].tolist() for line, values in lines.items()},
        "gradient": {line: values["gradient"][1:].tolist() for line, values in lines.items()},
        "float": {
            what: {line: float(values[what][0]) for line, values in lines.items()} for what in ("distance", "gradient")
        },
    }
    low, high = max(FITTED[0], min(record["bits"])), min(FITTED[1], max(record["bits"]))
    return record | {
        "slopes": slopes(record, "distance", low, high),
        "slopes of the gradient": slopes(record, "gradient", low, high),
        "fitted": [low, high],
    }


def _batches(given: Problem, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    inputs, n = given.inputs.float(), len(given.inputs)
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (CHUNK, settings.chains, settings.batch_size)
    steps = settings.warmup + settings.steps
    with bar("logistic", steps) as progress:
        for step in range(steps):
            if step % CHUNK == 0:
                chosen = torch.randint(n, shape, generator=generator)
            index = chosen[step % CHUNK]
            yield inputs[index], given.labels[index]
            progress.update()


def _measured(
    given: Problem, weights: Mapping[str, Tensor], over_chains: Callable[[Callable, Tensor], float]
) -> dict[str, np.ndarray]:
    """Squared distance and squared gradient of each width's chains [S, classes, d], as one number each."""
    chains = [each.detach().double() for each in weights.values()]
    measures = {"distance": given.squared_distance, "gradient": given.squared_gradient}
    return {key: np.array([over_chains(measure, each) for each in chains]) for key, measure in measures.items()}


def _mean(measure: Callable[[Tensor], Tensor], chains: Tensor) -> float:
    return measure(chains).mean().item()


def _limit(measure: Callable[[Tensor], Tensor], chains: Tensor) -> float:
    """The squared distance of the point w that every chain's average goes to.

    C is the covariance of an average around w. The mean of S chains is off by C / S, a chain by C:
    E|mean - w*|^2 = |w - w*|^2 + tr C / S, and E|chain - w*|^2 = |w - w*|^2 + tr C. So tr C cancels in this difference.
    """
    n = len(chains)
    return (n * measure(chains.mean(0)).item() - measure(chains).mean().item()) / (n - 1)


def slopes(record: Mapping[str, Any], what: str, low: int, high: int) -> dict[str, float | None]:
    """Line -> slope of log2 of its ``distance`` or ``gradient`` (``what``) in log2 delta, ``low`` to ``high`` bits.

    None if an estimate is not positive: it has no logarithm. More chains would give one.
    """
    chosen = [i for i, bits in enumerate(record["bits"]) if low <= bits <= high]
    log_delta = [-record["bits"][i] for i in chosen]
    found = {}
    for line, title in (("SGD-LP", "SGD-LP"), ("SWALP at T", "SWALP"), ("SWALP limit", "SWALP limit")):
        values = [record[what][line][i] for i in chosen]
        found[title] = float(np.polyfit(log_delta, np.log2(values), 1)[0]) if min(values) > 0 else None
    return found


def table(record: dict[str, Any]) -> str:
    low, high = record["fitted"]
    parts = []
    for what, slopes_of in (("distance", "slopes"), ("gradient", "slopes of the gradient")):
        lines = record[what]
        rows = [[bits, *(f"{v[i]:.2e}" for v in lines.values())] for i, bits in enumerate(record["bits"])]
        rows.append(["float", *(f"{value:.2e}" for value in record["float"][what].values())])
        fitted = ", ".join(f"{line} {_text(slope)}" for line, slope in record[slopes_of].items())
        parts.append(
            f"{TITLES[what]}, {record['settings']['chains']} chains\n\n"
            + tabulate(rows, headers=["fractional bits", *lines], disable_numparse=True, stralign="right")
            + f"\n\nslope in log2 delta, {low} to {high} bits: {fitted}"
        )
    return "\n\n".join(parts)


def _text(slope: float | None) -> str:
    return "not resolved (use --full)" if slope is None else f"{slope:.2f}"


COLORS = {
    "SGD-LP": VERMILION,
    "SWALP at T/4": "#9ecae1",
    "SWALP at T/2": "#4f9fd0",
    "SWALP at T": BLUE,
    "SWALP limit": GREEN,
}
# Lines of float, drawn as levels: line -> its name in float, and colour.
LEVELS = {"SGD-LP": ("SGD-FP", GREY), "SWALP limit": ("SWA-FP limit", BLACK)}
TITLES = {"distance": "squared distance to the optimum", "gradient": "squared norm of the gradient"}


def figures(record: dict[str, Any]) -> dict[str, Figure]:
    figure, panels = drawing.subplots(2, 9.6, 4.2)
    for axes, what in zip(panels, TITLES, strict=True):
        _panel(axes, record, what)
    for axes, what in zip(panels, TITLES, strict=True):
        drawing.label_ends(axes, _labels(record, what), right=8)
    return {"logistic": figure}


def _panel(axes: Axes, record: dict[str, Any], what: str) -> None:
    bits = np.array(record["bits"])
    for line, values in record[what].items():
        shown = [value if value > 0 else np.nan for value in values]
        axes.semilogy(bits, shown, color=COLORS[line], marker="o", linestyle="--" if line == "SGD-LP" else "-")
    for line, (_, color) in LEVELS.items():
        if (level := record["float"][what][line]) > 0:
            axes.axhline(level, color=color, linewidth=1, linestyle=":")
    _guide(axes, bits, 2.2 * record[what]["SGD-LP"][0], 1)
    _guide(axes, bits, 0.42 * abs(record[what]["SWALP limit"][0]), 2)
    axes.set_title(TITLES[what], loc="left")
    axes.set_xlabel(r"fractional bits of the weights ($\delta = 2^{-\mathrm{bits}}$)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlim(bits[0] - 0.2, bits[-1] + 0.1)


def _guide(axes: Axes, bits: np.ndarray, start: float, slope: int) -> None:
    """A straight line of this slope in delta, from ``start`` at the fewest bits, over three bits."""
    span = bits[bits <= bits[0] + 3]
    values = start * 2.0 ** (-slope * (span - span[0]))
    axes.plot(span, values, color=GREY, linewidth=1)
    middle, above = len(span) // 2, slope == 1
    axes.annotate(
        r"$\delta$" if slope == 1 else rf"$\delta^{slope}$",
        (span[middle], values[middle]),
        (0, 4 if above else -4),
        textcoords="offset points",
        color=GREY,
        ha="left" if above else "right",
        va="bottom" if above else "top",
    )


def _labels(record: dict[str, Any], what: str) -> dict[str, tuple[float, float, str]]:
    end, found = record["bits"][-1], {}
    for line, values in record[what].items():
        slope = record["slopes" if what == "distance" else "slopes of the gradient"].get(line.removesuffix(" at T"))
        if values[-1] > 0:
            found[line if slope is None else f"{line}, slope {slope:.2f}"] = (end, values[-1], COLORS[line])
    for line, (title, color) in LEVELS.items():
        if (level := record["float"][what][line]) > 0:
            found[title] = (end, level, color)
    return found
