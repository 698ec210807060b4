"""Checkpoints in codes: a state_dict with its rounded weights packed, and back, bit for bit.

Rounded numbers nearly always come back from their codes. Any that do not are kept beside the codes, and so is the sign
of -0 in a format with one zero. A tensor that would not become smaller stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import FLOAT, Format, parse
from .codecs import pack, unpack
from .codes import Codes, decode, encode

__all__ = ["packed_state", "unpacked_state"]

VERSION = 1
KEYS = {"version", "packed", "plain"}


@torch.no_grad()
def packed_state(module: nn.Module, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The state_dict of ``module``, each parameter in codes of its format. A tied parameter is packed once.

    It holds tensors, numbers and strings in dicts and lists, so torch.load(weights_only=True) reads it.
    formats: name of a parameter -> format; any other parameter stays as it is.
    """
    records: dict[nn.Parameter, dict[str, Any] | None] = {}
    packed = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter not in records:
            format = formats.get(name, FLOAT)
            records[parameter] = _record(parameter.detach(), format) if format != FLOAT else None
        if (record := records[parameter]) is not None:
            packed[name] = record
    # A copy, as codes are; a deep one keeps tensors together that share memory.
    plain = copy.deepcopy({name: value for name, value in module.state_dict().items() if name not in packed})
    return {"version": VERSION, "packed": packed, "plain": plain}


@torch.no_grad()
def unpacked_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict that ``packed_state`` has packed. Raises ValueError for anything else."""
    if not isinstance(state, Mapping) or set(state) != KEYS or state["version"] != VERSION:
        raise ValueError("this is no packed state of version 1; pass the result of packed_state_dict()")
    return {**state["plain"], **{name: _tensor(record) for name, record in state["packed"].items()}}


def _record(x: Tensor, format: Format) -> dict[str, Any] | None:
    """The record that restores ``x``; None if it takes as much room as x, or if a number of x has no code."""
    try:
        codes = encode(x, format)
    except ValueError:
        return None
    found = decode(codes)
    other = (found != x).flatten()
    negative_zero = ((x == 0) & (x.signbit() != found.signbit())).flatten()
    record = {
        "format": str(format),
        "shape": list(x.shape),
        "dtype": x.dtype,
        "codes": codes.packed,
        "scales": list(codes.scales),
        "zeros": pack(negative_zero.long(), 1) if negative_zero.any() else None,
        "places": other.nonzero().flatten().to(torch.int64 if x.numel() >= 2**31 else torch.int32),
        "numbers": x.flatten()[other],
    }
    held = [*(value for value in record.values() if isinstance(value, Tensor)), *codes.scales]
    return record if sum(each.nbytes for each in held) < x.nbytes else None


def _tensor(record: Mapping[str, Any]) -> Tensor:
    shape, format = torch.Size(record["shape"]), parse(record["format"])
    x = decode(Codes(record["codes"], tuple(record["scales"]), format, shape, record["dtype"])).flatten()
    if record["zeros"] is not None:
        x = torch.where(unpack(record["zeros"], x.numel(), 1) > 0, -x, x)
    x[record["places"].long()] = record["numbers"]
    return x.view(shape)
