// Rounding to integers: the only place that changes a value. Everything else in csrc/ scales
// or moves data.
#pragma once

#include "portable.h"

namespace swalp_fx {

// In the order of ROUNDINGS in swalp_fx/recipe/rounding.py.
enum class Rounding : int { Nearest, Stochastic, TowardZero, Down, Up, NearestAway, NearestUp };
constexpr int kRoundings = 7;

// A power of two as the bits of a T: adding Bits(n) << mantissa multiplies it by 2^n.
template <class T>
using Step = typename Ieee<T>::Bits;

// Each functor rounds a magnitude to a multiple of a step; magnitude / step is below 2^24. x is the number with this
// magnitude, and draw a random integer; most functors ignore both. NaN stays NaN, unless the functor loses_nan.

// Adds a number so large that the sum's last place is the step: the addition itself rounds, ties to even.
struct RoundNearest {
  static constexpr bool draws = false, loses_nan = false;
  static constexpr Rounding rounding = Rounding::Nearest;
  template <class T>
  SWALP_HD T operator()(T magnitude, Step<T> step, T, uint32_t) const {
    constexpr int m = Ieee<T>::mantissa;
    const T shifter = bit_cast<T>(step + (Step<T>(m) << m));
    return (magnitude + shifter) - shifter;
  }
};

// Adds the random bits below the last place and carries, like an adder in hardware. The probability of rounding up is
// magnitude / step - floor(magnitude / step), rounded to a multiple of 2^-bits. Representable values never move.
struct RoundStochastic {
  static constexpr bool draws = true, loses_nan = true;
  int bits;  // draws are below 2^bits
  template <class T>
  SWALP_HD T operator()(T magnitude, Step<T> step, T, uint32_t draw) const {
    constexpr int m = Ieee<T>::mantissa;
    // The sum's last place is the step over 2^bits, and its pattern an integer in that unit.
    const T shifter = bit_cast<T>(step + (static_cast<Step<T>>(m - bits) << m));
    const Step<T> sum = bit_cast<Step<T>>(magnitude + shifter) + draw;
    return bit_cast<T>(sum & (~Step<T>(0) << bits)) - shifter;
  }
};

// 1 / step: the bits of 2^e and 2^-e add up to twice the bias.
template <class T>
SWALP_HD T inverse_of(Step<T> step) {
  return bit_cast<T>((Step<T>(2 * Ieee<T>::bias) << Ieee<T>::mantissa) - step);
}

// The same, for a sum that does not fit in T.
struct RoundStochasticWide {
  static constexpr bool draws = true, loses_nan = false;
  int bits;  // draws are below 2^bits
  template <class T>
  SWALP_HD T operator()(T magnitude, Step<T> step, T, uint32_t draw) const {
    const T resolution = power_of_two<T>(bits);
    const T y = magnitude * inverse_of<T>(step);
    const T whole = std::trunc(y);
    const T rest = y - whole;  // exact: both are multiples of y's last place
    // The sum is exact below 2^24, and monotone beyond.
    const bool up = static_cast<T>(static_cast<int32_t>(draw)) + std::rint(rest * resolution) >= resolution;
    return (whole + (up ? T(1) : T(0))) * bit_cast<T>(step);
  }
};

// Any other rounding, chosen at run time: they serve comparisons, not training.
struct RoundOther {
  static constexpr bool draws = false, loses_nan = false;
  Rounding rounding;
  template <class T>
  SWALP_HD T operator()(T magnitude, Step<T> step, T x, uint32_t) const {
    const T y = magnitude * inverse_of<T>(step);
    const T whole = std::trunc(y);
    // If y underflowed, x still shows that there is a rest, and its sign.
    const T rest = y == T(0) && x != T(0) ? std::numeric_limits<T>::min() : y - whole;
    const bool negative = x < T(0);
    bool away = false;
    switch (rounding) {
      case Rounding::Nearest:
        away = rest > T(0.5) || (rest == T(0.5) && std::trunc(whole * T(0.5)) * T(2) != whole);
        break;
      case Rounding::Down:
        away = rest > T(0) && negative;
        break;
      case Rounding::Up:
        away = rest > T(0) && !negative;
        break;
      case Rounding::NearestAway:
        away = rest >= T(0.5);
        break;
      case Rounding::NearestUp:
        away = rest > T(0.5) || (rest == T(0.5) && !negative);
        break;
      default:  // toward zero
        break;
    }
    return (whole + (away ? T(1) : T(0))) * bit_cast<T>(step);
  }
};

// Whether x is rounded toward zero: then it never passes the largest number.
template <class Round, class T>
SWALP_HD bool is_toward_zero(const Round& round, T x) {
  if constexpr (std::is_same_v<Round, RoundOther>) {
    return round.rounding == Rounding::TowardZero || (round.rounding == Rounding::Down && x > T(0)) ||
           (round.rounding == Rounding::Up && x < T(0));
  }
  return false;
}

// Calls f with the functor for `rounding` of Ts of at most 2^magnitude_bits steps.
template <class T, class F>
void with_rounding(Rounding rounding, int random_bits, int magnitude_bits, F&& f) {
  constexpr int m = Ieee<T>::mantissa;
  if (rounding == Rounding::Nearest && magnitude_bits <= m) return f(RoundNearest{});
  if (rounding != Rounding::Stochastic) return f(RoundOther{rounding});
  if (random_bits + magnitude_bits <= m) return f(RoundStochastic{random_bits});
  return f(RoundStochasticWide{random_bits});
}

}  // namespace swalp_fx
