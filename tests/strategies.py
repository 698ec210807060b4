"""Formats that hypothesis draws: any element on any scale for any block, and the families that laws speak of."""

from dataclasses import replace

import hypothesis.strategies as st

from swalp_fx import Format
from swalp_fx.formats import (
    Absmax,
    Affine,
    Codebook,
    Float,
    FormatError,
    Integer,
    PowerOfTwo,
    Runs,
    Slices,
    Static,
    TwoLevel,
    named,
    posit,
)
from swalp_fx.formats.element import SIGNS, TOPS
from swalp_fx.formats.format import OVERFLOWS
from swalp_fx.formats.scale import LARGEST, RULES, SMALLEST

_word_lengths = st.integers(2, 24)
BLOCKS = st.one_of(
    st.just(Slices()),  # one block
    st.lists(st.integers(-4, 3), min_size=1, max_size=3, unique=True).map(lambda dims: Slices(tuple(dims))),
    st.tuples(st.sampled_from([0, -1]), st.integers(1, 40)).map(lambda run: Runs((run,))),
)

# ---- products ------------------------------------------------------------------------------------


def valid(build, *parts):
    """The results of ``build`` for parts that fit together."""

    def attempt(*values):
        try:
            return build(*values)
        except FormatError:
            return None

    return st.builds(attempt, *parts).filter(lambda made: made is not None)


INTEGERS = st.builds(Integer, st.integers(2, 16), st.integers(-20, 20), st.sampled_from([*SIGNS]))
EVERY_FLOAT = valid(
    Float,
    st.integers(2, 8),
    st.integers(0, 10) | st.integers(0, 23),
    st.sampled_from(["", *TOPS]),
    st.none() | st.integers(-20, 60),
    st.booleans(),
)
_numbers = st.floats(-100, 100, width=16).map(lambda value: value + 0.0)
_tables = st.lists(_numbers, min_size=2, max_size=20, unique=True).map(lambda values: tuple(sorted(values)))
CODEBOOKS = st.sampled_from([named.NORMAL_FLOAT_4, posit(8, 1), posit(5, 2)]) | valid(Codebook, _tables)
ELEMENTS = INTEGERS | EVERY_FLOAT | CODEBOOKS
POWERS_OF_TWO = st.builds(PowerOfTwo, st.integers(2, 8), st.booleans(), st.sampled_from([*RULES]))
SCALES = st.one_of(
    st.none(),
    POWERS_OF_TWO,
    st.just(Absmax()),
    st.floats(2.0**-20, 2.0**20, width=32).map(Static),
    st.sampled_from([Float(4, 3), Float(5, 2), Float(3, 2)]).map(TwoLevel),
    st.just(Affine()),
)
_overflows = st.sampled_from(OVERFLOWS)
PRODUCTS = valid(Format, ELEMENTS, SCALES, BLOCKS | st.just(Slices()), _overflows | st.just("saturate"))
# Those that have a law for single numbers.
_grids = INTEGERS | EVERY_FLOAT
GRIDS_ON_POWERS_OF_TWO = valid(Format, _grids, st.none() | POWERS_OF_TWO, st.just(Slices()), _overflows)

# A range may end at zero: an unsigned one, or one of which a dtype holds no other number on so large a scale.
ENDING_AT_ZERO = valid(Format, INTEGERS.map(lambda e: replace(e, sign="unsigned")), SCALES, BLOCKS) | valid(
    Format, _grids, st.floats(SMALLEST, LARGEST, width=32).map(Static), st.just(Slices()), _overflows
)

# ---- families ------------------------------------------------------------------------------------


def _block_floats(*signs):
    elements = st.builds(lambda wl, sign: Integer(wl, wl - 2, sign), _word_lengths, st.sampled_from(signs))
    return st.builds(Format, elements, st.integers(2, 8).map(PowerOfTwo), BLOCKS)


FIXED = st.builds(Integer, _word_lengths, st.integers(-100, 100), st.sampled_from(["twos", "sym"])).map(Format)
FLOATS = (
    st.builds(Float, st.integers(2, 7), st.integers(0, 23), st.sampled_from(["ieee", "nan", "finite"]))
    | st.builds(Float, st.just(8), st.integers(0, 23))
).map(Format)
BLOCK_FLOATS = _block_floats("mag")
TWOS_COMPLEMENT = _block_floats("twos")
_OCP = [format.element for format in named.STEMS.values() if format.scale == named.E8M0]
MICROSCALING = st.builds(Format, st.sampled_from(_OCP), st.just(named.E8M0), BLOCKS)
SCALED_INTEGERS = st.builds(Format, st.integers(2, 16).map(Integer), st.just(Absmax()), BLOCKS)
NVFP4 = st.builds(Format, st.just(Float(2, 1)), st.just(TwoLevel(Float(4, 3))), BLOCKS)

POWER_OF_TWO_SCALE = FIXED | FLOATS | BLOCK_FLOATS | TWOS_COMPLEMENT | MICROSCALING
REAL_SCALE_FORMATS = SCALED_INTEGERS | NVFP4
EVERY_FORMAT = POWER_OF_TWO_SCALE | REAL_SCALE_FORMATS | PRODUCTS
