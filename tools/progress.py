"""How far a run is: a bar on a terminal; where there is none, a line for each epoch of training."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

import ranks

__all__ = ["Progress", "bar", "scored"]

COLUMNS = 80


def bar(name: str, steps: int, done: int = 0) -> tqdm[Any]:
    """A bar of ``steps``, with ``done`` of them done; without a terminal on stderr it shows nothing."""
    from tqdm import tqdm  # here, because train.py does without where there is no terminal

    # A character in the last column would move some terminals to the next line.
    size = shutil.get_terminal_size((COLUMNS, 24))  # tqdm's own reading hides the bar where a terminal does not say
    columns, layout = min(COLUMNS, size.columns) - 1, _layout(name)
    return tqdm(total=steps, initial=done, disable=None, ncols=columns, nrows=size.lines, ascii=".#", bar_format=layout)


def _layout(name: str, news: str = "") -> str:
    """A bar's format, as tqdm has it."""
    return f"{name} [{{bar}}]{news}  {{remaining}} left"


class Progress:
    """The progress of a line in training, on stderr. It is a context, and is told of each step and epoch."""

    def __init__(self, name: str, metric: str, epochs: int, steps: int, done: int) -> None:
        self.name, self.metric, self.epochs = name, metric, epochs
        self.epoch, self.bar = done, None
        if ranks.RANK == 0 and sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
            self.bar = bar(self._head(), epochs * steps, done * steps)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def _head(self) -> str:
        return f"{self.name:5} epoch {min(self.epoch + 1, self.epochs)} of {self.epochs}"

    def step(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def end_epoch(self, scores: dict[str, Any]) -> None:
        """``scores``: as Line.train_epoch notes them."""
        self.epoch += 1
        news = f"loss {scores['losses'][-1]:.3f}"
        if scores["last"] is not None:
            news += f"  {scored(self.metric, scores['last'], unit=self.bar is None)}"
        if ranks.RANK:
            return
        if self.bar is not None:
            self.bar.bar_format = _layout(self._head(), f"  {news}")
            self.bar.refresh()
            return
        at = f"{self.name}  epoch {self.epoch} of {self.epochs}"
        print(f"{at}  {news}  {scores['seconds']:.1f} s", file=sys.stderr, flush=True)


def scored(metric: str, value: float, unit: bool = True) -> str:
    """``test error 9.43 %`` or ``validation loss 1.7403 nats a byte``; of the units, % always stays."""
    what, _, measured = metric.partition(", ")
    text = f"{what} {digits(metric, value)}"
    return f"{text} {measured}" if unit or measured == "%" else text


def digits(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric.endswith("%") else f"{value:.4f}"
