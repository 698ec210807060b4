"""Modes that a forward switches (gradients, inference, autocast), as nodes of its graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.autograd.grad_mode import _enter_inference_mode, _exit_inference_mode
from torch.fx import Proxy, Tracer
from torch.fx.proxy import TraceError

__all__ = ["SWITCHES", "held", "recorded", "replaced"]

# What switches a mode for all that follows it in a graph.
SWITCHES = (
    torch._C._set_grad_enabled,
    _enter_autocast,
    _exit_autocast,
    _enter_inference_mode,
    _exit_inference_mode,
)
SAVED = "it checkpoints or offloads what backward needs, which a graph would keep in memory"


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name``, its own or inherited, is ``value`` while it holds."""
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if own is None else setattr(owner, name, own)


@contextlib.contextmanager
def recorded(tracer: Tracer) -> Iterator[None]:
    """While it holds, a mode that the traced code enters or leaves is switched by nodes of the tracer's graph.

    with torch.no_grad():             is_grad_enabled = torch.is_grad_enabled()
        y = self.layer(x)             torch._C._set_grad_enabled(False)
                                      layer = self.layer(x)
                                      torch._C._set_grad_enabled(is_grad_enabled)

    Gradients and autocast are switched for the trace too, so that code that asks is told the truth; they are as they
    were when it ends. Raises TraceError for hooks on saved tensors, as activation checkpointing sets.
    """
    with held(), contextlib.ExitStack() as patches:
        for kind, methods in _recorders(tracer).items():
            for name, method in methods.items():
                patches.enter_context(replaced(kind, name, method))
        yield


def _recorders(tracer: Tracer) -> dict[type, dict[str, Callable[..., Any]]]:
    """Class -> the methods that record, in place of its own."""
    set_grad_enabled, autocast = torch._C._set_grad_enabled, torch.amp.autocast
    autocast_init, autocast_enter, autocast_exit = autocast.__init__, autocast.__enter__, autocast.__exit__

    def call(function: Callable[..., Any], *arguments: Any) -> Proxy:
        return tracer.create_proxy("call_function", function, arguments, {})

    def previous_grad(self: Any) -> None:
        # Read when the graph runs: what a model is called under is not known now.
        self.prev = call(torch.is_grad_enabled), torch.is_grad_enabled()

    def switch_grad(mode: Any) -> None:
        call(set_grad_enabled, mode)
        if not isinstance(mode, Proxy):
            set_grad_enabled(mode)

    def enter_grad(mode: bool) -> Callable[[Any], None]:
        def enter(self: Any) -> None:
            previous_grad(self)
            switch_grad(mode)

        return enter

    def leave_grad(self: Any, *_: Any) -> None:
        # A context that was made before the trace restores what held then.
        proxy, value = self.prev if isinstance(self.prev, tuple) else (self.prev, self.prev)
        call(set_grad_enabled, proxy)
        set_grad_enabled(value)

    def init_grad(self: Any, mode: Any) -> None:
        previous_grad(self)
        self.mode = mode
        switch_grad(mode)

    def enter_inference(self: Any) -> None:
        # Not for the trace: its constants would be inference tensors, of no use outside of the block.
        self._inference_mode_context = call(_enter_inference_mode, self.mode)

    def leave_inference(self: Any, *_: Any) -> None:
        call(_exit_inference_mode, self._inference_mode_context)

    def init_autocast(
        self: Any, device_type: Any, dtype: Any = None, enabled: Any = True, cache_enabled: Any = None
    ) -> None:
        self.given = None
        if any(isinstance(each, Proxy) for each in (device_type, dtype, enabled, cache_enabled)):
            self.given = device_type, dtype, enabled, cache_enabled  # known when the graph runs
        else:
            autocast_init(self, device_type, dtype, enabled, cache_enabled)

    entered: list[tuple[Proxy, bool]] = []  # an autocast that is a decorator is entered again and again

    def enter_autocast(self: Any) -> Any:
        given = getattr(self, "given", None)
        resolved = given or (self.device, self.fast_dtype, self._enabled, self._cache_enabled)
        entered.append((call(_enter_autocast, *resolved), given is None))
        return self if given else autocast_enter(self)

    def leave_autocast(self: Any, *exception: Any) -> Any:
        proxy, is_known = entered.pop()
        call(_exit_autocast, proxy)
        return autocast_exit(self, *exception) if is_known else None

    def refuse(*_: Any) -> None:
        raise TraceError(SAVED)

    return {
        torch.no_grad: {"__enter__": enter_grad(False), "__exit__": leave_grad},
        torch.enable_grad: {"__enter__": enter_grad(True), "__exit__": leave_grad},
        torch.set_grad_enabled: {
            "__init__": init_grad,
            "__enter__": lambda self: switch_grad(self.mode),
            "__exit__": leave_grad,
        },
        torch.inference_mode: {"__enter__": enter_inference, "__exit__": leave_inference},
        autocast: {"__init__": init_autocast, "__enter__": enter_autocast, "__exit__": leave_autocast},
        torch.autograd.graph.saved_tensors_hooks: {"__enter__": refuse},
    }


@contextlib.contextmanager
def held() -> Iterator[None]:
    """On leaving, by an exception too, gradients, inference and autocast are as they were on entering.

    A graph's switches are no with-blocks: an error between two of them would leave the mode on.
    """
    devices = torch._C._autocast_supported_devices()
    grad, inference, depth = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), _autocast_depth()
    autocast = [(device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    cache = torch.is_autocast_cache_enabled()
    try:
        yield
    except BaseException:
        while _autocast_depth() > depth:
            torch.autocast_decrement_nesting()
        if depth == 0:
            torch.clear_autocast_cache()
        for device, enabled, dtype in autocast:
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)
        torch.set_autocast_cache_enabled(cache)
        if torch.is_inference_mode_enabled() != inference:
            _enter_inference_mode(inference)
        torch._C._set_grad_enabled(grad)
        raise


def _autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()
