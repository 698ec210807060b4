// The loops, written for a compiler that vectorises. quantize_cpu.cpp includes this once for each
// instruction set, in a namespace that defines Lanes (see philox.h) and kLanes for it.

// A window on the random words, moved along as a thread goes through its elements.
class Words {
 public:
  explicit Words(const Random& r) : random(r), keys(r.key) {}

  const Random& random;

  // The words from element `index` on, and in `count` how many there are: at least one, at most `wanted`.
  const uint32_t* from(int64_t index, int64_t wanted, int64_t& count) {
    const int64_t block = index / kWordBlock;
    if (block < first || block >= end) {
      first = block;
      end = std::min(block + kBlocks, (index + wanted + kWordBlock - 1) / kWordBlock);
      for (int64_t b = first; b < end; ++b) {
        for (int64_t lane = 0; lane < kCounters; lane += 2 * kLanes) generate(b, lane);
      }
    }
    count = std::min(wanted, end * kWordBlock - index);
    return word + (index - first * kWordBlock);
  }

 private:
  static constexpr int64_t kBlocks = 16;  // 4 KiB of words: the L1 cache keeps them until they are used
  RoundKeys keys;
  int64_t first = 0, end = 0;
  alignas(64) uint32_t word[kBlocks * kWordBlock];

  // Even counters in one vector, odd ones in another: their low halves then join into one row of words.
  void generate(int64_t block, int64_t lane) {
    using Vector = Lanes::Vector;
    const uint64_t counter = static_cast<uint64_t>(block) * kCounters + static_cast<uint64_t>(lane);
    const Vector zero = Vector{};
    const Vector even = Lanes::twice_lane_number() + counter;
    Vector a[4] = {even, zero + (counter >> 32), zero + random.stream, zero + (random.stream >> 32)};
    Vector b[4] = {even + 1, a[1], a[2], a[3]};
    philox4x32<Lanes>(a, keys);
    philox4x32<Lanes>(b, keys);
    for (int j = 0; j < 4; ++j) {
      const Vector row = (a[j] & uint64_t{0xFFFFFFFF}) | (b[j] << 32);
      memcpy(word + (block - first) * kWordBlock + j * kCounters + lane, &row, sizeof(row));
    }
  }
};

template <Rounding R, class S, class Q>
void quantize_run(const S* x, S* y, int64_t n, int64_t index, int64_t index_step, const Q quantizer, Words& words) {
  using T = Compute<S>;
  const int bits = words.random.bits;
  if constexpr (R != Rounding::Stochastic) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      y[i] = static_cast<S>(quantizer.template apply<R>(static_cast<T>(x[i]), 0u, bits));
    }
  } else if (index_step == 1) {
    for (int64_t done = 0, count; done < n; done += count) {
      const uint32_t* word = words.from(index + done, n - done, count);
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        y[done + i] = static_cast<S>(quantizer.template apply<R>(static_cast<T>(x[done + i]), word[i], bits));
      }
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t word = word_at(words.random, index + i * index_step);
      y[i] = static_cast<S>(quantizer.template apply<R>(static_cast<T>(x[i]), word, bits));
    }
  }
}

// Bits of the largest finite magnitude; 0 where there is none.
template <class S>
typename Ieee<Compute<S>>::Bits maximum_of_run(const S* x, int64_t n) {
  using T = Compute<S>;
  typename Ieee<T>::Bits maximum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = finite_magnitude(static_cast<T>(x[i]));
    maximum = maximum < bits ? bits : maximum;
  }
  return maximum;
}

// Integer maximum does not depend on order, so neither do the results on the number of threads.
template <class Bits>
void raise(Bits* maximum, Bits value) {
  Bits seen = __atomic_load_n(maximum, __ATOMIC_RELAXED);
  while (seen < value && !__atomic_compare_exchange_n(maximum, &seen, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

template <Rounding R, class S, class Format>
void quantize(const Format& format, const Layout& layout, const S* x, S* y, const Random& random) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  const Runs runs(layout);

  if constexpr (!Format::shares_scale) {
    runs.for_each([&](auto each) {
      Words words{random};
      const auto quantizer = format.template quantizer<T>(0);
      each([&](const Run& r) { quantize_run<R>(x + r.memory, y + r.memory, r.size, r.index, runs.inner.index, quantizer, words); });
    });
  } else if (layout.blocks_are_rows() && runs.are_whole()) {
    runs.for_each([&](auto each) {
      Words words{random};
      each([&](const Run& r) {
        const auto quantizer = format.template quantizer<T>(maximum_of_run(x + r.memory, r.size));
        quantize_run<R>(x + r.memory, y + r.memory, r.size, r.index, runs.inner.index, quantizer, words);
      });
    });
  } else {
    std::vector<Bits> maxima(layout.blocks, 0);
    runs.for_each([&](auto each) {
      each([&](const Run& r) {
        if (runs.inner.block == 0) {
          raise(&maxima[r.block], maximum_of_run(x + r.memory, r.size));
        } else {
          for (int64_t i = 0; i < r.size; ++i) {
            raise(&maxima[r.block + i * runs.inner.block], finite_magnitude(static_cast<T>(x[r.memory + i])));
          }
        }
      });
    });
    runs.for_each([&](auto each) {
      Words words{random};
      each([&](const Run& r) {
        // One element at a time where neighbours lie in different blocks.
        const int64_t size = runs.inner.block == 0 ? r.size : 1;
        for (int64_t i = 0; i < r.size; i += size) {
          const auto quantizer = format.template quantizer<T>(maxima[r.block + i * runs.inner.block]);
          quantize_run<R>(x + r.memory + i, y + r.memory + i, size, r.index + i * runs.inner.index, runs.inner.index,
                          quantizer, words);
        }
      });
    });
  }
}

template <class S, class Format>
void quantize(const Format& format, const Layout& layout, const S* x, S* y, Rounding rounding, const Random& random) {
  switch (rounding) {
#define SWALP_CASE(R) \
  case Rounding::R:   \
    return quantize<Rounding::R>(format, layout, x, y, random);
    SWALP_CASE(Nearest)
    SWALP_CASE(Stochastic)
    SWALP_CASE(TowardZero)
    SWALP_CASE(Down)
    SWALP_CASE(Up)
    SWALP_CASE(NearestAway)
#undef SWALP_CASE
  }
}
