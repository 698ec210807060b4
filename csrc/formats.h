// Number formats as an element grid on a scale: quantize(x) = scale * element(x / scale).
// One functor a format; each mirrors a class of swalp_fx/formats.py.
#pragma once

#include "philox.h"
#include "round.h"

namespace swalp_fx {

// A clamp that lets NaN through.
template <class T>
SWALP_HD T clamp(T v, T lo, T hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

// ---- scales ---------------------------------------------------------------------------------

struct UnitScale {
  template <class T>
  SWALP_HD T divide(T x) const {
    return x;
  }
  template <class T>
  SWALP_HD T multiply(T q) const {
    return q;
  }
};

// 2^e for |e| up to 252, in two factors: 2^-e itself can lie beyond the numbers of float. Products are exact unless they
// underflow, far below every step.
template <class T>
struct FarScale {
  T down[2], up[2];
  FarScale() = default;
  SWALP_HD explicit FarScale(int e) {
    const int half = e >> 1;
    down[0] = power_of_two<T>(-half);
    down[1] = power_of_two<T>(half - e);
    up[0] = power_of_two<T>(half);
    up[1] = power_of_two<T>(e - half);
  }
  SWALP_HD T divide(T x) const { return x * down[0] * down[1]; }
  SWALP_HD T multiply(T q) const { return q * up[0] * up[1]; }
};

// Any positive number: the quotient and the product are rounded to nearest even.
template <class T>
struct RealScale {
  T scale;
  SWALP_HD T divide(T x) const { return x / scale; }
  SWALP_HD T multiply(T q) const { return q * scale; }
};

// ---- elements -------------------------------------------------------------------------------

// Elements take a power-of-two scale 2^e into their grid, and so need no division, where their steps and what
// RoundNearest adds are normal numbers of T.
template <class T>
SWALP_HD bool takes_in(int smallest_step, int largest_step) {
  return (smallest_step > -Ieee<T>::bias) & (largest_step + Ieee<T>::mantissa <= Ieee<T>::bias);
}

// Each element gives v clamped to its range and rounded, with the sign of x.

// Integers of `wl` bits times 2^e. The bounds are on the grid, so that clamping first changes no result.
template <class T>
struct IntegerElement {
  T lo, hi;
  Step<T> step;  // one for all, so that RoundNearest has its own, shorter way: it scales, and keeps the sign
  IntegerElement() = default;
  SWALP_HD IntegerElement(int wl, bool symmetric, int e = 0)
      : lo(((symmetric ? T(1) : T(0)) - power_of_two<T>(wl - 1)) * power_of_two<T>(e)),
        hi((power_of_two<T>(wl - 1) - T(1)) * power_of_two<T>(e)),
        step(bit_cast<Step<T>>(power_of_two<T>(e))) {}
  template <class Round>
  SWALP_HD T round(T v, T x, uint32_t draw, const Round& round_to_step) const {
    const T clamped = clamp(v, lo, hi);
    if constexpr (std::is_base_of_v<RoundNearest, Round>) {
      return std::rint(clamped * inverse_of<T>(step)) * bit_cast<T>(step);
    }
    return with_sign(round_to_step(std::fabs(clamped), step, x, draw), x);
  }
};

// The largest finite value of a float. top: what the highest exponent holds, a code of TOPS in swalp_fx/formats.py.
SWALP_HD float largest_float(int exp, int man, int top) {
  // Its code, as exponent field and mantissa field.
  int field = (1 << exp) - (top == 0 ? 2 : 1);
  int mantissa = (1 << man) - (top == 1 ? 2 : 1);
  if (mantissa < 0) {
    mantissa = 0;
    --field;
  }
  const int bias = (1 << (exp - 1)) - 1;
  return (1.0f + static_cast<float>(mantissa) * power_of_two<float>(-man)) * power_of_two<float>(field - bias);
}

// 2^min_exponent of a float: below it the step no longer shrinks.
SWALP_HD int smallest_exponent(int exp) { return 2 - (1 << (exp - 1)); }

// Floats times 2^e: the step of v is 2^(max(exponent of v, min_exponent) - man).
template <class T>
struct FloatElement {
  T max;
  Step<T> lowest, per_binade;  // the bits of 2^min_exponent; what makes a binade's bits those of its step

  FloatElement() = default;
  SWALP_HD FloatElement(int exp, int man, float largest, int e = 0)
      : max(static_cast<T>(largest) * power_of_two<T>(e)),
        lowest(bit_cast<Step<T>>(power_of_two<T>(smallest_exponent(exp) + e))),
        per_binade(static_cast<Step<T>>(man) << Ieee<T>::mantissa) {}

  template <class Round>
  SWALP_HD T round(T v, T x, uint32_t draw, const Round& round_to_step) const {
    T magnitude = std::fabs(v);
    magnitude = magnitude > max ? max : magnitude;
    const Step<T> binade = bit_cast<Step<T>>(magnitude) & (~Step<T>(0) << Ieee<T>::mantissa);
    return with_sign(round_to_step(magnitude, larger(binade, lowest) - per_binade, x, draw), x);
  }
};

// Floats of as many exponents as T = float has: v is scaled to its own binade, since steps are beyond T at both ends.
template <class T>
struct WideFloatElement {
  T max;
  Step<T> lowest, step;  // of the numbers from 1 to 2
  int dropped;           // places of T that the format lacks

  SWALP_HD WideFloatElement(int exp, int man, float largest)
      : max(static_cast<T>(largest)),
        lowest(bit_cast<Step<T>>(power_of_two<T>(smallest_exponent(exp)))),
        step(bit_cast<Step<T>>(power_of_two<T>(-man))),
        dropped(Ieee<T>::mantissa - man) {}

  template <class Round>
  SWALP_HD T round(T v, T x, uint32_t draw, const Round& round_to_step) const {
    constexpr int m = Ieee<T>::mantissa;
    using Integer = typename Ieee<T>::Integer;
    T magnitude = std::fabs(v);
    magnitude = magnitude > max ? max : magnitude;
    if constexpr (std::is_same_v<T, float> && std::is_same_v<Round, RoundStochasticWide>) {
      // Exponents are T's own, so that a carry in the pattern is one in value. Of the draw, which has as many bits as are
      // dropped or more, the lower ones decide nothing. NaN is lost, but these formats keep infinity, and NaN with it.
      const Step<T> sum = bit_cast<Step<T>>(magnitude) + (draw >> (round_to_step.bits - dropped));
      return with_sign(bit_cast<T>(sum & (~Step<T>(0) << dropped)), x);
    }
    const Step<T> binade = bit_cast<Step<T>>(magnitude) & (~Step<T>(0) << m);
    const Step<T> bounded = larger(binade, lowest);
    // Below 2^-e = 2^-(bias - 1) comes 2^-bias, the largest subnormal power of two.
    const auto rest = static_cast<Integer>((Step<T>(2 * Ieee<T>::bias) << m) - bounded);
    const T inverse = bit_cast<T>(rest > (Integer(1) << (m - 1)) ? rest : Integer(1) << (m - 1));
    return with_sign(round_to_step(magnitude * inverse, step, x, draw) * bit_cast<T>(bounded), x);
  }
};

// ---- a format, ready to run -------------------------------------------------------------------

template <class T, class Element, class Scale, bool kKeepsInfinity = false>
struct Quantizer {
  Element element;
  Scale scale;

  template <class Round>
  SWALP_HD T apply(T x, uint32_t draw, const Round& round) const {
    const T q = scale.multiply(element.round(scale.divide(x), x, draw, round));
    if constexpr (kKeepsInfinity) return std::fabs(x) <= std::numeric_limits<T>::max() ? q : x;
    if constexpr (Round::loses_nan) return x == x ? q : x;
    return q;
  }
};

// Each format tells what its blocks share, and a number of bits whose power of two no element exceeds, counted in
// steps; with_quantizer calls f with a Quantizer. Where it is exact, a power of two scales, so that a number on the grid
// is kept by every rounding. Those that share tell too which blocks are usual: their quantizers are of
// one type, and found without a branch, which is what tiles are done in batches by.

// What a block shares. `maximum` holds the bits of its largest finite magnitude: an exponent is read
// off them, because a float32 log2 gives 3 for 2^3 (1 - 2^-24). A block with nothing finite but
// zeros takes the largest scale, under which zeros stay zero and infinities saturate.
enum class Shared { Nothing, Block, BlockAndTensor };

struct FixedPoint {
  static constexpr auto shared = Shared::Nothing;
  static constexpr bool exact = true;
  int wl, fl;
  bool symmetric;
  int magnitude_bits() const { return wl - 1; }

  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits, T, F&& f) const {
    f(Quantizer<T, IntegerElement<T>, UnitScale>{{wl, symmetric, -fl}, {}});
  }
};

// The exponent that a block shares: floor(log2 maximum) - less, within the exponents that can be stored.
template <class T>
SWALP_HD int shared_exponent(typename Ieee<T>::Bits maximum, int less, int smallest, int largest) {
  const int e = exponent_of<T>(maximum) - less;
  return maximum == 0 || e > largest ? largest : e < smallest ? smallest : e;
}

// The same where the maximum is normal and the exponent within its bounds.
template <class T>
SWALP_HD int normal_exponent(typename Ieee<T>::Bits maximum, int less) {
  return static_cast<int>(maximum >> Ieee<T>::mantissa) - Ieee<T>::bias - less;
}

struct BlockFloat {
  static constexpr auto shared = Shared::Block;
  static constexpr bool exact = true;
  int wl;
  bool symmetric;
  int smallest, largest;  // shared exponent
  int magnitude_bits() const { return wl - 1; }

  template <class T>
  SWALP_HD bool is_usual(typename Ieee<T>::Bits maximum) const {
    const int e = normal_exponent<T>(maximum, 0);
    return (e > -Ieee<T>::bias) & (e >= smallest) & (e <= largest) & takes_in<T>(e - (wl - 2), e - (wl - 2));
  }
  template <class T>
  SWALP_HD auto usual(typename Ieee<T>::Bits maximum, T) const {
    const IntegerElement<T> element(wl, symmetric, normal_exponent<T>(maximum, wl - 2));
    return Quantizer<T, IntegerElement<T>, UnitScale>{element, {}};
  }
  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T, F&& f) const {
    const int e = shared_exponent<T>(maximum, 0, smallest, largest) - (wl - 2);
    if (takes_in<T>(e, e)) {
      f(Quantizer<T, IntegerElement<T>, UnitScale>{{wl, symmetric, e}, {}});
    } else {
      f(Quantizer<T, IntegerElement<T>, FarScale<T>>{{wl, symmetric}, FarScale<T>(e)});
    }
  }
};

struct Float {
  static constexpr auto shared = Shared::Nothing;
  static constexpr bool exact = true;
  int exp, man, top;
  float largest;
  Float(int e, int m, int t) : exp(e), man(m), top(t), largest(largest_float(e, m, t)) {}
  int magnitude_bits() const { return man + 1; }

  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits, T, F&& f) const {
    if (exp == 8) {
      f(Quantizer<T, WideFloatElement<T>, UnitScale, true>{{exp, man, largest}, {}});
    } else if (top == 0) {
      f(Quantizer<T, FloatElement<T>, UnitScale, true>{{exp, man, largest}, {}});
    } else {
      f(Quantizer<T, FloatElement<T>, UnitScale>{{exp, man, largest}, {}});
    }
  }
};

// OCP microscaling: floats on a shared E8M0 scale 2^(floor(log2 maximum) - largest exponent of the element), within
// 2^-127 to 2^127. (Its integers are a BlockFloat of these exponents.)
struct Microscaling {
  static constexpr auto shared = Shared::Block;
  static constexpr bool exact = true;
  int exp, man, largest_exponent;
  float largest;
  Microscaling(int e, int m, int top, int most) : exp(e), man(m), largest_exponent(most), largest(largest_float(e, m, top)) {}
  int magnitude_bits() const { return man + 1; }

  SWALP_HD int smallest_step(int e) const { return smallest_exponent(exp) + e - man; }
  SWALP_HD int largest_step(int e) const { return largest_exponent + e - man; }

  template <class T>
  SWALP_HD bool is_usual(typename Ieee<T>::Bits maximum) const {
    const int e = normal_exponent<T>(maximum, largest_exponent);
    return (e + largest_exponent > -Ieee<T>::bias) & (e >= -127) & (e <= 127) &
           takes_in<T>(smallest_step(e), largest_step(e));
  }
  template <class T>
  SWALP_HD auto usual(typename Ieee<T>::Bits maximum, T) const {
    const FloatElement<T> element(exp, man, largest, normal_exponent<T>(maximum, largest_exponent));
    return Quantizer<T, FloatElement<T>, UnitScale>{element, {}};
  }
  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T, F&& f) const {
    const int e = shared_exponent<T>(maximum, largest_exponent, -127, 127);
    if (takes_in<T>(smallest_step(e), largest_step(e))) {
      f(Quantizer<T, FloatElement<T>, UnitScale>{{exp, man, largest, e}, {}});
    } else {
      f(Quantizer<T, FloatElement<T>, FarScale<T>>{{exp, man, largest}, FarScale<T>(e)});
    }
  }
};

// A float32 scale, kept finite and above zero.
template <class T>
SWALP_HD T real_scale(float scale, T element_max) {
  constexpr float most = std::numeric_limits<float>::max();
  return scale > 0.0f ? static_cast<T>(scale < most ? scale : most) : static_cast<T>(most) / element_max;
}

// Symmetric integers on a float32 scale, maximum / (2^(wl-1) - 1).
struct ScaledInteger {
  static constexpr auto shared = Shared::Block;
  static constexpr bool exact = false;
  int wl;
  int magnitude_bits() const { return wl - 1; }

  template <class T>
  SWALP_HD bool is_usual(typename Ieee<T>::Bits) const {
    return true;
  }
  template <class T>
  SWALP_HD auto usual(typename Ieee<T>::Bits maximum, T) const {
    const IntegerElement<T> element(wl, true);
    const float scale = static_cast<float>(bit_cast<T>(maximum) / element.hi);
    return Quantizer<T, IntegerElement<T>, RealScale<T>>{element, {real_scale<T>(scale, element.hi)}};
  }
  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T most, F&& f) const {
    f(usual<T>(maximum, most));
  }
};

// NVIDIA's NVFP4: E2M1 on an E4M3 scale a block, on one float32 scale a tensor.
struct Nvfp4 {
  static constexpr auto shared = Shared::BlockAndTensor;
  static constexpr bool exact = false;
  int magnitude_bits() const { return 2; }

  template <class T>
  SWALP_HD bool is_usual(typename Ieee<T>::Bits) const {
    return true;
  }
  template <class T>
  SWALP_HD auto usual(typename Ieee<T>::Bits maximum, T tensor_maximum) const {
    const FloatElement<T> element(2, 1, 6.0f);
    const FloatElement<T> block_scale(4, 3, 448.0f);
    const T most = element.max * block_scale.max;
    const T outer = real_scale<T>(static_cast<float>(tensor_maximum / most), most);
    const T wanted = bit_cast<T>(maximum) / element.max / outer;
    T inner = block_scale.round(wanted, wanted, 0u, RoundNearest{});
    inner = inner > T(0) ? inner : power_of_two<T>(-9);  // E4M3's smallest: a block never loses its scale
    // The product may underflow where the tensor's own maximum nearly does, and zero over zero is no zero.
    const T scale = inner * outer;
    constexpr T least = std::numeric_limits<T>::denorm_min();
    return Quantizer<T, FloatElement<T>, RealScale<T>>{element, {scale > T(0) ? scale : least}};
  }
  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T tensor_maximum, F&& f) const {
    f(usual<T>(maximum, tensor_maximum));
  }
};

}  // namespace swalp_fx
