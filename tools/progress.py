"""How far a line in training is: one line in its place on a terminal, a line an epoch where there is none."""

from __future__ import annotations

import shutil
import sys
import time
from typing import Any

__all__ = ["Progress", "scored"]

COLUMNS = 80
REDRAW = 0.1  # seconds


class Progress:
    """Writes to stderr; to be entered, told of each step and epoch, and left."""

    def __init__(self, name: str, metric: str, epochs: int, steps: int, done: int) -> None:
        self.name, self.metric, self.epochs = name, metric, epochs
        self.all, self.before = epochs * steps, done * steps  # steps
        self.taken, self.epoch, self.news = 0, done, ""
        self.start = self.drawn = time.monotonic()
        self.terminal = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.terminal:
            self._draw()
            print(file=sys.stderr)

    def step(self) -> None:
        self.taken += 1
        if self.terminal and time.monotonic() - self.drawn >= REDRAW:
            self._draw()

    def end_epoch(self, scores: dict[str, Any]) -> None:
        """``scores``: as Line.train_epoch notes them."""
        self.epoch += 1
        loss = f"loss {scores['losses'][-1]:.3f}"
        if self.terminal:
            self.news = f"  {loss}  {scored(self.metric, scores['last'], unit=False)}"
            self._draw()
            return
        at = f"{self.name}  epoch {self.epoch} of {self.epochs}"
        score = scored(self.metric, scores["last"])
        print(f"{at}  {loss}  {score}  {scores['seconds']:.1f} s", file=sys.stderr, flush=True)

    def _draw(self) -> None:
        self.drawn = time.monotonic()
        done = (self.before + self.taken) / self.all
        left = (self.drawn - self.start) / max(self.taken, 1) * (self.all - self.before - self.taken)
        head = f"{self.name:5} epoch {min(self.epoch + 1, self.epochs)} of {self.epochs} ["
        tail = f"]{self.news}  {_clock(left)} left"
        # A character in the last column would move some terminals to the next line.
        room = min(COLUMNS, shutil.get_terminal_size().columns) - 1
        width = max(0, room - len(head) - len(tail))
        full = int(done * width)
        line = head + "#" * full + "." * (width - full) + tail
        print(f"\r{line[:room]:{room}}", end="", file=sys.stderr, flush=True)


def scored(metric: str, value: float, unit: bool = True) -> str:
    """``test error 9.43 %`` or ``validation loss 1.7403 nats a byte``; of the units, % always stays."""
    what, _, measured = metric.partition(", ")
    text = f"{what} {digits(metric, value)}"
    return f"{text} {measured}" if unit or measured == "%" else text


def digits(metric: str, value: float) -> str:
    return f"{value:.2f}" if metric.endswith("%") else f"{value:.4f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
