// The ops on the CPU: which elements a thread takes, and which instructions it has.
#include "../check.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#endif

namespace swalp_fx {
namespace {

// The innermost loops of a layout, cut into runs of at most kRun elements and shared out over torch's threads.
class Runs {
 public:
  static constexpr int64_t kGrain = 1 << 15;  // elements worth waking a thread for

  explicit Runs(const Layout& l) : layout(l), inner(l.inner()) {
    // A row that is a block and fits in the L2 cache stays whole: reading it again is then free.
    whole = inner.size <= (l.blocks_are_rows() ? kWholeRow : kRun);
    length = whole ? inner.size : kRun;
    pieces = (inner.size + length - 1) / length;
  }

  bool are_whole() const { return whole; }

  // Calls body(each) on every thread; each(f) then calls f(place, size) for every run of that thread.
  template <class Body>
  void for_each(const Body& body) const {
    const int64_t runs = layout.numel / inner.size * pieces;
    torch::stable::parallel_for(0, runs, std::max<int64_t>(1, kGrain / length), [&](int64_t begin, int64_t end) {
      body([&](const auto& f) { visit(begin, end, f); });
    });
  }

 private:
  static constexpr int64_t kRun = 1 << 14;       // elements, of which the L1 cache holds some and the L2 cache all
  static constexpr int64_t kWholeRow = 1 << 17;  // elements
  const Layout& layout;
  Dim inner;
  bool whole;
  int64_t length, pieces;

  template <class F>
  void visit(int64_t begin, int64_t end, const F& f) const {
    // An odometer over the outer loops, set to `begin`: a division for each run would cost more than a short run.
    int64_t at[Layout::kMaxDims] = {};
    Place row = layout.first;
    int64_t rest = begin / pieces, piece = begin % pieces;
    for (int d = layout.rank - 2; d >= 0; --d) {
      at[d] = rest % layout.dims[d].size;
      rest /= layout.dims[d].size;
      layout.dims[d].advance(row, at[d]);
    }
    for (int64_t i = begin; i < end; ++i) {
      Place p = row;
      inner.advance(p, piece * length);
      f(p, std::min(length, inner.size - piece * length));
      if (++piece < pieces) continue;
      piece = 0;
      for (int d = layout.rank - 2; d >= 0; --d) {
        layout.dims[d].advance(row, 1);
        if (++at[d] < layout.dims[d].size) break;
        layout.dims[d].advance(row, -at[d]);
        at[d] = 0;
      }
    }
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

const Isa kIsa = best_isa();

struct Cpu {
  template <class Format>
  static void run(const Format& format, const Cover& cover, const Tensor& x, Tensor& y, const Drawing& drawing) {
    with_scalar(x.scalar_type(), [&](auto zero) { run_as<decltype(zero)>(format, cover, x, y, drawing); });
  }

  // A list of tensors, in one loop: a thread takes the tensors that begin in its part of all elements. Those that are
  // worth all threads come first, and each has loops of its own.
  template <class OneCall>
  static void in_place(std::vector<OneCall>& calls) {
    std::vector<OneCall*> small;
    std::vector<int64_t> begins;
    int64_t numel = 0;
    for (OneCall& call : calls) {
      if (call.numel() > Runs::kGrain || !call.dense) {
        call.in_place();
      } else if (call.numel() > 0) {
        small.push_back(&call);
        begins.push_back(numel);
        numel += call.numel();
      }
    }
    torch::stable::parallel_for(0, numel, Runs::kGrain, [&](int64_t begin, int64_t end) {
      const auto first = std::lower_bound(begins.begin(), begins.end(), begin);
      const auto last = std::lower_bound(first, begins.end(), end);
      for (auto at = first; at != last; ++at) small[at - begins.begin()]->in_place();
    });
  }

 private:
  template <class S, class Format>
  static void run_as(const Format& format, const Cover& cover, const Tensor& x, Tensor& y, const Drawing& drawing) {
    const S* from = static_cast<const S*>(x.const_data_ptr());
    S* to = static_cast<S*>(y.mutable_data_ptr());
    const auto run_with = [&](const auto& round) {
      // What training does not use is not worth compiling three times.
      if constexpr (std::is_same_v<std::decay_t<decltype(round)>, RoundOther>) {
        return portable::quantize(format, cover, from, to, round, drawing.random);
      } else {
        run_on(kIsa, format, cover, from, to, round, drawing.random);
      }
    };
    with_rounding<Compute<S>>(drawing.rounding, drawing.random.bits, format.magnitude_bits(), run_with);
  }

  template <class... Arguments>
  static void run_on(Isa isa, const Arguments&... arguments) {
    switch (isa) {
#ifdef SWALP_X86
      case Isa::Avx512:
        return avx512::quantize(arguments...);
      case Isa::Avx2:
        return avx2::quantize(arguments...);
#endif
      default:
        return portable::quantize(arguments...);
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(swalp_fx, CPU, m) { register_ops<Cpu>(m); }

}  // namespace swalp_fx
