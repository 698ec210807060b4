// The ops on the CPU: which elements a thread takes, and which instructions it has.
#include <atomic>
#include <utility>

#include "../check.h"
#include "../codes.h"
#include "../plan.h"
#include "boxes.h"

#if defined(__GNUC__) && defined(__x86_64__)
#include <immintrin.h>
#endif

namespace swalp_fx {
namespace {

// The settings of a group of torch.optim.SGD.
struct Sgd {
  float lr, momentum, undamped, weight_decay;  // undamped: 1 - dampening
  bool nesterov, maximize;
};

// In place of a rounding: writes nothing, and tells whether rounding to nearest would change anything.
struct Look : RoundNearest {
  bool* changed;
  void tell(bool differs) const {
    if (differs) __atomic_store_n(changed, true, __ATOMIC_RELAXED);
  }
};

// 16 values of 32 bits: writes their lowest bytes, or writes the values to every second place and leaves the rest alone.
struct OneByOne {
  static void narrow(const uint32_t* from, uint8_t* to) {
    for (int i = 0; i < 16; ++i) to[i] = static_cast<uint8_t>(from[i]);
  }
  static void spread(const void* from, void* to) {
    for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * 8, static_cast<const char*>(from) + i * 4, 4);
  }
};

namespace portable {
constexpr int64_t kLanes = 1;
struct Lanes : OneLane, OneByOne {
  using Vector = uint64_t;
  static Vector twice_lane_number() { return 0; }
  static Vector join(Vector even, Vector odd) { return (even & 0xFFFFFFFFu) | odd << 32; }
};
#include "copy.h"
#include "draws.h"
#include "kernels.h"
#include "sgd.h"
#include "store.h"
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
struct Lanes : OneByOne {
  typedef uint64_t Vector __attribute__((vector_size(32)));
  static Vector multiply(Vector a, uint32_t m) {
    return (Vector)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
  }
  static Vector twice_lane_number() { return Vector{0, 2, 4, 6}; }
  static Vector join(Vector even, Vector odd) {
    return (Vector)_mm256_blend_epi32((__m256i)even, _mm256_slli_epi64((__m256i)odd, 32), 0xAA);
  }
};
#include "copy.h"
#include "draws.h"
#include "kernels.h"
#include "sgd.h"
#include "store.h"
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
  static Vector join(Vector even, Vector odd) {
    return (Vector)_mm512_mask_moveldup_ps((__m512)even, 0xAAAA, (__m512)odd);
  }
  static void narrow(const uint32_t* from, uint8_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_loadu_si512(from)));
  }
  static void spread(const void* from, void* to) {
    const __m512i all = _mm512_loadu_si512(from), last = _mm512_shuffle_i64x2(all, all, 0xEE);
    _mm512_mask_storeu_epi32(to, 0x5555, _mm512_maskz_expand_epi32(0x5555, all));
    _mm512_mask_storeu_epi32(static_cast<char*>(to) + 64, 0x5555, _mm512_maskz_expand_epi32(0x5555, last));
  }
};
#include "copy.h"
#include "draws.h"
#include "kernels.h"
#include "sgd.h"
#include "store.h"
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
  static constexpr Gaps most_gaps = Gaps::Some;

  static void run(const Numbers& format, const Cover& cover, const Tensor& x, Tensor& y, const Drawing& drawing) {
    run_at(format, cover, x.scalar_type(), x.const_data_ptr(), y.mutable_data_ptr(), drawing);
  }

  // A list of tensors, in one loop.
  static void in_place(std::vector<Call<Cpu>>& calls) {
    const auto in_place = [&](size_t i, const Cover& piece) { calls[i].dense ? calls[i].in_place(piece) : calls[i].in_place(); };
    for_each_piece(calls.data(), calls.size(), in_place);
  }

  template <class Forms>
  static void register_more(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize_sgd_", TORCH_BOX(&CpuForms<Forms>::sgd));
    m.impl("quantize_codes", TORCH_BOX(&CpuForms<Forms>::codes));
  }

  struct PlanOf final : Plan {
    Numbers format;
    Cover cover;
    ScalarType type;
    Drawing drawing;
    static constexpr bool dense = true;

    explicit PlanOf(const Call<Cpu>& call)
        : format(call.format), cover(call.cover), type(call.x.scalar_type()), drawing(call.drawing) {
      drawing.key.reset();
    }

    void round(const void* from, void* to, uint64_t key, uint64_t stream) const override {
      Drawing drawn = drawing;
      drawn.random.key = key;
      drawn.random.stream = stream;
      check_memory(from);
      if (!cover.layouts.empty()) run_at(format, cover, type, from, to, drawn);
    }

    // If scales are powers of two, every rounding keeps the numbers that rounding to nearest keeps.
    bool keeps(const void* from) const override {
      if (!format.is_exact()) return false;
      check_memory(from);
      std::atomic<bool> kept = steps_in_piece(*this) > 0 || cover.layouts.empty();
      if (!kept) return false;
      for_each_piece(this, 1, [&](size_t, const Cover& piece) {
        if (kept && !keeps_piece(piece, from)) kept = false;
      });
      return kept;
    }

   private:
    // The sizes and strides are the plan's, but the tensor may have no memory.
    void check_memory(const void* x) const {
      require(cover.layouts.empty() || x != nullptr, kOp, kNoMemory);
    }

    bool keeps_piece(const Cover& piece, const void* from) const {
      bool changed = false;
      with_scalar(type, [&](auto zero) {
        using S = decltype(zero);
        changed = format.magnitude_bits() > Ieee<Compute<S>>::mantissa;
        if (changed) return;
        const S* x = static_cast<const S*>(from);
        with_format(format, [&](const auto& product) {
          run_on(kIsa, product, piece, x, const_cast<S*>(x), Look{{}, &changed}, Random());
        });
      });
      return !changed;
    }
  };

 private:
  // Calls f(index of a call, cover of a piece), on every thread, for pieces of about kGrain elements and of whole blocks. A
  // tensor that cannot be cut into such pieces comes first, whole, and f has all threads for it.
  template <class OneCall, class F>
  static void for_each_piece(const OneCall* calls, size_t count, const F& f) {
    if (count == 1 && calls[0].cover.numel() <= Boxes::kGrain) {
      if (calls[0].cover.numel() > 0) f(0, calls[0].cover);
      return;
    }
    struct Piece {
      size_t call;
      int64_t begin, end;  // of the outermost loop
    };
    std::vector<Piece> pieces;
    std::vector<int64_t> begins;
    int64_t numel = 0;
    for (size_t i = 0; i < count; ++i) {
      const Cover& cover = calls[i].cover;
      const int64_t steps = steps_in_piece(calls[i]);
      if (steps == 0 && cover.numel() > 0) f(i, cover);
      if (steps == 0) continue;
      const int64_t size = outermost(cover);
      for (int64_t begin = 0; begin < size; begin += steps) {
        pieces.push_back({i, begin, std::min(size, begin + steps)});
        begins.push_back(numel + cover.numel() / size * begin);
      }
      numel += cover.numel();
    }
    torch::stable::parallel_for(0, numel, Boxes::kGrain, [&](int64_t begin, int64_t end) {
      const auto first = std::lower_bound(begins.begin(), begins.end(), begin);
      const auto last = std::lower_bound(first, begins.end(), end);
      for (auto at = first; at != last; ++at) {
        const Piece& piece = pieces[at - begins.begin()];
        f(piece.call, part_of(calls[piece.call].cover, piece.begin, piece.end));
      }
    });
  }

  static int64_t outermost(const Cover& cover) {
    const Layout& layout = cover.layouts.front();
    return layout.rank > 0 ? layout.dims[0].size : 1;
  }

  // Steps of a call's outermost loop that make a piece; 0 if it has to be done whole, by all threads.
  template <class OneCall>
  static int64_t steps_in_piece(const OneCall& call) {
    const Shared shared = call.format.shared();
    const Cover& cover = call.cover;
    if (!call.dense || cover.layouts.empty()) return 0;
    const Layout& layout = cover.layouts.front();
    const int64_t size = outermost(cover), step = layout.numel / size;
    if (cover.layouts.size() == 1 && layout.rank > 0 && step <= Boxes::kWholeRow && draws_apart(call.drawing, layout)) {
      // No block reaches from one step into another, and the blocks of a piece have consecutive numbers.
      const bool apart = shared == Shared::Block && layout.dims[0].step.block * size == cover.blocks;
      if (apart || shared == Shared::Nothing) return std::max<int64_t>(1, Boxes::kGrain / step);
    }
    return cover.numel() <= Boxes::kGrain ? size : 0;
  }

  // Whether each step of the outermost loop has random bits of its own: row-major neighbours lie among neighbours in memory.
  static bool draws_apart(const Drawing& drawing, const Layout& layout) {
    return drawing.rounding != Rounding::Stochastic ||
           std::all_of(layout.dims, layout.dims + layout.rank,
                       [&](const Dim& d) { return d.step.index <= layout.dims[0].step.index; });
  }

  // The elements from step `begin` to `end` of the outermost loop, which lie side by side.
  static Cover part_of(const Cover& cover, int64_t begin, int64_t end) {
    Cover part = cover;
    if (end - begin == outermost(cover)) return part;
    Layout& layout = part.layouts.front();
    layout.numel = layout.numel / layout.dims[0].size * (end - begin);
    layout.dims[0].advance(layout.first, begin);
    layout.dims[0].size = end - begin;
    layout.first.block = 0;
    part.blocks = std::max<int64_t>(1, layout.dims[0].step.block * (end - begin));
    return part;
  }

  // The forms that the CPU alone has.
  template <class Forms>
  struct CpuForms;

  template <class Device, class... N>
  struct CpuForms<Forms<Device, N...>> {
    using Of = Forms<Device, N...>;

    // A step of torch.optim.SGD in one pass. A thread rounds a piece of the gradients, updates the weights, and rounds them
    // while they are in its cache. A role without streams is not rounded. If there are masters, they are updated, and the
    // weights are rounded copies of them.
    static void sgd(std::vector<Tensor> weights, std::vector<Tensor> gradients, std::vector<Tensor> momenta,
                    std::vector<Tensor> masters, double lr, double momentum, double undamped, double weight_decay,
                    bool nesterov, bool maximize, N... format, Dims dims, Dims sizes, int64_t rounding, int64_t bits,
                    Key key, std::vector<int64_t> weight_streams, std::vector<int64_t> gradient_streams,
                    std::vector<int64_t> momentum_streams) {
      const Numbers n = numbers(format...);
      const Sgd step{static_cast<float>(lr),           static_cast<float>(momentum), static_cast<float>(undamped),
                     static_cast<float>(weight_decay), nesterov,                     maximize};
      const auto calls = [&](const std::vector<Tensor>& xs, const std::vector<int64_t>& streams) {
        check_alike(weights, xs);
        const std::vector<int64_t> none(xs.size());
        check_list(kOp, xs, streams.empty() ? none : streams);
        return Of::calls(xs, n, dims, sizes, rounding, bits, key, streams.empty() ? none : streams);
      };
      auto of_weights = calls(weights, weight_streams), of_gradients = calls(gradients, gradient_streams);
      std::vector<Tensor> all = weights;
      all.insert(all.end(), gradients.begin(), gradients.end());
      all.insert(all.end(), momenta.begin(), momenta.end());
      all.insert(all.end(), masters.begin(), masters.end());
      require(!share_memory(all), kOp, "weights, gradients, momenta or masters share memory; use the optimizer's own step");
      auto of_momenta = calls(momenta.empty() ? gradients : momenta, momentum_streams);
      if (!masters.empty()) check_alike(weights, masters);
      for_each_piece(of_weights.data(), of_weights.size(), [&](size_t i, const Cover& piece) {
        if (!gradient_streams.empty()) of_gradients[i].in_place(piece);
        update(step, piece, weights[i], gradients[i], momenta.empty() ? nullptr : &momenta[i],
               masters.empty() ? nullptr : &masters[i]);
        if (!momentum_streams.empty()) of_momenta[i].in_place(piece);
        if (!weight_streams.empty()) of_weights[i].in_place(piece);
      });
    }

    // Writes codes of 8 bits or fewer side by side, and stored scales. False if it makes none for this format, or if x is not
    // finite; then the outputs mean nothing.
    static bool codes(Tensor x, N... format, Dims dims, Dims sizes, int64_t rounding, int64_t bits, Key key, int64_t stream,
                      std::vector<int64_t> coding, Tensor packed, Tensor scales, Tensor second) {
      const Numbers n = numbers(format...);
      const Call<Cpu> call(x, n, dims, sizes, rounding, bits, key, stream);
      check_codes(call, coding, packed, scales, second);
      const auto at = [&](size_t i) { return static_cast<int>(coding[i]); };
      const Coding of_elements{at(0), at(1) != 0, at(2) != 0, at(3)};
      const bool is_packed = of_elements.bits == 8;  // one code a byte
      const std::unique_ptr<uint8_t[]> room(is_packed ? nullptr : new uint8_t[x.numel()]);
      auto* const to = static_cast<uint8_t*>(packed.mutable_data_ptr());
      uint8_t* const bytes = is_packed ? to : room.get();
      Found found;
      bool made = false;
      with_format(n, [&](const auto& product) {
        with_rounding<float>(call.drawing.rounding, call.drawing.random.bits, n.magnitude_bits(), [&](const auto& round) {
          using Round = std::decay_t<decltype(round)>;
          if constexpr (std::is_same_v<Round, RoundNearest> || std::is_same_v<Round, RoundStochastic>) {
            if (n.element() == ElementKind::WideFloats) return;
            const auto* from = static_cast<const float*>(x.const_data_ptr());
            run_on(kIsa, product, call.cover, from, bytes, Coded<Round>{round, of_elements, &found}, call.drawing.random);
            made = true;
          }
        });
      });
      if (!made || !found.finite) return false;
      const auto minus_zero = static_cast<uint8_t>(1 << (of_elements.bits - 1));
      if (!of_elements.has_signed_zero) std::replace(bytes, bytes + x.numel(), minus_zero, uint8_t{0});
      with_isa([&](auto store_scales, auto pack_codes) {
        store_scales(n, of_elements, found, at(4), scales.mutable_data_ptr(), second.mutable_data_ptr());
        if (is_packed) return;
        torch::stable::parallel_for(0, (x.numel() + 7) / 8, Boxes::kGrain / 8, [&](int64_t begin, int64_t end) {
          const int64_t first = 8 * begin, count = std::min(8 * end, x.numel()) - first;
          pack_codes(bytes + first, count, of_elements.bits, to + begin * of_elements.bits);
        });
      });
      return true;
    }

    static void check_codes(const Call<Cpu>& call, const std::vector<int64_t>& coding, const Tensor& packed,
                            const Tensor& scales, const Tensor& second) {
      const bool is_row_major = call.x.scalar_type() == ScalarType::Float && call.x.is_contiguous();
      require(is_row_major, kOp, "x must be contiguous float32, to have codes; convert it first");
      require(coding.size() == 5, kOp, "coding has ", coding.size(), " numbers; give it 5");
      check_range(kOp, "bits of a code", coding[0], 1, 8);
      const int64_t bytes = (call.x.numel() * coding[0] + 7) / 8, blocks = call.cover.blocks;
      require(is_of(packed, ScalarType::Byte, bytes), kOp, "packed must be ", bytes, " bytes, which the codes fill");
      const ScaleKind kind = call.format.scale;
      const bool is_float = kind == ScaleKind::Absmax || kind == ScaleKind::Affine;
      const bool is_byte = kind == ScaleKind::PowerOfTwo || kind == ScaleKind::TwoLevel;
      require(!is_float || is_of(scales, ScalarType::Float, blocks), kOp, "scales must be ", blocks, " float32, one a block");
      require(!is_byte || is_of(scales, ScalarType::Byte, blocks), kOp, "scales must be ", blocks, " bytes, one a block");
      require(kind != ScaleKind::TwoLevel || is_of(second, ScalarType::Float, 1), kOp, "second must be one float32");
      require(kind != ScaleKind::Affine || is_of(second, ScalarType::Byte, blocks), kOp, "second must be ", blocks,
              " bytes, one a block");
    }

    static void check_alike(const std::vector<Tensor>& weights, const std::vector<Tensor>& xs) {
      require(weights.size() == xs.size(), kOp, weights.size(), " weights but ", xs.size(),
              " gradients, momenta or masters; give each weight one");
      for (size_t i = 0; i < xs.size(); ++i) {
        bool alike = xs[i].scalar_type() == ScalarType::Float && is_dense(xs[i]) && xs[i].dim() == weights[i].dim();
        for (int64_t d = 0; alike && d < xs[i].dim(); ++d) {
          alike = xs[i].size(d) == weights[i].size(d) && xs[i].stride(d) == weights[i].stride(d);
        }
        require(alike, kOp, "weight, gradient, momentum and master ", i,
                " must be dense float32 of one shape and strides; use the optimizer's own step");
      }
    }
  };

  static bool is_of(const Tensor& x, ScalarType type, int64_t numel) {
    return x.scalar_type() == type && x.numel() == numel && x.is_contiguous();
  }

  // Calls f with store_scales and pack_codes.
  template <class F>
  static void with_isa(const F& f) {
    switch (kIsa) {
#ifdef SWALP_X86
      case Isa::Avx512:
        return f(avx512::store_scales, avx512::pack_codes);
      case Isa::Avx2:
        return f(avx2::store_scales, avx2::pack_codes);
#endif
      default:
        return f(portable::store_scales, portable::pack_codes);
    }
  }

  // The update of the elements that `piece`, which has no gaps, covers.
  static void update(const Sgd& step, const Cover& piece, Tensor& weight, const Tensor& gradient, Tensor* momentum,
                     Tensor* master) {
    const int64_t first = piece.layouts.front().first.memory;
    const auto memory = [&](Tensor* x) {
      return x == nullptr ? nullptr : static_cast<float*>(x->mutable_data_ptr()) + first;
    };
    float* const weights = memory(&weight);
    float* const w = master == nullptr ? weights : memory(master);
    const float* g = static_cast<const float*>(gradient.const_data_ptr()) + first;
    float* m = memory(momentum);
    torch::stable::parallel_for(0, piece.numel(), Boxes::kGrain, [&](int64_t begin, int64_t end) {
      sgd_update(step, w + begin, g + begin, m == nullptr ? nullptr : m + begin, end - begin);
      if (w != weights) std::copy(w + begin, w + end, weights + begin);
    });
  }

  static void sgd_update(const Sgd& step, float* w, const float* g, float* m, int64_t n) {
    switch (kIsa) {
#ifdef SWALP_X86
      case Isa::Avx512:
        return avx512::sgd_update(step, w, g, m, n);
      case Isa::Avx2:
        return avx2::sgd_update(step, w, g, m, n);
#endif
      default:
        return portable::sgd_update(step, w, g, m, n);
    }
  }

  static void run_at(const Numbers& format, const Cover& cover, ScalarType type, const void* x, void* y,
                     const Drawing& drawing) {
    with_scalar(type, [&](auto zero) {
      using S = decltype(zero);
      const S* from = static_cast<const S*>(x);
      S* to = static_cast<S*>(y);
      with_format(format, [&](const auto& product) {
        const auto run_with = [&](const auto& round) { run_on(kIsa, product, cover, from, to, round, drawing.random); };
        with_rounding<Compute<S>>(drawing.rounding, drawing.random.bits, format.magnitude_bits(), run_with);
      });
    });
  }

  template <class Format, class S, class Round>
  static void run_on(Isa isa, const Format& format, const Cover& cover, const S* x, Result<S, Round>* y,
                     const Round& round, const Random& random) {
    // Combinations that training does not use are not worth compiling three times.
    if constexpr (!Format::rare && !std::is_same_v<Round, RoundOther>) {
#ifdef SWALP_X86
      if (isa == Isa::Avx512) return avx512::quantize(format, cover, x, y, round, random);
      if (isa == Isa::Avx2) return avx2::quantize(format, cover, x, y, round, random);
#endif
    }
    portable::quantize(format, cover, x, y, round, random);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(swalp_fx, CPU, m) { register_ops<Cpu>(m); }

}  // namespace swalp_fx
