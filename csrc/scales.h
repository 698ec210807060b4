// Scales: a value is divided by its scale before it is rounded, and multiplied after. A scale follows from the numbers of a
// block. Each mirrors a class of swalp_fx/formats/scale.py.
#pragma once

#include "portable.h"

namespace swalp_fx {

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

// 2^e for |e| up to 252, in two factors, since 2^-e itself can be out of float's range. Products are exact unless they
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

// The exponent of a block's scale: floor(log2 maximum) minus `less`, and one more from some significand of the maximum on.
// `less` is the exponent of the element's largest number. A block of zeros, infinities and NaNs takes the largest scale: then
// zeros stay zero, and infinities saturate. `maximum` holds the bits of the block's largest finite magnitude. The exponent is
// read from the bits, because a float32 log2 gives 3 for 2^3 (1 - 2^-24).
struct SharedExponent {
  int less = 0;
  int smallest = 0, largest = 0;  // exponents that can be stored
  uint64_t carry = 0;             // added to a double's bits, it carries into the exponent from that significand on

  template <class T>
  SWALP_HD typename Ieee<T>::Bits carried(typename Ieee<T>::Bits maximum) const {
    return maximum + static_cast<typename Ieee<T>::Bits>(carry >> (Ieee<double>::mantissa - Ieee<T>::mantissa));
  }
  template <class T>
  SWALP_HD int of(typename Ieee<T>::Bits maximum) const {
    const bool normal = maximum >> Ieee<T>::mantissa != 0;
    // A subnormal in units of its last place is an integer, hence normal.
    const auto bits = normal ? maximum : bit_cast<typename Ieee<T>::Bits>(static_cast<T>(maximum));
    const int unit = normal ? 0 : 1 - Ieee<T>::bias - Ieee<T>::mantissa;
    const int e = static_cast<int>(carried<T>(bits) >> Ieee<T>::mantissa) - Ieee<T>::bias + unit - less;
    return maximum == 0 || e > largest ? largest : e < smallest ? smallest : e;
  }
  // The same, for a normal maximum and an exponent within its bounds.
  template <class T>
  SWALP_HD int of_normal(typename Ieee<T>::Bits maximum) const {
    return static_cast<int>(carried<T>(maximum) >> Ieee<T>::mantissa) - Ieee<T>::bias - less;
  }
  template <class T>
  SWALP_HD bool is_normal(typename Ieee<T>::Bits maximum) const {
    const int e = of_normal<T>(maximum);
    return (maximum >> Ieee<T>::mantissa != 0) & (e >= smallest) & (e <= largest);
  }
};

// A scale, or the number below it, on which the largest element is finite: scales are rounded, maybe up.
template <class T>
SWALP_HD T finite_scale(T scale, T element_max) {
  return scale * element_max <= std::numeric_limits<T>::max() ? scale : bit_cast<T>(magnitude_bits(scale) - 1);
}

// A float32 scale, kept finite and above zero.
template <class T>
SWALP_HD T real_scale(float scale, T element_max) {
  constexpr float most = std::numeric_limits<float>::max();
  if (scale > 0.0f) return static_cast<T>(scale < most ? scale : most);
  return static_cast<T>(most / (element_max > T(1) ? static_cast<float>(element_max) : 1.0f));
}

// The scale that brings `maximum` to the largest number of an element.
template <class T>
SWALP_HD T absmax_scale(typename Ieee<T>::Bits maximum, T element_max) {
  return finite_scale(real_scale<T>(static_cast<float>(bit_cast<T>(maximum) / element_max), element_max), element_max);
}

}  // namespace swalp_fx
