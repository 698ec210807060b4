"""Formats by name. A standard's format is one line of this table."""

from __future__ import annotations

from .block import Runs
from .element import Codebook, Float, Integer
from .format import FLOAT, Format
from .scale import Absmax, PowerOfTwo, TwoLevel

E8M0 = PowerOfTwo(biased=True)
OF_16, OF_32, OF_64 = (Runs(((-1, size),)) for size in (16, 32, 64))

# Dettmers et al., "QLoRA", NeurIPS 2023, appendix E: quantiles of a normal distribution.
NORMAL_FLOAT_4 = Codebook(
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    )
)

# Stems: a block and suffixes may follow. OCP Microscaling Formats (MX) Specification v1.0, section 5, NVIDIA's NVFP4,
# and QLoRA's NF4.
STEMS: dict[str, Format] = {
    "mxfp8": Format(Float(4, 3), E8M0, OF_32),
    "mxfp8_e5m2": Format(Float(5, 2), E8M0, OF_32),
    "mxfp6_e3m2": Format(Float(3, 2), E8M0, OF_32),
    "mxfp6_e2m3": Format(Float(2, 3), E8M0, OF_32),
    "mxfp4": Format(Float(2, 1), E8M0, OF_32),
    "mxint8": Format(Integer(8, 6, "sym"), E8M0, OF_32),
    "nvfp4": Format(Float(2, 1), TwoLevel(Float(4, 3)), OF_16),
    "nf4": Format(NORMAL_FLOAT_4, Absmax(), OF_64),
}

# The spelling of PyTorch and others -> the spec.
ALIASES = {
    "e4m3fn": "e4m3",
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "float8_e4m3fnuz": "e4m3fnuz",
    "float8_e5m2fnuz": "e5m2fnuz",
}

FP16 = Format(Float(5, 10))  # IEEE 754 binary16
BF16 = Format(Float(8, 7))  # the upper half of a float32
TF32 = Format(Float(8, 10))  # the bits of a float32 that NVIDIA's tensor cores read
E5M2 = Format(Float(5, 2))  # OCP 8-bit Floating Point Specification v1.0, as is the next
E4M3 = Format(Float(4, 3))
E3M2 = Format(Float(3, 2))  # OCP Microscaling Formats (MX) Specification v1.0, as are the next two
E2M3 = Format(Float(2, 3))
E2M1 = Format(Float(2, 1))
BFP8 = Format(Integer(8, 6, "mag"), PowerOfTwo())  # the "big block" of the SWALP paper, 8 bits
MSFP12 = Format(Integer(4, 2, "mag"), PowerOfTwo(), OF_16)  # Rouhani et al., NeurIPS 2020, as is the next
MSFP16 = Format(Integer(8, 6, "mag"), PowerOfTwo(), OF_16)
INT8 = Format(Integer(8), Absmax())
INT4 = Format(Integer(4), Absmax())
MXFP8 = STEMS["mxfp8"]
MXFP8_E5M2 = STEMS["mxfp8_e5m2"]
MXFP6_E3M2 = STEMS["mxfp6_e3m2"]
MXFP6_E2M3 = STEMS["mxfp6_e2m3"]
MXFP4 = STEMS["mxfp4"]
MXINT8 = STEMS["mxint8"]
NVFP4 = STEMS["nvfp4"]
NF4 = STEMS["nf4"]

# Name -> format: every constant of this module, in lower case. A name may differ from the format's spec.
PRESETS: dict[str, Format] = {"float": FLOAT} | {
    name.lower(): value for name, value in tuple(globals().items()) if isinstance(value, Format)
}
CONSTANTS = tuple(name.upper() for name in PRESETS)
__all__ = ["ALIASES", "CONSTANTS", "PRESETS", "STEMS", *CONSTANTS]
