"""The higher-precision average of the weights.

SWALP's last step (Algorithm 2, line 6) averages low-precision weights in high precision. The mean
lives apart from the model, in its own dtype. torch.optim.swa_utils.AveragedModel keeps it in the
parameters' dtype, and a bfloat16 mean soon stops moving.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .. import fingerprints
from ..copied import deep_copy
from ..formats import FLOAT, Format, parse
from ..ops import quantize, quantize_foreach_
from ..random import ROLES, parameter_stream
from ..recipe import Quantizer, parse_rounding

__all__ = ["Average", "mean_dtype"]


def mean_dtype(parameter: Tensor) -> torch.dtype | None:
    """The dtype of a parameter's mean, float32 or wider; None for integers, which have no mean."""
    if not (parameter.is_floating_point() or parameter.is_complex()):
        return None
    return torch.promote_types(parameter.dtype, torch.float32)


class Average:
    """The running mean of named parameters, ``means[name]``, in float32 (float64 for float64).

    format, rounding: of every mean after each update: Q_SWA of the paper's section 5.1, which asks how few bits an
        average needs.
    decay: of an exponential moving average, ``mean <- decay * mean + (1 - decay) * parameter``. The bias of its start
        is corrected (Kingma and Ba, ICLR 2015, section 3). None: every update counts alike.
    start, every: calls of ``update`` count from number ``start`` on, each ``every``-th one; the first is number 0.
    dtype, device: of the means, such as torch.float64 and "cpu"; None: as the parameters.

    An average that is rounded to nearest at each update stalls. The n-th update moves a mean by 1 / n of its distance
    to the new parameter, and rounding undoes a move of less than half a step. If parameters spread around their mean by
    sigma, and a step is delta, few updates count from n > 2 sigma / delta on. There are two remedies. With
    ``rounding="stochastic"`` a small move happens with a small probability. Or leave the format out here, and give one
    to ``mean(format)`` or ``applied_to(model, format)``: these round once, when the average is read.

    One run may have several averages: ``swalp.averages["ema"] = Average(decay=0.999)``.
    Raises ValueError for a number out of range, and the errors of parsing a format and a rounding.
    """

    def __init__(
        self,
        format: str | Format = FLOAT,
        rounding: str = "nearest",
        *,
        decay: float | None = None,
        start: int = 0,
        every: int = 1,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        parse_rounding(rounding)
        if decay is not None and not 0.0 < decay < 1.0:
            raise ValueError(f"decay={decay} is out of range; use more than 0 and less than 1, such as 0.999")
        if not (isinstance(start, int) and isinstance(every, int) and start >= 0 and every >= 1):
            raise ValueError(f"start={start}, every={every} is out of range; use whole numbers, from 0 and 1 on")
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"an average is kept in float32 or float64, not {dtype}; name a format to round it")
        if device is not None and torch.device(device).type == "meta":
            raise ValueError("device='meta' has no memory to keep an average in; use 'cpu', or leave it out")
        self.format, self.rounding = parse(format), rounding
        self.decay, self.start, self.every = decay, start, every
        self.dtype, self.device = dtype, device
        self.n_seen = 0  # calls of update
        self.n_averaged = 0  # calls of update that counted
        self.means: dict[str, Tensor] = {}

    @property
    def settings(self) -> dict[str, str | float | None]:
        """Argument -> value, for the arguments that set the mean's value; dtype and device are left out."""
        text = {"format": str(self.format), "rounding": self.rounding}
        return {**text, "decay": self.decay, "start": self.start, "every": self.every}

    def mean_dtype(self, parameter: Tensor) -> torch.dtype | None:
        """The dtype of the mean of ``parameter``; None for integers, which have no mean."""
        dtype = mean_dtype(parameter)
        return dtype if dtype is None or self.dtype is None else torch.promote_types(dtype, self.dtype)

    def saved_means(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``means``, or zeros in their place before the first update, so that a load has tensors to fill."""
        if self.n_averaged:
            return dict(self.means)
        return {
            name: torch.zeros_like(parameter, dtype=dtype, device=self.device, requires_grad=False)
            for name, parameter in parameters.items()
            if (dtype := self.mean_dtype(parameter)) is not None
        }

    def refuse_unfit(self, parameters: Mapping[str, Tensor], what: str) -> None:
        """Raises ValueError if a parameter has fewer axes than a block of the format spans."""
        for name, parameter in parameters.items():
            if self.format.block.rank > parameter.dim() > 1:
                raise ValueError(
                    f"{what} cannot be kept in {self.format}: parameter {name!r} has {parameter.dim()} dimensions, and "
                    f"the format needs {self.format.block.rank}; use another format"
                )

    @torch.inference_mode(False)
    @torch.no_grad()
    def update(
        self,
        parameters: Mapping[str, Tensor],
        *,
        key: Tensor | int | None = None,
        quantizers: Mapping[str, Quantizer] | None = None,
    ) -> None:
        """mean <- Q(mean + share * (parameter - mean)). The share is 1 / n in the n-th update that counts.

        With a decay the share is (1 - decay) / (1 - decay^n).

        key: of stochastic rounding; the stream of a mean is its place among ``parameters``. None: a key is drawn from
            torch's default generator.
        quantizers: of parameters by name, in place of the average's own format and rounding.
        Raises ValueError, before anything is changed, if earlier updates were of other parameters.
        """
        since = self.n_seen - self.start
        if since < 0 or since % self.every:
            self.n_seen += 1
            return
        n = self.n_averaged + 1
        if n > 1:
            self.refuse(parameters)
        share = 1 / n if self.decay is None else (1 - self.decay) / (1 - self.decay**n)
        own = Quantizer(self.format) if self.format == FLOAT else Quantizer(self.format, self.rounding)
        rounded: dict[Quantizer, tuple[list[Tensor], list[int]]] = {}
        for index, (name, parameter) in enumerate(parameters.items()):
            if (dtype := self.mean_dtype(parameter)) is None:
                continue
            device = parameter.device if self.device is None else self.device
            if n == 1:
                mean = parameter.detach().to(device, dtype, copy=True)
            else:
                # The model may have moved to another device, or dtype, since.
                mean = self.means[name].to(device, dtype).lerp_(parameter.detach().to(device, dtype), share)
            self.means[name] = mean
            quantizer = own if quantizers is None else quantizers[name]
            if mean.is_floating_point() and quantizer.rounds:  # no format holds a complex one
                means, streams = rounded.setdefault(quantizer, ([], []))
                means.append(mean)
                streams.append(parameter_stream(ROLES["average"], index))
        for quantizer, (means, streams) in rounded.items():
            quantize_foreach_(means, *quantizer.how(), key=key, streams=streams)
        self.n_averaged = n
        self.n_seen += 1

    def refuse(self, parameters: Mapping[str, Tensor]) -> None:
        """Raises ValueError if the average so far has other names or shapes than ``parameters``."""
        remedy = "begin a new average: convert again, or use an Average of its own"
        for name, parameter in parameters.items():
            mean = self.means.get(name)
            if mean_dtype(parameter) is not None and (mean is None or mean.shape != parameter.shape):
                averaged = "is not in" if mean is None else f"is of shape {tuple(mean.shape)} in"
                raise ValueError(
                    f"parameter {name!r}, of shape {tuple(parameter.shape)}, {averaged} the average of "
                    f"{self.n_averaged}; {remedy}"
                )
        if gone := [name for name in self.means if name not in parameters]:
            raise ValueError(f"the average of {self.n_averaged} has {gone[0]!r}, which the model has no more; {remedy}")

    @torch.no_grad()
    def mean(self, format: str | Format = FLOAT) -> dict[str, Tensor]:
        """Copies of the means by name, rounded to ``format``, to nearest; the average itself goes on unrounded."""
        rounds = parse(format) != FLOAT
        return {
            name: quantize(mean, format) if rounds and mean.is_floating_point() else mean.clone()
            for name, mean in self.means.items()
        }

    @torch.no_grad()
    def applied_to(
        self,
        model: nn.Module,
        format: str | Format = FLOAT,
        *,
        copied: Callable[[nn.Module], nn.Module] = deep_copy,
    ) -> nn.Module:
        """A deep copy of ``model`` with ``mean(format)`` as its parameters, in the parameters' own dtype.

        Tied parameters stay tied; buffers and modes are the model's of this moment. Raises ValueError if the model has
        other parameters than the average.
        """
        self.refuse(dict(model.named_parameters()))
        averaged = copied(model)
        self.write(dict(averaged.named_parameters()), format)
        return averaged

    @torch.no_grad()
    def write(self, parameters: Mapping[str, Tensor], format: str | Format = FLOAT) -> None:
        """Write ``mean(format)`` into ``parameters``. A forward in that very format reads them as they are."""
        means = self.mean(format)
        for name, mean in means.items():
            parameters[name].copy_(mean)
        of_means = parse(format) if parse(format) != FLOAT else self.format
        fingerprints.note((parameters[name], of_means) for name, mean in means.items() if mean.is_floating_point())
