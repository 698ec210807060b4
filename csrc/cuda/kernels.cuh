// The CUDA kernels. The arithmetic is csrc/formats.h's; here elements are shared out and moved.
//
// A quad of threads takes a block of random bits (kBlock elements) at a time: each thread runs four
// counters, and so has the bits of four neighbouring elements in every row of 16. No bit is thrown away, and
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

// The place of the element that an odometer over a layout shows at step i.
__device__ __forceinline__ Place place_of(const Layout& layout, int64_t i) {
  Place p = layout.first;
  for (int d = layout.rank - 1; d >= 0; --d) {
    const Dim& dim = layout.dims[d];
    dim.advance(p, d == 0 ? i : i % dim.size);
    i /= dim.size;
  }
  return p;
}

// These kernels serve draws of up to 16 bits, two of which share a word.
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

// ---- contiguous memory: elementwise formats, and blocks of 16, 32, 64 or 128 neighbours -----------

// `shared` is the maximum of a block that is the whole tensor. Where it is null, a format that shares has blocks
// of `tile` neighbours, a quad holds one or more of them, and finds their maxima by itself. x and y are aligned
// to a Vector, numel is a multiple of kBlock.
template <class S, class Format, class Round>
__global__ void __launch_bounds__(kThreads)
    quantize_quads(const Format format, const Round round, const S* x, S* y, int64_t numel, int tile,
                   const typename Ieee<Compute<S>>::Bits* shared, const Random drawn, const uint64_t* key) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  const Random random = Round::draws ? with_key(drawn, key) : drawn;
  const int lane = static_cast<int>(threadIdx.x % kQuad);
  const unsigned quad = 0xFu << (threadIdx.x % 32 / kQuad * kQuad);  // the threads that shuffle with this one
  for (int64_t block = thread_number() / kQuad; block < numel / kBlock; block += thread_count() / kQuad) {
    const int64_t first = block * kBlock + lane * kVector;
    Vector<S> v[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) v[r] = *reinterpret_cast<const Vector<S>*>(x + first + r * kCounters);
    const DrawsOf<Round> draws(random, block, lane);

    Bits maximum[kRows] = {};
    if (Format::shared == Shared::Block && shared != nullptr) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) maximum[r] = *shared;
    } else if constexpr (Format::shared == Shared::Block) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          maximum[r] = larger(maximum[r], finite_magnitude(static_cast<T>(v[r].at[j])));
        }
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
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      format.template with_quantizer<T>(maximum[r], T(0), [&](const auto& quantizer) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
          v[r].at[j] = static_cast<S>(quantizer.apply(static_cast<T>(v[r].at[j]), draws.at(random, r, j), round));
        }
      });
      *reinterpret_cast<Vector<S>*>(y + first + r * kCounters) = v[r];
    }
  }
}

// ---- any layout -------------------------------------------------------------------------------------

template <class S, class Format, class Round>
__global__ void __launch_bounds__(kThreads)
    quantize_elements(const Format format, const Round round, const Layout layout, const S* x, S* y,
                      const typename Ieee<Compute<S>>::Bits* maxima,
                      const typename Ieee<Compute<S>>::Bits* tensor_maximum, const Random drawn, const uint64_t* key) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  const Random random = Round::draws ? with_key(drawn, key) : drawn;
  const T most = Format::shared == Shared::BlockAndTensor ? bit_cast<T>(*tensor_maximum) : T(0);
  for (int64_t i = thread_number(); i < layout.numel; i += thread_count()) {
    const Place p = place_of(layout, i);
    const Bits maximum = Format::shared == Shared::Nothing ? Bits(0) : maxima[p.block];
    const uint32_t draw = Round::draws ? draw_at(random, p.index) : 0u;
    format.template with_quantizer<T>(maximum, most, [&](const auto& quantizer) {
      y[p.memory] = static_cast<S>(quantizer.apply(static_cast<T>(x[p.memory]), draw, round));
    });
  }
}

__device__ __forceinline__ void raise(uint32_t* maximum, uint32_t value) { atomicMax(maximum, value); }
__device__ __forceinline__ void raise(uint64_t* maximum, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(maximum), static_cast<unsigned long long>(value));
}

// Integer maxima do not depend on order, so neither do the results on the launch.
template <class S>
__global__ void __launch_bounds__(kThreads)
    block_maxima(const Layout layout, const S* x, typename Ieee<Compute<S>>::Bits* maxima) {
  using Bits = typename Ieee<Compute<S>>::Bits;
  int64_t block = 0;
  Bits maximum = 0;
  for (int64_t i = thread_number(); i < layout.numel; i += thread_count()) {
    const Place p = place_of(layout, i);
    if (p.block != block) {
      if (maximum > 0) raise(&maxima[block], maximum);
      block = p.block;
      maximum = 0;
    }
    maximum = larger(maximum, finite_magnitude(static_cast<Compute<S>>(x[p.memory])));
  }
  if (maximum > 0) raise(&maxima[block], maximum);
}

// ---- maxima of many threads, and one thread block a row ---------------------------------------------

// The largest value that any thread of the block has, in every thread.
template <class Bits>
__device__ __forceinline__ Bits maximum_of_threads(Bits mine) {
  __shared__ Bits of_warp[kThreads / 32];
#pragma unroll
  for (int reach = 16; reach > 0; reach /= 2) mine = larger(mine, __shfl_xor_sync(0xFFFFFFFFu, mine, reach));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) mine = larger(mine, of_warp[w]);
  __syncthreads();  // of_warp may be written again
  return mine;
}

// The maximum of contiguous memory aligned to a Vector; what is left over after whole vectors, thread 0 reads.
template <class S>
__global__ void __launch_bounds__(kThreads)
    maximum_of_all(const S* x, int64_t numel, typename Ieee<Compute<S>>::Bits* maximum) {
  using T = Compute<S>;
  typename Ieee<T>::Bits found = 0;
  for (int64_t i = thread_number(); i < numel / kVector; i += thread_count()) {
    const auto v = reinterpret_cast<const Vector<S>*>(x)[i];
#pragma unroll
    for (int j = 0; j < kVector; ++j) found = larger(found, finite_magnitude(static_cast<T>(v.at[j])));
  }
  if (thread_number() == 0) {
    for (int64_t i = numel / kVector * kVector; i < numel; ++i) found = larger(found, finite_magnitude(static_cast<T>(x[i])));
  }
  found = maximum_of_threads(found);
  if (threadIdx.x == 0 && found > 0) raise(maximum, found);
}

template <class Bits>
__global__ void __launch_bounds__(kThreads) maximum_of_maxima(const Bits* maxima, int64_t count, Bits* maximum) {
  Bits found = 0;
  for (int64_t i = thread_number(); i < count; i += thread_count()) found = larger(found, maxima[i]);
  found = maximum_of_threads(found);
  if (threadIdx.x == 0 && found > 0) raise(maximum, found);
}

// Rows of `size` neighbours, one block each, row after row: the maximum, then the rounding, which reads the row
// from the cache. x and y are aligned to a Vector and size is a multiple of it, so no vector straddles two rows.
template <class S, class Format, class Round>
__global__ void __launch_bounds__(kThreads)
    quantize_rows(const Format format, const Round round, const S* x, S* y, int64_t rows, int64_t size,
                  const Random drawn, const uint64_t* key) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  const Random random = Round::draws ? with_key(drawn, key) : drawn;
  const int lane = static_cast<int>(threadIdx.x % kQuad);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const int64_t begin = row * size, end = begin + size;
    Bits maximum = 0;
    for (int64_t i = begin + threadIdx.x * kVector; i < end; i += int64_t{blockDim.x} * kVector) {
      const auto v = *reinterpret_cast<const Vector<S>*>(x + i);
#pragma unroll
      for (int j = 0; j < kVector; ++j) maximum = larger(maximum, finite_magnitude(static_cast<T>(v.at[j])));
    }
    maximum = maximum_of_threads(maximum);
    format.template with_quantizer<T>(maximum, T(0), [&](const auto& quantizer) {
      const int64_t quads = blockDim.x / kQuad;
      for (int64_t block = begin / kBlock + threadIdx.x / kQuad; block * kBlock < end; block += quads) {
        const DrawsOf<Round> draws(random, block, lane);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const int64_t i = block * kBlock + r * kCounters + lane * kVector;
          if (i < begin || i >= end) continue;
          auto v = *reinterpret_cast<const Vector<S>*>(x + i);
#pragma unroll
          for (int j = 0; j < kVector; ++j) {
            v.at[j] = static_cast<S>(quantizer.apply(static_cast<T>(v.at[j]), draws.at(random, r, j), round));
          }
          *reinterpret_cast<Vector<S>*>(y + i) = v;
        }
      }
    });
  }
}

// ---- a list of tensors ------------------------------------------------------------------------------

// One of them: rows of `size` neighbours, the last of which may be short. A row is a block, or, in a format whose elements
// share nothing, a piece of the tensor. Thread blocks from `first` on work at it.
template <class S>
struct Item {
  S* x;
  int64_t numel, size;
  uint64_t stream;
  unsigned first;
};

// As many as a launch takes by value: its parameters have 4 KB.
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
  using T = Compute<S>;
  typename Ieee<T>::Bits maximum = 0;
  int i = 0;
  while (i + 1 < items.count && blockIdx.x >= items.at[i + 1].first) ++i;
  const Item<S>& item = items.at[i];
  const unsigned beyond = i + 1 < items.count ? items.at[i + 1].first : gridDim.x;
  Random random = Round::draws ? with_key(drawn, key) : drawn;
  random.stream = item.stream;
  for (int64_t row = blockIdx.x - item.first; row * item.size < item.numel; row += beyond - item.first) {
    const int64_t begin = row * item.size, end = begin + item.size < item.numel ? begin + item.size : item.numel;
    if constexpr (Format::shared == Shared::Block) {
      maximum = 0;
      for (int64_t j = begin + threadIdx.x; j < end; j += blockDim.x) {
        maximum = larger(maximum, finite_magnitude(static_cast<T>(item.x[j])));
      }
      maximum = maximum_of_threads(maximum);
    }
    format.template with_quantizer<T>(maximum, T(0), [&](const auto& quantizer) {
      for (int64_t j = begin + threadIdx.x; j < end; j += blockDim.x) {
        const uint32_t draw = Round::draws ? draw_at(random, j) : 0u;
        item.x[j] = static_cast<S>(quantizer.apply(static_cast<T>(item.x[j]), draw, round));
      }
    });
  }
}

}  // namespace swalp_fx
