// The ops on CUDA: which kernel serves which layout.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../check.h"
#include "kernels.cuh"

namespace swalp_fx {
namespace {

constexpr int64_t kMostBlocks = 132 * 16;    // two waves of full occupancy on the largest GPUs; the kernels stride on
constexpr int64_t kSmallestRow = 4 * kThreads;  // elements that keep a thread block busy

unsigned grid(int64_t threads) {
  return static_cast<unsigned>(std::clamp<int64_t>((threads + kThreads - 1) / kThreads, 1, kMostBlocks));
}

// Memory without gaps, in the order of the random bits if any are drawn.
template <class Round>
bool in_order(const Layout& l) {
  int64_t numel = 1;
  for (int d = l.rank - 1; d >= 0; --d) {
    const Place& step = l.dims[d].step;
    if (step.memory != numel || (Round::draws && step.index != numel)) return false;
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
      if (cover.layouts.size() == 1 && in_order<Round>(layout) && is_aligned(x) && is_aligned(y) &&
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
  template <class Format>
  static void run(const Format& format, const Cover& cover, const Tensor& x, Tensor& y, const Drawing& drawing) {
    switch (x.scalar_type()) {
      case ScalarType::Float:
        return run_as<float>(format, cover, x, y, drawing);
      case ScalarType::Double:
        return run_as<double>(format, cover, x, y, drawing);
      case ScalarType::Half:
        return run_as<torch::headeronly::Half>(format, cover, x, y, drawing);
      default:
        return run_as<torch::headeronly::BFloat16>(format, cover, x, y, drawing);
    }
  }

 private:
  template <class S, class Format>
  static void run_as(const Format& format, const Cover& cover, const Tensor& x, Tensor& y, const Drawing& drawing) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device());
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &stream));
    const bool key_on_device = drawing.key && drawing.key->is_cuda();
    const auto* key = key_on_device ? static_cast<const uint64_t*>(drawing.key->const_data_ptr()) : nullptr;
    with_rounding(drawing.rounding, drawing.random.bits, [&](const auto& round) {
      Launch<S, Format, std::decay_t<decltype(round)>>{format,
                                                       round,
                                                       x,
                                                       static_cast<const S*>(x.const_data_ptr()),
                                                       static_cast<S*>(y.mutable_data_ptr()),
                                                       drawing.random,
                                                       key,
                                                       static_cast<cudaStream_t>(stream)}
          .cover(cover);
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(swalp_fx, CUDA, m) { register_ops<Cuda>(m); }

}  // namespace swalp_fx
