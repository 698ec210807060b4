// The loops, written for a compiler that vectorises. compiled.h includes this once for each
// instruction set, in a namespace that defines Lanes (see philox.h) and kLanes for it: 1, 4 or 8.

// The bits that differ between n neighbours and their rounded values; 0 if rounding changes nothing.
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

// Meanwhile it prefetches as many elements behind these, since their maximum is often wanted next.
template <class S, class Q>
__attribute__((noinline)) void look_at_run(const S* x, int64_t n, const Q quantizer, const Look look) {
  constexpr int64_t chunk = 256;
  for (int64_t done = 0; done < n; done += chunk) {
    const int64_t size = std::min(chunk, n - done);
    ask_for(x + n + done, size * sizeof(S));
    look.tell(differences(x + done, size, quantizer, look) != 0);
  }
}

// Writes the codes of n neighbours: word_at(i, lane) is the word of x[i], `lane` its place in a register. Four registers of words
// get their endings together. Each is made by a loop of its own, since GCC then keeps it out of memory. This function and those
// that it is given are inlined, because the loops would not be vectorised else.
template <Sign kSign, class Code, class F>
inline __attribute__((always_inline)) void write_codes(const float* x, Code* y, int64_t n, const Ending& ending,
                                                       const F& word_at) {
  constexpr int64_t kRegister = Lanes::kBytes / 4;
  if (sizeof(Code) > 1 || n < Lanes::kBytes) {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<Code>(with_ending<kSign>(word_at(i, 0), x[i], ending));
  } else if constexpr (sizeof(Code) == 1) {
    alignas(64) uint32_t words[4][kRegister];
    for (int64_t i = 0; i < n; i += Lanes::kBytes) {
      const int64_t first = std::min(i, n - Lanes::kBytes);  // the last ones, and some before them once more
      SWALP_UNROLL
      for (int64_t part = 0; part < 4; ++part) {
#pragma GCC ivdep
#pragma GCC unroll 1
        for (int64_t lane = 0; lane < kRegister; ++lane) words[part][lane] = word_at(first + part * kRegister + lane, lane);
      }
      Lanes::template end_words<kSign>(words[0], x + first, y + first, ending);
    }
  }
}

// The same of words that are made already. Not by a copy of them: GCC makes it in other pieces than are read next, which waits.
template <Sign kSign, class Code>
inline __attribute__((always_inline)) void write_codes_of(const uint32_t* words, const float* x, Code* y, int64_t n,
                                                          const Ending& ending) {
  if (sizeof(Code) > 1 || n < Lanes::kBytes) {
    for (int64_t i = 0; i < n; ++i) y[i] = static_cast<Code>(with_ending<kSign>(words[i], x[i], ending));
  } else if constexpr (sizeof(Code) == 1) {
    for (int64_t i = 0; i < n; i += Lanes::kBytes) {
      const int64_t first = std::min(i, n - Lanes::kBytes);
      Lanes::template end_words<kSign>(words + first, x + first, y + first, ending);
    }
  }
}

// Calls f(kTwos, the Sign of words) for a quantizer Q, both as types. Only integers have loops for two's complement.
template <class Q, class Round, class F>
inline __attribute__((always_inline)) void with_sign(const Round& round, const F& f) {
  using Element = decltype(std::declval<Q>().element);
  const auto call = [&](auto twos) __attribute__((always_inline)) {
    f(twos, std::integral_constant<Sign, sign_of<Element, twos(), typename Round::Round>>());
  };
  if constexpr (std::is_same_v<Element, IntegerElement<float>>) {
    if (round.coding.is_twos) return call(std::true_type());
  }
  call(std::false_type());
}

// The ending for all quantizers Q of a format: the largest number has one code, whatever its scale.
template <class Q, class Format, class Round>
inline Ending ending_of_all(const Format& format, const Round& round) {
  return ending_of(decltype(std::declval<Q>().element)(format.grid), round.coding);
}

// The codes of n neighbours with one quantizer.
template <class Q, class Round>
inline __attribute__((always_inline)) void write_codes_with(const Q& quantizer, const float* x, typename Round::Code* y,
                                                            int64_t n, const uint32_t* draw, const Round& round) {
  with_sign<Q>(round, [&](auto twos, auto sign) __attribute__((always_inline)) {
    uint32_t largest[16] = {};  // of each lane
    const Ending ending = ending_of(quantizer.element, round.coding);
    const auto word_at = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
      if constexpr (Round::looks) largest[lane] = larger(largest[lane], magnitude_bits(x[i]));
      return code<twos()>(quantizer, x[i], Round::draws ? draw[i] : 0u, round);
    };
    write_codes<sign()>(x, y, n, ending, word_at);
    if constexpr (Round::looks) round.tell(is_finite_magnitude<float>(*std::max_element(largest, largest + 16)));
  });
}

// n neighbours with one quantizer. Not inlined: formats share quantizers, and each copy costs seconds of compiling.
template <class S, class Q, class Round>
__attribute__((noinline)) void quantize_run(const S* x, Result<S, Round>* y, int64_t n, const uint32_t* draw,
                                            const Q quantizer, const Round round) {
  using T = Compute<S>;
  if constexpr (std::is_same_v<Round, Look>) {
    look_at_run(x, n, quantizer, round);
  } else if constexpr (kCodes<Round>) {
    write_codes_with(quantizer, x, y, n, draw, round);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      y[i] = static_cast<S>(quantizer.apply(static_cast<T>(x[i]), Round::draws ? draw[i] : 0u, round));
    }
  }
}

// The bits of the largest magnitude, which may be an infinity's or a NaN's.
template <class S>
inline typename Ieee<Compute<S>>::Bits largest_of_run(const S* x, int64_t n) {
  using T = Compute<S>;
  typename Ieee<T>::Bits largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = larger(largest, magnitude_bits(static_cast<T>(x[i])));
  return largest;
}

template <class S>
__attribute__((noinline)) typename Ieee<Compute<S>>::Bits maximum_of_run(const S* x, int64_t n) {
  using T = Compute<S>;
  typename Ieee<T>::Bits maximum = largest_of_run(x, n);
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

// Whether a box is brought together before its elements are rounded: if its runs are short, or if neighbours lie in different
// blocks, since their scales are made once for many runs.
inline bool is_scattered(const Layout& box) {
  if (box.inner().step.memory != 1) return true;
  if (box.inner().size >= kShortRun && box.inner().step.block == 0) return false;
  return std::any_of(box.dims, box.dims + box.rank, [](const Dim& d) { return d.step.memory != d.step.index; });
}

// The box once it has been brought together.
inline Layout together(const Layout& box) {
  Layout close;
  close.first.block = box.first.block;
  for (int d = 0; d < box.rank; ++d) {
    const Dim& dim = box.dims[d];
    close.add({dim.size, {dim.step.index, dim.step.index, dim.step.block}});
  }
  return close;
}

constexpr int64_t kMostLanes = 1024;

// For neighbours in different blocks: calls f(place, lanes, count) for `count` neighbours; every `lanes`-th of them lies in
// the same block.
template <class F>
void for_each_lanes(const Layout& box, const F& f) {
  const Dim inner = box.inner();
  if (inner.size > kMostLanes) {
    return for_each_run(box, [&](Place p) {
      for (int64_t left = inner.size; left > 0; left -= kMostLanes, inner.advance(p, kMostLanes)) {
        f(p, std::min(kMostLanes, left), std::min(kMostLanes, left));
      }
    });
  }
  Layout rows = box;
  if (box.rank > 1) {
    const Dim& outer = box.dims[box.rank - 2];
    if (outer.step.block == 0 && outer.step.memory == inner.size && outer.step.index == inner.size) {
      rows.dims[--rows.rank - 1].size *= inner.size;
    }
  }
  const int64_t count = rows.rank < box.rank ? rows.inner().size : inner.size;
  for_each_run(rows, [&](const Place& p) { f(p, inner.size, count); });
}

// How many of `count` neighbours make a loop worth vectorising: all lanes, several times if they are few.
inline int64_t period_of(int64_t lanes, int64_t count) { return std::min(count, kMostLanes / lanes * lanes); }

template <class S, class Bits>
__attribute__((noinline)) void maxima_of_lanes(const S* x, int64_t count, Bits* maxima, int64_t period) {
  for (; count > 0; count -= period, x += period) {
    const int64_t size = std::min(period, count);
    for (int64_t i = 0; i < size; ++i) {
      maxima[i] = larger(maxima[i], finite_magnitude(static_cast<Compute<S>>(x[i])));
    }
  }
}

template <class S, class Bits>
void maxima_of_box(const Layout& box, const S* x, Bits* maxima) {
  const Dim inner = box.inner();
  if (inner.step.block != 0) {
    return for_each_lanes(box, [&](const Place& p, int64_t lanes, int64_t count) {
      Bits found[kMostLanes] = {};
      const int64_t period = period_of(lanes, count);
      maxima_of_lanes(x + p.memory, count, found, period);
      for (int64_t i = period - 1; i >= lanes; --i) found[i - lanes] = larger(found[i - lanes], found[i]);
      for (int64_t i = 0; i < lanes; ++i) raise(&maxima[p.block + i * inner.step.block], found[i]);
    });
  }
  Bits found = 0;
  int64_t block = box.first.block;
  for_each_run(box, [&](const Place& p) {
    if (p.block != block) raise(&maxima[block], std::exchange(found, 0));
    block = p.block;
    found = larger(found, maximum_of_run(x + p.memory, inner.size));
  });
  raise(&maxima[block], found);
}

// Raises the maximum of each block of the layout.
template <class S>
__attribute__((noinline)) void maxima_of_blocks(const Layout& layout, const S* x, typename Ieee<Compute<S>>::Bits* maxima) {
  const Layout in_memory = in_memory_order(layout);
  Boxes::of_memory(in_memory, false, is_scattered(in_memory) ? Boxes::kFew : Boxes::kMost).for_each([&](auto each) {
    each([&](const Layout& part) {
      const Layout box = in_memory_order(part);
      if (!is_scattered(box)) return maxima_of_box(box, x, maxima);
      S* const room = Room::of_thread().of<S>();
      gather(box, x, room);
      maxima_of_box(together(box), room, maxima);
    });
  });
}

// The same of positive numbers and of negative ones.
template <class S, class Bits>
__attribute__((noinline)) void extremes_of_blocks(const Layout& layout, const S* x, Bits* positive, Bits* negative) {
  Boxes::of_memory(layout, false).for_each([&](auto each) {
    each([&](const Layout& box) {
      for_each_run(box, [&](Place p) {
        for (int64_t i = 0; i < box.inner().size; ++i, box.inner().advance(p, 1)) {
          const auto value = static_cast<Compute<S>>(x[p.memory]);
          raise(&(value < 0 ? negative : positive)[p.block], finite_magnitude(value));
        }
      });
    });
  });
}

// kSize neighbours with one quantizer. Not unrolled, so that the compiler vectorises the loop.
template <int kSize, class S, class Q, class Round>
inline void quantize_tile(const Q& quantizer, const S* x, Result<S, Round>* y, const Round& round, const uint32_t* draw) {
  if constexpr (std::is_same_v<Round, Look>) {
    round.tell(differences(x, kSize, quantizer, round) != 0);
  } else if constexpr (kCodes<Round>) {
    write_codes_with(quantizer, x, y, kSize, draw, round.without_look());
  } else {
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int i = 0; i < kSize; ++i) {
      y[i] = static_cast<S>(quantizer.apply(static_cast<Compute<S>>(x[i]), Round::draws ? draw[i] : 0u, round));
    }
  }
}

constexpr int64_t kBatch = 32;  // tiles: GCC unrolls a shorter loop completely, and then does not vectorise it

// The largest finite magnitude in each of kBatch tiles. Each round halves the candidates: this vectorises without a
// horizontal maximum for each tile. Returns whether all elements are finite.
template <int kSize, class S>
inline bool maxima_of_tiles(const S* x, typename Ieee<Compute<S>>::Bits (&maxima)[kBatch]) {
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
  if (is_finite_magnitude<T>(maximum)) return true;
  for (int64_t t = 0; t < kBatch; ++t) maxima[t] = maximum_of_run(x + t * kSize, kSize);
  return false;
}

// Tiles of kSize neighbours, one after another, in batches: first the maxima, then the quantizers, then the rounding. So no
// tile waits for its own maximum. found: takes the maxima, if they are wanted.
template <int kSize, class S, class Format, class Round>
__attribute__((noinline)) void quantize_tiles(const Format format, const S* x, Result<S, Round>* y, int64_t tiles,
                                              int64_t index, Compute<S> tensor_maximum, const Round round, Draws& draws,
                                              typename Ieee<Compute<S>>::Bits* found) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  using Quantizer = decltype(format.template usual<T>(0, tensor_maximum));
  Ending ending{};
  if constexpr (kCodes<Round>) ending = ending_of_all<Quantizer>(format, round);
  for (int64_t batch; tiles > 0; tiles -= batch, x += batch * kSize, y += batch * kSize, index += batch * kSize) {
    batch = std::min(kBatch, tiles);
    Bits maxima[kBatch] = {};
    bool finite = false;
    if (batch == kBatch) {
      finite = maxima_of_tiles<kSize>(x, maxima);
    } else {
      for (int64_t t = 0; t < batch; ++t) maxima[t] = maximum_of_run(x + t * kSize, kSize);
    }
    if constexpr (kCodes<Round>) {
      round.tell(finite || is_finite_magnitude<T>(largest_of_run(x, batch * kSize)));
      if (batch == kBatch) {  // a size that is known is copied faster
        std::copy(maxima, maxima + kBatch, found);
      } else {
        std::copy(maxima, maxima + batch, found);
      }
      found += batch;
    }
    Bits unusual = 0;
    for (int64_t t = 0; t < kBatch; ++t) unusual |= Bits(t < batch) & Bits(!format.template is_usual<T>(maxima[t]));
    // Divisions are done for all tiles at once. A quantizer without one is made faster than it is stored.
    constexpr bool kDivides = std::is_same_v<decltype(Quantizer::scale), RealScale<T>>;
    Quantizer quantizers[kDivides ? kBatch : 1];
    for (int64_t t = 0; kDivides && t < kBatch; ++t) quantizers[t] = format.template usual<T>(maxima[t], tensor_maximum);
    constexpr bool kTooShort = kSize < Lanes::kBytes;  // words of several tiles are then ended together
    alignas(64) uint32_t words[kCodes<Round> && kTooShort ? kBatch * kSize : 1];
    for (int64_t t = 0; t < batch; ++t) {
      const int64_t at = t * kSize;
      int64_t count = 0;
      const uint32_t* draw = Round::draws ? draws.from(index + at, (tiles - t) * kSize, count, x + at) : nullptr;
      if (unusual == 0) {
        const Quantizer quantizer = kDivides ? quantizers[t] : format.template usual<T>(maxima[t], tensor_maximum);
        if constexpr (kCodes<Round>) {
          with_sign<Quantizer>(round, [&](auto twos, auto sign) __attribute__((always_inline)) {
            const auto word_at = [&](int64_t i, int64_t) __attribute__((always_inline)) {
              return code<twos()>(quantizer, x[at + i], Round::draws ? draw[i] : 0u, round);
            };
            if constexpr (kTooShort) {
#pragma GCC ivdep
#pragma GCC unroll 1
              for (int i = 0; i < kSize; ++i) words[at + i] = word_at(i, 0);
            } else {
              write_codes<sign()>(x + at, y + at, kSize, ending, word_at);
            }
          });
        } else {
          quantize_tile<kSize>(quantizer, x + at, y + at, round, draw);
        }
      } else {
        format.template with_quantizer<T>(maxima[t], tensor_maximum, [&](const auto& quantizer) {
          quantize_tile<kSize>(quantizer, x + at, y + at, round, draw);
        });
      }
    }
    if constexpr (kCodes<Round> && kTooShort) {
      if (unusual != 0) continue;
      with_sign<Quantizer>(round, [&](auto, auto sign) __attribute__((always_inline)) {
        write_codes_of<sign()>(words, x, y, batch * kSize, ending);
      });
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
void quantize_layout_of_tiles(const Format& format, const Layout& layout, const S* x, Result<S, Round>* y,
                              Compute<S> tensor_maximum, const Round& round, const Random& random,
                              typename Ieee<Compute<S>>::Bits* found) {
  const int64_t size = layout.inner().size;
  const auto run = size == 16 ? &quantize_tiles<16, S, Format, Round> : &quantize_tiles<32, S, Format, Round>;
  torch::stable::parallel_for(0, layout.dims[0].size, Boxes::kGrain / size, [&](int64_t begin, int64_t end) {
    Draws draws(random);
    const int64_t memory = layout.first.memory + begin * size, index = layout.first.index + begin * size;
    auto* const of_part = kCodes<Round> ? found + layout.first.block + begin : nullptr;
    run(format, x + memory, y + memory, end - begin, index, tensor_maximum, round, draws, of_part);
  });
}

// The largest finite magnitude of all elements.
template <class S>
typename Ieee<Compute<S>>::Bits maximum_of_all(const Cover& cover, const S* x) {
  typename Ieee<Compute<S>>::Bits maximum = 0;
  Layout all;
  if (cover.dense) {
    all.add({cover.numel(), {1, 1, 0}});
    maxima_of_blocks(all, x, &maximum);
    return maximum;
  }
  for (Layout layout : cover.layouts) {
    layout.first.block = 0;
    for (int d = 0; d < layout.rank; ++d) layout.dims[d].step.block = 0;
    maxima_of_blocks(layout, x, &maximum);
  }
  return maximum;
}

// Whether neighbours that lie in different blocks are rounded side by side; else one by one, in half of the code.
template <class S, class Format, class Round>
constexpr bool kSideBySide = !Format::rare && !std::is_same_v<S, double> && !std::is_same_v<Round, RoundOther>;

// Neighbours in `lanes` different blocks, in turns. `maxima` has the maximum of each of `period` neighbours.
template <class S, class Format, class Round>
__attribute__((noinline)) void quantize_lanes(const Format format, const S* x, Result<S, Round>* y, int64_t count,
                                              const uint32_t* draw, const typename Ieee<Compute<S>>::Bits* maxima,
                                              int64_t lanes, int64_t period, Compute<S> tensor_maximum,
                                              const Round round) {
  using T = Compute<S>;
  typename Ieee<T>::Bits differs = 0;
  if constexpr (kCodes<Round>) round.tell(is_finite_magnitude<T>(largest_of_run(x, count)));
  for (int64_t done = 0; done < count; done += period) {
    const int64_t size = std::min(period, count - done);
    if constexpr (kCodes<Round>) {
      using Quantizer = decltype(format.template usual<T>(maxima[0], tensor_maximum));
      with_sign<Quantizer>(round, [&](auto twos, auto sign) __attribute__((always_inline)) {
        const Ending ending = ending_of_all<Quantizer>(format, round);
        write_codes<sign()>(x + done, y + done, size, ending, [&](int64_t i, int64_t) __attribute__((always_inline)) {
          const auto quantizer = format.template usual<T>(maxima[i], tensor_maximum);
          return code<twos()>(quantizer, x[done + i], Round::draws ? draw[done + i] : 0u, round);
        });
      });
    } else {
#pragma GCC ivdep
      for (int64_t i = done; i < done + size; ++i) {
        const auto maximum = maxima[i - done];
        const auto quantizer = format.template usual<T>(maximum, tensor_maximum);
        const T rounded = quantizer.apply(static_cast<T>(x[i]), Round::draws ? draw[i] : 0u, round);
        const S result = static_cast<S>(format.template is_usual<T>(maximum) ? rounded : static_cast<T>(x[i]));
        if constexpr (std::is_same_v<Round, Look>) {
          differs |= bit_cast<typename Ieee<T>::Bits>(static_cast<T>(result)) ^
                     bit_cast<typename Ieee<T>::Bits>(static_cast<T>(x[i]));
        } else {
          y[i] = result;
        }
      }
    }
  }
  if constexpr (std::is_same_v<Round, Look>) round.tell(differs != 0);
  for (int64_t lane = 0; lane < lanes; ++lane) {
    if (format.template is_usual<T>(maxima[lane])) continue;
    format.template with_quantizer<T>(maxima[lane], tensor_maximum, [&](const auto& quantizer) {
      for (int64_t i = lane; i < count; i += lanes) {
        quantize_run(x + i, y + i, 1, Round::draws ? draw + i : nullptr, quantizer, round);
      }
    });
  }
}

// The draws of a box, made already, in its order.
struct Made {
  const uint32_t* draw;
  template <class S>
  const uint32_t* from(int64_t index, int64_t wanted, int64_t& count, const S*) const {
    count = wanted;
    return draw + index;
  }
};

template <class Round>
auto source(const Random& random) {
  if constexpr (Round::draws) {
    return Draws(random);
  } else {
    return Made{nullptr};
  }
}

// The common state of all boxes of a tensor. maxima: of the blocks, or nullptr if each run is a whole block. negative: of an
// affine scale's blocks, in place of a maximum of the tensor. found: takes the maxima of runs, if they are wanted.
template <class S, class Format, class Round>
struct Rounder {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  const Format& format;
  const Round& round;
  T tensor_maximum;
  const Bits* maxima;
  const Bits* negative;
  Bits* found;
  using Y = Result<S, Round>;

  template <class Source>
  void box(const Layout& box, const S* x, Y* y, Source& draws) const {
    const Dim inner = box.inner();
    if constexpr (Format::shared != Shared::Nothing) {
      if (inner.step.block != 0) return lanes_of(box, x, y, draws);
    }
    for_each_run(box, [&](const Place& p) {
      Bits maximum = 0;
      if (Format::shared != Shared::Nothing) {
        if constexpr (kCodes<Round>) {
          if (maxima == nullptr) return code_row(x + p.memory, y + p.memory, inner.size, p, draws);
        }
        maximum = maxima == nullptr ? maximum_of_run(x + p.memory, inner.size) : maxima[p.block];
      }
      format.template with_quantizer<T>(maximum, beside(p.block), [&](const auto& quantizer) {
        run(x + p.memory, y + p.memory, inner.size, p.index, quantizer, draws, round);
      });
    });
  }

 private:
  // The codes of a whole block. Its maximum tells whether all of it is finite; else its codes mean nothing.
  template <class Source>
  void code_row(const S* x, Y* y, int64_t n, const Place& p, Source& draws) const {
    const Bits maximum = found[p.block] = largest_of_run(x, n);
    round.tell(is_finite_magnitude<T>(maximum));
    format.template with_quantizer<T>(maximum, beside(p.block), [&](const auto& quantizer) {
      run(x, y, n, p.index, quantizer, draws, round.without_look());
    });
  }

  // The second number that a quantizer is made from, beside the maximum of its block.
  T beside(int64_t block) const {
    if constexpr (Format::rare) return negative == nullptr ? tensor_maximum : bit_cast<T>(negative[block]);
    return tensor_maximum;
  }

  template <class Q, class Source, class How>
  void run(const S* x, Y* y, int64_t n, int64_t index, const Q& quantizer, Source& draws, const How& how) const {
    if constexpr (Round::draws) {
      for (int64_t done = 0, count; done < n; done += count) {
        const uint32_t* draw = draws.from(index + done, n - done, count, x + done);
        quantize_run(x + done, y + done, count, draw, quantizer, how);
      }
    } else {
      quantize_run(x, y, n, nullptr, quantizer, how);
    }
  }

  // Not from a window on the draws, which may be less than all lanes.
  void lanes_of(const Layout&, const S*, Y*, Draws&) const {}
  void lanes_of(const Layout& box, const S* x, Y* y, const Made& draws) const {
    if constexpr (!kSideBySide<S, Format, Round>) {
      for_each_run(box, [&](Place p) {
        for (int64_t i = 0; i < box.inner().size; ++i, box.inner().advance(p, 1)) {
          format.template with_quantizer<T>(maxima[p.block], beside(p.block), [&](const auto& quantizer) {
            const uint32_t* draw = Round::draws ? draws.draw + p.index : nullptr;
            quantize_run(x + p.memory, y + p.memory, 1, draw, quantizer, round);
          });
        }
      });
    } else {
      for_each_lanes(box, [&](const Place& p, int64_t lanes, int64_t count) {
        Bits each[kMostLanes];
        const int64_t period = period_of(lanes, count);
        for (int64_t i = 0; i < lanes; ++i) each[i] = maxima[p.block + i * box.inner().step.block];
        for (int64_t i = lanes; i < period; ++i) each[i] = each[i - lanes];
        const uint32_t* draw = Round::draws ? draws.draw + p.index : nullptr;
        quantize_lanes(format, x + p.memory, y + p.memory, count, draw, each, lanes, period, tensor_maximum, round);
      });
    }
  }
};

// Whether a thread may go through memory in order, and draw on its way: row-major neighbours are neighbours in memory.
inline bool is_direct(const Layout& layout, bool draws) {
  const Place step = layout.inner().step;
  return !is_scattered(layout) && (!draws || (step.index == 1 && step.block == 0));
}

// Any layout: a box's draws are made in row-major order and turned into the order of the box. Scattered elements are brought
// together.
template <class S, class Format, class Round>
__attribute__((noinline)) void quantize_boxes(const Rounder<S, Format, Round>& rounder, const Layout& layout, const S* x,
                                              Result<S, Round>* y, const Random& random) {
  // In row-major order already, as slices are.
  const bool ordered = !Round::draws || std::is_sorted(layout.dims, layout.dims + layout.rank, [](const Dim& a, const Dim& b) {
    return a.step.index > b.step.index;
  });
  const Boxes boxes = ordered ? Boxes::of_memory(layout, false, Boxes::kFew) : Boxes::of_both(layout);
  boxes.for_each([&](auto each) {
    Room& of_thread = Room::of_thread();
    DrawsOfBox draws(random, of_thread);
    S* const room = of_thread.of<S>();
    each([&](const Layout& part) {
      const Layout box = in_memory_order(part);
      // The elements are on their way while the draws are made.
      const Made made{Round::draws ? draws.of(part, Runs(box, x)) : nullptr};
      if (!is_scattered(box)) return rounder.box(box, x, y, made);
      gather(box, x, room);
      // Codes go behind the elements, which fill half of the room.
      auto* const results = reinterpret_cast<Result<S, Round>*>(room + (kCodes<Round> ? Boxes::kMost : 0));
      rounder.box(together(box), room, results, made);
      if constexpr (!std::is_same_v<Round, Look>) scatter(box, results, y);
    });
  });
}

template <class S, class Format, class Round>
void quantize(const Format& format, const Cover& cover, const S* x, Result<S, Round>* y, const Round& round,
              const Random& random) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  constexpr bool kShares = Format::shared != Shared::Nothing;
  T tensor_maximum = 0;
  if (Format::shared == Shared::BlockAndTensor) tensor_maximum = bit_cast<T>(maximum_of_all(cover, x));
  std::vector<Bits> maxima, negative;
  if (kCodes<Round> && kShares) maxima.resize(cover.blocks);
  bool affine = false;
  if constexpr (Format::rare) affine = format.scale == ScaleKind::Affine;
  for (const Layout& given : cover.layouts) {
    const Layout layout = Round::draws ? given : in_memory_order(given);
    if constexpr (kShares && !Format::rare && !std::is_same_v<S, double>) {
      if (are_tiles(layout)) {
        quantize_layout_of_tiles(format, layout, x, y, tensor_maximum, round, random, maxima.data());
        continue;
      }
    }
    const bool direct = is_direct(layout, Round::draws);
    // If a row is a whole block, one thread reads it twice. Other blocks wait for the maxima of all threads.
    const bool rows = kShares && !affine && direct && layout.blocks_are_rows() && layout.inner().size <= Boxes::kWholeRow;
    if (kShares && !rows) {
      maxima.resize(cover.blocks);
      if (affine) {
        negative.resize(cover.blocks);
        extremes_of_blocks(layout, x, maxima.data(), negative.data());
      } else {
        maxima_of_blocks(layout, x, maxima.data());
      }
    }
    const Rounder<S, Format, Round> rounder{format, round, tensor_maximum, rows ? nullptr : maxima.data(),
                                            affine ? negative.data() : nullptr, maxima.data()};
    if (!direct) {
      quantize_boxes(rounder, layout, x, y, random);
      continue;
    }
    Boxes::of_memory(layout, rows).for_each([&](auto each) {
      auto draws = source<Round>(random);
      each([&](const Layout& box) { rounder.box(box, x, y, draws); });
    });
  }
  if constexpr (kCodes<Round>) *round.found = {std::move(maxima), std::move(negative), tensor_maximum, round.found->finite};
}
