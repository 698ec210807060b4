"""Whether parameters are whole, and what their module's forward reads: formats round no shards of them."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

__all__ = ["SHARDED", "class_of_torch", "unwhole"]

REMEDY = "formats round whole parameters: wrap the converted module in DistributedDataParallel"
# Classes of torch that hold shards of parameters or of an optimizer's states, by name, since torch loads them late.
SHARDED = {
    "FullyShardedDataParallel": REMEDY,
    "FSDPModule": REMEDY,
    "ZeroRedundancyOptimizer": "its states are not there to be rounded: use the optimizer inside it for all parameters",
}


def class_of_torch(kind: type, names: Collection[str]) -> str | None:
    """The first of these names that a class of torch has which ``kind`` is, or is made from."""
    known = (each for each in kind.__mro__ if each.__name__ in names and each.__module__.startswith("torch."))
    return next((each.__name__ for each in known), None)


def unwhole(model: nn.Module) -> str | None:
    """What in ``model`` is not whole, or is hidden from its forward, and the remedy; None if all is as it seems."""
    for path, module in model.named_modules():
        if (kind := class_of_torch(type(module), SHARDED)) is not None:
            return f"{path or 'the model'}, which is {kind}; {SHARDED[kind]}"
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            which = f"parameter {path}.{name}" if path else f"parameter {name}"
            if class_of_torch(type(parameter), ("DTensor",)) or getattr(parameter, "_fsdp_flattened", False):
                return f"{which}, a shard of type {type(parameter).__name__}; {REMEDY}"
            if name in vars(module):
                return (
                    f"{which}, which an attribute of that name in its module's __dict__ hides from the forward; delete "
                    "that, or use DistributedDataParallel where FullyShardedDataParallel put it"
                )
    return None
