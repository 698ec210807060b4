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
  static constexpr int64_t kBytes = 64;
  template <Sign kSign>
  static void end_words(const uint32_t* words, const float* x, uint8_t* to, const Ending& ending) {
    const auto all = [](int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); };
    const auto at = [](const void* from, int i) { return _mm512_loadu_si512(static_cast<const __m512i*>(from) + i); };
    const auto word = [&](int i) {
      return kSign == Sign::Inside ? _mm512_and_si512(at(words, i), _mm512_set1_epi32(0xFF)) : at(words, i);
    };
    // Packing saturates, and so keeps signs. Each quarter of a register is packed by itself.
    __m512i codes = _mm512_packus_epi16(_mm512_packs_epi32(word(0), word(1)), _mm512_packs_epi32(word(2), word(3)));
    if constexpr (kSign != Sign::Inside) {
      const __m512i first = _mm512_packs_epi32(at(x, 0), at(x, 1)), last = _mm512_packs_epi32(at(x, 2), at(x, 3));
      const __mmask64 negative = _mm512_movepi8_mask(_mm512_packs_epi16(first, last));
      if constexpr (kSign == Sign::Above) {
        const __m512i magnitudes = _mm512_min_epu8(codes, all(ending.most));
        const __m512i negated = _mm512_or_si512(magnitudes, all(ending.sign_bit));
        codes = _mm512_mask_mov_epi8(magnitudes, negative, negated);
      } else {
        codes = _mm512_mask_sub_epi8(codes, negative, all(0), codes);
      }
    }
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(in_order, codes));
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
