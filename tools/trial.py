"""Tries, before the work begins, whether a model takes the samples, and its tensors a recipe."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import files
import models
import swalp_fx
from command import sentence

__all__ = ["INPUT_ERRORS", "of_model", "of_recipe"]

# Errors of a model, a recipe or a file that does not fit the others: refused in one line, without a traceback.
INPUT_ERRORS = (
    *(files.FileError, models.ModelError),
    *(swalp_fx.ConvertError, swalp_fx.FormatError, swalp_fx.RecipeError),
)


def of_model(name: str, model: nn.Module, *shape: int, batch: int | None = None) -> None:
    """Raises ModelError unless ``model`` takes samples of ``shape``: one to evaluate, or a ``batch`` to train on.

    A copy without memory runs, so that nothing is computed, drawn or changed.
    """
    with torch.device("meta"):
        sample = models.example(*shape)
    samples = sample.expand(batch or 1, *sample.shape[1:])
    try:
        outputs = copy.deepcopy(model).to("meta").train(batch is not None)(samples)
    except (RuntimeError, ValueError, AssertionError) as error:  # errors of the layers, and of torchvision's own checks
        made_for = f"it was made for {_described(*models.default_shape(name))}"
        remedy = "use a batch size that leaves more for the last batch" if batch == 1 else made_for
        raise models.ModelError(
            f"{name} cannot take {_described(*shape, batch=batch)} ({sentence(error)}); {remedy}"
        ) from None
    if not isinstance(outputs, Tensor):
        raise models.ModelError(f"{name} gives {type(outputs).__name__}, not a tensor; use another model")


def _described(*shape: int, batch: int | None = None) -> str:
    side, many = shape[-1], f"a batch of {batch} of " if batch else ""
    return many + (f"images of {side} x {side} pixels" if len(shape) == 2 else f"texts of {side} bytes")


@contextmanager
def of_recipe(recipe: str) -> Iterator[None]:
    """Raises RecipeError if the op refuses a tensor: the format's blocks need a dimension that it does not have."""
    try:
        yield
    except RuntimeError as error:
        op, _, reason = sentence(error).partition(": ")
        if not op.startswith("swalp_fx::") or "dimension" not in reason:
            raise
        raise swalp_fx.RecipeError(f"recipe {recipe!r} does not fit the model: {reason}") from None
