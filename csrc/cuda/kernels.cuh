// The CUDA kernels. csrc/formats.h has the arithmetic; here elements are shared out and moved.
//
// A quad of threads takes a block of random bits (kBlock elements) at a time. Each thread runs four
// counters, and so has the bits of four neighbouring elements in every row of 16. No bit is wasted, and
// every access is 16 bytes of float32.
#pragma once

#include "../formats.h"
#include "../layout.h"

namespace swalp_fx {

constexpr int kThreads = 256;
constexpr int kQuad = 4;    // threads that share a block of random bits
constexpr int kVector = 4;  // neighbouring elements of a thread

template <class S>
struct alignas(sizeof(S) * kVector) Vector {
  S at[kVector];
};

// A key on the device is read here, so that neither the host waits nor a captured graph freezes it.
__device__ __forceinline__ Random with_key(Random random, const uint64_t* key) {
  if (key != nullptr) random.key = *key;
  return random;
}

__device__ __forceinline__ int64_t thread_number() { return int64_t{blockIdx.x} * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t thread_count() { return int64_t{gridDim.x} * blockDim.x; }

// The place of the element that an odometer over a layout shows at step i, by divisions of Integers.
template <class Integer>
__device__ __forceinline__ Place place_by(const Layout& layout, Integer i) {
  Place p = layout.first;
  for (int d = layout.rank - 1; d >= 0; --d) {
    const Dim& dim = layout.dims[d];
    const auto size = static_cast<Integer>(dim.size);
    const Integer outer = d == 0 ? 0 : i / size;
    dim.advance(p, static_cast<int64_t>(i - outer * size));
    i = outer;
  }
  return p;
}

// The same. A 32-bit division takes a third of the time of a 64-bit one.
__device__ __forceinline__ Place place_of(const Layout& layout, int64_t i) {
  if (layout.numel <= int64_t{0xFFFFFFFF}) return place_by(layout, static_cast<uint32_t>(i));
  return place_by(layout, i);
}

// These kernels serve draws of up to 16 bits: two draws share a word.
constexpr int kDrawsPerWord = 2;
constexpr int kRows = 4 * kDrawsPerWord;  // of 16 elements, in a block of random bits
constexpr int64_t kBlock = kRows * kCounters;

// The draws of a quad's thread: it has kVector elements in each row.
struct QuadDraws {
  uint64_t words[kVector][4];

  __device__ __forceinline__ QuadDraws(const Random& random, int64_t block, int lane) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) words_of(random, block * kCounters + lane * kVector + v, words[v]);
  }
  __device__ __forceinline__ uint32_t at(const Random& random, int row, int v) const {
    return random.draw(static_cast<uint32_t>(words[v][row / kDrawsPerWord]), row % kDrawsPerWord);
  }
};

// Without draws there is nothing to hold.
struct NoDraws {
  __device__ __forceinline__ NoDraws(const Random&, int64_t, int) {}
  __device__ __forceinline__ uint32_t at(const Random&, int, int) const { return 0; }
};

template <class Round>
using DrawsOf = std::conditional_t<Round::draws, QuadDraws, NoDraws>;

// ---- contiguous memory ------------------------------------------------------------------------------

// A thread's share of a block of random bits: a Vector in each row of 16. x is aligned to a Vector.
template <class S>
struct Share {
  Vector<S> at[kRows];

  // Loads the elements from begin to end, and zeros for the rest: zeros raise no maximum.
  __device__ __forceinline__ void load(const S* x, int64_t block, int lane, int64_t begin, int64_t end) {
    const int64_t first = block * kBlock + lane * kVector;
    if (block * kBlock >= begin && (block + 1) * kBlock <= end) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) at[r] = *reinterpret_cast<const Vector<S>*>(x + first + r * kCounters);
      return;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = first + r * kCounters;
      if (i >= begin && i + kVector <= end) {
        at[r] = *reinterpret_cast<const Vector<S>*>(x + i);
        continue;
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) at[r].at[j] = i + j >= begin && i + j < end ? x[i + j] : S(0.0f);
    }
  }

  // Writes nothing before begin or from end on.
  __device__ __forceinline__ void store(S* y, int64_t block, int lane, int64_t begin, int64_t end) const {
    const int64_t first = block * kBlock + lane * kVector;
    if (block * kBlock >= begin && (block + 1) * kBlock <= end) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) *reinterpret_cast<Vector<S>*>(y + first + r * kCounters) = at[r];
      return;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = first + r * kCounters;
      if (i >= begin && i + kVector <= end) {
        *reinterpret_cast<Vector<S>*>(y + i) = at[r];
        continue;
      }
#pragma unroll
      for (int j = 0; j < kVector; ++j) {
        if (i + j >= begin && i + j < end) y[i + j] = at[r].at[j];
      }
    }
  }

  __device__ __forceinline__ typename Ieee<Compute<S>>::Bits maximum_of_row(int r) const {
    typename Ieee<Compute<S>>::Bits maximum = 0;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      maximum = larger(maximum, finite_magnitude(static_cast<Compute<S>>(at[r].at[j])));
    }
    return maximum;
  }

  template <class Quantizer, class Draws, class Round>
  __device__ __forceinline__ void apply(const Quantizer& quantizer, int r, int j, const Draws& draws,
                                        const Random& random, const Round& round) {
    const auto value = static_cast<Compute<S>>(at[r].at[j]);
    at[r].at[j] = static_cast<S>(quantizer.apply(value, draws.at(random, r, j), round));
  }
};

// The maxima of tiles of 16, 32, 64 or 128 neighbours, by rows of a quad's shares; `quad` is its threads in the warp.
template <class S, class Bits>
__device__ __forceinline__ void maxima_of_tiles(const Share<S>& share, int tile, unsigned quad, Bits (&maximum)[kRows]) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    maximum[r] = share.maximum_of_row(r);
    maximum[r] = larger(maximum[r], __shfl_xor_sync(quad, maximum[r], 1));
    maximum[r] = larger(maximum[r], __shfl_xor_sync(quad, maximum[r], 2));
  }
  // Rows of one tile meet in a butterfly, of as many rounds as the tile has doublings of a row.
#pragma unroll
  for (int reach = 1; reach < kRows; reach *= 2) {
    if (reach * kCounters >= tile) break;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if ((r & reach) == 0) maximum[r] = maximum[r | reach] = larger(maximum[r], maximum[r | reach]);
    }
  }
}

// Contiguous memory, a quad a block of random bits. x and y are aligned to a Vector. A format that shares has tiles or rows.
// A quad finds the maxima of tiles (tile > 0) by itself; then `maxima` is the tensor's, for formats that share that too. Rows
// (row > 0) have at least kBlock elements, and their maxima in `maxima`.
template <class S, class Format, class Round>
__global__ void __launch_bounds__(kThreads)
    quantize_quads(const Format format, const Round round, const S* x, S* y, int64_t numel, int tile, int64_t row,
                   const typename Ieee<Compute<S>>::Bits* maxima, const Random drawn, const uint64_t* key) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  const Random random = Round::draws ? with_key(drawn, key) : drawn;
  const int lane = static_cast<int>(threadIdx.x % kQuad);
  const unsigned quad = 0xFu << (threadIdx.x % 32 / kQuad * kQuad);
  const T most = Format::shared == Shared::BlockAndTensor ? bit_cast<T>(*maxima) : T(0);
  const int64_t blocks = (numel + kBlock - 1) / kBlock;
  for (int64_t block = thread_number() / kQuad; block < blocks; block += thread_count() / kQuad) {
    Share<S> share;
    share.load(x, block, lane, 0, numel);
    const DrawsOf<Round> draws(random, block, lane);
    if (Format::shared == Shared::Block && row > 0) {
      const int64_t at = block * kBlock / row, next = (at + 1) * row - block * kBlock;  // where the next row begins
      const Bits here = maxima[at], there = next < kBlock && (at + 1) * row < numel ? maxima[at + 1] : here;
      const bool alike = here == there;
#pragma unroll 1
      for (int side = 0; side < (alike ? 1 : 2); ++side) {
        format.template with_quantizer<T>(side == 0 ? here : there, most, [&](const auto& quantizer) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
              const bool beyond = r * kCounters + lane * kVector + j >= next;
              if (alike || beyond == (side == 1)) share.apply(quantizer, r, j, draws, random, round);
            }
          }
        });
      }
    } else {
      Bits maximum[kRows] = {};
      if constexpr (Format::shared != Shared::Nothing) maxima_of_tiles(share, tile, quad, maximum);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        format.template with_quantizer<T>(maximum[r], most, [&](const auto& quantizer) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) share.apply(quantizer, r, j, draws, random, round);
        });
      }
    }
    share.store(y, block, lane, 0, numel);
  }
}

// The largest value that any thread of the block has, in every thread.
template <class Bits>
__device__ __forceinline__ Bits maximum_of_threads(Bits mine) {
  __shared__ Bits of_warp[kThreads / 32];
#pragma unroll
  for (int reach = 16; reach > 0; reach /= 2) mine = larger(mine, __shfl_xor_sync(0xFFFFFFFFu, mine, reach));
  if (blockDim.x == 32) return mine;
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
  for (unsigned w = 0; w < blockDim.x / 32; ++w) mine = larger(mine, of_warp[w]);
  __syncthreads();  // of_warp may be written again
  return mine;
}

// The elements from begin to end, one block of a format that shares, by the threads of one thread block. A row of no more
// blocks of random bits than there are quads is read once.
template <class S, class Format, class Round>
__device__ __forceinline__ void quantize_row(const Format& format, const Round& round, const S* x, S* y, int64_t begin,
                                             int64_t end, const Random& random) {
  using T = Compute<S>;
  const int lane = static_cast<int>(threadIdx.x % kQuad);
  const int64_t quads = blockDim.x / kQuad, last = (end - 1) / kBlock;
  const int64_t first = begin / kBlock + threadIdx.x / kQuad;
  const bool held = last - begin / kBlock < quads;
  Share<S> share;
  typename Ieee<T>::Bits maximum = 0;
  if (Format::shared != Shared::Nothing || held) {
    for (int64_t block = first; block <= last; block += quads) {
      share.load(x, block, lane, begin, end);
      if constexpr (Format::shared != Shared::Nothing) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) maximum = larger(maximum, share.maximum_of_row(r));
      }
    }
  }
  if constexpr (Format::shared != Shared::Nothing) maximum = maximum_of_threads(maximum);
  format.template with_quantizer<T>(maximum, T(0), [&](const auto& quantizer) {
    for (int64_t block = first; block <= last; block += quads) {
      if (!held) share.load(x, block, lane, begin, end);
      const DrawsOf<Round> draws(random, block, lane);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) share.apply(quantizer, r, j, draws, random, round);
      }
      share.store(y, block, lane, begin, end);
    }
  });
}

// Rows of `size` neighbours, one block each, row after row. x and y are aligned to a Vector.
template <class S, class Format, class Round>
__global__ void __launch_bounds__(kThreads)
    quantize_rows(const Format format, const Round round, const S* x, S* y, int64_t rows, int64_t size,
                  const Random drawn, const uint64_t* key) {
  const Random random = Round::draws ? with_key(drawn, key) : drawn;
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    quantize_row(format, round, x, y, row * size, (row + 1) * size, random);
  }
}

__device__ __forceinline__ void raise(uint32_t* maximum, uint32_t value) { atomicMax(maximum, value); }
__device__ __forceinline__ void raise(uint64_t* maximum, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(maximum), static_cast<unsigned long long>(value));
}

// The maxima of rows of `size` neighbours; a thread block takes kChunk elements of one row at a time. Integer maxima do
// not depend on order, so neither do the results on the launch. x is aligned to `kElements` elements.
constexpr int64_t kChunk = int64_t{kThreads} * 32;

template <class S, int kElements>
__global__ void __launch_bounds__(kThreads)
    maxima_of_rows(const S* x, int64_t rows, int64_t size, typename Ieee<Compute<S>>::Bits* maxima) {
  using T = Compute<S>;
  struct alignas(sizeof(S) * kElements) Elements {
    S at[kElements];
  };
  const int64_t chunks = (size + kChunk - 1) / kChunk;
  for (int64_t c = blockIdx.x; c < rows * chunks; c += gridDim.x) {
    const int64_t row = c / chunks, begin = row * size + c % chunks * kChunk;
    const int64_t end = begin + kChunk < (row + 1) * size ? begin + kChunk : (row + 1) * size;
    const int64_t first = begin / kElements * kElements + threadIdx.x * kElements;
    typename Ieee<T>::Bits found = 0;
    // One round more than fill the chunk: its first elements may begin before it.
#pragma unroll
    for (int64_t round = 0; round <= kChunk / kThreads / kElements; ++round) {
      const int64_t i = first + round * kThreads * kElements;
      if (i >= begin && i + kElements <= end) {
        const auto v = *reinterpret_cast<const Elements*>(x + i);
#pragma unroll
        for (int j = 0; j < kElements; ++j) found = larger(found, finite_magnitude(static_cast<T>(v.at[j])));
      } else {
        for (int64_t j = i < begin ? begin : i; j < i + kElements && j < end; ++j) {
          found = larger(found, finite_magnitude(static_cast<T>(x[j])));
        }
      }
    }
    found = maximum_of_threads(found);
    if (threadIdx.x == 0 && found > 0) raise(&maxima[row], found);
  }
}

// ---- any layout -------------------------------------------------------------------------------------

// beside: the maximum of the tensor, or, if of_blocks, another of each block.
template <class S, class Format, class Round>
__global__ void __launch_bounds__(kThreads)
    quantize_elements(const Format format, const Round round, const Layout layout, const S* x, S* y,
                      const typename Ieee<Compute<S>>::Bits* maxima,
                      const typename Ieee<Compute<S>>::Bits* beside, bool of_blocks, const Random drawn, const uint64_t* key) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  const Random random = Round::draws ? with_key(drawn, key) : drawn;
  for (int64_t i = thread_number(); i < layout.numel; i += thread_count()) {
    const Place p = place_of(layout, i);
    const Bits maximum = Format::shared == Shared::Nothing ? Bits(0) : maxima[p.block];
    const T second = Format::shared == Shared::BlockAndTensor ? bit_cast<T>(beside[of_blocks ? p.block : 0]) : T(0);
    const uint32_t draw = Round::draws ? draw_at(random, p.index) : 0u;
    format.template with_quantizer<T>(maximum, second, [&](const auto& quantizer) {
      y[p.memory] = static_cast<S>(quantizer.apply(static_cast<T>(x[p.memory]), draw, round));
    });
  }
}

// The maxima of any blocks. A thread block takes a stretch of memory at a time; the layout's loops run in memory order.
template <class S>
__global__ void __launch_bounds__(kThreads)
    block_maxima(const Layout layout, const S* x, typename Ieee<Compute<S>>::Bits* maxima) {
  using Bits = typename Ieee<Compute<S>>::Bits;
  for (int64_t stretch = blockIdx.x * kChunk; stretch < layout.numel; stretch += gridDim.x * kChunk) {
    const int64_t end = stretch + kChunk < layout.numel ? stretch + kChunk : layout.numel;
    int64_t block = place_of(layout, stretch).block;
    Bits maximum = 0;
    for (int64_t i = stretch + threadIdx.x; i < end; i += blockDim.x) {
      const Place p = place_of(layout, i);
      if (p.block != block) {
        if (maximum > 0) raise(&maxima[block], maximum);
        block = p.block;
        maximum = 0;
      }
      maximum = larger(maximum, finite_magnitude(static_cast<Compute<S>>(x[p.memory])));
    }
    // Threads of a warp that end in one block raise its maximum once.
    int64_t least = block, greatest = block;
#pragma unroll
    for (int reach = 16; reach > 0; reach /= 2) {
      const int64_t low = __shfl_xor_sync(0xFFFFFFFFu, least, reach);
      least = low < least ? low : least;
      greatest = larger(greatest, __shfl_xor_sync(0xFFFFFFFFu, greatest, reach));
    }
    if (least == greatest) {
#pragma unroll
      for (int reach = 16; reach > 0; reach /= 2) {
        maximum = larger(maximum, __shfl_xor_sync(0xFFFFFFFFu, maximum, reach));
      }
    }
    if (maximum > 0 && (least != greatest || threadIdx.x % 32 == 0)) raise(&maxima[block], maximum);
  }
}

// The maxima of the positive numbers of any blocks, and of the magnitudes of the negative ones.
template <class S>
__global__ void __launch_bounds__(kThreads)
    block_extremes(const Layout layout, const S* x, typename Ieee<Compute<S>>::Bits* positive,
                   typename Ieee<Compute<S>>::Bits* negative) {
  for (int64_t i = thread_number(); i < layout.numel; i += thread_count()) {
    const Place p = place_of(layout, i);
    const auto value = static_cast<Compute<S>>(x[p.memory]);
    raise(&(value < 0 ? negative : positive)[p.block], finite_magnitude(value));
  }
}

// The largest of `count` maxima.
template <class Bits>
__global__ void __launch_bounds__(kThreads) maximum_of_maxima(const Bits* maxima, int64_t count, Bits* maximum) {
  Bits found = 0;
  for (int64_t i = thread_number(); i < count; i += thread_count()) found = larger(found, maxima[i]);
  found = maximum_of_threads(found);
  if (threadIdx.x == 0 && found > 0) raise(maximum, found);
}

// ---- memory in another order than the random bits ---------------------------------------------------

// A layout cut into tiles: `along` is the loop of row-major neighbours, `across` the loop of neighbours in memory, `outer` the
// loops around them. If the innermost loop is both, `across` is all of it, and `along` has one step. The draws of a tile come
// in segments of row-major neighbours.
struct Tiles {
  static constexpr int kDraws = 32 * 514;  // draws that fit in shared memory
  Layout outer;
  Dim along, across;
  int64_t rows, columns;  // of a tile: steps along and across
  int64_t slots;          // from one column's draws to the next one's, in shared memory
  bool joined;            // the columns' draws follow on one another: they are one segment

  SWALP_HD int64_t tiles_along() const { return (along.size + rows - 1) / rows; }
  SWALP_HD int64_t tiles_across() const { return (across.size + columns - 1) / columns; }
  SWALP_HD int64_t count() const { return outer.numel * tiles_along() * tiles_across(); }
};

// A tile's draws are made in row-major order, each word once, and left in shared memory. Then its elements are rounded in
// memory order, kElements neighbours a thread. kElements > 1 needs every vector to be aligned.
template <class S, class Format, class Round, int kElements>
__global__ void __launch_bounds__(kThreads)
    quantize_tiles(const Format format, const Round round, const Tiles tiles, const S* x, S* y,
                   const typename Ieee<Compute<S>>::Bits* maxima, const Random drawn, const uint64_t* key) {
  using T = Compute<S>;
  __shared__ uint16_t draws[Tiles::kDraws];
  struct alignas(sizeof(S) * kElements) Elements {
    S at[kElements];
  };
  const Random random = with_key(drawn, key);
  const bool one_block = tiles.along.step.block == 0 && tiles.across.step.block == 0;
  for (int64_t tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
    const int64_t in_column = tile / tiles.tiles_across();
    const int64_t row = in_column % tiles.tiles_along() * tiles.rows;
    const int64_t column = tile % tiles.tiles_across() * tiles.columns;
    Place first = place_of(tiles.outer, in_column / tiles.tiles_along());
    tiles.along.advance(first, row);
    tiles.across.advance(first, column);
    const auto rows = static_cast<int>(tiles.along.size - row < tiles.rows ? tiles.along.size - row : tiles.rows);
    const auto columns =
        static_cast<int>(tiles.across.size - column < tiles.columns ? tiles.across.size - column : tiles.columns);
    const int slots = static_cast<int>(tiles.slots);

    const int segments = tiles.joined ? 1 : columns, length = tiles.joined ? rows * columns : rows;
    // A segment may begin anywhere in its first block of random bits. 16 threads run a block's counters.
    const int blocks = (length + 2 * static_cast<int>(kBlock) - 2) / static_cast<int>(kBlock);
    const int counter = static_cast<int>(threadIdx.x % kCounters), step = static_cast<int>(blockDim.x / kCounters);
    int segment = 0, within = static_cast<int>(threadIdx.x / kCounters);
    while (true) {
      for (; within >= blocks && segment < segments; within -= blocks) ++segment;
      if (segment >= segments) break;
      const int64_t start = first.index + segment * tiles.across.step.index;
      const int64_t block = start / kBlock + within;
      const auto begin = static_cast<int>(block * kBlock + counter - start);
      within += step;
      if (begin >= length) continue;
      uint64_t words[4];
      words_of(random, block * kCounters + counter, words);
      const int slot = segment * slots + begin;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int at = r * static_cast<int>(kCounters);
        const uint32_t draw = random.draw(static_cast<uint32_t>(words[r / kDrawsPerWord]), r % kDrawsPerWord);
        if (static_cast<unsigned>(begin + at) < static_cast<unsigned>(length)) draws[slot + at] = static_cast<uint16_t>(draw);
      }
    }
    __syncthreads();

    // Threads side by side take neighbours in memory; threads beyond the last whole row take none.
    const auto each = [&](const auto& f) {
      const int in_row = columns / kElements, threads = static_cast<int>(blockDim.x);
      const int beside = in_row < threads ? in_row : threads, at_once = threads / beside;
      const int begin = static_cast<int>(threadIdx.x) / beside, lane = static_cast<int>(threadIdx.x) % beside;
      for (int r = begin < at_once ? begin : rows; r < rows; r += at_once) {
        const int64_t row = first.memory + r * tiles.along.step.memory;
        for (int i = lane; i < in_row; i += beside) {
          const int c = i * kElements;
          Elements v = *reinterpret_cast<const Elements*>(x + row + c);
#pragma unroll
          for (int j = 0; j < kElements; ++j) f(v.at[j], r, c + j, static_cast<uint32_t>(draws[(c + j) * slots + r]));
          *reinterpret_cast<Elements*>(y + row + c) = v;
        }
      }
    };
    if (one_block) {
      const auto maximum = Format::shared == Shared::Nothing ? 0 : maxima[first.block];
      format.template with_quantizer<T>(maximum, T(0), [&](const auto& quantizer) {
        each([&](S& value, int, int, uint32_t draw) {
          value = static_cast<S>(quantizer.apply(static_cast<T>(value), draw, round));
        });
      });
    } else {
      each([&](S& value, int r, int c, uint32_t draw) {
        const auto maximum = maxima[first.block + r * tiles.along.step.block + c * tiles.across.step.block];
        format.template with_quantizer<T>(maximum, T(0), [&](const auto& quantizer) {
          value = static_cast<S>(quantizer.apply(static_cast<T>(value), draw, round));
        });
      });
    }
    __syncthreads();  // the draws may be written again
  }
}

// ---- a list of tensors ------------------------------------------------------------------------------

// A tensor of the list, aligned to a Vector: rows of `size` neighbours; the last may be short. A row is a block, or, in a
// format that shares nothing, a piece of the tensor. Thread blocks from `first` on work at it.
template <class S>
struct Item {
  S* x;
  int64_t numel, size;
  uint64_t stream;
  unsigned first;
};

// As many items as a launch takes by value: its parameters have 4 KB.
template <class S>
struct Items {
  static constexpr int kMost = 64;
  int count = 0;
  Item<S> at[kMost];
};

template <class S, class Format, class Round>
__global__ void __launch_bounds__(kThreads)
    quantize_items(const Format format, const Round round, const Items<S> items, const Random drawn,
                   const uint64_t* key) {
  int i = 0;
  for (int beyond = items.count; beyond - i > 1;) {
    const int middle = (i + beyond) / 2;
    (blockIdx.x >= items.at[middle].first ? i : beyond) = middle;
  }
  const Item<S>& item = items.at[i];
  const unsigned beyond = i + 1 < items.count ? items.at[i + 1].first : gridDim.x;
  Random random = Round::draws ? with_key(drawn, key) : drawn;
  random.stream = item.stream;
  for (int64_t row = blockIdx.x - item.first; row * item.size < item.numel; row += beyond - item.first) {
    const int64_t begin = row * item.size, end = begin + item.size < item.numel ? begin + item.size : item.numel;
    quantize_row(format, round, item.x, item.x, begin, end, random);
  }
}

}  // namespace swalp_fx
