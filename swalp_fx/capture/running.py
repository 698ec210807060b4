"""What runs now, in each thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from .bare import Bare

if TYPE_CHECKING:
    from .conversion import Rewritten

__all__ = ["local"]


class _Local(threading.local):
    entered: nn.Module | None = None  # the module that was called from outside of its model
    nested = False  # whether an entry that another one called runs: what it returns, the model reads
    ran = False  # whether a graph has, in that call
    explaining = False  # the model's own code runs, to see what it raises
    watch: Callable[[Rewritten, tuple[Any, ...]], Any] | None = None  # runs graphs in place of their code

    def __init__(self) -> None:
        self.bare = Bare()

    @contextlib.contextmanager
    def entering(self, module: nn.Module, is_outside: bool) -> Iterator[None]:
        """While it holds, ``module`` runs: called from outside of its model, or by what runs in that."""
        before = self.entered, self.nested, self.bare
        if is_outside:
            self.entered, self.nested, self.ran, self.bare = module, False, False, Bare()
        else:
            self.nested = True
        try:
            yield
        finally:
            self.entered, self.nested, self.bare = before
            self.ran = self.ran or is_outside  # for the model that called this one


local = _Local()
