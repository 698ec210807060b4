"""Formats that hypothesis draws: elements, scales and blocks, and the families that laws speak of."""

import hypothesis.strategies as st

from swalp_fx import Format
from swalp_fx.formats import Absmax, Float, Integer, PowerOfTwo, Runs, Slices, TwoLevel, named

_word_lengths = st.integers(2, 24)
_tops = st.sampled_from(["ieee", "nan", "finite"])
BLOCKS = st.one_of(
    st.just(Slices()),  # one block
    st.lists(st.integers(-4, 3), min_size=1, max_size=3, unique=True).map(lambda dims: Slices(tuple(dims))),
    st.tuples(st.sampled_from([0, -1]), st.integers(1, 40)).map(lambda run: Runs((run,))),
)


def _block_floats(*signs):
    elements = st.builds(lambda wl, sign: Integer(wl, wl - 2, sign), _word_lengths, st.sampled_from(signs))
    return st.builds(Format, elements, st.integers(2, 8).map(PowerOfTwo), BLOCKS)


FIXED = st.builds(Integer, _word_lengths, st.integers(-100, 100), st.sampled_from(["twos", "sym"])).map(Format)
FLOATS = (
    st.builds(Float, st.integers(2, 7), st.integers(0, 23), _tops) | st.builds(Float, st.just(8), st.integers(0, 23))
).map(Format)
BLOCK_FLOATS = _block_floats("mag")
TWOS_COMPLEMENT = _block_floats("twos")
_OCP = [format.element for format in named.STEMS.values() if format.scale == named.E8M0]
MICROSCALING = st.builds(Format, st.sampled_from(_OCP), st.just(named.E8M0), BLOCKS)
SCALED_INTEGERS = st.builds(Format, st.integers(2, 16).map(Integer), st.just(Absmax()), BLOCKS)
NVFP4 = st.builds(Format, st.just(Float(2, 1)), st.just(TwoLevel(Float(4, 3))), BLOCKS)

POWER_OF_TWO_SCALE = FIXED | FLOATS | BLOCK_FLOATS | TWOS_COMPLEMENT | MICROSCALING
REAL_SCALE_FORMATS = SCALED_INTEGERS | NVFP4
EVERY_FORMAT = POWER_OF_TWO_SCALE | REAL_SCALE_FORMATS
