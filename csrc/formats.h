// Number formats as an element grid on a scale: quantize(x) = scale * element(x / scale).
// One functor a format; each mirrors a class of swalp_fx/formats.py.
#pragma once

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

// 2^e for |e| up to 252, in two factors: 2^-e itself can lie beyond the normal numbers of float.
// Both products are exact unless the result underflows, where it is far below every step.
template <class T>
struct PowerOfTwoScale {
  T down[2], up[2];
  SWALP_HD explicit PowerOfTwoScale(int e) {
    const int half = e >> 1;
    down[0] = power_of_two<T>(-half);
    down[1] = power_of_two<T>(half - e);
    up[0] = power_of_two<T>(half);
    up[1] = power_of_two<T>(e - half);
  }
  SWALP_HD T divide(T x) const { return x * down[0] * down[1]; }
  SWALP_HD T multiply(T q) const { return q * up[0] * up[1]; }
};

// ---- elements -------------------------------------------------------------------------------

// Integers of `word_length` bits. Clamping before rounding keeps |v| below 2^24 and changes no
// result, because the bounds are integers.
template <class T>
struct IntegerElement {
  T lo, hi;
  SWALP_HD IntegerElement(int word_length, bool symmetric)
      : lo(-power_of_two<T>(word_length - 1) + (symmetric ? T(1) : T(0))), hi(power_of_two<T>(word_length - 1) - T(1)) {}
  template <Rounding R>
  SWALP_HD T round(T v, T x, uint32_t word, int bits) const {
    return round_to_integer<R>(clamp(v, lo, hi), x, word, bits);
  }
};

// Floats of `man` mantissa bits: the step of v is 2^(max(exponent of v, min_exponent) - man).
template <class T>
struct FloatElement {
  int man, min_exponent;
  T max;
  template <Rounding R>
  SWALP_HD T round(T v, T x, uint32_t word, int bits) const {
    v = clamp(v, -max, max);
    const int e = exponent_of<T>(magnitude_bits(v));
    const PowerOfTwoScale<T> step((e > min_exponent ? e : min_exponent) - man);
    return step.multiply(round_to_integer<R>(step.divide(v), x, word, bits));
  }
};

// ---- a format, ready to run -------------------------------------------------------------------

template <class T, class Element, class Scale>
struct Quantizer {
  Element element;
  Scale scale;
  T keep;  // what lies beyond (NaN always; infinity, if it equals the largest finite T) passes as it is

  template <Rounding R>
  SWALP_HD T apply(T x, uint32_t word, int bits) const {
    const T q = scale.multiply(element.template round<R>(scale.divide(x), x, word, bits));
    return std::fabs(x) <= keep ? q : x;
  }
};

struct FixedPoint {
  static constexpr bool shares_scale = false;
  int wl, fl;
  bool symmetric;

  template <class T>
  SWALP_HD auto quantizer(typename Ieee<T>::Bits) const {
    return Quantizer<T, IntegerElement<T>, PowerOfTwoScale<T>>{
        {wl, symmetric}, PowerOfTwoScale<T>(-fl), std::numeric_limits<T>::infinity()};
  }
};

struct BlockFloat {
  static constexpr bool shares_scale = true;
  int wl;
  bool symmetric;
  int exponent_bits;

  // `maximum`: bits of the block's largest finite magnitude. E comes from the bits: a float32 log2
  // gives 3 for 2^3 (1 - 2^-24). A block with nothing finite but zeros takes the largest exponent,
  // under which zeros stay zero and infinities saturate.
  template <class T>
  SWALP_HD auto quantizer(typename Ieee<T>::Bits maximum) const {
    const int largest = (1 << (exponent_bits - 1)) - 1;
    int e = exponent_of<T>(maximum);
    if (e == -Ieee<T>::bias) e = subnormal_exponent<T>(maximum);
    e = e < -largest - 1 ? -largest - 1 : e > largest ? largest : e;
    e = maximum == 0 ? largest : e;
    return Quantizer<T, IntegerElement<T>, PowerOfTwoScale<T>>{
        {wl, symmetric}, PowerOfTwoScale<T>(e - (wl - 2)), std::numeric_limits<T>::infinity()};
  }

 private:
  // floor(log2) of a subnormal: its value in units of the last place is an integer, hence normal.
  template <class T>
  SWALP_HD static int subnormal_exponent(typename Ieee<T>::Bits magnitude) {
    const T units = static_cast<T>(magnitude);
    return exponent_of<T>(magnitude_bits(units)) + 1 - Ieee<T>::bias - Ieee<T>::mantissa;
  }
};

struct Float {
  static constexpr bool shares_scale = false;
  enum Top : int { Ieee754, OneNan, Finite };  // TOPS in swalp_fx/formats.py
  int exp, man;
  Top top;

  template <class T>
  SWALP_HD auto quantizer(typename Ieee<T>::Bits) const {
    const int bias = (1 << (exp - 1)) - 1;
    // The largest finite code, as (exponent field, mantissa field).
    int field = (1 << exp) - (top == Ieee754 ? 2 : 1);
    int mantissa = (1 << man) - (top == OneNan ? 2 : 1);
    if (mantissa < 0) {
      mantissa = 0;
      --field;
    }
    const T max = (T(1) + static_cast<T>(mantissa) * power_of_two<T>(-man)) * power_of_two<T>(field - bias);
    const T keep = top == Ieee754 ? std::numeric_limits<T>::max() : std::numeric_limits<T>::infinity();
    return Quantizer<T, FloatElement<T>, UnitScale>{{man, 1 - bias, max}, {}, keep};
  }
};

}  // namespace swalp_fx
