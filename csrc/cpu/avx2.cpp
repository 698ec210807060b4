// The loops for AVX2. They have the combinations that training uses.
#include "lanes.h"

#ifdef SWALP_X86
#include <immintrin.h>

namespace swalp_fx {
namespace {

// Behind all that other files share, which must run on any processor.
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi2")
constexpr int64_t kLanes = 4;
struct Lanes : OneByOne {
  static constexpr int64_t kBytes = 32;
  template <Sign kSign>
  static void end_words(const uint32_t* words, const float* x, uint8_t* to, const Ending& ending) {
    const auto all = [](int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); };
    const auto at = [](const void* from, int i) { return _mm256_loadu_si256(static_cast<const __m256i*>(from) + i); };
    const auto word = [&](int i) {
      return kSign == Sign::Inside ? _mm256_and_si256(at(words, i), _mm256_set1_epi32(0xFF)) : at(words, i);
    };
    // Packing saturates, and so keeps signs. Each half of a register is packed by itself.
    __m256i codes = _mm256_packus_epi16(_mm256_packs_epi32(word(0), word(1)), _mm256_packs_epi32(word(2), word(3)));
    if constexpr (kSign != Sign::Inside) {
      const __m256i first = _mm256_packs_epi32(at(x, 0), at(x, 1)), last = _mm256_packs_epi32(at(x, 2), at(x, 3));
      const __m256i signs = _mm256_packs_epi16(first, last);  // 0 only for a zero
      if constexpr (kSign == Sign::Above) {
        const __m256i magnitudes = _mm256_min_epu8(codes, all(ending.most));
        codes = _mm256_blendv_epi8(magnitudes, _mm256_or_si256(magnitudes, all(ending.sign_bit)), signs);
      } else {
        codes = _mm256_sign_epi8(codes, signs);
      }
    }
    codes = _mm256_permutevar8x32_epi32(codes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), codes);
  }
  typedef uint64_t Vector __attribute__((vector_size(32)));
  static Vector multiply(Vector a, uint32_t m) {
    return (Vector)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
  }
  static Vector twice_lane_number() { return Vector{0, 2, 4, 6}; }
  static Vector join(Vector even, Vector odd) {
    return (Vector)_mm256_blend_epi32((__m256i)even, _mm256_slli_epi64((__m256i)odd, 32), 0xAA);
  }
};
#include "compiled.h"
#pragma GCC pop_options

}  // namespace

const Instructions& avx2_instructions() { return kInstructions; }

}  // namespace swalp_fx
#endif
