// The loops for AVX-512. They have the combinations that training uses.
#include "lanes.h"

#ifdef SWALP_X86
#include <immintrin.h>

// GCC 12 takes its own _mm512_undefined for a mistake (PR 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace swalp_fx {
namespace {

// Behind all that other files share, which must run on any processor.
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c,bmi2,prefer-vector-width=512")
constexpr int64_t kLanes = 8;
struct Lanes {
  typedef uint64_t Vector __attribute__((vector_size(64)));
  static Vector multiply(Vector a, uint32_t m) {
    return (Vector)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
  }
  static Vector twice_lane_number() { return Vector{0, 2, 4, 6, 8, 10, 12, 14}; }
  static Vector join(Vector even, Vector odd) {
    return (Vector)_mm512_mask_moveldup_ps((__m512)even, 0xAAAA, (__m512)odd);
  }
  static void narrow(const uint32_t* from, uint8_t* to) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_loadu_si512(from)));
  }
  static void spread(const void* from, void* to) {
    const __m512i all = _mm512_loadu_si512(from), last = _mm512_shuffle_i64x2(all, all, 0xEE);
    _mm512_mask_storeu_epi32(to, 0x5555, _mm512_maskz_expand_epi32(0x5555, all));
    _mm512_mask_storeu_epi32(static_cast<char*>(to) + 64, 0x5555, _mm512_maskz_expand_epi32(0x5555, last));
  }
};
#include "compiled.h"
#pragma GCC pop_options

}  // namespace

const Instructions& avx512_instructions() { return kInstructions; }

}  // namespace swalp_fx
#endif
