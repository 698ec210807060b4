// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
// swalp_fx/random.py states the same law in Python.
#pragma once

#include "portable.h"

namespace swalp_fx {

// Which words an operation draws: element i takes word_at(random, i).
struct Random {
  uint64_t key = 0;
  uint64_t stream = 0;
  int bits = 31;  // random bits that stochastic rounding uses, 1 to 31
};

// 64 elements in row share 16 counters: element i of the block takes word i / 16 of counter
// i % 16. So 16 SIMD lanes run one counter each and store their words in order, without a shuffle.
constexpr int64_t kWordBlock = 64;
constexpr int64_t kCounters = 16;

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

// Runs one counter in each lane of V, a vector of 64-bit lanes of which only the low halves count:
// a 32 x 32 -> 64 bit product then leaves its low half in place and its high half one shift away.
template <class Lanes, class V>
SWALP_HD void philox4x32(V (&c)[4], const RoundKeys& keys) {
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
  for (int round = 0; round < 10; ++round) {
    const V p0 = Lanes::multiply(c[0], 0xD2511F53u);
    const V p1 = Lanes::multiply(c[2], 0xCD9E8D57u);
    c[0] = (p1 >> 32) ^ c[1] ^ keys.k[round][0];
    c[1] = p1;
    c[2] = (p0 >> 32) ^ c[3] ^ keys.k[round][1];
    c[3] = p0;
  }
}

struct OneLane {
  SWALP_HD static uint64_t multiply(uint64_t a, uint32_t m) { return (a & 0xFFFFFFFFu) * m; }
};

// The four words of one counter.
SWALP_HD void words_of(const Random& random, int64_t counter, uint64_t (&c)[4]) {
  c[0] = static_cast<uint64_t>(counter);
  c[1] = static_cast<uint64_t>(counter) >> 32;
  c[2] = random.stream;
  c[3] = random.stream >> 32;
  philox4x32<OneLane>(c, RoundKeys(random.key));
}

// The word of the element at row-major index i.
SWALP_HD uint32_t word_at(const Random& random, int64_t i) {
  uint64_t c[4];
  words_of(random, i / kWordBlock * kCounters + i % kCounters, c);
  return static_cast<uint32_t>(c[i % kWordBlock / kCounters]);
}

}  // namespace swalp_fx
