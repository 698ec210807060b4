// Elements: a value is clamped and rounded to their numbers, on a scale of 1. Each mirrors a class of
// swalp_fx/formats/element.py.
#pragma once

#include "philox.h"
#include "round.h"

namespace swalp_fx {

// The result for a number that is beyond the largest, or rounds to more. An infinity is such a number.
enum class Beyond : int { Saturate, SaturateButInfinity, Infinity, Nan };
constexpr int kBeyonds = 4;

// Numbers from `lowest` to `highest`. Near v the step is 2^(max(exponent of v, least) - man). Integers have a single step:
// their least exponent is their highest. Bounds are float32 numbers.
struct Grid {
  int man = 0, least = 0;
  float lowest = 0, highest = 0;
  bool subnormals = true;  // false: below 2^least there is zero alone
  Beyond beyond = Beyond::Saturate;

  // The largest number that is at most `bound`, which is no negative number and not beyond the largest.
  SWALP_HD float below(double bound) const {
    if (!subnormals && bound < std::ldexp(1.0, least)) return 0.0f;
    const int exponent = exponent_of<double>(magnitude_bits(bound));
    const double step = std::ldexp(1.0, (exponent > least ? exponent : least) - man);
    return static_cast<float>(std::floor(bound / step) * step);
  }
};

// The grid without the numbers that, times their scale, are beyond `most`: the tensor's dtype would hold an infinity instead.
template <class T, class Scale>
SWALP_HD Grid held(Grid grid, const Scale& scale, T most) {
  const auto is_held = [&](float number) { return scale.multiply(static_cast<T>(number)) <= most; };
  const auto last = [&] {
    const float number = grid.below(scale.divide(most));
    if (is_held(number)) return number;
    return grid.below(scale.divide(most * (1 - std::numeric_limits<T>::epsilon())));  // that quotient was rounded up
  };
  if (!is_held(grid.highest)) grid.highest = last();
  if (!is_held(-grid.lowest)) grid.lowest = -last();
  return grid;
}

// A clamp that lets NaN through.
template <class T>
SWALP_HD T clamp(T v, T lo, T hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

// Whether elements can take a power-of-two scale 2^e into their grid, and so need no division. 2^e, the steps and the number
// that RoundNearest adds must be normal numbers of T.
template <class T>
SWALP_HD bool takes_in(int smallest_step, int largest_step) {
  return (smallest_step > -Ieee<T>::bias) & (largest_step + Ieee<T>::mantissa <= Ieee<T>::bias);
}

// The bits of a normal power of two times 2^e, which is normal too.
template <class T>
SWALP_HD Step<T> scaled_step(T power, int e) {
  return bit_cast<Step<T>>(power) + (static_cast<Step<T>>(e) << Ieee<T>::mantissa);
}

// What a rounding sees of x, if a range ends at `end` on its side. A quotient that underflows has a number beside zero to go to,
// but not where the range ends at zero.
template <class Round, class T>
SWALP_HD T seen(T x, T end) {
  if constexpr (std::is_same_v<Round, RoundOther>) return end == T(0) ? T(0) : x;
  return x;
}

// Each element gives v clamped to its range and rounded, with the sign of x. An element may keep NaN even if its rounding
// loses it.

// ---- integers -------------------------------------------------------------------------------------------

// A grid of one step, times a power of two. The bounds are on the grid, so that clamping first changes no result.
template <class T>
struct IntegerElement {
  static constexpr bool keeps_nan = false;
  T lo, hi;
  Step<T> step;  // one for all, so that RoundNearest has its own, shorter way: it scales, and keeps the sign
  IntegerElement() = default;
  SWALP_HD explicit IntegerElement(const Grid& grid, T power = T(1))
      : lo(static_cast<T>(grid.lowest) * power),
        hi(static_cast<T>(grid.highest) * power),
        step(scaled_step<T>(power, grid.least - grid.man)) {}
  template <class Round>
  SWALP_HD T round(T v, T x, uint32_t draw, const Round& round_to_step) const {
    const T clamped = clamp(v, lo, hi);
    if constexpr (std::is_base_of_v<RoundNearest, Round>) {
      return std::rint(clamped * inverse_of<T>(step)) * bit_cast<T>(step);
    }
    const T magnitude = std::fabs(clamped);
    return with_sign(round_to_step(magnitude, step, seen<Round>(x, end_beside(x)), draw), x);
  }
  // Where the range ends on the side of x.
  SWALP_HD T end_beside(T x) const { return x < T(0) ? lo : hi; }
};

// Integers that begin at -moved instead of their lowest one.
template <class T>
struct MovedElement : IntegerElement<T> {
  T moved;
  SWALP_HD MovedElement(const Grid& grid, T m) : IntegerElement<T>(grid), moved(m) {}
};

// ---- tails: floats beyond their largest number --------------------------------------------------------
//
// A tail gives the largest magnitude before rounding (`most`), and turns a rounded magnitude into a result. AnyTail serves
// the formats of the other tails too, with more work.

template <class T>
struct Saturates {
  static constexpr bool keeps_nan = false, flushes = false;
  T max;
  Saturates() = default;
  SWALP_HD Saturates(Beyond, T largest, T) : max(largest) {}
  template <class Round>
  SWALP_HD T most(const Round&, T) const {
    return max;
  }
  SWALP_HD T result(T magnitude, T x) const { return with_sign(magnitude, x); }
};

// An infinity stays one, unless it saturates.
template <class T>
struct KeepsInfinity {
  static constexpr bool keeps_nan = true, flushes = false;
  T max, of_x;  // an x beyond of_x is kept
  KeepsInfinity() = default;
  SWALP_HD KeepsInfinity(Beyond beyond, T largest, T)
      : max(largest),
        of_x(beyond != Beyond::Saturate ? std::numeric_limits<T>::max() : std::numeric_limits<T>::infinity()) {}
  template <class Round>
  SWALP_HD T most(const Round&, T) const {
    return max;
  }
  SWALP_HD T result(T magnitude, T x) const { return std::fabs(x) <= of_x ? with_sign(magnitude, x) : x; }
};

// Overflow to infinity or NaN: a magnitude is clamped to one step beyond the largest number, and overflows if it rounds there.
template <class T>
struct AnyTail {
  static constexpr bool keeps_nan = true, flushes = true;
  T max, clamped;
  T of_result, of_x;  // bounds of the rounded result and of x
  T over;             // beyond a bound the result is this plus |x|: so NaN and a kept infinity stay
  AnyTail() = default;
  SWALP_HD AnyTail(Beyond beyond, T largest, T last_step)
      : max(largest),
        clamped(largest),
        of_result(std::numeric_limits<T>::infinity()),
        of_x(KeepsInfinity<T>(beyond, largest, last_step).of_x),
        over(0) {
    if (beyond == Beyond::Infinity || beyond == Beyond::Nan) {
      clamped = max + last_step;
      of_result = max;
      over = beyond == Beyond::Nan ? std::numeric_limits<T>::quiet_NaN() : std::numeric_limits<T>::infinity();
    }
  }
  template <class Round>
  SWALP_HD T most(const Round& round, T x) const {
    return is_toward_zero(round, x) ? max : clamped;
  }
  SWALP_HD T result(T magnitude, T x) const {
    const T of_number = std::fabs(x);
    return with_sign((magnitude <= of_result) & (of_number <= of_x) ? magnitude : over + of_number, x);
  }
};

// ---- floats ---------------------------------------------------------------------------------------------

// Floats times a power of two: the step of v is 2^(max(exponent of v, least) - man).
template <class T, template <class> class Tail>
struct FloatElement {
  static constexpr bool keeps_nan = Tail<T>::keeps_nan;
  Step<T> lowest, per_binade;  // the bits of 2^least; a binade's bits minus the bits of its step
  Step<T> below;               // the bits of the step below 2^least
  Tail<T> tail;

  FloatElement() = default;
  SWALP_HD explicit FloatElement(const Grid& grid, T power = T(1))
      : lowest(scaled_step<T>(power, grid.least)),
        per_binade(static_cast<Step<T>>(grid.man) << Ieee<T>::mantissa),
        below(grid.subnormals ? lowest - per_binade : lowest) {
    const T max = static_cast<T>(grid.highest) * power;
    tail = Tail<T>(grid.beyond, max, bit_cast<T>(larger(binade_of(max), lowest) - per_binade));
  }

  template <class Round>
  SWALP_HD T round(T v, T x, uint32_t draw, const Round& round_to_step) const {
    T magnitude = std::fabs(v);
    const T most = tail.most(round_to_step, x);
    magnitude = magnitude > most ? most : magnitude;
    const Step<T> binade = binade_of(magnitude);
    Step<T> step = larger(binade, lowest) - per_binade;
    if constexpr (Tail<T>::flushes) step = binade < lowest ? below : step;
    return tail.result(round_to_step(magnitude, step, seen<Round>(x, most), draw), x);
  }

  SWALP_HD static Step<T> binade_of(T magnitude) {
    return bit_cast<Step<T>>(magnitude) & (~Step<T>(0) << Ieee<T>::mantissa);
  }
  SWALP_HD static T binade(T magnitude) { return bit_cast<T>(binade_of(magnitude)); }
};

// Floats with as many exponents as T = float: v is scaled to its own binade, since steps leave T's range at both ends.
template <class T, template <class> class Tail>
struct WideFloatElement {
  static constexpr bool keeps_nan = true;
  Step<T> lowest, step;  // of the numbers from 1 to 2
  int dropped;           // places of T that the format lacks
  bool subnormals;
  Tail<T> tail;

  // The largest number plus the last step may be 2^128: infinity in float.
  SWALP_HD explicit WideFloatElement(const Grid& grid)
      : lowest(bit_cast<Step<T>>(power_of_two<T>(grid.least))),
        step(bit_cast<Step<T>>(power_of_two<T>(-grid.man))),
        dropped(Ieee<T>::mantissa - grid.man),
        subnormals(grid.subnormals),
        tail(grid.beyond, static_cast<T>(grid.highest),
             FloatElement<T, Tail>::binade(std::fmax(static_cast<T>(grid.highest), bit_cast<T>(lowest))) * bit_cast<T>(step)) {}

  template <class Round>
  SWALP_HD T round(T v, T x, uint32_t draw, const Round& round_to_step) const {
    constexpr int m = Ieee<T>::mantissa;
    using Integer = typename Ieee<T>::Integer;
    T magnitude = std::fabs(v);
    const T most = tail.most(round_to_step, x);
    magnitude = magnitude > most ? most : magnitude;
    if constexpr (Tail<T>::flushes) {
      if (!subnormals && magnitude < bit_cast<T>(lowest)) {
        // The only step is from zero to the least number. It is made 2^m times as large, away from the least number of T.
        const T of_x = seen<Round>(x, most);
        const T q = round_to_step(magnitude * power_of_two<T>(m), lowest + (Step<T>(m) << m), of_x, draw);
        return with_sign(q * power_of_two<T>(-m), x);
      }
    }
    if constexpr (std::is_same_v<T, float> && std::is_same_v<Round, RoundStochasticWide>) {
      // Exponents are T's own, so a carry in the bit pattern is a carry in value. The draw has at least as many bits as are
      // dropped; its lower bits decide nothing. The tail mends a NaN that is broken here.
      const Step<T> sum = bit_cast<Step<T>>(magnitude) + (draw >> (round_to_step.bits - dropped));
      return tail.result(bit_cast<T>(sum & (~Step<T>(0) << dropped)), x);
    }
    const Step<T> binade = bit_cast<Step<T>>(magnitude) & (~Step<T>(0) << m);
    const Step<T> bounded = larger(binade, lowest);
    // Below 2^-e = 2^-(bias - 1) comes 2^-bias, the largest subnormal power of two.
    const auto rest = static_cast<Integer>((Step<T>(2 * Ieee<T>::bias) << m) - bounded);
    const T inverse = bit_cast<T>(rest > (Integer(1) << (m - 1)) ? rest : Integer(1) << (m - 1));
    const T of_x = seen<Round>(x, most);
    return tail.result(round_to_step(magnitude * inverse, step, of_x, draw) * bit_cast<T>(bounded), x);
  }
};

// ---- tables ---------------------------------------------------------------------------------------------

// The numbers of a table, in ascending order.
struct Table {
  static constexpr int kMost = 256;
  float at[kMost];
  int size = 0;
  int half = 0;  // the largest power of two below the size
  int zero = 0;  // the index that counts as even in a tie
  float reach = 0;
};

template <class T>
struct TableElement {
  static constexpr bool keeps_nan = true;
  const Table& table;
  int first, last;  // the numbers that the tensor's dtype holds

  template <class Scale>
  SWALP_HD TableElement(const Table& t, const Scale& scale, T most) : table(t), first(0), last(t.size - 1) {
    while (scale.multiply(static_cast<T>(table.at[last])) > most && last > 0) --last;
    while (scale.multiply(static_cast<T>(table.at[first])) < -most && first < last) ++first;
  }

  template <class Round>
  SWALP_HD T round(T v, T x, uint32_t draw, const Round& round) const {
    if (!(v == v)) return v;
    const T q = static_cast<T>(table.at[index_of(v, x, draw, round)]);
    return q == T(0) ? with_sign(q, x) : q;
  }

  // The index of the rounded number.
  template <class Round>
  SWALP_HD int index_of(T v, T x, uint32_t draw, const Round& round) const {
    if (v == T(0) && x != T(0)) v = with_sign(std::numeric_limits<T>::min(), x);  // a quotient that has underflowed
    const T clamped = clamp(v, static_cast<T>(table.at[first]), static_cast<T>(table.at[last]));
    int below = 0;
    for (int half = table.half; half > 0; half /= 2) {
      const int at = below + half;
      const bool beyond = (at < table.size - 1) & (static_cast<T>(table.at[at & (Table::kMost - 1)]) <= clamped);
      below += half & -static_cast<int>(beyond);  // no choice here: compilers would make it a branch, hard to predict
    }
    const T low = static_cast<T>(table.at[below]), high = static_cast<T>(table.at[below + 1]);
    return below + static_cast<int>(goes_up(clamped, low, high, ((below - table.zero) & 1) != 0, x, draw, round));
  }

 private:
  template <class Round>
  SWALP_HD static bool goes_up(T v, T low, T high, bool odd, T x, uint32_t draw, const Round& round) {
    const bool negative = bit_cast<Step<T>>(x) >> (8 * sizeof(T) - 1) != 0;
    if constexpr (Round::draws) {
      const T resolution = power_of_two<T>(round.bits);
      const T rest = std::fabs(v - (negative ? high : low)) / (high - low);
      const bool away = std::rint(rest * resolution) + static_cast<T>(static_cast<int32_t>(draw)) >= resolution;
      return away != negative;
    } else {
      if (v == high) return true;
      const double at = v, middle = (static_cast<double>(low) + static_cast<double>(high)) / 2;
      switch (round.rounding) {
        case Rounding::Nearest:
          return (at > middle) | ((at == middle) & odd);
        case Rounding::NearestAway:
          return (at > middle) | ((at == middle) & !negative);
        case Rounding::NearestUp:
          return at >= middle;
        case Rounding::Down:
          return false;
        case Rounding::Up:
          return v > low;
        default:  // toward zero
          return v > low && negative;
      }
    }
  }
};

}  // namespace swalp_fx
