// The ops on the CPU: which elements a thread takes, and which instructions it has.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "../check.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#endif

namespace swalp_fx {
namespace {

// float16 and bfloat16 are computed in float32, which holds them exactly.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

// A piece of an innermost loop.
struct Run {
  int64_t size, memory, index, block;
};

// A layout cut into runs of at most kRun elements, shared out over torch's threads.
struct Runs {
  static constexpr int64_t kRun = 1 << 14;    // a multiple of kWordBlock that fits in the L1 cache twice
  static constexpr int64_t kGrain = 1 << 15;  // elements worth waking a thread for
  const Layout& layout;
  Dim inner;
  int64_t pieces;  // runs in an innermost loop
  int64_t count;

  explicit Runs(const Layout& l) : layout(l), inner{1, 1, 1, 0} {
    if (l.rank > 0) inner = l.dims[l.rank - 1];
    // A row-block that fits in the L2 cache stays whole: its second reading is then free.
    pieces = l.blocks_are_rows() && inner.size <= kRowLimit ? 1 : (inner.size + kRun - 1) / kRun;
    count = l.numel / inner.size * pieces;
  }

  bool are_whole() const { return pieces == 1; }

  // Calls body(each) on every thread; each(f) then calls f on every run of that thread.
  template <class Body>
  void for_each(const Body& body) const {
    const int64_t size = std::min(inner.size, pieces == 1 ? inner.size : kRun);
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / size), [&](int64_t begin, int64_t end) {
      body([&](const auto& f) {
        for (int64_t i = begin; i < end; ++i) f(run(i));
      });
    });
  }

 private:
  static constexpr int64_t kRowLimit = 1 << 17;

  Run run(int64_t i) const {
    int64_t outer = i / pieces;
    const int64_t first = i % pieces * kRun;
    Run r{std::min(inner.size - first, pieces == 1 ? inner.size : kRun), first, first * inner.index, first * inner.block};
    for (int d = layout.rank - 2; d >= 0; --d) {
      const Dim& dim = layout.dims[d];
      const int64_t at = outer % dim.size;
      outer /= dim.size;
      r.memory += at * dim.memory;
      r.index += at * dim.index;
      r.block += at * dim.block;
    }
    return r;
  }
};

namespace portable {
constexpr int64_t kLanes = 1;
struct Lanes : OneLane {
  using Vector = uint64_t;
  static Vector twice_lane_number() { return 0; }
};
#include "kernels.h"
}  // namespace portable

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define SWALP_X86 1
// GCC 12 takes its own _mm512_undefined for a mistake (PR 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
namespace avx2 {
constexpr int64_t kLanes = 4;
struct Lanes {
  typedef uint64_t Vector __attribute__((vector_size(32)));
  static Vector multiply(Vector a, uint32_t m) {
    return (Vector)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
  }
  static Vector twice_lane_number() { return Vector{0, 2, 4, 6}; }
};
#include "kernels.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2,prefer-vector-width=512")
namespace avx512 {
constexpr int64_t kLanes = 8;
struct Lanes {
  typedef uint64_t Vector __attribute__((vector_size(64)));
  static Vector multiply(Vector a, uint32_t m) {
    return (Vector)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
  }
  static Vector twice_lane_number() { return Vector{0, 2, 4, 6, 8, 10, 12, 14}; }
};
#include "kernels.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

enum class Isa { Portable, Avx2, Avx512 };

Isa best_isa() {
#ifdef SWALP_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::Avx512;
  }
  if (__builtin_cpu_supports("avx2")) return Isa::Avx2;
#endif
  return Isa::Portable;
}

struct Cpu {
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

  template <class S, class Format>
  static void run_as(const Format& format, const Layout& layout, const Tensor& x, Tensor& y, const Draws& draws) {
    static const Isa isa = best_isa();
    const S* from = static_cast<const S*>(x.const_data_ptr());
    S* to = static_cast<S*>(y.mutable_data_ptr());
    switch (isa) {
#ifdef SWALP_X86
      case Isa::Avx512:
        return avx512::quantize(format, layout, from, to, draws.rounding, draws.random);
      case Isa::Avx2:
        return avx2::quantize(format, layout, from, to, draws.rounding, draws.random);
#endif
      default:
        return portable::quantize(format, layout, from, to, draws.rounding, draws.random);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(swalp_fx, CPU, m) { Ops<Cpu>::register_in(m); }

}  // namespace swalp_fx
