// What the arithmetic headers need to compile for host and device alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__CUDACC__)
#define SWALP_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inline: a kernel compiled for AVX-512 then takes the arithmetic in, and vectorises it.
#define SWALP_HD inline __attribute__((always_inline))
#else
#define SWALP_HD inline
#endif

namespace swalp_fx {

// The layout of an IEEE 754 binary type.
template <class T>
struct Ieee;

template <>
struct Ieee<float> {
  using Bits = uint32_t;
  using Integer = int32_t;
  static constexpr int mantissa = 23, bias = 127;
};

template <>
struct Ieee<double> {
  using Bits = uint64_t;
  using Integer = int64_t;
  static constexpr int mantissa = 52, bias = 1023;
};

template <class To, class From>
SWALP_HD To bit_cast(From value) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}

// The bits of |x|: their order as integers is the order of magnitudes.
template <class T>
SWALP_HD typename Ieee<T>::Bits magnitude_bits(T x) {
  using Bits = typename Ieee<T>::Bits;
  return bit_cast<Bits>(x) & (~Bits(0) >> 1);
}

// The same, but 0 for infinities and NaN: they must not set a block's scale.
template <class T>
SWALP_HD typename Ieee<T>::Bits finite_magnitude(T x) {
  const auto bits = magnitude_bits(x);
  // A mask, not a choice: compilers turn a choice inside a maximum into a branch.
  return bits & -static_cast<typename Ieee<T>::Bits>(bits < magnitude_bits(std::numeric_limits<T>::infinity()));
}

// floor(log2 |x|) of a normal x; -bias for zero and subnormals, bias + 1 for infinities and NaN.
template <class T>
SWALP_HD int exponent_of(typename Ieee<T>::Bits magnitude) {
  return static_cast<int>(magnitude >> Ieee<T>::mantissa) - Ieee<T>::bias;
}

// 2^e, for e in the range of T's normal numbers.
template <class T>
SWALP_HD T power_of_two(int e) {
  using Integer = typename Ieee<T>::Integer;
  return bit_cast<T>(static_cast<Integer>(e + Ieee<T>::bias) << Ieee<T>::mantissa);
}

}  // namespace swalp_fx
