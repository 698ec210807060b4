// What the files of the instruction sets have in common.
#pragma once

#include "instructions.h"

namespace swalp_fx {

// What a loop does with several values of 32 bits. end_words gives kBytes words of codes their endings, see codes.h. spread moves
// 16 values to every second place, and leaves the places between alone.
struct OneByOne {
  static constexpr int64_t kBytes = 16;
  template <Sign kSign>
  static void end_words(const uint32_t* words, const float* x, uint8_t* to, const Ending& ending) {
    for (int i = 0; i < kBytes; ++i) to[i] = static_cast<uint8_t>(with_ending<kSign>(words[i], x[i], ending));
  }
  static void spread(const void* from, void* to) {
    for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * 8, static_cast<const char*>(from) + i * 4, 4);
  }
};

}  // namespace swalp_fx
