// The ops on CUDA: the arithmetic is csrc/formats.h's; here it is only launched.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../check.h"

namespace swalp_fx {
namespace {

// float16 and bfloat16 are computed in float32, which holds them exactly.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

constexpr int kThreads = 256;

struct Place {
  int64_t memory, index, block;
};

// The element that comes i-th in memory order.
__device__ __forceinline__ Place place_of(const Layout& layout, int64_t i) {
  Place p{i, 0, 0};
  for (int d = layout.rank - 1; d >= 0; --d) {
    const Dim& dim = layout.dims[d];
    const int64_t at = d == 0 ? i : i % dim.size;
    i /= dim.size;
    p.index += at * dim.index;
    p.block += at * dim.block;
  }
  return p;
}

// A key on the device is read here, so that neither the host waits nor a captured graph freezes it.
__device__ __forceinline__ Random with_key(Random random, const uint64_t* key) {
  if (key != nullptr) random.key = *key;
  return random;
}

template <Rounding R, class S, class Format>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const Format format, const Layout layout, const S* x, S* y,
                    const typename Ieee<Compute<S>>::Bits* maxima, const Random drawn, const uint64_t* key) {
  using T = Compute<S>;
  const Random random = R == Rounding::Stochastic ? with_key(drawn, key) : drawn;
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < layout.numel; i += step) {
    const Place p = place_of(layout, i);
    const auto quantizer = format.template quantizer<T>(Format::shares_scale ? maxima[p.block] : 0);
    const uint32_t word = R == Rounding::Stochastic ? word_at(random, p.index) : 0u;
    y[p.memory] = static_cast<S>(quantizer.template apply<R>(static_cast<T>(x[p.memory]), word, random.bits));
  }
}

__device__ __forceinline__ void raise(uint32_t* maximum, uint32_t value) { atomicMax(maximum, value); }
__device__ __forceinline__ void raise(uint64_t* maximum, uint64_t value) {
  atomicMax(reinterpret_cast<unsigned long long*>(maximum), static_cast<unsigned long long>(value));
}

// Integer maxima do not depend on order, so neither do the results on the launch.
template <class S>
__global__ void __launch_bounds__(kThreads)
    maximum_kernel(const Layout layout, const S* x, typename Ieee<Compute<S>>::Bits* maxima) {
  using T = Compute<S>;
  using Bits = typename Ieee<T>::Bits;
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  int64_t block = -1;
  Bits maximum = 0;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < layout.numel; i += step) {
    const Place p = place_of(layout, i);
    if (p.block != block) {
      if (maximum > 0) raise(&maxima[block], maximum);
      block = p.block;
      maximum = 0;
    }
    const Bits bits = finite_magnitude(static_cast<T>(x[p.memory]));
    maximum = maximum < bits ? bits : maximum;
  }
  if (maximum > 0) raise(&maxima[block], maximum);
}

struct Cuda {
  template <class Format>
  static void run(const Format& format, const Layout& layout, const Tensor& x, Tensor& y, const Draws& draws) {
    switch (x.scalar_type()) {
      case ScalarType::Float:
        return run_as<float>(format, layout, x, y, draws);
      case ScalarType::Double:
        return run_as<double>(format, layout, x, y, draws);
      case ScalarType::Half:
        return run_as<torch::headeronly::Half>(format, layout, x, y, draws);
      default:
        return run_as<torch::headeronly::BFloat16>(format, layout, x, y, draws);
    }
  }

 private:
  template <class S, class Format>
  static void run_as(const Format& format, const Layout& layout, const Tensor& x, Tensor& y, const Draws& draws) {
    using Bits = typename Ieee<Compute<S>>::Bits;
    const torch::stable::accelerator::DeviceGuard guard(x.get_device());
    void* handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device(), &handle));
    const auto stream = static_cast<cudaStream_t>(handle);
    const S* from = static_cast<const S*>(x.const_data_ptr());
    S* to = static_cast<S*>(y.mutable_data_ptr());

    // Scratch from torch's allocator: it follows the stream, and graph capture allows it.
    Bits* maxima = nullptr;
    std::optional<Tensor> scratch;
    if constexpr (Format::shares_scale) {
      scratch = torch::stable::new_empty(x, {layout.blocks}, sizeof(Bits) == 8 ? ScalarType::Long : ScalarType::Int);
      maxima = static_cast<Bits*>(scratch->mutable_data_ptr());
      STD_CUDA_CHECK(cudaMemsetAsync(maxima, 0, layout.blocks * sizeof(Bits), stream));
      maximum_kernel<S><<<grid(layout), kThreads, 0, stream>>>(layout, from, maxima);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
    const uint64_t* key = nullptr;
    if (draws.key && draws.key->is_cuda()) key = static_cast<const uint64_t*>(draws.key->const_data_ptr());
    switch (draws.rounding) {
#define SWALP_CASE(R)                                                                                                  \
  case Rounding::R:                                                                                                    \
    quantize_kernel<Rounding::R><<<grid(layout), kThreads, 0, stream>>>(format, layout, from, to, maxima, draws.random, \
                                                                        key);                                          \
    break;
      SWALP_CASE(Nearest)
      SWALP_CASE(Stochastic)
      SWALP_CASE(TowardZero)
      SWALP_CASE(Down)
      SWALP_CASE(Up)
      SWALP_CASE(NearestAway)
#undef SWALP_CASE
    }
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

  static unsigned grid(const Layout& layout) {
    constexpr int64_t kMostBlocks = 132 * 32;  // several waves of the largest GPUs; the kernels stride over the rest
    return static_cast<unsigned>(std::min<int64_t>((layout.numel + kThreads - 1) / kThreads, kMostBlocks));
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(swalp_fx, CUDA, m) { Ops<Cuda>::register_in(m); }

}  // namespace swalp_fx
