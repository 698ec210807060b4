"""Random draws: Random123's known answers, the order of elements, and keys."""

import pytest
import torch

from swalp_fx import random, reference

# Random123 1.14, tests/kat_vectors, lines "philox4x32 10": counter, key, words.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_known_answers(counter, key, words):
    counter, key, words = ([int(word, 16) for word in text.split()] for text in (counter, key, words))
    key = key[0] | key[1] << 32
    assert random.philox(key, tuple(counter)) == tuple(words)
    on_tensors = reference.philox(key, tuple(torch.tensor([c]) for c in counter))
    assert [word.item() for word in on_tensors] == words


@pytest.mark.parametrize("bits", [1, 8, 16, 17, 24])
@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1])
@pytest.mark.parametrize("stream", [0, 7, 2**32, 2**40 + 3, 2**63 - 1])
def test_the_oracle_draws_the_same(key, stream, bits):
    due = [random.draw(key, stream, i, bits) for i in range(300)]
    assert reference.random_draws(key, stream, 300, bits).tolist() == due


def test_signed_and_unsigned_keys_are_the_same_bits():
    assert [random.draw(-1, 5, i) for i in range(70)] == [random.draw(2**64 - 1, 5, i) for i in range(70)]


def test_draws_are_parts_of_the_words_in_order():
    """Rows of 16 elements: the low halves of the 16 counters' first words, their high halves, their second words'..."""
    counters = [random.philox(7, (counter, 0, 9, 0)) for counter in range(32)]
    halves = [
        words[j] >> 16 * half & 0xFFFF
        for group in (counters[:16], counters[16:])
        for j in range(4)
        for half in range(2)
        for words in group
    ]
    assert [random.draw(7, 9, i) for i in range(256)] == halves
    assert [random.draw(7, 9, i, 5) for i in range(256)] == [half >> 11 for half in halves]
    whole = [words[j] for group in (counters[:16], counters[16:]) for j in range(4) for words in group]
    assert [random.draw(7, 9, i, 24) for i in range(128)] == [word >> 8 for word in whole]


@pytest.mark.parametrize("bits, last", [(16, 2**35), (24, 2**34)])
def test_the_counters_high_half_counts(bits, last):
    """Past this many elements, 32 bits of counter would start over."""
    drawn = [[random.draw(3, 4, start + i, bits) for i in range(64)] for start in (0, last)]
    assert drawn[0] != drawn[1]


def test_streams_and_keys_are_unrelated():
    drawn = [reference.random_draws(key, stream, 1 << 15) for key in (1, 2) for stream in (0, 1, 2**32)]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            # Half of the bits of a ^ b are ones, within 5 sigma of as many fair coins.
            ones = sum(int((a ^ b).bitwise_right_shift(bit).bitwise_and(1).sum()) for bit in range(16))
            n = 16 * a.numel()
            assert abs(ones - n / 2) < 5 * (n / 4) ** 0.5


@pytest.mark.parametrize("bits", [16, 24])
def test_draws_are_uniform(bits):
    drawn = reference.random_draws(12, 34, 1_000_000, bits)
    assert drawn.min() >= 0 and drawn.max() < 2**bits
    for shift in (0, bits - 8):
        counts = torch.bincount(drawn >> shift & 255, minlength=256).double()
        expected = drawn.numel() / 256
        chi_squared = float(((counts - expected) ** 2 / expected).sum())
        # 255 degrees of freedom: mean 255, variance 510; five sigma.
        assert abs(chi_squared - 255) < 5 * 510**0.5


def test_fold_in():
    keys = {random.fold_in(key, data) for key in (0, 1, -1) for data in range(100)}
    assert len(keys) == 300
    assert all(0 <= key < 2**64 for key in keys)
    assert random.fold_in(5, 6) == random.fold_in(5, 6)
    assert random.fold_in(-1, 6) == random.fold_in(2**64 - 1, 6)


def test_torch_manual_seed_rules_the_keys():
    torch.manual_seed(3)
    first, second = random.draw_key(), random.draw_key()
    assert first.dtype == torch.int64 and first.shape == () and first.device.type == "cpu"
    assert first != second
    torch.manual_seed(3)
    assert random.draw_key() == first


def test_a_generator_leaves_the_default_one_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, other = (random.draw_key(torch.Generator().manual_seed(5)) for _ in range(2))
    assert one == other
    assert torch.equal(torch.get_rng_state(), before)


def test_streams_of_a_site_and_of_a_parameter_are_distinct_and_do_not_change():
    found = [random.error_stream(7), random.imaginary_stream(7), random.tensor_stream(7, 3)]
    assert found == [7 + 2**32, 7 + 2**33, 7 + 3 * 2**40] and 7 < random.SITES == 2**32
    assert [random.parameter_stream(role, 7) for role in random.ROLES.values()] == [7 + n * 2**32 for n in range(5)]
    key = torch.tensor(5)
    assert [int(random.step_key(key, 2)), int(random.rank_key(key, 3))] == [5 + 2 * 2**32, 6]


def test_a_stream_that_is_taken_gives_another_one():
    taken = set()
    found = [random.free_stream(taken, *place) for place in (("layer",), ("layer",), ("layer", "again"))]
    assert found[:2] == [random.stream_of("layer"), random.stream_of("layer", "again")]
    assert found[2] == random.stream_of("layer", "again", "again") and taken == set(found)
