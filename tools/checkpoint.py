"""A line's checkpoint: a file of torch.save, written whole and checked as it is read."""

from __future__ import annotations

import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

import files

__all__ = ["load", "path_of", "save"]

KINDS = {"settings": dict, "model": dict, "optimizer": dict, "swalp": dict, "epochs": list}
# The errors of zipfile and torch.load for bytes that are no file of torch.save, or a damaged one.
DAMAGE = (RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)


def path_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.pt"


def save(path: Path, state: dict[str, Any]) -> None:
    """Raises FileError, and leaves an earlier checkpoint as it was, if ``state`` cannot be written."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write(path, buffer.getvalue())


def load(path: Path, device: torch.device) -> dict[str, Any]:
    """The state that ``save`` wrote, with its tensors on ``device``.

    Raises FileError for a file that is unreadable, damaged or no checkpoint, or that would run code.
    """
    remedy = "delete it to start the line again, or name another --out"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise files.FileError(f"{path} cannot be read: {error.strerror}; {remedy}") from None
    try:
        state = _parse(content, device)
    except pickle.UnpicklingError:
        raise files.FileError(f"{path} is not loaded: it holds more than tensors and numbers; {remedy}") from None
    except DAMAGE:
        what = "damaged, or no checkpoint of train.py" if content else "empty"
        raise files.FileError(f"{path} is {what}; {remedy}") from None
    whole = isinstance(state, dict) and state.keys() == KINDS.keys()
    if not whole or not all(isinstance(state[key], kind) for key, kind in KINDS.items()):
        raise files.FileError(f"{path} is no checkpoint of train.py; {remedy}")
    return state


def _parse(content: bytes, device: torch.device) -> Any:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if damaged := archive.testzip():  # torch.load does not compare the checksums
            raise zipfile.BadZipFile(damaged)
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
