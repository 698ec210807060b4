// Macros and bit arithmetic that let the other headers compile for host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#define SWALP_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// Always inline: a kernel compiled for AVX-512 then takes the arithmetic in, and vectorises it.
#define SWALP_HD inline __attribute__((always_inline))
#else
#define SWALP_HD inline
#endif

// Unrolls a loop of a small, known count, even if the compiler's own limits forbid it.
#if defined(__CUDA_ARCH__)
#define SWALP_UNROLL _Pragma("unroll")
#elif defined(__GNUC__) && !defined(__clang__)
#define SWALP_UNROLL _Pragma("GCC unroll 16")
#else
#define SWALP_UNROLL
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

// The compute type for elements stored as S: float32 for float16 and bfloat16, and it holds them exactly.
template <class S>
using Compute = std::conditional_t<std::is_same_v<S, double>, double, float>;

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

template <class T>
SWALP_HD bool is_finite_magnitude(typename Ieee<T>::Bits magnitude) {
  return magnitude < magnitude_bits(std::numeric_limits<T>::infinity());
}

// The bits of |x|, but 0 for infinities and NaN: they must not set a block's scale.
template <class T>
SWALP_HD typename Ieee<T>::Bits finite_magnitude(T x) {
  const auto bits = magnitude_bits(x);
  // A mask, not a choice: compilers turn a choice inside a maximum into a branch.
  return bits & -static_cast<typename Ieee<T>::Bits>(is_finite_magnitude<T>(bits));
}

template <class Bits>
SWALP_HD Bits larger(Bits a, Bits b) {
  return a < b ? b : a;
}

// A magnitude with the sign of x; -0 has a sign too.
template <class T>
SWALP_HD T with_sign(T magnitude, T x) {
  using Bits = typename Ieee<T>::Bits;
  return bit_cast<T>(bit_cast<Bits>(magnitude) | (bit_cast<Bits>(x) & ~(~Bits(0) >> 1)));
}

// floor(log2) of a magnitude, subnormals included; -2000 for zero.
template <class T>
SWALP_HD int exponent_of(typename Ieee<T>::Bits magnitude) {
  const int e = static_cast<int>(magnitude >> Ieee<T>::mantissa) - Ieee<T>::bias;
  if (e > -Ieee<T>::bias) return e;
  if (magnitude == 0) return -2000;
  // A subnormal in units of its last place is an integer, hence normal.
  const auto units = bit_cast<typename Ieee<T>::Bits>(static_cast<T>(magnitude));
  return static_cast<int>(units >> Ieee<T>::mantissa) + 1 - 2 * Ieee<T>::bias - Ieee<T>::mantissa;
}

// 2^e, for e in the range of T's normal numbers or one below it (2^-127 for float).
template <class T>
SWALP_HD T power_of_two(int e) {
  using Bits = typename Ieee<T>::Bits;
  const Bits normal = static_cast<Bits>(e + Ieee<T>::bias) << Ieee<T>::mantissa;
  return bit_cast<T>(normal > 0 ? normal : Bits(1) << (Ieee<T>::mantissa - 1));
}

}  // namespace swalp_fx
