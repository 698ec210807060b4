"""The calls of ``Optimizer.step`` on the stack: a step is over when its outermost call ends or raises."""

from __future__ import annotations

import sys
from types import FrameType

__all__ = ["hooked_call", "is_running"]


def hooked_call() -> FrameType:
    """The frame of ``Optimizer.step`` that fired the calling hook, without the frames of torch.compiler.disable.

    It lasts until the step is over. A compiled step goes on in calls made by this frame.
    """
    frame = sys._getframe(2)
    while frame.f_globals.get("__name__", "").startswith("torch._dynamo") and frame.f_back is not None:
        frame = frame.f_back
    return frame


def is_running(frame: FrameType) -> bool:
    """Whether ``frame`` is on the stack of this thread (it may outlive its call in a traceback)."""
    caller: FrameType | None = sys._getframe()
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return caller is not None
