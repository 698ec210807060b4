"""Fingerprints of stored weights, by which a forward reads a weight that a step stored as it is.

Most formats keep what they gave: rounding a stored weight once more changes nothing. The others may find another scale
in a rounded block. Of a weight in one of these, a step notes a fingerprint: 64 bits that follow from the weight's own
bits, its shape, dtype and format. Nothing else counts, neither names nor objects nor devices, so the weight is known
when it is detached, copied or loaded again. Any write into it makes it unknown, and it is rounded where it is read.

A fingerprint is known while the parameter that it was noted of lives, and has no newer one.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .formats import Format, parse
from .ops import fingerprint, is_plain, is_recorded, is_transformed, keeps, quantize, rounded
from .random import is_captured

__all__ = ["is_rounded", "keeps_rounded", "note", "number_of", "put", "rounded_once"]

WORD = 8  # bytes
LEAST = 1024  # numbers of a table


class _Fingerprint:
    """A number of 64 bits, known while a parameter holds it."""

    def __init__(self, number: int) -> None:
        self.number = number


_KNOWN: WeakValueDictionary[int, _Fingerprint] = WeakValueDictionary()
_OF: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> its _Fingerprint
# The known numbers on a GPU, whose forwards do not wait for a fingerprint. The last table of a device has them all;
# earlier ones were too small, and captured CUDA graphs may still read their memory.
_TABLES: defaultdict[torch.device, list[Tensor]] = defaultdict(list)


# ---- in a step -----------------------------------------------------------------------------------


def note(stored: Iterable[tuple[Tensor, Format]]) -> None:
    """Note a fingerprint of each parameter that now holds numbers rounded to its format, unless the format keeps them.

    Waits once for each GPU.
    """
    waiting: defaultdict[torch.device, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    found: list[tuple[Tensor, int]] = []
    kept: dict[tuple[int, torch.dtype], bool] = {}  # by identity, since the hash of a format takes long
    for parameter, format in stored:
        which = id(format), parameter.dtype
        if which not in kept:
            kept[which] = keeps_rounded(format, parameter.dtype)
        if kept[which] or not is_plain(parameter):
            continue
        if parameter.is_cpu:
            found.append((parameter, _number(parameter, format)))
        else:
            waiting[parameter.device].append((parameter, _number_on_device(parameter, format)))
    for pairs in waiting.values():
        numbers = torch.stack([number for _, number in pairs]).tolist()
        found += zip((parameter for parameter, _ in pairs), numbers, strict=True)
    if found:
        put(found)


def put(held: Iterable[tuple[Tensor, int]]) -> None:
    """Let each parameter hold a fingerprint, as ``number_of`` gave it."""
    for parameter, number in held:
        if number:
            _OF[parameter] = _KNOWN.setdefault(number, _Fingerprint(number))
        elif parameter in _OF:
            del _OF[parameter]
    _refresh()


def number_of(parameter: Tensor) -> int:
    """The fingerprint that was noted of ``parameter``, whatever it holds now; 0 if there is none."""
    found = _OF.get(parameter)
    return 0 if found is None else found.number


# ---- in a forward --------------------------------------------------------------------------------


def is_rounded(x: Tensor, spec: str) -> bool:
    """Whether ``x`` is known to be rounded to ``spec`` already.

    Because each number is on the grid, if ``spec`` keeps such numbers; else because a step stored these bits. False if
    that is not known, as off the CPU and while calls are recorded: see ``rounded_once``.
    """
    if keeps_rounded(spec, x.dtype):
        return keeps(x, spec)
    return _may_wait(x) and len(_KNOWN) > 0 and _number(x, spec) in _KNOWN


def rounded_once(x: Tensor, spec: str, rounding: str, key: Tensor | None, stream: int) -> Tensor:
    """A new tensor: ``x`` rounded to ``spec``, or as it is if a step stored it. For an x that is not ``is_rounded``.

    It has no gradient of its own, except under the transforms of torch.func.
    """
    if is_transformed():
        y = quantize(x, spec, rounding, key=key, stream=stream)
    else:
        y = rounded(x, spec, rounding, key, stream)
    return y if keeps_rounded(spec, x.dtype) or _may_wait(x) else torch.where(is_stored(x.detach(), spec), x, y)


def keeps_rounded(format: str | Format, dtype: torch.dtype) -> bool:
    """Whether ``format`` keeps all rounded numbers, stored in ``dtype``."""
    # torch.compile warns when it traces through a cache, and does not need one.
    return (_keeps.__wrapped__ if torch.compiler.is_compiling() else _keeps)(format, dtype)


@cache
def _keeps(format: str | Format, dtype: torch.dtype) -> bool:
    return parse(format).keeps_rounded(1 - round(math.log2(torch.finfo(dtype).eps)))


def _may_wait(x: Tensor) -> bool:
    """Whether Python may look at the numbers of ``x`` now."""
    return x.is_cpu and not is_recorded() and is_plain(x)


@torch.library.custom_op("swalp_fx::is_stored", mutates_args=(), schema="(Tensor x, str format) -> Tensor")
def is_stored(x: Tensor, format: str) -> Tensor:
    """Whether a step stored these bits: a boolean of shape [], on the device of ``x``.

    An op, so that a recorded call asks anew whenever it runs.
    """
    if x.is_cpu:
        return torch.tensor(is_plain(x) and len(_KNOWN) > 0 and _number(x, format) in _KNOWN)
    if is_plain(x) and not (is_captured() and x.device not in _TABLES):  # a table cannot be made in a capture
        return (_table(x.device) == _number_on_device(x, format)).any()
    return torch.zeros((), dtype=torch.bool, device=x.device)


is_stored.register_fake(lambda x, format: x.new_empty((), dtype=torch.bool))


@is_stored.register_vmap
def _of_samples(info: Any, in_dims: tuple[Any, ...], x: Tensor, format: str) -> tuple[Tensor, int]:
    found = [is_stored(each, format) for each in x.movedim(in_dims[0], 0)]
    return torch.stack(found) if found else x.new_empty(0, dtype=torch.bool), 0


def _table(device: torch.device) -> Tensor:
    if device not in _TABLES:
        _TABLES[device].append(torch.zeros(LEAST, dtype=torch.int64, device=device))
        _refresh()
    return _TABLES[device][-1]


def _refresh() -> None:
    """Write the known numbers into the tables: CUDA graphs that were captured before see them too."""
    numbers = list(_KNOWN.keys()) if _TABLES else []
    for device, tables in _TABLES.items():
        if len(numbers) > len(tables[-1]):
            tables.append(torch.zeros(2 * len(numbers), dtype=torch.int64, device=device))
        for table in tables:
            known = numbers[: len(table)]
            table.copy_(torch.tensor(known + [0] * (len(table) - len(known)), dtype=torch.int64))


# ---- the numbers ---------------------------------------------------------------------------------

# SplitMix64's, as in csrc/fingerprint.h: (shift, factor) of each round, the last shift, and the increment a word.
ROUNDS, LAST, INCREMENT = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)), 31, 0x9E3779B97F4A7C15


def _number(x: Tensor, format: str | Format) -> int:
    """The fingerprint of a tensor on the CPU, in 64 signed bits."""
    return _signed(fingerprint(x.detach().contiguous()) + _salt(format, x.dtype, x.shape))


def _number_on_device(x: Tensor, format: str | Format) -> Tensor:
    """``_number`` by operations of torch: int64, of shape []."""
    flat = x.detach().reshape(-1).contiguous()
    if flat.storage_offset() * flat.itemsize % WORD:
        flat = flat.clone()
    words = F.pad(flat.view(torch.uint8), (0, -flat.nbytes % WORD)).view(torch.int64)
    z = words + torch.arange(1, len(words) + 1, device=x.device) * _signed(INCREMENT)
    for shift, factor in ROUNDS:
        z = _shifted(z, shift) * _signed(factor)
    return _shifted(z, LAST).sum() + _salt(format, x.dtype, x.shape)


def _shifted(z: Tensor, shift: int) -> Tensor:
    """z ^ (z >> shift), without the copies of the sign that torch shifts in."""
    return z ^ ((z >> shift) & (2 ** (64 - shift) - 1))


@lru_cache(maxsize=4096)
def _salt(format: str | Format, dtype: torch.dtype, shape: torch.Size) -> int:
    text = f"{parse(format)} {dtype} {tuple(shape)}"
    return _signed(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def _signed(number: int) -> int:
    """A number modulo 2^64, as the integer that int64 holds."""
    return (number + 2**63) % 2**64 - 2**63
