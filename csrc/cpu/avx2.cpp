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
