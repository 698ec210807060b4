"""What runs now, in each thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
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


local = _Local()
