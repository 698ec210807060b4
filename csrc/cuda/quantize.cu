// The ops on CUDA: which kernel serves which layout.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <map>

#include "../check.h"
#include "kernels.cuh"

namespace swalp_fx {
namespace {

constexpr int64_t kMostBlocks = 132 * 16;    // two waves of full occupancy on the largest GPUs; the kernels stride on
constexpr int64_t kSmallestRow = 4 * kThreads;  // elements that keep a thread block busy
constexpr int64_t kLargestItem = 1 << 18;    // elements of a tensor that is not worth a launch of its own
constexpr int64_t kPiece = 8 * kThreads;     // elements that a thread block takes of an item with no blocks

unsigned grid(int64_t threads) {
  return static_cast<unsigned>(std::clamp<int64_t>((threads + kThreads - 1) / kThreads, 1, kMostBlocks));
}

// Memory without gaps, in the order of the random bits if any are drawn.
bool in_order(const Layout& l, bool draws) {
  int64_t numel = 1;
  for (int d = l.rank - 1; d >= 0; --d) {
    const Place& step = l.dims[d].step;
    if (step.memory != numel || (draws && step.index != numel)) return false;
    numel *= l.dims[d].size;
  }
  return l.first.memory == 0;
}

template <class S>
bool is_aligned(const S* x) {
  return reinterpret_cast<uintptr_t>(x) % sizeof(Vector<S>) == 0;
}

// One op's launches, on the current stream of the tensor's device.
template <class S, class Format, class Round>
struct Launch {
  using Bits = typename Ieee<Compute<S>>::Bits;
  const Format& format;
  const Round& round;
  const Tensor& tensor;
  const S* x;
  S* y;
  Random random;
  const uint64_t* key;
  cudaStream_t stream;

  // Zeros, from torch's allocator: it follows the stream, and graph capture allows it.
  Tensor zeros(int64_t count) const {
    Tensor t = torch::stable::new_empty(tensor, {count}, sizeof(Bits) == 8 ? ScalarType::Long : ScalarType::Int);
    STD_CUDA_CHECK(cudaMemsetAsync(t.mutable_data_ptr(), 0, count * sizeof(Bits), stream));
    return t;
  }
  static Bits* data(const Tensor& t) { return static_cast<Bits*>(t.mutable_data_ptr()); }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), unsigned blocks, const Arguments&... arguments) const {
    const cudaLaunchConfig_t config{dim3(blocks), dim3(kThreads), 0, stream};
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

  void cover(const Cover& cover) const {
    if constexpr (kFast) {
      const Layout& layout = cover.layouts.front();
      if (cover.layouts.size() == 1 && in_order(layout, Round::draws) && is_aligned(x) && is_aligned(y) &&
          random.draws_per_word() == kDrawsPerWord && fast(cover, layout)) {
        return;
      }
    }
    elements(cover);
  }

 private:
  // Kernels that move four elements at a time, for what training uses; the rest is served one element at a time.
  static constexpr bool kFast = !std::is_same_v<Round, RoundOther> && Format::shared != Shared::BlockAndTensor;

  // Whether one of them serves the layout; if so, it has.
  bool fast(const Cover& cover, const Layout& layout) const {
    if constexpr (Format::shared == Shared::Nothing) {
      quads(layout, 0, nullptr);
      return true;
    } else {
      if (cover.blocks == 1) {
        const Tensor maximum = zeros(1);
        launch(maximum_of_all<S>, grid(layout.numel / kVector), x, layout.numel, data(maximum));
        quads(layout, 0, data(maximum));
        return true;
      }
      if (!layout.blocks_are_rows() || layout.rank != 2) return false;
      const int64_t size = layout.inner().size;
      if (size % kCounters == 0 && (size & (size - 1)) == 0 && size <= random.block()) {
        quads(layout, size, nullptr);
        return true;
      }
      if (size < kSmallestRow || size % kVector != 0) return false;
      const int64_t count = layout.dims[0].size;
      launch(quantize_rows<S, Format, Round>, static_cast<unsigned>(std::min(count, kMostBlocks)), format, round, x, y,
             count, size, random, key);
      return true;
    }
  }

  void quads(const Layout& layout, int64_t tile, const Bits* shared) const {
    const int64_t numel = layout.numel / random.block() * random.block();
    if (numel > 0) {
      launch(quantize_quads<S, Format, Round>, grid(numel / random.block() * kQuad), format, round, x, y, numel,
             static_cast<int>(tile), shared, random, key);
    }
    if (numel == layout.numel) return;
    // What is left over is less than a block of random bits.
    Cover rest;
    Layout left;
    left.first = {numel, numel, 0};
    left.numel = layout.numel - numel;
    if (tile > 0) {
      left.dims[left.rank++] = {left.numel / tile, {tile, tile, 1}};
      left.dims[left.rank++] = {tile, {1, 1, 0}};
      rest.blocks = left.numel / tile;
    } else {
      left.dims[left.rank++] = {left.numel, {1, 1, 0}};
    }
    rest.layouts.push_back(left);
    elements(rest, shared);
  }

  // Any layout. `known`: the maxima, where they have been found already.
  void elements(const Cover& cover, const Bits* known = nullptr) const {
    std::optional<Tensor> maxima, most;
    const Bits* of_tensor = nullptr;
    if (Format::shared != Shared::Nothing && known == nullptr) {
      maxima = zeros(cover.blocks);
      known = data(*maxima);
      for (const Layout& layout : cover.layouts) {
        launch(block_maxima<S>, grid(layout.numel), layout, x, data(*maxima));
      }
    }
    if (Format::shared == Shared::BlockAndTensor) {
      most = zeros(1);
      of_tensor = data(*most);
      launch(maximum_of_maxima<Bits>, grid(cover.blocks), known, cover.blocks, data(*most));
    }
    for (const Layout& layout : cover.layouts) {
      launch(quantize_elements<S, Format, Round>, grid(layout.numel), format, round, layout, x, y, known, of_tensor,
             random, key);
    }
  }
};

struct Cuda {
  template <class Forms>
  static void register_more(torch::stable::detail::StableLibrary&, const std::string&) {}

  template <class Format>
  static void run(const Format& format, const Cover& cover, const Tensor& x, Tensor& y, const Drawing& drawing) {
    with_scalar(x.scalar_type(), [&](auto zero) { run_as<decltype(zero)>(format, cover, x, y, drawing); });
  }

  // A list of tensors: the small ones in as few launches as take them, each large one in its own.
  template <class OneCall>
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

  template <class S, class Format>
  static void run_as(const Format& format, const Cover& cover, const Tensor& x, Tensor& y, const Drawing& drawing) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device());
    with_rounding<Compute<S>>(drawing.rounding, drawing.random.bits, format.magnitude_bits(), [&](const auto& round) {
      Launch<S, Format, std::decay_t<decltype(round)>>{format,
                                                       round,
                                                       x,
                                                       static_cast<const S*>(x.const_data_ptr()),
                                                       static_cast<S*>(y.mutable_data_ptr()),
                                                       drawing.random,
                                                       key_on_device(drawing),
                                                       current_stream(x)}
          .cover(cover);
    });
  }

  // The elements in a row of a call's tensor as an Item; 0 where it is none.
  template <class OneCall>
  static int64_t row_of_item(const OneCall& call) {
    constexpr auto shared = std::decay_t<decltype(call.format)>::shared;
    if (shared == Shared::BlockAndTensor || !call.dense || call.cover.layouts.size() != 1) return 0;
    const Layout& layout = call.cover.layouts.front();
    const bool draws = call.drawing.rounding == Rounding::Stochastic;
    if (layout.numel > kLargestItem || !in_order(layout, draws)) return 0;
    if (shared == Shared::Nothing) return kPiece;
    if (call.cover.blocks == 1) return layout.numel;
    return layout.rank == 2 && layout.blocks_are_rows() ? layout.inner().size : 0;
  }

  template <class S, class OneCall>
  static void launch_items(const std::vector<OneCall*>& calls) {
    const OneCall& any = *calls.front();
    const torch::stable::accelerator::DeviceGuard guard(any.x.get_device());
    Items<S> items;
    unsigned blocks = 0;
    for (const OneCall* call : calls) {
      const int64_t numel = call->numel(), size = row_of_item(*call);
      items.at[items.count++] = {static_cast<S*>(call->x.mutable_data_ptr()), numel, size, call->drawing.random.stream,
                                 blocks};
      blocks += static_cast<unsigned>(std::min((numel + size - 1) / size, kMostBlocks));
    }
    const cudaLaunchConfig_t config{dim3(blocks), dim3(kThreads), 0, current_stream(any.x)};
    const Drawing& drawing = any.drawing;
    with_rounding<Compute<S>>(drawing.rounding, drawing.random.bits, any.format.magnitude_bits(), [&](const auto& round) {
      using Format = std::decay_t<decltype(any.format)>;
      STD_CUDA_CHECK(cudaLaunchKernelEx(&config, quantize_items<S, Format, std::decay_t<decltype(round)>>, any.format,
                                        round, items, drawing.random, key_on_device(drawing)));
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(swalp_fx, CUDA, m) { register_ops<Cuda>(m); }

}  // namespace swalp_fx
