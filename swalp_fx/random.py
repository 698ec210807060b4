"""Counter-based random words: a pure function of (key, stream, element index).

Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3",
SC'11), used like JAX's keys. This module defines the words in Python integers; csrc/philox.h
computes the same words.
"""

from __future__ import annotations

import hashlib

import torch

__all__ = [
    "ROLES",
    "SITES",
    "draw",
    "draw_key",
    "draws_per_word",
    "error_stream",
    "fold_in",
    "free_stream",
    "imaginary_stream",
    "is_captured",
    "parameter_stream",
    "philox",
    "rank_key",
    "step_key",
    "stream_of",
    "tensor_stream",
]

MASK = 0xFFFFFFFF
# SC'11, section 3.3: the two multipliers, and the Weyl increments of the key (the golden
# ratio and sqrt(3) - 1, in 0.32 fixed point).
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10

# 16 counters run side by side, and each row of 16 neighbouring elements draws the same part of the same
# word of each. So 16 SIMD lanes, or 4 GPU threads with 16-byte accesses, store their draws without a shuffle.
COUNTERS = 16

# The 64 bits of a stream id in a graph: the site (32 bits), its error signal (1 bit), the imaginary part of a complex
# tensor (1 bit), and the tensor's number in an output of several (from bit 40). So distinct sites, signals, parts and
# tensors never share a random word.
SITES = 1 << 32
ERROR = 1 << 32
IMAGINARY = 1 << 33
TENSOR = 1 << 40
# In an optimizer step and in an average, which have keys of their own: the index of the parameter (32 bits), and above
# it the number of the role. Momentum is last: an optimizer's second state tensor of a parameter takes the next number.
ROLES = {"average": 0, "gradient": 1, "master": 2, "weight": 3, "momentum": 4}
ROLE = 32
# The lowest bit of a key that takes the number of a time step; ranks take the bits below.
STEP = 32


@torch.compiler.disable(reason="the products of Philox take 64 bits, one more than a compiled integer has")
def philox(key: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """The four 32-bit words of Philox4x32-10 for a 64-bit ``key`` and a 4 x 32-bit ``counter``."""
    k0, k1 = key & MASK, (key >> 32) & MASK
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        p0, p1 = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def draws_per_word(bits: int) -> int:
    """2 or 1: up to 16 random bits take half a word, the low half first; more take a whole word."""
    return 2 if bits <= 16 else 1


def draw(key: int, stream: int, index: int, bits: int = 16) -> int:
    """The ``bits`` random bits, as an integer, of the element at row-major ``index``."""
    per_word = draws_per_word(bits)
    block, within = divmod(index, 4 * per_word * COUNTERS)
    row, lane = divmod(within, COUNTERS)
    counter = block * COUNTERS + lane
    words = philox(key, (counter & MASK, counter >> 32, stream & MASK, (stream >> 32) & MASK))
    word, half = words[row // per_word], row % per_word
    if per_word == 1:
        return word >> (32 - bits)
    return (word >> 16 * half & 0xFFFF) >> (16 - bits)


def fold_in(key: int, data: int) -> int:
    """A new 64-bit key from a key and a number (a step, a rank); distinct numbers give distinct keys."""
    # Only keys use the highest stream, so no element ever draws the bits of a key.
    words = philox(key, (data & MASK, (data >> 32) & MASK, MASK, MASK))
    return words[0] | words[1] << 32


def stream_of(*place: str) -> int:
    """The 32 bits of a site's stream: a hash of the words that name the place."""
    return int.from_bytes(hashlib.blake2b("|".join(place).encode(), digest_size=4).digest(), "little")


def free_stream(taken: set[int], *place: str) -> int:
    """``stream_of(*place)``, added to ``taken``; another hash if it is taken, as may happen among 100,000 places."""
    while (stream := stream_of(*place)) in taken:
        place = (*place, "again")
    taken.add(stream)
    return stream


def error_stream(stream: int) -> int:
    """The stream of the error signal of a site's output."""
    return stream | ERROR


def imaginary_stream(stream: int) -> int:
    """The stream of the imaginary part of a complex tensor; the real part has the tensor's own."""
    return stream | IMAGINARY


def tensor_stream(stream: int, number: int) -> int:
    """The stream of one of several tensors of an output, by its number."""
    return stream + number * TENSOR


def parameter_stream(role: int, index: int) -> int:
    """The stream of a parameter in an optimizer step or an average, by the number of its role in ROLES."""
    return role << ROLE | index


def step_key(key: torch.Tensor, time: int) -> torch.Tensor:
    """The key of one time step of a loop; that of step 0 is ``key``."""
    return key ^ (time << STEP)


def rank_key(key: torch.Tensor, rank: int) -> torch.Tensor:
    """The key of one process of a group; that of rank 0 is ``key``. Distinct keys are all that Philox asks for."""
    return key ^ rank


def draw_key(generator: torch.Generator | None = None) -> torch.Tensor:
    """A fresh key, int64 of shape [], from ``generator`` or torch's default CPU generator.

    ``torch.manual_seed`` seeds it. Activation checkpointing restores torch's state, and so draws
    the same key again. The key is on the CPU: kernels take it by value, so no device waits.

    While a CUDA graph is captured, the key is on the GPU, from the generator there. Each replay
    advances that generator. A key taken by value would be the same in every replay.

    Raises ValueError for a generator under capture, since a replay cannot advance it.
    """
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    device = "cpu"
    if is_captured():
        if generator is not None:
            raise ValueError("a CUDA graph being captured cannot draw from this generator at each replay; pass a key")
        device = "cuda"
    return torch.randint(low, high, (), generator=generator, dtype=torch.int64, device=device)


def is_captured() -> bool:
    """Whether a CUDA graph is being captured. Its kernels then run again at each replay, without Python."""
    # Asking about capture would initialise CUDA; under torch.compile nothing runs yet.
    asked = not torch.compiler.is_compiling() and torch.cuda.is_initialized()
    return asked and torch.cuda.is_current_stream_capturing()
