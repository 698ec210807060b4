"""QPyTorch, where it is there: pip install qtorch ninja setuptools. It compiles itself when it is first imported."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version

import torch
from torch import nn

from command import CommandLine, sentence

__all__ = ["OWN", "SCALE", "in_its_own", "in_low_precision", "refuse_missing", "versions"]

# The recipe of QPyTorch's example on CIFAR-10 (examples/tutorial/CIFAR10_Low_Precision_Training_Example.ipynb), and its
# factor of the loss.
OWN = (
    "e5m2+finite rounding=nearest_away M=e6m9+finite~stochastic master=e6m9+finite~stochastic "
    "placement=compute+activation"
)
SCALE = 1000.0
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
    """QPyTorch's small-block simulation: a Quantizer behind each layer of a type in ``rounded`` except the last layer,
    and its optimizer for the rest. It leaves the results of functions alone. Raises ImportError without QPyTorch."""
    from qtorch import BlockFloatingPoint
    from qtorch.optim import OptimLP
    from qtorch.quant import Quantizer, quantizer

    number = BlockFloatingPoint(wl=bits, dim=0)
    both = {"forward_number": number, "backward_number": number}
    both |= {"forward_rounding": "stochastic", "backward_rounding": "stochastic"}
    _put_behind(model, Quantizer(**both), rounded)
    one = quantizer(forward_number=number, forward_rounding="stochastic")
    return OptimLP(optimizer, weight_quant=one, grad_quant=one, momentum_quant=one)


def in_its_own(
    model: nn.Module, optimizer: torch.optim.Optimizer, of_step: str = "stochastic"
) -> torch.optim.Optimizer:
    """The recipe ``OWN`` of QPyTorch's example, for a loss times ``SCALE``. Raises ImportError without QPyTorch.

    of_step: how M and the master are rounded.
    """
    from qtorch import FloatingPoint
    from qtorch.optim import OptimLP
    from qtorch.quant import Quantizer, quantizer

    bit_8, bit_16 = FloatingPoint(exp=5, man=2), FloatingPoint(exp=6, man=9)
    both = {"forward_number": bit_8, "backward_number": bit_8}
    both |= {"forward_rounding": "nearest", "backward_rounding": "nearest"}
    _put_behind(model, Quantizer(**both), (nn.Conv2d, nn.Linear, nn.ReLU))
    nearest = quantizer(forward_number=bit_8, forward_rounding="nearest")
    of_states = quantizer(forward_number=bit_16, forward_rounding=of_step)
    how = {"weight_quant": nearest, "grad_quant": nearest, "momentum_quant": of_states, "acc_quant": of_states}
    return OptimLP(optimizer, **how, grad_scaling=1 / SCALE)


def _put_behind(model: nn.Module, quantize: nn.Module, rounded: tuple[type, ...]) -> None:
    """Rounds the output of each layer of a type in ``rounded``, except the last layer."""
    *layers, _ = (module for module in model.modules() if not any(True for _ in module.children()))
    for layer in layers:
        if isinstance(layer, rounded) and not isinstance(layer, NOT_ROUNDED):
            layer.register_forward_hook(lambda module, inputs, output: quantize(output))
