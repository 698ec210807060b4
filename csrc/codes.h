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

// A code begins as a word: its low bits, or its magnitude. How words end as codes is alike for all numbers with one quantizer. So
// many get their endings at once, when they are bytes already.
enum class Sign {
  Inside,  // the low bits of the word are the code
  Above,   // the word is the code's magnitude, or beyond the largest; the sign of x stands in the bit above
  Negated  // the word is a magnitude; the code of a negative x is its two's complement
};

struct Ending {
  uint32_t most;      // the largest magnitude of a code
  uint32_t sign_bit;  // alone in its word
};

// The caller clears the bits above the code, and the sign of a zero that has none.
template <Sign kSign>
SWALP_HD uint32_t with_ending(uint32_t word, float x, const Ending& ending) {
  if constexpr (kSign == Sign::Inside) return word;
  const auto negative = static_cast<uint32_t>(bit_cast<int32_t>(x) >> 31);
  if constexpr (kSign == Sign::Negated) return (word ^ negative) - negative;
  return (word < ending.most ? word : ending.most) | (ending.sign_bit & negative);
}

// The number of steps in a rounded magnitude. x: see round.h.
SWALP_HD uint32_t steps_of(const RoundNearest&, float magnitude, Step<float> step, float, uint32_t) {
  const Step<float> shifter = step + (Step<float>(23) << 23);
  return bit_cast<uint32_t>(magnitude + bit_cast<float>(shifter)) - shifter;
}

SWALP_HD uint32_t steps_of(const RoundStochastic& round, float magnitude, Step<float> step, float, uint32_t draw) {
  const Step<float> shifter = step + (static_cast<Step<float>>(23 - round.bits) << 23);
  return (bit_cast<uint32_t>(magnitude + bit_cast<float>(shifter)) + draw - shifter) >> round.bits;
}

template <class Round>
SWALP_HD uint32_t steps_of(const Round& round, float magnitude, Step<float> step, float x, uint32_t draw) {
  return static_cast<uint32_t>(round(magnitude, step, x, draw) * inverse_of<float>(step));
}

// The same of v, which may be negative, in the low 16 bits: then in two's complement.
SWALP_HD uint32_t signed_steps_of(const RoundNearest&, float v, Step<float> step, float, uint32_t) {
  return bit_cast<uint32_t>(v + bit_cast<float>(step + (Step<float>(23) << 23) + (Step<float>(1) << 22)));
}

template <class Round>
SWALP_HD uint32_t signed_steps_of(const Round& round, float v, Step<float> step, float x, uint32_t draw) {
  return with_ending<Sign::Negated>(steps_of(round, std::fabs(v), step, x, draw), v, {});
}

// The same of any finite magnitude below twice `power`, where a step is 2^-man of that power of two. The magnitude is scaled down
// until the last place of its sum with `power` is a step. That product is exact, so that the sum is the one rounding, and it cannot
// overflow.
SWALP_HD uint32_t steps_below(const RoundNearest&, float magnitude, Step<float> power, int man, uint32_t) {
  const float scaled = power_of_two<float>(man - Ieee<float>::mantissa);
  return bit_cast<uint32_t>(std::fma(magnitude, scaled, bit_cast<float>(power))) - power;
}

SWALP_HD uint32_t steps_below(const RoundStochastic& round, float magnitude, Step<float> power, int man, uint32_t draw) {
  return (steps_below(RoundNearest{}, magnitude, power, man + round.bits, 0u) + draw) >> round.bits;
}

// |v|, at most `most`. As integers: GCC would make a comparison of floats twice.
SWALP_HD float smaller_magnitude(float v, float most) {
  const uint32_t magnitude = magnitude_bits(v), bound = magnitude_bits(most);
  return bit_cast<float>(magnitude < bound ? magnitude : bound);
}

SWALP_HD uint32_t sign_bit(float x, const Coding& coding) {
  return static_cast<uint32_t>(bit_cast<int32_t>(x) >> 31) & (1u << (coding.bits - 1));
}

// Each gives the word of a finite x with the quotient v. kTwos: Coding.is_twos; only integers have loops for true. An element
// whose words have no sign inside is a case of sign_of.

template <class Element, bool kTwos, class Round>
constexpr Sign sign_of = Sign::Inside;
template <bool kTwos, class Round>
constexpr Sign sign_of<IntegerElement<float>, kTwos, Round> = kTwos ? Sign::Negated : Sign::Above;
template <>
inline constexpr Sign sign_of<IntegerElement<float>, true, RoundNearest> = Sign::Inside;  // negative numbers are as fast
template <template <class> class Tail, bool kTwos, class Round>
constexpr Sign sign_of<FloatElement<float, Tail>, kTwos, Round> = Tail<float>::flushes ? Sign::Inside : Sign::Above;

template <bool kTwos, class Round>
SWALP_HD uint32_t code_of(const IntegerElement<float>& element, float v, float x, uint32_t draw, const Coding&,
                          const Round& round) {
  if constexpr (kTwos) {
    const float within = clamp(v, element.lo, element.hi), magnitude = std::fabs(within);
    const float of_x = seen<Round>(x, element.end_beside(x));
    if constexpr (std::is_same_v<Round, RoundNearest>) return signed_steps_of(round, within, element.step, of_x, draw);
    return steps_of(round, magnitude, element.step, of_x, draw);
  }
  const float magnitude = smaller_magnitude(v, element.hi);
  return steps_of(round, magnitude, element.step, seen<Round>(x, element.hi), draw);
}

template <bool kTwos, class Round>
SWALP_HD uint32_t code_of(const MovedElement<float>& element, float v, float x, uint32_t draw, const Coding& coding,
                          const Round& round) {
  const float within = clamp(v, element.lo, element.hi);
  const int lowest = coding.first + static_cast<int>(element.moved);
  const float of_x = seen<Round>(x, element.end_beside(x));
  return signed_steps_of(round, within, element.step, of_x, draw) + static_cast<uint32_t>(lowest);
}

// Exponent and mantissa. From 2^least on, the steps of a number include the hidden bit. A magnitude beyond the largest, or an
// infinite quotient, has a larger word than the largest.
template <bool kTwos, template <class> class Tail, class Round>
SWALP_HD uint32_t code_of(const FloatElement<float, Tail>& element, float v, float, uint32_t draw, const Coding&,
                          const Round& round) {
  const uint32_t bits = magnitude_bits(v);
  const Step<float> power = element.binade_of(bit_cast<float>(larger(bits, element.lowest)));
  const int man = static_cast<int>(element.per_binade >> 23);
  const float magnitude = bit_cast<float>(bits);  // not std::fabs: GCC would make it once more
  return steps_below(round, magnitude, power, man, draw) + ((power - element.lowest) >> (23 - man));
}

template <class Element>
Ending ending_of(const Element&, const Coding& coding) {
  return {~0u, 1u << (coding.bits - 1)};
}

template <template <class> class Tail>
Ending ending_of(const FloatElement<float, Tail>& element, const Coding& coding) {
  return {code_of<false>(element, element.tail.max, element.tail.max, 0u, coding, RoundNearest{}), 1u << (coding.bits - 1)};
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
