// The loops of one set of instructions, and the functions by which quantize_cpu.cpp calls them. Each of portable.cpp, avx2.cpp and
// avx512.cpp includes this once, in a namespace that defines Lanes (see philox.h) and kLanes for it: 1, 4 or 8.

// torch's own, in place: its library does not round every root correctly, and its bits depend on the processor.
inline void square_root(float* x, int64_t n) {
  namespace stable = torch::stable;
  const Tensor roots = stable::from_blob(x, {n}, {1}, {torch::headeronly::DeviceType::CPU}, ScalarType::Float);
  StableIValue stack[] = {stable::detail::from(roots)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sqrt_", "", stack, TORCH_ABI_VERSION));
  stable::detail::to<Tensor>(stack[0]);  // frees it
}

// In place of a rounding: writes nothing, and tells whether rounding to nearest would change anything.
struct Look : RoundNearest {
  bool* changed;
  void tell(bool differs) const {
    if (differs) __atomic_store_n(changed, true, __ATOMIC_RELAXED);
  }
};

#include "copy.h"
#include "draws.h"
#include "kernels.h"
#include "store.h"
#include "updates.h"

// Combinations that training does not use are not worth compiling for every set.
template <class Format, class Round>
constexpr bool kIsCompiled = kLanes == 1 || (!Format::rare && !std::is_same_v<Round, RoundOther>);

template <class Format, class S, class Round>
bool run(const Format& format, const Cover& cover, const S* x, Result<S, Round>* y, const Round& round, const Random& random) {
  if constexpr (kIsCompiled<Format, Round>) quantize(format, cover, x, y, round, random);
  return kIsCompiled<Format, Round>;
}

inline bool round_all(const Numbers& format, const Cover& cover, ScalarType type, const void* x, void* y,
                      const Drawing& drawing) {
  bool done = false;
  with_scalar(type, [&](auto zero) {
    using S = decltype(zero);
    with_format(format, [&](const auto& product) {
      with_rounding<Compute<S>>(drawing.rounding, drawing.random.bits, format.magnitude_bits(), [&](const auto& round) {
        done = run(product, cover, static_cast<const S*>(x), static_cast<S*>(y), round, drawing.random);
      });
    });
  });
  return done;
}

inline bool look_at_all(const Numbers& format, const Cover& cover, ScalarType type, const void* x, bool* changed) {
  bool done = false;
  with_scalar(type, [&](auto zero) {
    using S = decltype(zero);
    const S* from = static_cast<const S*>(x);
    with_format(format, [&](const auto& product) {
      done = run(product, cover, from, const_cast<S*>(from), Look{{}, changed}, Random());
    });
  });
  return done;
}

inline bool encode_all(const Numbers& format, const Cover& cover, const float* x, void* codes, bool wide, const Coding& coding,
                       Found* found, const Drawing& drawing) {
  bool done = false;
  with_rounding<float>(drawing.rounding, drawing.random.bits, format.magnitude_bits(), [&](const auto& round) {
    using Round = std::decay_t<decltype(round)>;
    const auto run_as = [&](const auto& product, auto zero) {
      using Code = decltype(zero);
      const Coded<Round, Code> coded{round, coding, found};
      done = run(product, cover, x, static_cast<Code*>(codes), coded, drawing.random);
    };
    if (wide) {
      run_as(format.rare(), uint16_t());  // it serves every format, and so is all that has to be compiled
    } else if constexpr (kIsCommon<Round>) {
      with_format(format, [&](const auto& product) { run_as(product, uint8_t()); });
    }
  });
  return done;
}

inline std::optional<Takes> takes(int64_t kernel) {
  std::optional<Takes> found;
  with_update(kernel, [&](auto kind) {
    using Kind = typename decltype(kind)::type;
    found = {Kind::kNumbers, Kind::kFewestStates, Kind::kMostStates};
  });
  return found;
}

constexpr Instructions kInstructions{round_all,          look_at_all,        encode_all, Storing::store_scales,
                                 Storing::pack_codes, Storing::pack_codes, update,     takes};
