"""``check``: does the rewritten module give the bits of the model?"""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..capture import Conversion, refuse_unfit
from ..capture.trial import randomness_kept
from ..copied import deep_copy
from ..recipe import Recipe

__all__ = ["Check", "check"]

SEED = 0
# With logits, gradients are summed in the same order as in the model. The other is where roundings usually are.
IDENTITY = Recipe(rounding="nearest", quantize_logits=True)
PLACED = Recipe(rounding="nearest", quantize_input=True)


@dataclass(frozen=True)
class Check:
    """The result of ``check``: true if nothing differs. Its text lists the differences."""

    compared: int  # tensors, over both modes
    differences: tuple[str, ...]  # "eval output 0: largest difference 0.5"

    def __bool__(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        if self:
            return f"{self.compared} tensors are bit-equal in train and eval mode"
        return f"{len(self.differences)} of {self.compared} tensors differ: " + "; ".join(self.differences)

    __repr__ = __str__


def check(model: nn.Module, /, *inputs: Any, **keywords: Any) -> Check:
    """Whether the converted model, with every format ``float``, has the bits of ``model``, in train and eval mode.

    ``assert swalp_fx.check(model, x)`` runs a forward and a backward twice, on copies, from the same random state. It
    compares outputs, gradients of parameters and inputs, and buffers each time. So it does once more with logits left
    alone and inputs rounded, as a recipe has it. There gradients may be summed in another order: a difference counts
    beyond the square root of the type's epsilon times the model's largest gradient. A model with nondeterministic
    kernels differs from itself; see torch.use_deterministic_algorithms.
    Raises ConvertError if the model cannot be converted.
    """
    differences = []
    compared = 0
    refuse_unfit(model, IDENTITY)
    plain, everywhere, placed = deep_copy(model), _identity(model, IDENTITY), _identity(model, PLACED)
    given = _with_gradients(model, inputs, keywords)
    for mode in ("train", "eval"):
        for again in ("", " again"):
            expected = _run(plain.train(mode == "train"), *given())
            compared += len(expected) - 1  # the type is no tensor
            # Of the model's, and not of the tensor's own: the gradient of attention's key bias is a sum of zero.
            largest = max((_largest(value) for name, value in expected.items() if _is_gradient(name)), default=0.0)
            complaints: dict[str, str] = {}
            for low in (everywhere, placed):
                found = _run(low.train(mode == "train"), *given())
                for name in dict.fromkeys((*expected, *found)):
                    of = largest if low is placed and _is_gradient(name) else 0.0
                    if complaint := _difference(expected.get(name), found.get(name), of):
                        complaints.setdefault(name, complaint)
            differences += [f"{mode}{again} {name}: {complaint}" for name, complaint in complaints.items()]
    return Check(compared, tuple(differences))


def _identity(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of ``model``, converted, with nodes that round nothing."""
    from ..capture.entries import install

    low = deep_copy(model)
    install(Conversion(low, recipe, identity=True))
    return low


def _with_gradients(model: nn.Module, *given: Any) -> Callable[[], Any]:
    """A function that copies the inputs. The copies require gradients, unless the model fails on such inputs."""

    def asking() -> Any:
        return pytree.tree_map_only(Tensor, lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), given)

    def as_they_are() -> Any:
        return pytree.tree_map_only(Tensor, lambda x: x.detach().clone().requires_grad_(x.requires_grad), given)

    try:
        for mode in (True, False):
            _run(deep_copy(model).train(mode), *asking())
    except RuntimeError:
        return as_they_are
    return asking


def _run(model: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """Every tensor after a forward and a backward, by name, and the type of the model's output."""
    model.zero_grad()
    with randomness_kept(model):
        _seed()
        given = model(*inputs, **keywords)
        outputs = list(_tensors(given))
        seeds = [(output, torch.randn_like(output)) for output in outputs if output.requires_grad]
        if seeds:
            torch.autograd.backward([output for output, _ in seeds], [seed for _, seed in seeds])
    found: dict[str, Any] = {"type of the output": type(given)}
    found |= {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    found |= {f"gradient of input {i}": _dense(x.grad) for i, x in enumerate(_tensors((inputs, keywords)))}
    found |= {f"gradient of {name}": _dense(parameter.grad) for name, parameter in model.named_parameters()}
    found |= {f"buffer {name}": buffer.clone() for name, buffer in model.named_buffers()}
    return found


def _seed() -> None:
    """Seeds the random numbers of PyTorch, Python and NumPy."""
    torch.manual_seed(SEED)
    random.seed(SEED)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(SEED)


def _tensors(nest: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(nest):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def _dense(gradient: Tensor | None) -> Tensor | None:
    """The gradient, which an embedding may give as a sparse tensor."""
    return gradient if gradient is None or gradient.layout is torch.strided else gradient.to_dense()


def _is_gradient(name: str) -> bool:
    return name.startswith("gradient of ")


def _largest(value: Tensor | None) -> float:
    """The largest finite magnitude in a tensor; 0 of none."""
    return 0.0 if value is None or not value.numel() else float(value.abs().nan_to_num(0, 0, 0).max())


def _difference(expected: Any, found: Any, of: float = 0.0) -> str | None:
    """The difference of the two in words, or None. NaN equals NaN.

    of: numbers may differ by the square root of the type's epsilon times this, as sums in another order do.
    """
    if isinstance(expected, type) and isinstance(found, type):
        return None if expected is found else f"{found.__name__}, not {expected.__name__}"
    if expected is None or found is None:
        return None if expected is found else f"is {'missing' if found is None else 'there'} after the rewrite"
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"{found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    same = (expected == found) | ((expected != expected) & (found != found))
    if of and not bool(same.all()):
        same |= (expected - found).abs() <= torch.finfo(expected.dtype).eps ** 0.5 * of
    if bool(same.all()):
        return None
    gap = (expected.double() - found.double()).abs()[~same].max()
    return f"{int((~same).sum())} of {same.numel()} values differ, by at most {gap:.3g}"
