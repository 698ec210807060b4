// The loops, written for a compiler that vectorises. quantize_cpu.cpp includes this once for each
// instruction set, in a namespace that defines Lanes (see philox.h) and kLanes for it.

// A window on the draws, moved along as a thread goes through its elements.
class Draws {
 public:
  explicit Draws(const Random& r) : random(r), keys(r.key) {}

  const Random random;

  // The draws from element `index` on, and in `count` how many there are: at least one, at most `wanted`.
  const uint32_t* from(int64_t index, int64_t wanted, int64_t& count) {
    if (index < begin || index >= end) refill(index, wanted);
    count = std::min(wanted, end - index);
    return draw + (index - begin);
  }

 private:
  static constexpr int64_t kWindow = 2048;  // 8 KiB: the L1 cache keeps them until they are used
  RoundKeys keys;
  int64_t begin = 0, end = 0;
  alignas(64) uint32_t draw[kWindow];

  void refill(int64_t index, int64_t wanted) {
    const int64_t block = random.block();
    begin = index / block * block;
    end = std::min(begin + kWindow, (index + wanted + block - 1) / block * block);
    const bool halves = random.draws_per_word() == 2;
    const int shift = (halves ? 16 : 32) - random.bits;
    uint32_t* row = draw;
    for (int64_t counter = begin / block * kCounters; row < draw + (end - begin); counter += kCounters, row += block) {
      for (int64_t lane = 0; lane < kCounters; lane += 2 * kLanes) {
        halves ? generate<2>(counter + lane, row + lane, shift) : generate<1>(counter + lane, row + lane, shift);
      }
    }
  }

  // Even counters in one vector, odd ones in another: their low halves then join into one row.
  template <int kPerWord>
  void generate(int64_t counter, uint32_t* row, int shift) const {
    using Vector = Lanes::Vector;
    const Vector zero = Vector{};
    const Vector even = Lanes::twice_lane_number() + static_cast<uint64_t>(counter);
    Vector a[4] = {even, zero + (static_cast<uint64_t>(counter) >> 32), zero + random.stream,
                   zero + (random.stream >> 32)};
    Vector b[4] = {even + 1, a[1], a[2], a[3]};
    philox4x32<Lanes>(a, keys);
    philox4x32<Lanes>(b, keys);
    for (int j = 0; j < 4; ++j, row += kPerWord * kCounters) {
      const Vector words = (a[j] & uint64_t{0xFFFFFFFF}) | (b[j] << 32);
      if constexpr (kPerWord == 1) {
        store(row, (words >> shift) & mask(0xFFFFFFFFu >> shift));
      } else {
        store(row, (words >> shift) & mask(0xFFFFu >> shift));
        store(row + kCounters, (words >> (16 + shift)) & mask(0xFFFFu >> shift));
      }
    }
  }

  static uint64_t mask(uint32_t m) { return uint64_t{m} << 32 | m; }
  static void store(uint32_t* row, const Lanes::Vector& v) { memcpy(row, &v, sizeof(v)); }
};

// Not inlined: formats share quantizers, and each copy costs seconds of compiling.
template <class S, class Q, class Round>
__attribute__((noinline)) void quantize_run(const S* x, S* y, int64_t n, int64_t index, int64_t index_step,
                                            const Q quantizer, const Round round, Draws& draws) {
  using T = Compute<S>;
  if constexpr (!Round::draws) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<S>(quantizer.apply(static_cast<T>(x[i]), 0u, round));
  } else if (index_step == 1) {
    for (int64_t done = 0, count; done < n; done += count) {
      const uint32_t* draw = draws.from(index + done, n - done, count);
      const S* from = x + done;
      S* to = y + done;
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) {
        to[i] = static_cast<S>(quantizer.apply(static_cast<T>(from[i]), draw[i], round));
      }
    }
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t draw = draw_at(draws.random, index + i * index_step);
      y[i] = static_cast<S>(quantizer.apply(static_cast<T>(x[i]), draw, round));
    }
  }
}

template <class S>
__attribute__((noinline)) typename Ieee<Compute<S>>::Bits maximum_of_run(const S* x, int64_t n) {
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

template <class S>
void maxima_of_blocks(const Layout& layout, const S* x, typename Ieee<Compute<S>>::Bits* maxima) {
  const Dim inner = layout.inner();
  Runs(layout).for_each([&](auto each) {
    each([&](const Place& p, int64_t size) {
      if (inner.step.block == 0) {
        raise(&maxima[p.block], maximum_of_run(x + p.memory, size));
      } else {
        for (int64_t i = 0; i < size; ++i) {
          raise(&maxima[p.block + i * inner.step.block], finite_magnitude(static_cast<Compute<S>>(x[p.memory + i])));
        }
      }
    });
  });
}

// Asks for the next row while this one is computed: its maximum is found at the speed of the cache, not of memory.
template <class S>
inline void prefetch(const S* next, int64_t n) {
  constexpr int64_t kLine = 64, kMost = 1 << 14;  // bytes
  const auto* bytes = reinterpret_cast<const char*>(next);
  const int64_t size = std::min<int64_t>(n * static_cast<int64_t>(sizeof(S)), kMost);
  for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(bytes + i, 0, 2);
}

// Tiles of kSize neighbours, one after another: with the size known, a tile is a few instructions, and no call.
template <int kSize, class S, class Format, class Round>
__attribute__((noinline)) void quantize_tiles(const Format format, const S* x, S* y, int64_t tiles, int64_t index,
                                              const Round round, Draws& draws) {
  using T = Compute<S>;
  for (int64_t tile = 0; tile < tiles; ++tile, x += kSize, y += kSize, index += kSize) {
    typename Ieee<T>::Bits maximum = 0;
    for (int i = 0; i < kSize; ++i) {
      const auto bits = finite_magnitude(static_cast<T>(x[i]));
      maximum = maximum < bits ? bits : maximum;
    }
    int64_t count = 0;
    const uint32_t* draw = Round::draws ? draws.from(index, (tiles - tile) * kSize, count) : nullptr;
    format.template with_quantizer<T>(maximum, T(0), [&](const auto& quantizer) {
#pragma GCC ivdep
      for (int i = 0; i < kSize; ++i) {
        y[i] = static_cast<S>(quantizer.apply(static_cast<T>(x[i]), Round::draws ? draw[i] : 0u, round));
      }
    });
  }
}

// Whether the layout is tiles of 16 or 32 neighbours, row after row; if so, they are done.
template <class S, class Format, class Round>
bool quantized_tiles(const Format& format, const Layout& layout, const S* x, S* y, const Round& round,
                     const Random& random) {
  const int64_t size = layout.inner().size;
  if (!layout.blocks_are_rows() || layout.rank != 2 || layout.inner().step.index != 1 || (size != 16 && size != 32)) {
    return false;
  }
  const Place& across = layout.dims[0].step;
  if (across.memory != size || across.index != size || layout.first.index % size != 0) return false;
  torch::stable::parallel_for(0, layout.dims[0].size, Runs::kGrain / size, [&](int64_t begin, int64_t end) {
    Draws draws(random);
    const int64_t memory = layout.first.memory + begin * size, index = layout.first.index + begin * size;
    const auto run = size == 16 ? &quantize_tiles<16, S, Format, Round> : &quantize_tiles<32, S, Format, Round>;
    run(format, x + memory, y + memory, end - begin, index, round, draws);
  });
  return true;
}

template <class S, class Format, class Round>
void quantize(const Format& format, const Cover& cover, const S* x, S* y, const Round& round, const Random& random) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  const auto run = [&](const Dim& inner, const Place& p, int64_t size, const auto& quantizer, Draws& draws) {
    quantize_run(x + p.memory, y + p.memory, size, p.index, inner.step.index, quantizer, round, draws);
  };

  if constexpr (Format::shared == Shared::Nothing) {
    format.template with_quantizer<T>(0, T(0), [&](const auto& quantizer) {
      for (const Layout& layout : cover.layouts) {
        Runs(layout).for_each([&](auto each) {
          Draws draws(random);
          each([&](const Place& p, int64_t size) { run(layout.inner(), p, size, quantizer, draws); });
        });
      }
    });
    return;
  }

  const auto whole_rows = [](const Layout& layout) {
    return Format::shared == Shared::Block && layout.blocks_are_rows() && Runs(layout).are_whole();
  };
  std::vector<Bits> maxima;
  T tensor_maximum = 0;
  if (!std::all_of(cover.layouts.begin(), cover.layouts.end(), whole_rows)) {
    maxima.resize(cover.blocks);
    for (const Layout& layout : cover.layouts) {
      if (!whole_rows(layout)) maxima_of_blocks(layout, x, maxima.data());
    }
    if (Format::shared == Shared::BlockAndTensor) {
      tensor_maximum = bit_cast<T>(*std::max_element(maxima.begin(), maxima.end()));
    }
  }

  for (const Layout& layout : cover.layouts) {
    if constexpr (Format::shared == Shared::Block && !std::is_same_v<S, double>) {
      if (quantized_tiles(format, layout, x, y, round, random)) continue;
    }
    const Dim inner = layout.inner();
    const bool rows = whole_rows(layout);
    Runs(layout).for_each([&](auto each) {
      Draws draws(random);
      each([&](const Place& p, int64_t size) {
        // One element at a time where neighbours lie in different blocks.
        const int64_t piece = inner.step.block == 0 ? size : 1;
        Place at = p;
        for (int64_t i = 0; i < size; i += piece, inner.advance(at, piece)) {
          const Bits maximum = rows ? maximum_of_run(x + at.memory, piece) : maxima[at.block];
          if (rows) prefetch(x + at.memory + piece, piece);
          format.template with_quantizer<T>(maximum, tensor_maximum,
                                            [&](const auto& quantizer) { run(inner, at, piece, quantizer, draws); });
        }
      });
    });
  }
}
