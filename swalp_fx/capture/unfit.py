"""Models that cannot be converted: they are refused before anything is changed."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import UNPACK, ConvertError
from ..passes.fit import of_parameter
from ..passes.names import parameter_subjects
from ..recipe import LETTERS, OF_PARAMETERS, Recipe, Subject
from ..whole import class_of_torch, unwhole
from .conversion import conversion_of

__all__ = ["refuse_hooked", "refuse_unfit"]

# Classes of torch that a model must not be or hold -> the remedy. By name: torch loads some of them late.
UNFIT = {
    "DataParallel": "convert the module inside it, then wrap the result",
    "DistributedDataParallel": "convert the module inside it, then wrap the result",
    "OptimizedModule": "convert first, then torch.compile the result",
    "ScriptModule": "convert the Python module it was made from",
}
HOOKED = {WeightNorm: "weight_norm", SpectralNorm: "spectral_norm"}


def refuse_unfit(model: nn.Module, recipe: Recipe) -> None:
    """Raises ConvertError unless ``model`` is a float model, and ``recipe`` fits it."""
    if not isinstance(model, nn.Module):
        remedy = UNPACK if isinstance(model, tuple) else "pass a torch.nn.Module"
        raise ConvertError(f"cannot convert a {type(model).__name__}; {remedy}")
    for path, module in model.named_modules():
        which = path or "the model"
        if conversion_of(module) is not None:
            raise ConvertError(
                f"{which} is already converted; call swalp_fx.restore on it first, or take a copy that was made before"
            )
        if (kind := class_of_torch(type(module), UNFIT)) is not None:
            raise ConvertError(f"cannot convert {which}, which is {kind}; {UNFIT[kind]}")
        if module._compiled_call_impl is not None:
            raise ConvertError(f"cannot convert {which}, which is compiled; convert first, then compile the result")
    if (shard := unwhole(model)) is not None:
        raise ConvertError(f"cannot convert {shard}")
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)):
        raise ConvertError(
            f"cannot convert a bare {type(model).__name__}, which has no forward; "
            "convert the module that calls its layers"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise ConvertError(f"cannot convert: parameter {name} has no shape yet; run the model on one batch first")
    subjects = parameter_subjects(model)
    _refuse_misfits(model, recipe, subjects)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    refuse_hooked(model)
    for path, module in model.named_modules():
        is_renormalised = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
        if is_renormalised and recipe.at(*subjects[names[id(module.weight)]]).weight.rounds:
            raise ConvertError(
                f"{path or 'the model'}: max_norm makes {type(module).__name__} write into its weight in its forward, "
                "where a graph reads a rounded one; use max_norm=None, or a rule that leaves the weight in float"
            )


def _refuse_misfits(model: nn.Module, recipe: Recipe, subjects: dict[str, tuple[Subject, ...]]) -> None:
    """Raises ConvertError for a parameter with fewer axes than the block of one of its formats."""
    for name, parameter in model.named_parameters():
        here = of_parameter(recipe, subjects[name], parameter.dim())
        for role in OF_PARAMETERS:
            quantizer = getattr(here, role)
            if quantizer is None or not parameter.is_floating_point():
                continue
            format = quantizer.format
            if format.block.rank > parameter.dim() > 1:
                remedy = f"give it another format by a rule, such as Rule({name!r}, {LETTERS.get(role, role)}='float')"
                raise ConvertError(
                    f"parameter {name} has {parameter.dim()} dimensions, and {format} needs {format.block.rank}; "
                    f"{remedy}"
                )


def refuse_hooked(model: nn.Module) -> None:
    """Raises ConvertError for a layer that derives its weight in a hook, as the old ``weight_norm`` does."""
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if norm := next((name for kind, name in HOOKED.items() if isinstance(hook, kind)), None):
                raise ConvertError(
                    f"{path or type(module).__name__}: torch.nn.utils.{norm} derives its weight in a hook, out of "
                    f"sight; use torch.nn.utils.parametrizations.{norm}, or torch.nn.utils.remove_{norm} first"
                )
