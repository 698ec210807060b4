// What is compiled once for each set of instructions, in a file of its own, so that the files are compiled side by side.
#pragma once

#include "../check.h"
#include "../codes.h"
#include "boxes.h"

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define SWALP_X86 1
#endif

namespace swalp_fx {

// An update, see updates.h: which one, and its numbers.
struct Update {
  int64_t kernel;
  std::vector<float> numbers;
};

// Memory that an update steps: a weight or its master, the gradient, the states, and room for as many numbers.
struct Stepped {
  static constexpr size_t kMostStates = 2;
  float* w;
  float* g;
  float* states[kMostStates];  // null from the last one on
  float* room;

  Stepped from(int64_t first, float* for_room) const {
    Stepped at{w + first, g + first, {}, for_room};
    for (size_t k = 0; k < kMostStates && states[k] != nullptr; ++k) at.states[k] = states[k] + first;
    return at;
  }
};

// What an update takes: numbers, and states of a weight.
struct Takes {
  size_t numbers, fewest_states, most_states;
};

// Codes of a byte have loops for these roundings.
template <class Round>
constexpr bool kIsCommon = std::is_same_v<Round, RoundNearest> || std::is_same_v<Round, RoundStochastic>;

// The loops of one set. The first three return false, and have done nothing, where their combination is not compiled: those that
// training does not use are compiled for one set alone.
struct Instructions {
  bool (*round)(const Numbers&, const Cover&, ScalarType, const void* x, void* y, const Drawing&);
  // Whether rounding to nearest would change a number of x.
  bool (*look)(const Numbers&, const Cover&, ScalarType, const void* x, bool* changed);
  // Codes of a uint8_t, or of a uint16_t if they are wide.
  bool (*encode)(const Numbers&, const Cover&, const float* x, void* codes, bool wide, const Coding&, Found*, const Drawing&);
  void (*store_scales)(const Numbers&, const Coding&, const Found&, int bias, void* scales, void* second);
  void (*pack_bytes)(const uint8_t* codes, int64_t n, int bits, uint8_t* packed);
  void (*pack_words)(const uint16_t* codes, int64_t n, int bits, uint8_t* packed);
  void (*update)(const Update&, const Stepped&, int64_t n);
  std::optional<Takes> (*takes)(int64_t kernel);  // none if there is no such update
};

const Instructions& portable_instructions();  // has every combination
#ifdef SWALP_X86
const Instructions& avx2_instructions();
const Instructions& avx512_instructions();
#endif

}  // namespace swalp_fx
