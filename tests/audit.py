"""The share of a model's multiply-adds inside rewritten graphs."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from swalp_fx.capture.running import local

_aten = torch.ops.aten
COUNTED = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
}


class Audit(TorchDispatchMode):
    """Multiply-adds of the calls made while it holds: ``inside`` rewritten graphs, and all of them."""

    @classmethod
    def ignore_compile_internals(cls):
        return True  # else PyTorch's front end leaves every frame alone

    def __init__(self):
        super().__init__()
        self.inside = self.all = self.depth = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if (counted := COUNTED.get(function.overloadpacket)) is not None:
            count = counted(*args, **kwargs, out_val=result) // 2
            self.all += count
            self.inside += count if self.depth else 0
        return result

    @contextlib.contextmanager
    def watching(self):
        """Knows whether a rewritten graph of this thread is running."""

        def run(made, inputs):
            self.depth += 1
            try:
                return made.graph_module(*inputs)
            finally:
                self.depth -= 1

        local.watch = run
        try:
            yield self
        finally:
            local.watch = None


def share_inside(lp, args, keywords):
    """Of a forward's multiply-adds, the share inside rewritten graphs. The first call makes the graphs, uncounted."""
    lp(*args, **keywords)
    with Audit() as audit, audit.watching():
        lp(*args, **keywords)
    return audit.inside / audit.all if audit.all else 1.0
