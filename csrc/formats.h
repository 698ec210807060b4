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

// 2^e for |e| up to 127. Products are exact unless they underflow, far below every step.
template <class T>
struct NearScale {
  T down, up;
  SWALP_HD explicit NearScale(int e) : down(power_of_two<T>(-e)), up(power_of_two<T>(e)) {}
  SWALP_HD T divide(T x) const { return x * down; }
  SWALP_HD T multiply(T q) const { return q * up; }
};

// 2^e for |e| up to 252, in two factors: 2^-e itself can lie beyond the numbers of float.
template <class T>
struct FarScale {
  T down[2], up[2];
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

// Integers of `wl` bits. Clamping before rounding keeps |v| below 2^24 and changes no result,
// because the bounds are integers.
template <class T>
struct IntegerElement {
  T lo, hi;
  SWALP_HD IntegerElement(int wl, bool symmetric)
      : lo((symmetric ? T(1) : T(0)) - power_of_two<T>(wl - 1)), hi(power_of_two<T>(wl - 1) - T(1)) {}
  template <class Round>
  SWALP_HD T round(T v, T x, uint32_t draw, const Round& round_to_integer) const {
    return round_to_integer(clamp(v, lo, hi), x, draw);
  }
};

// Floats: the step of v is 2^(max(exponent of v, min_exponent) - man).
template <class T>
struct FloatElement {
  using Bits = typename Ieee<T>::Bits;
  T max;
  T per_step, step;  // 2^man and 2^-man
  Bits lowest;       // bits of 2^min_exponent

  // top: what the highest exponent holds, a code of TOPS in swalp_fx/formats.py.
  SWALP_HD FloatElement(int exp, int man, int top)
      : per_step(power_of_two<T>(man)), step(power_of_two<T>(-man)) {
    const int bias = (1 << (exp - 1)) - 1;
    lowest = bit_cast<Bits>(power_of_two<T>(1 - bias));
    // The largest finite code, as exponent field and mantissa field.
    int field = (1 << exp) - (top == 0 ? 2 : 1);
    int mantissa = (1 << man) - (top == 1 ? 2 : 1);
    if (mantissa < 0) {
      mantissa = 0;
      --field;
    }
    max = (T(1) + static_cast<T>(mantissa) * step) * power_of_two<T>(field - bias);
  }

  template <class Round>
  SWALP_HD T round(T v, T x, uint32_t draw, const Round& round_to_integer) const {
    constexpr int m = Ieee<T>::mantissa;
    using Integer = typename Ieee<T>::Integer;
    v = clamp(v, -max, max);
    // The binade as a power of two, and one over it: bits of 2^e and 2^-e add up to twice the bias.
    // Below 2^-e = 2^-(bias - 1) comes 2^-bias, the largest subnormal power of two.
    const Bits binade = magnitude_bits(v) & (~Bits(0) << m);
    const Bits bounded = binade > lowest ? binade : lowest;
    const auto rest = static_cast<Integer>((static_cast<Bits>(2 * Ieee<T>::bias) << m) - bounded);
    const T inverse = bit_cast<T>(rest > (Integer(1) << (m - 1)) ? rest : Integer(1) << (m - 1));
    const T q = round_to_integer(v * inverse * per_step, x, draw);
    return q * step * bit_cast<T>(bounded);
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
    return q;
  }
};

// Each format tells what its blocks share, and a number of bits below whose power of two its elements lie when they
// are rounded; with_quantizer calls f with a Quantizer.

// What a block shares. `maximum` holds the bits of its largest finite magnitude: an exponent is read
// off them, because a float32 log2 gives 3 for 2^3 (1 - 2^-24). A block with nothing finite but
// zeros takes the largest scale, under which zeros stay zero and infinities saturate.
enum class Shared { Nothing, Block, BlockAndTensor };

struct FixedPoint {
  static constexpr auto shared = Shared::Nothing;
  int wl, fl;
  bool symmetric;
  int magnitude_bits() const { return wl; }

  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits, T, F&& f) const {
    f(Quantizer<T, IntegerElement<T>, NearScale<T>>{{wl, symmetric}, NearScale<T>(-fl)});
  }
};

struct BlockFloat {
  static constexpr auto shared = Shared::Block;
  int wl;
  bool symmetric;
  int exponent_bits;
  int magnitude_bits() const { return wl; }

  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T, F&& f) const {
    const int largest = (1 << (exponent_bits - 1)) - 1;
    int e = exponent_of<T>(maximum);
    e = maximum == 0 || e > largest ? largest : e < -largest - 1 ? -largest - 1 : e;
    e -= wl - 2;
    if (e >= -127) {
      f(Quantizer<T, IntegerElement<T>, NearScale<T>>{{wl, symmetric}, NearScale<T>(e)});
    } else {
      f(Quantizer<T, IntegerElement<T>, FarScale<T>>{{wl, symmetric}, FarScale<T>(e)});
    }
  }
};

struct Float {
  static constexpr auto shared = Shared::Nothing;
  int exp, man, top;
  int magnitude_bits() const { return man + 1; }

  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits, T, F&& f) const {
    const FloatElement<T> element(exp, man, top);
    if (top == 0) {
      f(Quantizer<T, FloatElement<T>, UnitScale, true>{element, {}});
    } else {
      f(Quantizer<T, FloatElement<T>, UnitScale>{element, {}});
    }
  }
};

// OCP microscaling: floats (or, with exp = 0, integers of man fractional bits) on a shared E8M0
// scale 2^(floor(log2 maximum) - largest exponent of the element), within 2^-127 to 2^127.
struct Microscaling {
  static constexpr auto shared = Shared::Block;
  int exp, man, top, largest_exponent;
  int magnitude_bits() const { return man + 2; }

  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T, F&& f) const {
    int e = exponent_of<T>(maximum) - largest_exponent;
    e = maximum == 0 || e > 127 ? 127 : e < -127 ? -127 : e;
    if (exp > 0) {
      f(Quantizer<T, FloatElement<T>, NearScale<T>>{{exp, man, top}, NearScale<T>(e)});
    } else if (e - man >= -127) {
      f(Quantizer<T, IntegerElement<T>, NearScale<T>>{{man + 2, true}, NearScale<T>(e - man)});
    } else {
      f(Quantizer<T, IntegerElement<T>, FarScale<T>>{{man + 2, true}, FarScale<T>(e - man)});
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
  int wl;
  int magnitude_bits() const { return wl; }

  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T, F&& f) const {
    const IntegerElement<T> element(wl, true);
    const float scale = static_cast<float>(bit_cast<T>(maximum) / element.hi);
    f(Quantizer<T, IntegerElement<T>, RealScale<T>>{element, {real_scale<T>(scale, element.hi)}});
  }
};

// NVIDIA's NVFP4: E2M1 on an E4M3 scale a block, on one float32 scale a tensor.
struct Nvfp4 {
  static constexpr auto shared = Shared::BlockAndTensor;
  int magnitude_bits() const { return 2; }

  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T tensor_maximum, F&& f) const {
    const FloatElement<T> element(2, 1, 2);
    const FloatElement<T> block_scale(4, 3, 1);
    const T most = element.max * block_scale.max;
    const T outer = real_scale<T>(static_cast<float>(tensor_maximum / most), most);
    const T wanted = bit_cast<T>(maximum) / element.max / outer;
    T inner = block_scale.round(wanted, wanted, 0u, RoundNearest{});
    inner = inner > T(0) ? inner : power_of_two<T>(-9);  // E4M3's smallest: a block never loses its scale
    f(Quantizer<T, FloatElement<T>, RealScale<T>>{element, {inner * outer}});
  }
};

}  // namespace swalp_fx
