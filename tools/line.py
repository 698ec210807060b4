"""One network in training, from its start to its scores."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import data
import models
import ranks
import swalp_fx
import trial
from command import sentence
from settings import OPTIMIZERS, Plan, learning_rate
from swalp_fx.random import fold_in

__all__ = ["LOSSES_EVERY", "Line"]

ORDER, DRAWS = range(2)  # uses of an epoch's random numbers: the data order, or the model's own draws
LOSSES_EVERY = 16  # a point of a line's curve is the mean training loss of so many steps


class Line:
    """One network in training: the converted model, its optimizer and its average, and the epochs so far."""

    def __init__(self, plan: Plan, dataset: data.Source, device: torch.device) -> None:
        self.name, self.recipe, self.settings = plan.name, plan.recipe, plan.settings
        settings = plan.settings
        self.dataset = dataclasses.replace(dataset, epoch=settings.samples) if settings.samples else dataset
        torch.manual_seed(settings.seed)  # every line starts from the same weights
        self.model = models.build(settings.model, dataset.classes, *dataset.shape).to(device)
        self.optimizer = OPTIMIZERS[settings.optimizer].make(self.model.parameters(), settings)
        _, self.swalp = swalp_fx.convert(self.model, self.optimizer, recipe=self.recipe, seed=settings.seed)
        self.replica = ranks.replica(self.model)
        self.epochs: list[dict[str, Any]] = []
        self.saved = 0  # epochs that the checkpoint holds

    def train_epoch(self, on_step: Callable[[], object], score: bool = True) -> None:
        """One epoch of the training samples, appended to ``epochs`` with the scores after it.

        score: False leaves the scores out, except at the end of the warm-up: no later epoch gives that one.
        """
        settings, epoch = self.settings, len(self.epochs)
        # Every epoch's random numbers follow from (seed, epoch): a resumed run draws the same as an unbroken one.
        seed = fold_in(settings.seed, epoch)
        torch.manual_seed(ranks.own(fold_in(seed, DRAWS)))
        batches = self.dataset.train(settings.batch_size, fold_in(seed, ORDER))
        losses = []
        self.model.train()
        start = time.perf_counter()
        for step, (inputs, targets, weight) in enumerate(ranks.parts(batches)):
            at = epoch + step / len(batches) if settings.lr_changes == "step" else epoch
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(at, settings)
            self.optimizer.zero_grad()
            loss = weight * self._loss(inputs, targets)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
            if self._averages_after(epoch, step, len(batches)):
                self.swalp.update_average()
            on_step()
        of_all = ranks.total(torch.stack(losses)) / ranks.COUNT
        curve = torch.stack([few.mean() for few in of_all.split(LOSSES_EVERY)])
        self.epochs.append(
            {
                "steps": len(losses),
                "losses": curve.tolist(),  # waits for the device: the time is the epoch's own
                "seconds": time.perf_counter() - start,
                "last": self.score(self.model) if score else None,
                "average": self.score(self._averaged_model()) if score and self.swalp.n_averaged else None,
                "warm_up": self._recalibrated(self.model) if epoch + 1 == settings.average_from else None,
            }
        )

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.replica(inputs).flatten(0, -2), targets.flatten())

    def _averages_after(self, epoch: int, step: int, steps: int) -> bool:
        if epoch < self.settings.average_from:
            return False
        every = self.settings.average_every or steps
        return ((epoch - self.settings.average_from) * steps + step + 1) % every == 0

    def _averaged_model(self) -> nn.Module:
        averaged = self.swalp.averaged_model()
        self._recalibrate(averaged)
        return averaged

    def _recalibrate(self, model: nn.Module) -> None:
        batches = self.dataset.train(self.settings.batch_size)
        swalp_fx.recalibrate(model, ranks.share(batches), group=ranks.group())

    def _recalibrated(self, model: nn.Module) -> float:
        """The score of ``model`` with batch-norm statistics over the training samples, as the SWALP authors have it.

        A copy is scored: training goes on with the statistics it had.
        """
        judged = copy.deepcopy(model)
        self._recalibrate(judged)
        return self.score(judged)

    def _rounded_average(self) -> float | None:
        """The score of the average in a converted copy, which rounds it, and the activations, to nearest."""
        if not self.swalp.n_averaged or swalp_fx.Recipe.parse(self.recipe) == swalp_fx.Recipe.parse("float"):
            return None
        return self._recalibrated(self.swalp.average.applied_to(self.model))

    @torch.no_grad()
    def score(self, model: nn.Module) -> float:
        """The data set's metric of ``model`` in evaluation mode, over the test samples."""
        model.eval()
        metric = data.METRICS[self.dataset.metric]
        total = sum(metric(model(inputs), targets).item() for inputs, targets in ranks.share(self.dataset.test()))
        of_all = ranks.total(torch.tensor(float(total), dtype=torch.float64, device=self.dataset.device))
        return of_all.item() / self.dataset.tested

    def result(self) -> dict[str, Any]:
        """The scores (or None), and the epochs behind them.

        ``warm_up``: the weights at the end of the warm-up, SGD in the paper. ``last``: the weights at the end.
        ``average``: their average, in a float model. ``rounded``: the average in the rounded graph.
        """
        settings = self.settings
        return {
            "line": self.name,
            "recipe": self.recipe,
            "settings": dataclasses.asdict(settings),
            "warm_up": self.epochs[settings.average_from - 1]["warm_up"] if settings.average_from else None,
            "rounded": self._rounded_average(),
            "last": self.epochs[-1]["last"],
            "average": self.epochs[-1]["average"],
            "n_averaged": self.swalp.n_averaged,
            "median_seconds": statistics.median(epoch["seconds"] for epoch in self.epochs),
            "epochs": self.epochs,
        }

    def try_out(self) -> None:
        """A step and an average, on a batch as small as an epoch's last. The line is of no use after it.

        Raises ModelError or RecipeError if the model does not take the samples, or a format its tensors.
        """
        size, samples = self.settings.batch_size, self.dataset.samples
        last = samples % size or size  # in an epoch's last batch
        if last < ranks.COUNT:
            many = f"the last batch of an epoch, of {last}, has none for one of {ranks.COUNT} ranks"
            raise data.DataError(f"{many}; use another --batch-size, or fewer ranks")
        few = min(2, last // ranks.COUNT)
        with swalp_fx.in_float(self.model):
            trial.of_model(self.settings.model, self.model, *self.dataset.shape, batch=few)
        with trial.of_recipe(self.recipe):
            inputs, targets = next(iter(self.dataset.train(few)))
            self._loss(inputs, targets).backward()
            self.optimizer.step()
            self.swalp.update_average()

    def save(self, path: Path) -> None:
        """Raises FileError, and leaves the last checkpoint as it was, if it cannot be written."""
        state = {
            "settings": self._settings(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "swalp": self.swalp.state_dict(),
            "epochs": self.epochs,
        }
        checkpoint.save(path, state)
        self.saved = len(self.epochs)

    def _settings(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self.settings), "recipe": self.recipe}

    def load(self, path: Path) -> None:
        """Go on from the checkpoint at ``path``; raises DataError or FileError if it is damaged or another run's."""
        state = checkpoint.load(path, self.dataset.device)
        if state["settings"].keys() != self._settings().keys():
            raise data.DataError(f"{path} was made by another version of train.py; give another --out")
        for name, now in self._settings().items():
            then = state["settings"][name]
            if name == "recipe" and swalp_fx.Recipe.parse(then) == swalp_fx.Recipe.parse(now):
                continue  # though it may be written with older words
            if now != then and not (name == "epochs" and now >= len(state["epochs"])):
                option = "--" + name.replace("_", "-")
                raise data.DataError(f"{path} was made with {option} {then}, not {now}; give the same or another --out")
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.swalp.load_state_dict(state["swalp"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise data.DataError(f"{path} does not fit the model ({sentence(error)}); name another --out") from None
        self.epochs = state["epochs"]
        self.saved = len(self.epochs)
