// Rounding to integers: the one place where a value is changed. Everything else in csrc/ scales
// by powers of two, which is exact, or moves data.
#pragma once

#include "philox.h"
#include "portable.h"

namespace swalp_fx {

// The codes are those of ROUNDINGS in swalp_fx/recipe.py.
enum class Rounding : int { Nearest, Stochastic, TowardZero, Down, Up, NearestAway };
constexpr int kRoundings = 6;

// y rounded to an integer, sign kept (of zero too). |y| is below 2^24 or y is NaN, and stays NaN.
// x is what y was scaled from: where y underflowed, its sign still tells Up and Down which way.
template <Rounding R, class T>
SWALP_HD T round_to_integer(T y, T x, uint32_t word, int bits) {
  if constexpr (R == Rounding::Nearest) {
    return std::rint(y);
  } else if constexpr (R == Rounding::TowardZero) {
    return std::trunc(y);
  } else if constexpr (R == Rounding::Down) {
    return y == T(0) && x < T(0) ? T(-1) : std::floor(y);
  } else if constexpr (R == Rounding::Up) {
    return y == T(0) && x > T(0) ? T(1) : std::ceil(y);
  } else {
    const T magnitude = std::fabs(y);
    const T whole = std::trunc(magnitude);
    const T rest = magnitude - whole;  // exact: both are multiples of y's last place
    bool up;
    if constexpr (R == Rounding::NearestAway) {
      up = rest >= T(0.5);
    } else {
      // Up with probability floor(rest 2^bits) / 2^bits, so a representable value never moves.
      // At most 31 bits, because the conversion to int32 is one instruction everywhere.
      const T scaled = rest > T(0) ? rest * power_of_two<T>(bits) : T(0);  // and NaN gives 0
      up = static_cast<int32_t>(word >> (32 - bits)) < static_cast<int32_t>(scaled);
    }
    return std::copysign(whole + (up ? T(1) : T(0)), y);
  }
}

}  // namespace swalp_fx
