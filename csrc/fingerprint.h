// A 64-bit fingerprint of memory: the sum of a hash of each word with its place. A sum has no order, so threads add up their
// parts, and a GPU gives the same number (swalp_fx/fingerprints.py).
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <cstring>

namespace swalp_fx {

// The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every bit of z changes every bit of the result.
inline uint64_t mixed(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return z ^ (z >> 31);
}

// A last word with fewer than eight bytes is filled with zeros.
inline uint64_t fingerprint(const void* memory, int64_t bytes) {
  constexpr int64_t kWord = sizeof(uint64_t), kGrain = 1 << 14;
  const char* begin = static_cast<const char*>(memory);
  const auto of_word = [&](int64_t i, int64_t size) {
    uint64_t word = 0;
    std::memcpy(&word, begin + i * kWord, size);
    return mixed(word + static_cast<uint64_t>(i + 1) * 0x9E3779B97F4A7C15);
  };
  const int64_t words = bytes / kWord, rest = bytes % kWord;
  std::atomic<uint64_t> sum = rest > 0 ? of_word(words, rest) : 0;
  torch::stable::parallel_for(0, words, kGrain, [&](int64_t from, int64_t to) {
    uint64_t part = 0;
    for (int64_t i = from; i < to; ++i) part += of_word(i, kWord);
    sum += part;
  });
  return sum;
}

}  // namespace swalp_fx
