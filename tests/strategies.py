"""Formats that hypothesis draws: a strategy a family."""

import dataclasses

import hypothesis.strategies as st

from swalp_fx import BlockFloat, FixedPoint, Float, Microscaling, Nvfp4, ScaledInteger
from swalp_fx.formats import MX_ELEMENTS, TOPS

_word_lengths = st.integers(2, 24)
_blocks = st.one_of(
    st.just({"tile": None}),  # one block
    st.lists(st.integers(-4, 3), min_size=1, max_size=3, unique=True).map(lambda dims: {"dims": dims, "tile": None}),
    st.tuples(st.sampled_from([0, -1]), st.integers(1, 40)).map(lambda tile: {"tile": tile}),
)


def _with_blocks(family, *fields):
    return st.builds(lambda blocks, *values: family(*values, **blocks), _blocks, *fields)


FIXED = st.builds(FixedPoint, _word_lengths, st.integers(-100, 100), st.booleans())
FLOATS = st.builds(Float, st.integers(2, 7), st.integers(0, 23), st.sampled_from(TOPS)) | st.builds(
    Float, st.just(8), st.integers(0, 23)
)
BLOCK_FLOATS = st.builds(
    lambda wl, bits, blocks: BlockFloat(wl, exponent_bits=bits, **blocks), _word_lengths, st.integers(2, 8), _blocks
)
TWOS_COMPLEMENT = BLOCK_FLOATS.map(lambda format: dataclasses.replace(format, symmetric=False))
MICROSCALING = _with_blocks(Microscaling, st.sampled_from([*MX_ELEMENTS.values()]))
SCALED_INTEGERS = _with_blocks(ScaledInteger, st.integers(2, 16))
NVFP4 = _with_blocks(Nvfp4)

POWER_OF_TWO_SCALE = FIXED | FLOATS | BLOCK_FLOATS | TWOS_COMPLEMENT | MICROSCALING
REAL_SCALE_FORMATS = SCALED_INTEGERS | NVFP4
EVERY_FORMAT = POWER_OF_TWO_SCALE | REAL_SCALE_FORMATS
