// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11), and the
// bits of it that an element draws. swalp_fx/random.py is the same in Python.
#pragma once

#include "portable.h"

namespace swalp_fx {

// The ten round keys: the Weyl sequence that starts at a key.
struct RoundKeys {
  uint64_t k[10][2];
  SWALP_HD explicit RoundKeys(uint64_t key) {
    auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      k[round][0] = k0;
      k[round][1] = k1;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

// Runs one counter in each lane of V, a vector of 64-bit lanes. Only the low halves count: a 32 x 32 -> 64 bit product leaves
// its low half in place, and its high half one shift away. kSets vectors side by side keep the multipliers busy while each
// waits for its product.
template <class Lanes, int kSets, class V>
SWALP_HD void philox4x32(V (&c)[kSets][4], const RoundKeys& keys) {
  SWALP_UNROLL
  for (int round = 0; round < 10; ++round) {
    SWALP_UNROLL
    for (int set = 0; set < kSets; ++set) {
      const V p0 = Lanes::multiply(c[set][0], 0xD2511F53u);
      const V p1 = Lanes::multiply(c[set][2], 0xCD9E8D57u);
      c[set][0] = (p1 >> 32) ^ c[set][1] ^ keys.k[round][0];
      c[set][1] = p1;
      c[set][2] = (p0 >> 32) ^ c[set][3] ^ keys.k[round][1];
      c[set][3] = p0;
    }
  }
}

struct OneLane {
  SWALP_HD static uint64_t multiply(uint64_t a, uint32_t m) { return (a & 0xFFFFFFFFu) * m; }
};

// 16 counters run side by side; each row of 16 neighbouring elements draws the same part of the
// same word of each. So SIMD lanes store their draws in order, without a shuffle.
constexpr int64_t kCounters = 16;

// The draws of an operation: `bits` random bits an element. Up to 16 bits come from half a word
// (low half first), more from a whole one: the generator costs more than all the rounding.
struct Random {
  uint64_t key = 0;
  uint64_t stream = 0;
  int bits = 16;  // 1 to 24

  SWALP_HD int64_t draws_per_word() const { return bits <= 16 ? 2 : 1; }
  // Elements that one set of 16 counters serves.
  SWALP_HD int64_t block() const { return 4 * kCounters * draws_per_word(); }
  // The draw in a half (0 or 1) of a word: its highest `bits` bits.
  SWALP_HD uint32_t draw(uint32_t word, int64_t half) const {
    return bits > 16 ? word >> (32 - bits) : ((half ? word >> 16 : word & 0xFFFFu) >> (16 - bits));
  }
};

// The four words of one counter.
SWALP_HD void words_of(const Random& random, int64_t counter, uint64_t (&words)[4]) {
  const auto n = static_cast<uint64_t>(counter);
  uint64_t c[1][4] = {{n, n >> 32, random.stream, random.stream >> 32}};
  philox4x32<OneLane>(c, RoundKeys(random.key));
  for (int j = 0; j < 4; ++j) words[j] = c[0][j];
}

// The draw of the element at row-major index i.
SWALP_HD uint32_t draw_at(const Random& random, int64_t i) {
  const int64_t row = i % random.block() / kCounters;
  uint64_t c[4];
  words_of(random, i / random.block() * kCounters + i % kCounters, c);
  const int64_t half = row % random.draws_per_word();
  const int64_t j = row / random.draws_per_word();
  const uint64_t word = j == 0 ? c[0] : j == 1 ? c[1] : j == 2 ? c[2] : c[3];
  return random.draw(static_cast<uint32_t>(word), half);
}

}  // namespace swalp_fx
