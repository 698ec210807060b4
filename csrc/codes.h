// Codes of 16 bits or fewer in place of rounded numbers, as in swalp_fx/codes/codecs.py.
#pragma once

#include <vector>

#include "formats.h"

namespace swalp_fx {

// How to make the code of a number, beside its grid or table.
struct Coding {
  int bits = 8;
  bool is_twos = false;         // two's complement, or no sign at all; else a sign bit above the magnitude
  bool has_signed_zero = true;  // else zero is 0, without the sign bit
  int first = 0;                // the code of the lowest number, of a table or of integers that are moved
  int infinity = 0, nan = 0;    // the codes of what overflows
};

// Facts of a tensor, found on the way to its codes.
struct Found {
  std::vector<uint32_t> maxima;    // of its blocks: the bits of the largest finite magnitude
  std::vector<uint32_t> negative;  // for an affine scale: the maxima of negative numbers; maxima has only positive ones
  float tensor_maximum = 0;
  bool finite = true;  // whether every number is
};

// A rounding that gives codes, each in a C. It looks whether numbers are finite, unless their maximum has told.
template <class R, class C, bool kLooks = true>
struct Coded {
  using Round = R;
  using Code = C;
  static constexpr bool draws = R::draws, looks = kLooks;
  R round;
  Coding coding;
  Found* found;

  void tell(bool finite) const {
    if (!finite) __atomic_store_n(&found->finite, false, __ATOMIC_RELAXED);
  }
  Coded<R, C, false> without_look() const { return {round, coding, found}; }
};

template <class Round>
constexpr bool kCodes = false;
template <class R, class C, bool kLooks>
constexpr bool kCodes<Coded<R, C, kLooks>> = true;

// The type that is written for an element stored as S.
template <class S, class Round>
struct Written {
  using Type = S;
};
template <class S, class R, class C, bool kLooks>
struct Written<S, Coded<R, C, kLooks>> {
  using Type = C;
};
template <class S, class Round>
using Result = typename Written<S, Round>::Type;

// The number of steps in a rounded magnitude, in at least the low 16 bits. For the two common roundings it is in the last
// places of the rounding sum in round.h. x: see round.h.
SWALP_HD uint32_t steps_of(const RoundNearest&, float magnitude, Step<float> step, float, uint32_t) {
  return bit_cast<uint32_t>(magnitude + bit_cast<float>(step + (Step<float>(23) << 23)));
}

SWALP_HD uint32_t steps_of(const RoundStochastic& round, float magnitude, Step<float> step, float, uint32_t draw) {
  const Step<float> shifter = step + (static_cast<Step<float>>(23 - round.bits) << 23);
  return (bit_cast<uint32_t>(magnitude + bit_cast<float>(shifter)) + draw - shifter) >> round.bits;
}

template <class Round>
SWALP_HD uint32_t steps_of(const Round& round, float magnitude, Step<float> step, float x, uint32_t draw) {
  return static_cast<uint32_t>(round(magnitude, step, x, draw) * inverse_of<float>(step));
}

// The same of v, which may be negative: then in two's complement.
SWALP_HD uint32_t signed_steps_of(const RoundNearest&, float v, Step<float> step, float, uint32_t) {
  return bit_cast<uint32_t>(v + bit_cast<float>(step + (Step<float>(23) << 23) + (Step<float>(1) << 22)));
}

template <class Round>
SWALP_HD uint32_t signed_steps_of(const Round& round, float v, Step<float> step, float x, uint32_t draw) {
  const auto negative = static_cast<uint32_t>(bit_cast<int32_t>(v) >> 31);
  return (steps_of(round, std::fabs(v), step, x, draw) ^ negative) - negative;
}

// |v|, at most `most`. As integers: GCC would make a comparison of floats twice.
SWALP_HD float smaller_magnitude(float v, float most) {
  const uint32_t magnitude = magnitude_bits(v), bound = magnitude_bits(most);
  return bit_cast<float>(magnitude < bound ? magnitude : bound);
}

SWALP_HD uint32_t sign_bit(float x, const Coding& coding) {
  return static_cast<uint32_t>(bit_cast<int32_t>(x) >> 31) & (1u << (coding.bits - 1));
}

// Each gives the code of a finite x with the quotient v, in the low bits of a word. The caller clears the bits above, and the
// sign of a zero that has none. kTwos: Coding.is_twos; only integers have loops for true.

template <bool kTwos, class Round>
SWALP_HD uint32_t code_of(const IntegerElement<float>& element, float v, float x, uint32_t draw, const Coding& coding,
                          const Round& round) {
  if constexpr (kTwos) {
    const float within = clamp(v, element.lo, element.hi);
    return signed_steps_of(round, within, element.step, seen<Round>(v, std::fabs(within), x), draw);
  }
  const float magnitude = smaller_magnitude(v, element.hi);
  return steps_of(round, magnitude, element.step, seen<Round>(v, magnitude, x), draw) | sign_bit(x, coding);
}

template <bool kTwos, class Round>
SWALP_HD uint32_t code_of(const MovedElement<float>& element, float v, float x, uint32_t draw, const Coding& coding,
                          const Round& round) {
  const IntegerElement<float>& integers = element;
  const int lowest = coding.first + static_cast<int>(element.moved);
  return code_of<true>(integers, v, x, draw, coding, round) + static_cast<uint32_t>(lowest);
}

// Exponent and mantissa. From 2^least on, the steps of a number include the hidden bit.
template <bool kTwos, template <class> class Tail, class Round>
SWALP_HD uint32_t code_of(const FloatElement<float, Tail>& element, float v, float x, uint32_t draw, const Coding& coding,
                          const Round& round) {
  const float magnitude = smaller_magnitude(v, element.tail.max);
  const Step<float> above = larger(element.binade_of(magnitude), element.lowest) - element.lowest;
  const Step<float> step = above + (element.lowest - element.per_binade);
  const int man = static_cast<int>(element.per_binade >> 23);
  const uint32_t steps = steps_of(round, magnitude, step, seen<Round>(v, magnitude, x), draw);
  return (steps + (above >> (23 - man))) | sign_bit(x, coding);
}

// The code of a rounded float on a scale of 1, of any overflow. lowest: the bits of 2^least.
SWALP_HD uint32_t code_of_number(float number, Step<float> lowest, int man, const Coding& coding) {
  const uint32_t bits = magnitude_bits(number), infinity = magnitude_bits(std::numeric_limits<float>::infinity());
  if (bits > infinity) return static_cast<uint32_t>(coding.nan);
  if (bits == infinity) return static_cast<uint32_t>(coding.infinity) | sign_bit(number, coding);
  if (bits == 0 && !coding.has_signed_zero) return 0;
  uint32_t code = 0;
  if (bits >= lowest) {
    code = ((bits - lowest) >> (23 - man)) + (1u << man);
  } else {  // a whole number of steps below 2^least; in float32 itself these may be subnormal
    code = static_cast<uint32_t>(std::fabs(static_cast<double>(number)) / bit_cast<float>(lowest) * (1 << man));
  }
  return code | sign_bit(number, coding);
}

template <bool kTwos, class Round>
SWALP_HD uint32_t code_of(const FloatElement<float, AnyTail>& element, float v, float x, uint32_t draw, const Coding& coding,
                          const Round& round) {
  return code_of_number(element.round(v, x, draw, round), element.lowest, static_cast<int>(element.per_binade >> 23), coding);
}

template <bool kTwos, template <class> class Tail, class Round>
SWALP_HD uint32_t code_of(const WideFloatElement<float, Tail>& element, float v, float x, uint32_t draw, const Coding& coding,
                          const Round& round) {
  return code_of_number(element.round(v, x, draw, round), element.lowest, Ieee<float>::mantissa - element.dropped, coding);
}

template <bool kTwos, class Round>
SWALP_HD uint32_t code_of(const TableElement<float>& element, float v, float x, uint32_t draw, const Coding& coding,
                          const Round& round) {
  return static_cast<uint32_t>(element.index_of(v, x, draw, round) + coding.first);
}

template <bool kTwos, class Element, class Scale, class How>
SWALP_HD uint32_t code(const Quantizer<float, Element, Scale>& quantizer, float x, uint32_t draw, const How& how) {
  return code_of<kTwos>(quantizer.element, quantizer.scale.divide(x), x, draw, how.coding, how.round);
}

}  // namespace swalp_fx
