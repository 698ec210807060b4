// The loops for any processor. They have every combination.
#include "lanes.h"

namespace swalp_fx {
namespace {

constexpr int64_t kLanes = 1;
struct Lanes : OneLane, OneByOne {
  using Vector = uint64_t;
  static Vector twice_lane_number() { return 0; }
  static Vector join(Vector even, Vector odd) { return (even & 0xFFFFFFFFu) | odd << 32; }
};
#include "compiled.h"

}  // namespace

const Instructions& portable_instructions() { return kInstructions; }

}  // namespace swalp_fx
