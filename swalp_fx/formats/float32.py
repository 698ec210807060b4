"""Numbers of float32, the type of scales and codebooks."""

from __future__ import annotations

import math
import struct

__all__ = ["LARGEST", "SMALLEST", "shortest", "to_float32"]

LARGEST = (2 - 2.0**-23) * 2.0**127
SMALLEST = 2.0**-149


def to_float32(value: float) -> float:
    """The float32 nearest to ``value``; infinity beyond the largest."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def shortest(value: float) -> str:
    """The shortest decimal that is read as this float32, without a plus sign: ``0.05``, ``1e20``."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next(text for text in texts if to_float32(float(text)) == value).replace("e+", "e")
