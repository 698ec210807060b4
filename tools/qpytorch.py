"""QPyTorch, where it is there: pip install qtorch ninja setuptools. It compiles itself when it is first imported."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version

import torch
from torch import nn

from command import CommandLine, sentence

__all__ = ["in_low_precision", "refuse_missing", "versions"]

NOT_ROUNDED = (nn.Dropout, nn.Identity, nn.Flatten)


def refuse_missing(parser: CommandLine) -> None:
    """Refuses in one line where it cannot be imported."""
    try:
        import qtorch.quant  # noqa: F401
    except (ImportError, RuntimeError, subprocess.CalledProcessError) as error:  # the last two: it did not compile
        parser.refuse(f"qtorch cannot be imported ({sentence(error)}); pip install qtorch ninja setuptools")


def versions() -> str:
    return f"qtorch {version('qtorch')}, torch {torch.__version__}, Python {platform.python_version()}"


def in_low_precision(
    model: nn.Module, optimizer: torch.optim.Optimizer, bits: int, rounded: tuple[type, ...] = (nn.Module,)
) -> torch.optim.Optimizer:
    """Its small-block simulation: a Quantizer behind each layer of a type in ``rounded``, but for the last layer, and
    its optimizer for the rest. What a function adds or flattens, it leaves alone. Raises ImportError without it."""
    from qtorch import BlockFloatingPoint
    from qtorch.optim import OptimLP
    from qtorch.quant import Quantizer, quantizer

    number = BlockFloatingPoint(wl=bits, dim=0)
    both = {"forward_number": number, "backward_number": number}
    both |= {"forward_rounding": "stochastic", "backward_rounding": "stochastic"}
    *layers, _ = (module for module in model.modules() if not any(True for _ in module.children()))
    behind = Quantizer(**both)
    for layer in layers:
        if isinstance(layer, rounded) and not isinstance(layer, NOT_ROUNDED):
            layer.register_forward_hook(lambda module, inputs, output: behind(output))
    one = quantizer(forward_number=number, forward_rounding="stochastic")
    return OptimLP(optimizer, weight_quant=one, grad_quant=one, momentum_quant=one)
