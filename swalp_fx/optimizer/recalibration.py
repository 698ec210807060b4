"""Batch-norm statistics for weights that no training step has seen, such as an average."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from .averaging import mean_dtype

__all__ = ["recalibrate"]


@torch.no_grad()
def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """Set the running statistics of every norm in ``model`` to the statistics over all of ``loader``.

    They are means of the batch statistics (mean and unbiased variance). Each batch is weighted by its number of values,
    so a short last batch counts less. Norms run in training mode, and all else in evaluation mode, as when the
    statistics are used: there is no dropout, and no random number is drawn. Momenta and modes are put back. A norm
    keeps its statistics if the forward never calls it, and every norm does if anything raises.

    loader: yields a tensor, or a tuple or list with the input first; moved to the model's device.
        It is not read if the model has no norm with running statistics.
    forward: calls the model with a batch of any other kind: ``lambda model, batch: model(**batch)``.
    group: a process group. Each rank calls this with its own part of the data, perhaps without a batch; the statistics
        are taken over all ranks.
    Raises TypeError (a batch of another kind) and ValueError (no batch at all, or one of a single value a channel).
    """
    # The base of batch and instance norms: all modules with running statistics and a momentum.
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]
    if not norms:
        return
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    names = {module: name for name, module in model.named_modules()}
    statistics = {norm: _Statistics(norm, names[norm]) for norm in norms}
    handles = [handle for each in statistics.values() for handle in each.watch()]
    try:
        model.eval()
        for norm in norms:
            norm.train()
            norm.momentum = 1.0  # a call replaces the running statistics by its own
        batches = 0
        for batch in loader:
            if forward is not None:
                forward(model, batch)
            else:
                model(_inputs(batch).to(device))
            batches += 1
        if _total(batches, device, group) == 0:
            raise ValueError("the loader yielded no batch to take batch-norm statistics from; pass one that does")
    except BaseException:
        for each in statistics.values():
            each.put_back()
        raise
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, mode in modes:
            module.training = mode
    for each in statistics.values():
        each.store(group)


class _Statistics:
    """The mean and variance that one norm saw, averaged over its calls in float32 or wider."""

    def __init__(self, norm: _NormBase, name: str) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        self.norm, self.name = norm, name
        self.buffers = (norm.running_mean, norm.running_var)
        self.before = {name: buffer.clone() for name, buffer in norm.named_buffers(recurse=False)}
        self.means = [torch.zeros_like(buffer, dtype=mean_dtype(buffer)) for buffer in self.buffers]
        self.values = 0  # in each channel

    def watch(self) -> tuple[RemovableHandle, RemovableHandle]:
        return (
            self.norm.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.norm.register_forward_hook(self._add, with_kwargs=True),
        )

    def _begin(self, norm: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._values_of(args, kwargs) == 1:
            raise ValueError(
                f"norm {self.name!r} got one value a channel, which has no variance: a batch of one sample; give the "
                "loader another batch size, or drop_last=True"
            )
        if self.values == 0:
            self.norm.reset_running_stats()  # a momentum of 1 does not clear a NaN: 0 * nan is nan

    def _add(self, norm: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        values = self._values_of(args, kwargs)
        self.values += values
        for mean, buffer in zip(self.means, self.buffers, strict=True):
            mean.lerp_(buffer.to(mean.dtype), values / self.values)

    def _values_of(self, args: tuple, kwargs: dict) -> int:
        """How many values of each channel a call got."""
        inputs: Tensor = args[0] if args else kwargs["input"]
        return inputs.numel() // self.norm.num_features

    def put_back(self) -> None:
        for name, buffer in self.before.items():
            getattr(self.norm, name).copy_(buffer)

    def store(self, group: distributed.ProcessGroup | None) -> None:
        if group is not None:
            self._reduce(group)
        if self.values:
            for buffer, mean in zip(self.buffers, self.means, strict=True):
                buffer.copy_(mean)

    def _reduce(self, group: distributed.ProcessGroup) -> None:
        """Average the means over the ranks, each weighted by its number of values."""
        values = _total(self.values, self.buffers[0].device, group)
        for mean in self.means:
            mean.mul_(self.values / max(1, values))
            distributed.all_reduce(mean, group=group)
        self.values = values


def _total(number: int, device: torch.device | None, group: distributed.ProcessGroup | None) -> int:
    """The sum of ``number`` over the ranks of ``group``."""
    if group is None:
        return number
    total = torch.tensor(number, device=device)
    distributed.all_reduce(total, group=group)
    return int(total.item())


def _inputs(batch: Any) -> Tensor:
    inputs = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if not isinstance(inputs, Tensor):
        raise TypeError(
            "the loader must yield a tensor, or a tuple or list with the input tensor first, "
            f"not a {type(batch).__name__}; say how the model takes it: forward=lambda model, batch: model(**batch)"
        )
    return inputs
