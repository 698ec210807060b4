// The loops, written for a compiler that vectorises. quantize_cpu.cpp includes this once for each
// instruction set, in a namespace that defines Lanes (see philox.h) and kLanes for it: 1, 4 or 8.

// Asks for memory to be brought into the L2 cache; where there is none, that does nothing.
inline void ask_for(const void* memory, int64_t bytes) {
  const char* at = static_cast<const char*>(memory);
  for (const char* end = at + bytes; at < end; at += 64) __builtin_prefetch(at, 0, 2);
}

// A window on the draws, moved along as a thread goes through its elements.
class Draws {
 public:
  explicit Draws(const Random& r) : random(r), keys(r.key) {}

  const Random random;

  // The draws from element `index` on, and in `count` how many there are: at least one, at most `wanted`.
  // While it makes them it asks for the memory of the elements a piece later than x, those of `index`, so that the next
  // piece is in the L2 cache when it is wanted. That may lie beyond the tensor's end, where asking does nothing.
  template <class S>
  const uint32_t* from(int64_t index, int64_t wanted, int64_t& count, const S* x) {
    if (index < begin || index >= end) refill(index, wanted, {reinterpret_cast<const char*>(x + Runs::kGrain), sizeof(S)});
    count = std::min(wanted, end - index);
    return draw + (index - begin);
  }

 private:
  // Few, so that the memory that results go to is not left idle for long.
  static constexpr int64_t kWindow = 512;
  RoundKeys keys;
  int64_t begin = 0, end = 0;
  alignas(64) uint32_t draw[kWindow];

  // Counters at a time, in two pairs of vectors, one of even counters and one of odd ones: their low halves join into
  // rows.
  static constexpr int64_t kPair = 2 * kLanes, kAtOnce = 2 * kPair;

  struct Later {
    const char* at;
    int64_t size;  // of an element, in bytes
    void ask(int64_t elements) {
      ask_for(at, elements * size);
      at += elements * size;
    }
  };

  void refill(int64_t index, int64_t wanted, Later later) {
    if (random.bits == 16) return refill_with<2>(index, wanted, std::integral_constant<int, 0>(), later);
    if (random.draws_per_word() == 2) return refill_with<2>(index, wanted, 16 - random.bits, later);
    refill_with<1>(index, wanted, 32 - random.bits, later);
  }

  template <int kPerWord, class Shift>
  __attribute__((noinline)) void refill_with(int64_t index, int64_t wanted, const Shift unused_bits, Later later) {
    constexpr int64_t block = 4 * kPerWord * kCounters;
    const int64_t first = index / block * kCounters / kAtOnce * kAtOnce;
    begin = first / kCounters * block;
    const int64_t needed = (std::min(begin + kWindow, index + wanted) + block - 1) / block * kCounters;
    const int64_t last = (needed + kAtOnce - 1) / kAtOnce * kAtOnce;
    end = last / kCounters * block;
    for (int64_t counter = first; counter < last; counter += kAtOnce) {
      later.ask(4 * kPerWord * kAtOnce);
      generate<kPerWord>(counter, (counter - first) / kCounters * block + (counter - first) % kCounters, unused_bits);
    }
  }

  template <int kPerWord, class Shift>
  __attribute__((always_inline)) void generate(int64_t counter, int64_t at, const Shift unused_bits) {
    using Vector = Lanes::Vector;
    const int shift = unused_bits;
    const auto first = static_cast<uint64_t>(counter);
    const Vector zero = Vector{};
    Vector c[4][4];
    SWALP_UNROLL
    for (int set = 0; set < 4; ++set) {
      c[set][0] = Lanes::twice_lane_number() + first + (set / 2 * kPair + set % 2);
      c[set][1] = zero + (first >> 32);  // one for all, since kAtOnce divides 2^32: its first product is too
      c[set][2] = zero + random.stream;
      c[set][3] = zero + (random.stream >> 32);
    }
    philox4x32<Lanes>(c, keys);
    SWALP_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t* row = draw + at + pair * (kPair < kCounters ? kPair : 4 * kPerWord * kCounters);
      SWALP_UNROLL
      for (int j = 0; j < 4; ++j, row += kPerWord * kCounters) {
        const Vector words = Lanes::join(c[2 * pair][j], c[2 * pair + 1][j]);
        if constexpr (kPerWord == 1) {
          store(row, (words >> shift) & mask(0xFFFFFFFFu >> shift));
        } else {
          store(row, (words >> shift) & mask(0xFFFFu >> shift));
          store(row + kCounters, (words >> (16 + shift)) & mask(0xFFFFu >> shift));
        }
      }
    }
  }

  static uint64_t mask(uint32_t m) { return uint64_t{m} << 32 | m; }
  static void store(uint32_t* row, const Lanes::Vector& v) { memcpy(row, &v, sizeof(v)); }
};

// The bits in which n neighbours differ from what they are rounded to.
template <class S, class Q>
inline auto differences(const S* x, int64_t n, const Q& quantizer, const Look& look) {
  using Bits = std::conditional_t<sizeof(S) == 2, uint16_t, typename Ieee<Compute<S>>::Bits>;
  Bits found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const S rounded = static_cast<S>(quantizer.apply(static_cast<Compute<S>>(x[i]), 0u, look));
    found |= swalp_fx::bit_cast<Bits>(rounded) ^ swalp_fx::bit_cast<Bits>(x[i]);
  }
  return found;
}

// Meanwhile it asks for as many elements behind these, whose maximum is often the next thing that is wanted.
template <class S, class Q>
__attribute__((noinline)) void look_at_run(const S* x, int64_t n, const Q quantizer, const Look look) {
  constexpr int64_t chunk = 256;
  for (int64_t done = 0; done < n; done += chunk) {
    const int64_t size = std::min(chunk, n - done);
    ask_for(x + n + done, size * sizeof(S));
    look.tell(differences(x + done, size, quantizer, look) != 0);
  }
}

// Not inlined: formats share quantizers, and each copy costs seconds of compiling.
template <class S, class Q, class Round>
__attribute__((noinline)) void quantize_run(const S* x, S* y, int64_t n, int64_t index, int64_t index_step,
                                            const Q quantizer, const Round round, Draws& draws) {
  using T = Compute<S>;
  if constexpr (std::is_same_v<Round, Look>) {
    look_at_run(x, n, quantizer, round);
  } else if constexpr (!Round::draws) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<S>(quantizer.apply(static_cast<T>(x[i]), 0u, round));
  } else if (index_step == 1) {
    for (int64_t done = 0, count; done < n; done += count) {
      const uint32_t* draw = draws.from(index + done, n - done, count, x + done);
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
  for (int64_t i = 0; i < n; ++i) maximum = larger(maximum, magnitude_bits(static_cast<T>(x[i])));
  if (is_finite_magnitude<T>(maximum)) return maximum;
  maximum = 0;
  for (int64_t i = 0; i < n; ++i) maximum = larger(maximum, finite_magnitude(static_cast<T>(x[i])));
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
          const auto value = static_cast<Compute<S>>(x[p.memory + i * inner.step.memory]);
          raise(&maxima[p.block + i * inner.step.block], finite_magnitude(value));
        }
      }
    });
  });
}

// kSize neighbours with one quantizer. Not unrolled: the loop is what the compiler vectorises.
template <int kSize, class S, class Q, class Round>
inline void quantize_tile(const Q& quantizer, const S* x, S* y, const Round& round, const uint32_t* draw) {
  if constexpr (std::is_same_v<Round, Look>) return round.tell(differences(x, kSize, quantizer, round) != 0);
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int i = 0; i < kSize; ++i) {
    y[i] = static_cast<S>(quantizer.apply(static_cast<Compute<S>>(x[i]), Round::draws ? draw[i] : 0u, round));
  }
}

constexpr int64_t kBatch = 32;  // tiles: more than GCC unrolls a loop whole for, which would keep it from vectorising

// The largest finite magnitude in each of kBatch tiles. In rounds that halve what is left, which vectorises without a
// horizontal maximum for each tile.
template <int kSize, class S>
inline void maxima_of_tiles(const S* x, typename Ieee<Compute<S>>::Bits (&maxima)[kBatch]) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  constexpr int kWidth = 16;
  Bits halves[kBatch * kWidth];
  for (int64_t t = 0; t < kBatch; ++t) {
    for (int i = 0; i < kWidth; ++i) {
      Bits maximum = magnitude_bits(static_cast<T>(x[t * kSize + i]));
      for (int j = i + kWidth; j < kSize; j += kWidth) {
        maximum = larger(maximum, magnitude_bits(static_cast<T>(x[t * kSize + j])));
      }
      halves[t * kWidth + i] = maximum;
    }
  }
  SWALP_UNROLL
  for (int n = kBatch * kWidth / 2; n >= kBatch; n /= 2) {
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) halves[i] = larger(halves[2 * i], halves[2 * i + 1]);
  }
  Bits maximum = 0;
  for (int64_t t = 0; t < kBatch; ++t) {
    maxima[t] = halves[t];
    maximum = larger(maximum, maxima[t]);
  }
  if (is_finite_magnitude<T>(maximum)) return;
  for (int64_t t = 0; t < kBatch; ++t) maxima[t] = maximum_of_run(x + t * kSize, kSize);
}

// Tiles of kSize neighbours, one after another, in batches: first the maxima, then the quantizers, then the rounding, so
// that no tile waits for its own maximum.
template <int kSize, class S, class Format, class Round>
__attribute__((noinline)) void quantize_tiles(const Format format, const S* x, S* y, int64_t tiles, int64_t index,
                                              Compute<S> tensor_maximum, const Round round, Draws& draws) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  for (int64_t batch; tiles > 0; tiles -= batch, x += batch * kSize, y += batch * kSize, index += batch * kSize) {
    batch = std::min(kBatch, tiles);
    Bits maxima[kBatch] = {};
    if (batch == kBatch) {
      maxima_of_tiles<kSize>(x, maxima);
    } else {
      for (int64_t t = 0; t < batch; ++t) maxima[t] = maximum_of_run(x + t * kSize, kSize);
    }
    Bits unusual = 0;
    for (int64_t t = 0; t < kBatch; ++t) unusual |= Bits(t < batch) & Bits(!format.template is_usual<T>(maxima[t]));
    using Quantizer = decltype(format.template usual<T>(maxima[0], tensor_maximum));
    // Divisions are done for all tiles at once; what takes none is faster made than stored.
    constexpr bool kDivides = std::is_same_v<decltype(Quantizer::scale), RealScale<T>>;
    Quantizer quantizers[kDivides ? kBatch : 1];
    for (int64_t t = 0; kDivides && t < kBatch; ++t) quantizers[t] = format.template usual<T>(maxima[t], tensor_maximum);
    for (int64_t t = 0; t < batch; ++t) {
      const int64_t at = t * kSize;
      int64_t count = 0;
      const uint32_t* draw = Round::draws ? draws.from(index + at, (tiles - t) * kSize, count, x + at) : nullptr;
      if (unusual == 0) {
        const Quantizer quantizer = kDivides ? quantizers[t] : format.template usual<T>(maxima[t], tensor_maximum);
        quantize_tile<kSize>(quantizer, x + at, y + at, round, draw);
      } else {
        format.template with_quantizer<T>(maxima[t], tensor_maximum, [&](const auto& quantizer) {
          quantize_tile<kSize>(quantizer, x + at, y + at, round, draw);
        });
      }
    }
  }
}

// Whether the layout is tiles of 16 or 32 neighbours, row after row.
inline bool are_tiles(const Layout& layout) {
  const int64_t size = layout.inner().size;
  if (!layout.blocks_are_rows() || layout.rank != 2 || layout.inner().step.index != 1 || (size != 16 && size != 32)) {
    return false;
  }
  const Place& across = layout.dims[0].step;
  return across.memory == size && across.index == size && layout.first.index % size == 0;
}

template <class S, class Format, class Round>
void quantize_layout_of_tiles(const Format& format, const Layout& layout, const S* x, S* y, Compute<S> tensor_maximum,
                              const Round& round, const Random& random) {
  const int64_t size = layout.inner().size;
  const auto run = size == 16 ? &quantize_tiles<16, S, Format, Round> : &quantize_tiles<32, S, Format, Round>;
  torch::stable::parallel_for(0, layout.dims[0].size, Runs::kGrain / size, [&](int64_t begin, int64_t end) {
    Draws draws(random);
    const int64_t memory = layout.first.memory + begin * size, index = layout.first.index + begin * size;
    run(format, x + memory, y + memory, end - begin, index, tensor_maximum, round, draws);
  });
}

// The largest finite magnitude of all n elements.
template <class S>
typename Ieee<Compute<S>>::Bits maximum_of_all(const S* x, int64_t n) {
  Layout all;
  all.dims[all.rank++] = {n, {1, 1, 0}};
  all.numel = n;
  typename Ieee<Compute<S>>::Bits maximum = 0;
  maxima_of_blocks(all, x, &maximum);
  return maximum;
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
  } else {
    T tensor_maximum = 0;
    if (Format::shared == Shared::BlockAndTensor) tensor_maximum = bit_cast<T>(maximum_of_all(x, cover.numel()));
    std::vector<Bits> maxima;
    for (const Layout& layout : cover.layouts) {
      if (!std::is_same_v<S, double> && are_tiles(layout)) {
        quantize_layout_of_tiles(format, layout, x, y, tensor_maximum, round, random);
        continue;
      }
      // A row that is a block, and whole, is read twice by one thread; other blocks wait for all threads' maxima.
      const bool rows = layout.blocks_are_rows() && Runs(layout).are_whole();
      if (!rows) {
        maxima.resize(cover.blocks);
        maxima_of_blocks(layout, x, maxima.data());
      }
      const Dim inner = layout.inner();
      Runs(layout).for_each([&](auto each) {
        Draws draws(random);
        each([&](const Place& p, int64_t size) {
          // One element at a time where neighbours lie in different blocks.
          const int64_t piece = inner.step.block == 0 ? size : 1;
          Place at = p;
          for (int64_t i = 0; i < size; i += piece, inner.advance(at, piece)) {
            const Bits maximum = rows ? maximum_of_run(x + at.memory, piece) : maxima[at.block];
            format.template with_quantizer<T>(maximum, tensor_maximum,
                                              [&](const auto& quantizer) { run(inner, at, piece, quantizer, draws); });
          }
        });
      });
    }
  }
}
