"""The bits of every spec, rounding and dtype on finite values, as hashes that no later version may change.

    python tests/test_bits.py          # add the hashes of new specs to tests/bits.json; a kept one is never rewritten

Inputs are made by integer arithmetic alone, so every version of torch makes the same ones.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from cuda_cases import KEY, STREAM, hash_of, words
from tables import ALL_ROUNDINGS, DTYPES, FORMATS, every_half

from swalp_fx import quantize
from swalp_fx.formats import PRESETS

KEPT = Path(__file__).parent / "bits.json"
SPECS = list(dict.fromkeys([*FORMATS, *PRESETS]))
SIDE = 96


def scaled(dtype):
    """Rows of many scales and few bits of mantissa, so that ties and numbers of the grid are among them."""
    rows = torch.arange(SIDE)
    mantissas = (words(SIDE * SIDE, 3) & 0xFFFFFF).view(SIDE, SIDE) >> (rows % 23)[:, None]
    signs = 1 - 2 * (words(SIDE * SIDE, 4) & 1).view(SIDE, SIDE)
    exponents = torch.where(rows % 2 == 0, rows % 9 - 4, words(SIDE, 5) % 250 - 140)
    powers = ((exponents + 1023) << 52).view(torch.float64)
    return (signs * mantissas * powers[:, None] / (1 << 24 - rows % 23)[:, None]).to(dtype)


def patterns(dtype):
    """Bits of any pattern: of the half types, every one."""
    if dtype.itemsize == 2:
        return every_half(dtype)
    integers = words(SIDE * SIDE, 6)
    integers = integers << 1 ^ words(SIDE * SIDE, 7) if dtype is torch.float64 else integers.to(torch.int32)
    return integers.view(dtype).view(SIDE, SIDE)


def bits_of(spec):
    """One hash of all results."""
    found = []
    for dtype in DTYPES:
        for x in (scaled(dtype), patterns(dtype)):
            finite = torch.where(x.isfinite(), x, 0)
            found += [hash_of(quantize(finite, spec, rounding, key=KEY, stream=STREAM)) for rounding in ALL_ROUNDINGS]
    return hashlib.sha256(" ".join(found).encode()).hexdigest()[:16]


@pytest.mark.parametrize("spec", SPECS)
def test_the_bits_are_those_of_every_version_before(spec):
    assert bits_of(spec) == json.loads(KEPT.read_text())[spec]


if __name__ == "__main__":
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    KEPT.write_text(json.dumps({spec: kept.get(spec) or bits_of(spec) for spec in SPECS}, indent=0) + "\n")
