"""Does the rewritten module compute the gradients of the steps, or the float model that it was made from?

Nothing is hung on the user's model. A rewritten module counts its calls; a step that saw none of them may still be in
order (gradients given by hand, a CUDA graph replayed), so the step after it is looked at more closely.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Calls", "Watch", "calls_of", "warn"]


class Calls:
    """The calls of all modules that were rewritten from one model."""

    def __init__(self) -> None:
        self.number = 0
        self.compiled = False  # by torch.compile, under which there is no counting: each new number would compile anew

    def add(self) -> None:
        if torch.compiler.is_compiling():
            self.compiled = True
        else:
            self.number += 1


_CALLS: WeakKeyDictionary[nn.Module, Calls] = WeakKeyDictionary()


def calls_of(model: nn.Module) -> Calls:
    """One for a model, however often it is converted: an optimizer's steps may be on the gradients of any of them."""
    return _CALLS.setdefault(model, Calls())


class Watch:
    """One optimizer's look at ``calls``."""

    def __init__(self, calls: Calls) -> None:
        self._calls, self._seen = calls, calls.number
        self._probe: RemovableHandle | None = None  # on one parameter, from a step in doubt on
        self._is_probed = False  # autograd has been there since

    def steps_on_float(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Whether autograd, but no rewritten module, gave the gradients of ``parameters`` in two steps running.

        To be asked once a step, after it. Of the first such step it cannot tell where the gradients came from.
        """
        if self._calls.compiled or self._calls.number != self._seen:
            self._seen = self._calls.number
            self.forget()
            return False
        if self._probe is None:
            given = [parameter for parameter in parameters if parameter.grad is not None]
            if given:
                self._probe = given[-1].register_post_accumulate_grad_hook(self._note)
            return False
        found = self._is_probed
        if found:
            self.forget()
        return found

    def _note(self, parameter: Tensor) -> None:
        self._is_probed = True

    def forget(self) -> None:
        """Be in no doubt: take the probe off."""
        if self._probe is not None:
            self._probe.remove()
        self._probe, self._is_probed = None, False

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_probe": None, "_is_probed": False}  # torch copies no hook of a parameter


def warn(message: str) -> None:
    """Warn at the user's line that led here, past those of this package and of torch."""
    level = 2
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("swalp_fx", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
