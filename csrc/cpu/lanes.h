// What the files of the instruction sets have in common.
#pragma once

#include <atomic>
#include <utility>

#include "instructions.h"

namespace swalp_fx {

// 16 values of 32 bits: writes their lowest bits, or writes the values to every second place and leaves the rest alone.
struct OneByOne {
  template <class Code>
  static void narrow(const uint32_t* from, Code* to) {
    for (int i = 0; i < 16; ++i) to[i] = static_cast<Code>(from[i]);
  }
  static void spread(const void* from, void* to) {
    for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(to) + i * 8, static_cast<const char*>(from) + i * 4, 4);
  }
};

}  // namespace swalp_fx
