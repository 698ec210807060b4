// Codes of 8 bits or fewer in place of rounded numbers, as in swalp_fx/codes/codecs.py.
#pragma once

#include <vector>

#include "formats.h"

namespace swalp_fx {

// How to make the code of a number, beside its grid or table.
struct Coding {
  int bits = 8;
  bool is_twos = false;         // two's complement, or no sign at all; else a sign bit above the magnitude
  bool has_signed_zero = true;  // else zero is 0, without the sign bit
  int first = 0;                // the code of the lowest number, in two's complement or of a table
};

// Facts of a tensor, found on the way to its codes.
struct Found {
  std::vector<uint32_t> maxima;    // of its blocks: the bits of the largest finite magnitude
  std::vector<uint32_t> negative;  // for an affine scale: the maxima of negative numbers; maxima has only positive ones
  float tensor_maximum = 0;
  bool finite = true;  // whether every number is
};

// A rounding that gives codes.
template <class R>
struct Coded {
  using Round = R;
  static constexpr bool draws = R::draws;
  R round;
  Coding coding;
  Found* found;

  void tell(bool finite) const {
    if (!finite) __atomic_store_n(&found->finite, false, __ATOMIC_RELAXED);
  }
};

template <class Round>
constexpr bool kCodes = false;
template <class Round>
constexpr bool kCodes<Coded<Round>> = true;

// The type that is written for an element stored as S.
template <class S, class Round>
using Result = std::conditional_t<kCodes<Round>, uint8_t, S>;

// The number of steps in a rounded number, in at least the low 8 bits: the last places of the rounding sum in round.h. A
// negative number is in two's complement.
SWALP_HD uint32_t steps_of(const RoundNearest&, float v, Step<float> step, uint32_t) {
  const Step<float> shifter = step + (Step<float>(23) << 23) + (Step<float>(1) << 22);
  return bit_cast<uint32_t>(v + bit_cast<float>(shifter));
}

SWALP_HD uint32_t steps_of(const RoundStochastic& round, float v, Step<float> step, uint32_t draw) {
  const Step<float> shifter = step + (static_cast<Step<float>>(23 - round.bits) << 23);
  const uint32_t magnitude = (bit_cast<uint32_t>(std::fabs(v) + bit_cast<float>(shifter)) + draw - shifter) >> round.bits;
  const auto negative = static_cast<uint32_t>(bit_cast<int32_t>(v) >> 31);
  return (magnitude ^ negative) - negative;
}

SWALP_HD uint32_t sign_bit(float x, const Coding& coding) {
  return static_cast<uint32_t>(bit_cast<int32_t>(x) >> 31) & (1u << (coding.bits - 1));
}

// Each gives the code of a finite x with the quotient v, in the low bits of a word. The caller clears the bits above, and the
// sign of a zero that has none. kTwos: Coding.is_twos; only integers have loops for true.

template <bool kTwos, class Round>
SWALP_HD uint32_t code_of(const IntegerElement<float>& element, float v, float x, uint32_t draw, const Coded<Round>& how) {
  const float within = clamp(v, element.lo, element.hi);
  if constexpr (kTwos) {
    const auto lowest = static_cast<int>(element.lo * inverse_of<float>(element.step));
    return steps_of(how.round, within, element.step, draw) + static_cast<uint32_t>(how.coding.first - lowest);
  }
  return steps_of(how.round, std::fabs(within), element.step, draw) | sign_bit(x, how.coding);
}

// Exponent and mantissa. From 2^least on, the steps of a number include the hidden bit.
template <bool kTwos, template <class> class Tail, class Round>
SWALP_HD uint32_t code_of(const FloatElement<float, Tail>& element, float v, float x, uint32_t draw,
                          const Coded<Round>& how) {
  float magnitude = std::fabs(v);
  magnitude = magnitude > element.tail.max ? element.tail.max : magnitude;
  const Step<float> above = larger(element.binade_of(magnitude), element.lowest) - element.lowest;
  const Step<float> step = above + (element.lowest - element.per_binade);
  const int man = static_cast<int>(element.per_binade >> 23);
  return (steps_of(how.round, magnitude, step, draw) + (above >> (23 - man))) | sign_bit(x, how.coding);
}

// No element with so many exponents fits in 8 bits.
template <bool kTwos, template <class> class Tail, class Round>
SWALP_HD uint32_t code_of(const WideFloatElement<float, Tail>&, float, float, uint32_t, const Coded<Round>&) {
  return 0;
}

template <bool kTwos, class Round>
SWALP_HD uint32_t code_of(const TableElement<float>& element, float v, float x, uint32_t draw, const Coded<Round>& how) {
  return static_cast<uint32_t>(element.index_of(v, x, draw, how.round) + how.coding.first);
}

template <bool kTwos, class Element, class Scale, class Round>
SWALP_HD uint32_t code(const Quantizer<float, Element, Scale>& quantizer, float x, uint32_t draw, const Coded<Round>& how) {
  return code_of<kTwos>(quantizer.element, quantizer.scale.divide(x), x, draw, how);
}

}  // namespace swalp_fx
