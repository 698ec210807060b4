// Rounding to integers: the one place where a value is changed. Everything else in csrc/ scales
// or moves data.
#pragma once

#include "portable.h"

namespace swalp_fx {

// The codes are those of ROUNDINGS in swalp_fx/recipe.py.
enum class Rounding : int { Nearest, Stochastic, TowardZero, Down, Up, NearestAway, NearestUp };
constexpr int kRoundings = 7;

// Each functor gives y rounded to an integer, sign kept (of zero too). |y| is below 2^24, or y is NaN
// and stays NaN. x is what y was scaled from, and draw a random integer; most ignore them.

struct RoundNearest {
  static constexpr bool draws = false;
  template <class T>
  SWALP_HD T operator()(T y, T, uint32_t) const {
    return std::rint(y);
  }
};

// Adds the random bits below the last place and carries, as an adder in hardware does: up with probability
// |y| - floor |y|, rounded to a multiple of 1 / resolution. Representable values never move.
struct RoundStochastic {
  static constexpr bool draws = true;
  float resolution;  // draws are below it: a power of two up to 2^24
  template <class T>
  SWALP_HD T operator()(T y, T, uint32_t draw) const {
    const T magnitude = std::fabs(y);
    const T whole = std::trunc(magnitude);
    const T rest = magnitude - whole;  // exact: both are multiples of y's last place
    // The sum is exact below 2^24, and monotone beyond.
    const bool up = static_cast<T>(static_cast<int32_t>(draw)) + std::rint(rest * T(resolution)) >= T(resolution);
    return std::copysign(whole + (up ? T(1) : T(0)), y);
  }
};

// The same where |y| < 2^(24 - bits), in fewer steps: then |y| in units of the lowest random bit fits in 24 bits.
struct RoundStochasticNarrow {
  static constexpr bool draws = true;
  float resolution;
  template <class T>
  SWALP_HD T operator()(T y, T, uint32_t draw) const {
    // Beyond 2^24 the sum may be off by one, which no longer reaches the next multiple of the resolution.
    const T sum = std::rint(std::fabs(y) * T(resolution)) + static_cast<T>(static_cast<int32_t>(draw));
    return std::copysign(std::trunc(sum * (T(1) / T(resolution))), y);
  }
};

// The rest, chosen at run time: they are compared with, not trained with.
struct RoundOther {
  static constexpr bool draws = false;
  Rounding rounding;
  template <class T>
  SWALP_HD T operator()(T y, T x, uint32_t) const {
    const T magnitude = std::fabs(y);
    const T whole = std::trunc(magnitude);
    // Where y underflowed, x still tells that there is a rest, and on which side of zero.
    const T rest = y == T(0) && x != T(0) ? std::numeric_limits<T>::min() : magnitude - whole;
    const bool negative = x < T(0);
    bool away = false;
    switch (rounding) {
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
    return std::copysign(whole + (away ? T(1) : T(0)), x);
  }
};

// Calls f with the functor for `rounding`.
template <class F>
void with_rounding(Rounding rounding, int random_bits, F&& f) {
  switch (rounding) {
    case Rounding::Nearest:
      return f(RoundNearest{});
    case Rounding::Stochastic:
      return f(RoundStochastic{static_cast<float>(1 << random_bits)});
    default:
      return f(RoundOther{rounding});
  }
}

}  // namespace swalp_fx
