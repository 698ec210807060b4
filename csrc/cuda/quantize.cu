// The ops on CUDA: the choice of a kernel for a layout.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>

#include "../check.h"
#include "../plan.h"
#include "kernels.cuh"

namespace swalp_fx {
namespace {

constexpr int64_t kMostBlocks = 132 * 16;    // two waves of full occupancy on the largest GPUs; the kernels stride on
constexpr int64_t kHeld = kThreads / kQuad * kBlock;  // elements that a thread block holds in registers
constexpr int64_t kLargestItem = 1 << 18;    // elements of a tensor that is not worth a launch of its own

// A thread for each share of a row, in whole warps; the row may begin anywhere in a block of random bits.
unsigned threads_of_row(int64_t size) {
  const int64_t shares = ((size + 2 * kBlock - 2) / kBlock) * kQuad;
  return static_cast<unsigned>(std::min<int64_t>(kThreads, (shares + 31) / 32 * 32));
}

// Memory without gaps, in the order of the random bits.
bool in_order(const Layout& l) {
  int64_t numel = 1;
  for (int d = l.rank - 1; d >= 0; --d) {
    const Place& step = l.dims[d].step;
    if (step.memory != numel || step.index != numel) return false;
    numel *= l.dims[d].size;
  }
  return l.first.memory == 0 && l.first.index == 0;
}

// The size of the rows, if the layout is rows of neighbours in memory, one block each, row after row; else 0.
int64_t rows_in_memory(const Layout& layout, int64_t blocks) {
  const Layout l = in_memory_order(layout);
  if (l.first.memory != 0 || l.numel % blocks != 0) return 0;
  const int64_t size = l.numel / blocks;
  if (blocks == 1) return size;
  if (l.rank == 1) return l.dims[0].step.block == 1 ? 1 : 0;
  const bool rows = l.rank == 2 && l.dims[0].step.block == 1 && l.dims[1].step.block == 0 && l.dims[1].size == size;
  return rows ? size : 0;
}

// The tiles of a layout. It needs a loop of row-major neighbours and a loop of neighbours in memory; none if it lacks one.
std::optional<Tiles> tiles_of(const Layout& layout) {
  if (layout.rank == 0 || layout.inner().step.memory != 1) return {};
  constexpr int64_t kNarrow = 32;  // columns that fill a memory access
  Tiles tiles{};
  tiles.across = layout.inner();
  tiles.along = {1, {0, 1, 0}};
  int along = layout.rank - 1;
  while (along >= 0 && layout.dims[along].step.index != 1) --along;
  if (along < 0) return {};
  tiles.outer.first = layout.first;
  for (int d = 0; d + 1 < layout.rank; ++d) {
    if (d == along) {
      tiles.along = layout.dims[d];
    } else {
      tiles.outer.dims[tiles.outer.rank++] = layout.dims[d];
      tiles.outer.numel *= layout.dims[d].size;
    }
  }
  const int64_t height = tiles.along.size, width = tiles.across.size;
  if (height == 1 || (tiles.across.step.index == height && height * std::min(width, kNarrow) <= Tiles::kDraws)) {
    const int64_t fit = height == 1 ? kChunk : Tiles::kDraws / height;
    tiles.rows = height;
    tiles.columns = std::min(width, fit < kNarrow ? fit : fit / kNarrow * kNarrow);
    tiles.slots = height;
    tiles.joined = true;
  } else {
    tiles.columns = std::min(width, kNarrow);
    // Equal tiles, and two slots between columns, so that their draws lie in different banks.
    const int64_t fit = Tiles::kDraws / tiles.columns - 2, pieces = (height + fit - 1) / fit;
    tiles.rows = (height + pieces - 1) / pieces;
    tiles.slots = tiles.rows + 2;
  }
  return tiles;
}

// Whether every run of kVector columns of a tile begins where a Vector may.
bool is_even(const Tiles& tiles) {
  bool even = tiles.columns % kVector == 0 && tiles.across.size % kVector == 0 && tiles.outer.first.memory % kVector == 0;
  even = even && (tiles.along.size == 1 || tiles.along.step.memory % kVector == 0);
  for (int d = 0; d < tiles.outer.rank; ++d) even = even && tiles.outer.dims[d].step.memory % kVector == 0;
  return even;
}

template <class S>
bool is_aligned(const S* x, int elements = kVector) {
  return reinterpret_cast<uintptr_t>(x) % (sizeof(S) * elements) == 0;
}

// Combinations that training uses have kernels that move four elements at a time. All others go one element at a time: this
// is slower, but halves the size of the module.
template <class S, class Format, class Round>
constexpr bool is_fast = !Format::rare && !std::is_same_v<Round, RoundOther> && !std::is_same_v<S, double>;

// One op's launches, on the current stream of the tensor's device.
template <class S, class Format, class Round>
struct Launch {
  using Bits = typename Ieee<Compute<S>>::Bits;
  const Format& format;
  const Round& round;
  const Tensor& like;  // a tensor on the device
  const S* x;
  S* y;
  Random random;
  const uint64_t* key;
  cudaStream_t stream;

  // Zeros, from torch's allocator: it follows the stream, and graph capture allows it.
  Tensor zeros(int64_t count) const {
    Tensor t = torch::stable::new_empty(like, {count}, sizeof(Bits) == 8 ? ScalarType::Long : ScalarType::Int);
    STD_CUDA_CHECK(cudaMemsetAsync(t.mutable_data_ptr(), 0, count * sizeof(Bits), stream));
    return t;
  }
  static Bits* data(const Tensor& t) { return static_cast<Bits*>(t.mutable_data_ptr()); }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads, const Arguments&... arguments) const {
    const auto most = static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, kMostBlocks * kThreads / threads));
    const cudaLaunchConfig_t config{dim3(most), dim3(threads), 0, stream};
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

  void cover(const Cover& cover) const {
    if constexpr (kFast) {
      const bool pairs = random.draws_per_word() == kDrawsPerWord;
      if ((pairs || !Round::draws) && is_aligned(x) && is_aligned(y) && contiguous(cover)) return;
    }
    anywhere(cover);
  }

 private:
  static constexpr bool kFast = is_fast<S, Format, Round>;

  // Whether kernels for contiguous memory serve the layout; if so, they have.
  bool contiguous(const Cover& cover) const {
    if (cover.layouts.size() != 1) return false;
    const Layout& given = cover.layouts.front();
    const Layout layout = Round::draws ? given : in_memory_order(given);
    if (!in_order(layout)) return false;
    if constexpr (Format::shared == Shared::Nothing) {
      quads(layout.numel, 0, 0, nullptr);
      return true;
    } else {
      const int64_t size = rows_in_memory(layout, cover.blocks);
      if (size == 0) return false;
      if (size % kCounters == 0 && size <= kBlock && (size & (size - 1)) == 0) {
        std::optional<Tensor> most;
        if constexpr (Format::shared == Shared::BlockAndTensor) most = maxima(1, layout.numel);
        quads(layout.numel, static_cast<int>(size), 0, most ? data(*most) : nullptr);
        return true;
      }
      if constexpr (Format::shared == Shared::Block) {
        if (size <= kHeld) {
          launch(quantize_rows<S, Format, Round>, cover.blocks, threads_of_row(size), format, round, x, y, cover.blocks,
                 size, random, key);
        } else {  // rows too long for a thread block are read twice, by all thread blocks
          const Tensor of_rows = maxima(cover.blocks, size);
          quads(layout.numel, 0, size, data(of_rows));
        }
        return true;
      }
      return false;
    }
  }

  Tensor maxima(int64_t rows, int64_t size) const {
    const Tensor found = zeros(rows);
    constexpr int wide = std::max<int>(kVector, 16 / sizeof(S));
    launch(is_aligned(x, wide) ? maxima_of_rows<S, wide> : maxima_of_rows<S, kVector>,
           rows * ((size + kChunk - 1) / kChunk), kThreads, x, rows, size, data(found));
    return found;
  }

  void quads(int64_t numel, int tile, int64_t row, const Bits* known) const {
    const int64_t blocks = (numel + kBlock - 1) / kBlock;
    launch(quantize_quads<S, Format, Round>, (blocks * kQuad + kThreads - 1) / kThreads, kThreads, format, round, x, y, numel,
           tile, row, known, random, key);
  }

  void anywhere(const Cover& cover) const {
    bool affine = false;
    if constexpr (Format::rare) affine = format.scale == ScaleKind::Affine;
    std::optional<Tensor> of_blocks, most;
    const Bits *known = nullptr, *of_tensor = nullptr;
    if constexpr (Format::shared != Shared::Nothing) {
      if (!affine) {
        of_blocks = maxima_anywhere(cover);
        known = data(*of_blocks);
      }
    }
    if (affine) {
      most = zeros(cover.blocks);
      of_tensor = data(*most);
      of_blocks = zeros(cover.blocks);
      known = data(*of_blocks);
      for (const Layout& layout : cover.layouts) {
        launch(block_extremes<S>, (layout.numel + kThreads - 1) / kThreads, kThreads, layout, x, data(*of_blocks), data(*most));
      }
    } else if constexpr (Format::shared == Shared::BlockAndTensor) {
      most = zeros(1);
      of_tensor = data(*most);
      launch(maximum_of_maxima<Bits>, (cover.blocks + kThreads - 1) / kThreads, kThreads, known, cover.blocks, data(*most));
    }
    for (const Layout& layout : cover.layouts) {
      if constexpr (kFast && Round::draws && Format::shared != Shared::BlockAndTensor) {
        const auto tiles = random.draws_per_word() == kDrawsPerWord ? tiles_of(layout) : std::nullopt;
        if (tiles) {
          const bool vectors = is_even(*tiles) && is_aligned(x) && is_aligned(y);
          launch(vectors ? quantize_tiles<S, Format, Round, kVector> : quantize_tiles<S, Format, Round, 1>, tiles->count(),
                 kThreads, format, round, *tiles, x, y, known, random, key);
          continue;
        }
      }
      launch(quantize_elements<S, Format, Round>, (layout.numel + kThreads - 1) / kThreads, kThreads, format, round, layout,
             x, y, known, of_tensor, affine, random, key);
    }
  }

  Tensor maxima_anywhere(const Cover& cover) const {
    const int64_t size = cover.layouts.size() == 1 ? rows_in_memory(cover.layouts.front(), cover.blocks) : 0;
    if (size > 0 && is_aligned(x)) return maxima(cover.blocks, size);
    const Tensor found = zeros(cover.blocks);
    for (const Layout& layout : cover.layouts) {
      launch(block_maxima<S>, (layout.numel + kChunk - 1) / kChunk, kThreads, layout, x, data(found));
    }
    return found;
  }
};

struct Cuda {
  using OneCall = Call<Cuda>;

  template <class Forms>
  static void register_more(torch::stable::detail::StableLibrary&) {}

  static void run(const Numbers& format, const Cover& cover, const Tensor& x, Tensor& y, const Drawing& drawing) {
    run_at(format, cover, x, x.scalar_type(), x.const_data_ptr(), y.mutable_data_ptr(), drawing);
  }

  struct PlanOf final : Plan {
    Numbers format;
    Cover cover;
    ScalarType type;
    Drawing drawing;
    Tensor like;  // without memory

    explicit PlanOf(const OneCall& call)
        : format(call.format),
          cover(call.cover),
          type(call.x.scalar_type()),
          drawing(call.drawing),
          like(torch::stable::new_empty(call.x, {0})) {
      drawing.key.reset();
    }

    void round(const void* from, void* to, uint64_t key, uint64_t stream) const override {
      if (cover.layouts.empty()) return;
      require(from != nullptr, kOp, kNoMemory);
      Drawing drawn = drawing;
      drawn.random.key = key;
      drawn.random.stream = stream;
      run_at(format, cover, like, type, from, to, drawn);
    }

    // To find out, the host would have to wait for the GPU.
    bool keeps(const void*) const override { return false; }
  };

  // A list of tensors: the small ones in as few launches as take them, each other one in its own.
  static void in_place(std::vector<OneCall>& calls) {
    std::map<std::pair<int32_t, ScalarType>, std::vector<OneCall*>> small;
    for (OneCall& call : calls) {
      if (row_of_item(call) > 0) {
        small[{call.x.get_device(), call.x.scalar_type()}].push_back(&call);
      } else {
        call.in_place();
      }
    }
    for (const auto& [kind, items] : small) {
      for (size_t i = 0; i < items.size(); i += kMostItems) {
        const std::vector<OneCall*> some(items.begin() + i, items.begin() + std::min(items.size(), i + kMostItems));
        with_scalar(kind.second, [&](auto zero) { launch_items<decltype(zero)>(some); });
      }
    }
  }

 private:
  static constexpr int kMostItems = Items<float>::kMost;

  static cudaStream_t current_stream(const Tensor& x) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
    return static_cast<cudaStream_t>(stream);
  }

  static const uint64_t* key_on_device(const Drawing& drawing) {
    const bool there = drawing.key && drawing.key->is_cuda();
    return there ? static_cast<const uint64_t*>(drawing.key->const_data_ptr()) : nullptr;
  }

  // `like`: any tensor on the device of x and y.
  static void run_at(const Numbers& format, const Cover& cover, const Tensor& like, ScalarType type, const void* x, void* y,
                     const Drawing& drawing) {
    const torch::stable::accelerator::DeviceGuard guard(like.get_device());
    with_scalar(type, [&](auto zero) {
      using S = decltype(zero);
      with_format(format, [&](const auto& product) {
        with_rounding<Compute<S>>(drawing.rounding, drawing.random.bits, product.magnitude_bits(), [&](const auto& round) {
          using Format = std::decay_t<decltype(product)>;
          using Round = std::decay_t<decltype(round)>;
          Launch<S, Format, Round>{product, round, like, static_cast<const S*>(x), static_cast<S*>(y), drawing.random,
                                   key_on_device(drawing), current_stream(like)}
              .cover(cover);
        });
      });
    });
  }

  // Calls f with the functors of a call's format and rounding.
  template <class S, class F>
  static void with_functors(const OneCall& call, const F& f) {
    const Drawing& drawing = call.drawing;
    with_format(call.format, [&](const auto& product) {
      with_rounding<Compute<S>>(drawing.rounding, drawing.random.bits, product.magnitude_bits(),
                                [&](const auto& round) { f(product, round); });
    });
  }

  // Whether quantize_items serves a format.
  template <class S, class Format, class Round>
  static constexpr bool kItems = is_fast<S, Format, Round> && Format::shared != Shared::BlockAndTensor;

  // The elements in a row of a call's tensor as an Item; 0 where it is none.
  static int64_t row_of_item(const OneCall& call) {
    if (!call.dense || call.cover.layouts.size() != 1) return 0;
    const Layout& given = call.cover.layouts.front();
    const Drawing& drawing = call.drawing;
    const bool draws = drawing.rounding == Rounding::Stochastic;
    bool served = false;
    with_scalar(call.x.scalar_type(), [&](auto zero) {
      using S = decltype(zero);
      with_functors<S>(call, [&](const auto& product, const auto& round) {
        served = kItems<S, std::decay_t<decltype(product)>, std::decay_t<decltype(round)>> &&
                 is_aligned(static_cast<const S*>(call.x.const_data_ptr()));
      });
    });
    const Layout layout = draws ? given : in_memory_order(given);
    if (layout.numel > kLargestItem || !served || !in_order(layout)) return 0;
    if (draws && drawing.random.draws_per_word() != kDrawsPerWord) return 0;
    return call.format.shared() == Shared::Nothing ? kHeld : rows_in_memory(layout, call.cover.blocks);
  }

  template <class S>
  static void launch_items(const std::vector<OneCall*>& calls) {
    const OneCall& any = *calls.front();
    const torch::stable::accelerator::DeviceGuard guard(any.x.get_device());
    Items<S> items;
    unsigned blocks = 0, threads = 32;
    for (const OneCall* call : calls) {
      const int64_t numel = call->numel(), size = row_of_item(*call);
      threads = std::max(threads, threads_of_row(std::min(size, numel)));
      items.at[items.count++] = {static_cast<S*>(call->x.mutable_data_ptr()), numel, size, call->drawing.random.stream,
                                 blocks};
      blocks += static_cast<unsigned>(std::min((numel + size - 1) / size, kMostBlocks));
    }
    const cudaLaunchConfig_t config{dim3(blocks), dim3(threads), 0, current_stream(any.x)};
    const Drawing& drawing = any.drawing;
    with_functors<S>(any, [&](const auto& product, const auto& round) {
      using Format = std::decay_t<decltype(product)>;
      using Round = std::decay_t<decltype(round)>;
      if constexpr (kItems<S, Format, Round>) {  // as row_of_item has seen
        STD_CUDA_CHECK(cudaLaunchKernelEx(&config, quantize_items<S, Format, Round>, product, round, items, drawing.random,
                                          key_on_device(drawing)));
      }
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(swalp_fx, CUDA, m) { register_ops<Cuda>(m); }

}  // namespace swalp_fx
