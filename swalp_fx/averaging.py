"""The higher-precision average of the weights, and the batch-norm statistics that go with it.

SWALP's last step (Algorithm 2, line 6) averages low-precision weights in high precision. The
mean lives apart from the model, in its own dtype: torch.optim.swa_utils.AveragedModel keeps it in
the parameters' dtype, where a bfloat16 mean soon stops moving.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from .formats import FLOAT, Format, parse
from .ops import quantize, quantize_foreach_
from .recipe import parse_rounding

__all__ = ["Average", "mean_dtype", "recalibrate"]


def mean_dtype(parameter: Tensor) -> torch.dtype | None:
    """The dtype a parameter is averaged in, float32 or wider; None if it is an integer, with no mean."""
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return None
    return torch.promote_types(parameter.dtype, torch.float32)


class Average:
    """The running mean of named parameters, ``means[name]``, in float32 (float64 for float64).

    format, rounding: what every mean is rounded to after each update, and how: Q_SWA of the paper's section 5.1, which
        asks how few bits the average can live with.

    An average that is rounded to nearest at each update stalls. The n-th update moves a mean by 1 / n of its distance
    to the new parameter, and rounding takes back what is less than half a step. With parameters around their mean by
    sigma, and steps of delta, few updates count from n > 2 sigma / delta on. Two remedies: ``rounding="stochastic"``,
    under which a small move comes with a small probability; and no format here, but one in ``mean(format)`` or
    ``applied_to(model, format)``, which round once, when the average is read.

    One run may have several averages: ``average.update(dict(model.named_parameters()))`` adds its weights to any.
    """

    def __init__(self, format: str | Format = FLOAT, rounding: str = "nearest") -> None:
        parse_rounding(rounding)
        self.format = parse(format)
        self.rounding = rounding
        self.n_averaged = 0
        self.means: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], *, key: Tensor | int | None = None) -> None:
        """mean <- Q(mean + (parameter - mean) / n), for the n-th update.

        key: of stochastic rounding; each mean has its place among ``parameters`` for a stream. Without a key, one is
            drawn from torch's default generator.
        Raises ValueError, before anything is changed, for a parameter that the average so far does not have.
        """
        n = self.n_averaged + 1
        if n > 1:
            self._refuse_other(parameters)
        means, streams = [], []
        for stream, (name, parameter) in enumerate(parameters.items()):
            if (dtype := mean_dtype(parameter)) is None:
                continue
            if n == 1:
                mean = parameter.detach().to(dtype, copy=True)
            else:
                # The model may have moved to another device since.
                mean = self.means[name].to(parameter.device).lerp_(parameter.detach().to(dtype), 1 / n)
            self.means[name] = mean
            means.append(mean)
            streams.append(stream)
        if self.format != FLOAT:
            quantize_foreach_(means, self.format, self.rounding, key=key, streams=streams)
        self.n_averaged = n

    def _refuse_other(self, parameters: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            mean = self.means.get(name)
            if mean_dtype(parameter) is not None and (mean is None or mean.shape != parameter.shape):
                averaged = "is not in" if mean is None else f"is of shape {tuple(mean.shape)} in"
                raise ValueError(
                    f"parameter {name!r}, of shape {tuple(parameter.shape)}, {averaged} the average of "
                    f"{self.n_averaged}; begin a new average: convert again, or use an Average of its own"
                )

    @torch.no_grad()
    def mean(self, format: str | Format = FLOAT) -> dict[str, Tensor]:
        """Copies of the means by name, rounded to ``format``, to nearest; the average itself goes on unrounded."""
        rounds = parse(format) != FLOAT
        return {name: quantize(mean, format) if rounds else mean.clone() for name, mean in self.means.items()}

    @torch.no_grad()
    def applied_to(
        self,
        model: nn.Module,
        format: str | Format = FLOAT,
        *,
        copied: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    ) -> nn.Module:
        """A deep copy of ``model`` with ``mean(format)`` as its parameters, in the parameters' own dtype.

        Tied parameters stay tied; buffers and modes are the model's of this moment.
        """
        averaged = copied(model)
        parameters = dict(averaged.named_parameters())
        for name, mean in self.mean(format).items():
            parameters[name].copy_(mean)
        return averaged


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Iterable[Any]) -> None:
    """Set the running statistics of every norm in ``model`` to those over all of ``loader``.

    A mean over batches of the batch statistics (of the mean and the unbiased variance), each weighted
    by the values it was taken over, so that a short last batch counts for what it is. Norms run in
    training mode and all else in evaluation mode, because that is the network the statistics will
    serve: no dropout, and no random number is consumed. Momenta and modes are put back. A norm that
    the forward never calls keeps what it has.

    loader: yields a tensor, or a tuple or list with the input first; moved to the model's device.
    It is not read if the model has no norm with running statistics.
    Raises TypeError (a batch of another kind) and ValueError (no batch at all).
    """
    # The base of batch and instance norms: whatever has running statistics and a momentum.
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    if not norms:
        return
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    statistics = {norm: _Statistics(norm) for norm in norms}
    handles = [handle for each in statistics.values() for handle in each.watch()]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # after a call the running statistics are that call's own
        batch = None
        for batch in loader:
            model(_inputs(batch).to(device))
        if batch is None:
            raise ValueError("the loader yielded no batch to take batch-norm statistics from; pass one that does")
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    for each in statistics.values():
        each.store()


class _Statistics:
    """The mean and variance that one norm saw, averaged over its calls in float32 or wider."""

    def __init__(self, norm: _NormBase) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        self.norm = norm
        self.buffers = (norm.running_mean, norm.running_var)
        self.means = [torch.zeros_like(buffer, dtype=mean_dtype(buffer)) for buffer in self.buffers]
        self.values = 0  # in each channel

    def watch(self) -> tuple[RemovableHandle, RemovableHandle]:
        return (
            self.norm.register_forward_pre_hook(self._begin),
            self.norm.register_forward_hook(self._add, with_kwargs=True),
        )

    def _begin(self, norm: nn.Module, args: tuple) -> None:
        if self.values == 0:
            self.norm.reset_running_stats()  # a momentum of 1 does not clear a NaN: 0 * nan is nan

    def _add(self, norm: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        values = (args[0] if args else kwargs["input"]).numel() // self.norm.num_features
        self.values += values
        for mean, buffer in zip(self.means, self.buffers, strict=True):
            mean.lerp_(buffer.to(mean.dtype), values / self.values)

    def store(self) -> None:
        if self.values:
            for buffer, mean in zip(self.buffers, self.means, strict=True):
                buffer.copy_(mean)


def _inputs(batch: Any) -> Tensor:
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, Tensor):
        raise TypeError(
            "the loader must yield a tensor, or a tuple or list with the input tensor first, "
            f"not a {type(batch).__name__}; map it, as in ((b['image'],) for b in loader)"
        )
    return inputs
