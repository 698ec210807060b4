"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["FileError", "make_folder", "refuse_unwritable", "write", "write_json"]


class FileError(ValueError):
    """A file that cannot be read or written, in one sentence that names it."""


def write(path: Path, content: bytes) -> None:
    """Puts ``content`` at ``path``, and on the disk.

    If it is interrupted, the old file or the new one is there, whole. A path that is no plain file, such as
    /dev/stdout, takes the bytes directly. Raises FileError if it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
        else:
            _replace(path.resolve(), content)  # a link goes on pointing at the file
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from None


def write_json(path: Path, record: dict[str, Any]) -> None:
    """As ``write``, of ``record`` as JSON."""
    write(path, (json.dumps(record, indent=1) + "\n").encode())


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or after a power cut the new name may stand for an empty file
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()  # a full disk needs the room
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)


def make_folder(path: Path) -> None:
    """Raises FileError if there can be no such folder."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{path} cannot be made a folder ({error.strerror}); name another") from None


def refuse_unwritable(path: Path) -> None:
    """Raises FileError if a file can surely not be written to ``path``, before an hour of work is lost."""
    if path.is_dir():
        raise FileError(f"{path} is a folder; name a file")
    if not path.parent.is_dir():
        raise FileError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    if path.exists() and not os.access(path, os.W_OK):
        raise FileError(f"{path} cannot be written: it is read-only; make it writable, or name another")
    if path.exists() and not path.is_file():
        return
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}; name another folder") from None
