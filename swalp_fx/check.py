"""``check``: does the rewritten module compute what the model computes, bit for bit?"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .passes.parts import rewrite_what_can_be
from .recipe import Recipe

__all__ = ["Check", "check"]

SEED = 0


@dataclass(frozen=True)
class Check:
    """What ``check`` found: true if nothing differs; as text, what was compared and what differs."""

    compared: int  # tensors, over both modes
    differences: tuple[str, ...]  # "eval output 0: largest difference 0.5"

    def __bool__(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        if self:
            return f"{self.compared} tensors are bit-equal in train and eval mode"
        return f"{len(self.differences)} of {self.compared} tensors differ: " + "; ".join(self.differences)

    __repr__ = __str__


def check(model: nn.Module, *inputs: Any, leaves: Sequence[type[nn.Module]] = ()) -> Check:
    """Whether the rewritten module, with every format ``float``, is bit-equal with ``model``, in train and eval mode.

    Outputs, gradients of parameters and inputs, and buffers are compared after one forward and backward from the same
    random state, on copies: ``assert swalp_fx.check(model, x)``. A model whose own kernels are not deterministic
    differs from itself; see torch.use_deterministic_algorithms.
    Raises ConvertError if the model cannot be rewritten.
    """
    differences = []
    compared = 0
    # One trace serves both modes: that it does is half of the proof.
    source = copy.deepcopy(model).train()
    rewritten = rewrite_what_can_be(source, Recipe(rounding="nearest"), leaves=tuple(leaves), identity=True)
    for mode in ("train", "eval"):
        plain, low = copy.deepcopy(model), copy.deepcopy(rewritten)
        expected = _run(plain.train(mode == "train"), inputs)
        found = _run(low.train(mode == "train"), inputs)
        compared += len(expected)
        for name in dict.fromkeys((*expected, *found)):
            if complaint := _difference(expected.get(name), found.get(name)):
                differences.append(f"{mode} {name}: {complaint}")
    return Check(compared, tuple(differences))


def _run(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, Tensor | None]:
    """Every tensor that a forward and a backward leave behind, by name."""
    inputs = pytree.tree_map_only(Tensor, _leaf, inputs)
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(SEED)
        outputs = list(_tensors(model(*inputs)))
        seeds = [(output, torch.randn_like(output)) for output in outputs if output.requires_grad]
        if seeds:
            torch.autograd.backward([output for output, _ in seeds], [seed for _, seed in seeds])
    found: dict[str, Tensor | None] = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    found |= {f"gradient of input {i}": x.grad for i, x in enumerate(_tensors(inputs))}
    found |= {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
    found |= {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    return found


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.is_floating_point())


def _tensors(nest: Any) -> Iterator[Tensor]:
    for leaf in pytree.tree_leaves(nest):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def _difference(expected: Tensor | None, found: Tensor | None) -> str | None:
    """What tells the two apart, or None. NaN equals NaN."""
    if expected is None or found is None:
        return None if expected is found else f"is {'missing' if found is None else 'there'} after the rewrite"
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return f"{found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)}"
    same = (expected == found) | ((expected != expected) & (found != found))
    if bool(same.all()):
        return None
    gap = (expected.double() - found.double()).abs()[~same].max()
    return f"{int((~same).sum())} of {same.numel()} values differ, by at most {gap:.3g}"
