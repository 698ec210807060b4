"""The state of the call that runs now, in each thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from .bare import Bare
from .modes import remove, stacked

if TYPE_CHECKING:
    from .conversion import Rewritten
    from .gaps import Watch

__all__ = ["local"]


class _Local(threading.local):
    entered: nn.Module | None = None  # the module that was called from outside of its model
    nested = False  # whether an inner entry runs: its caller, in the model, reads its result
    ran = False  # whether a graph has run in that call
    explaining = False  # whether the model's own code runs, for the error that it raises
    watch: Callable[[Rewritten, tuple[Any, ...]], Any] | None = None  # runs graphs in place of their code
    gaps: Watch | None = None  # sees what no graph runs in that call
    stacked = 0  # the number of dispatch modes that were on when that call began

    def __init__(self) -> None:
        self.bare = Bare()
        self._held: list[threading.Lock] = []

    @contextlib.contextmanager
    def tracing(self, lock: threading.Lock) -> Iterator[None]:
        """A context that holds ``lock``, so that no other thread traces the same, until ``traced`` is called."""
        lock.acquire()
        self._held.append(lock)
        try:
            yield
        finally:
            self.traced()

    def traced(self) -> None:
        """Releases the locks: the first frame has a graph. The model's code runs now; it may wait for other threads."""
        while self._held:
            self._held.pop().release()

    @contextlib.contextmanager
    def entering(self, module: nn.Module, is_outside: bool) -> Iterator[None]:
        """A context for the run of ``module``, called from outside of its model or from inside."""
        before = self.entered, self.nested, self.bare, self.stacked
        gaps = self.gaps
        if is_outside:
            self.entered, self.nested, self.ran, self.bare = module, False, False, Bare()
            self.stacked = stacked()
        else:
            self.nested = True
        try:
            yield
        finally:
            if is_outside and self.gaps is not gaps:
                remove(self.gaps)
                self.gaps = gaps
            self.entered, self.nested, self.bare, self.stacked = before
            self.ran = self.ran or is_outside  # for the model that called this one


local = _Local()
