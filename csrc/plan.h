// A rounding that is done again and again, of tensors alike: looked up and checked once, then called without a dispatcher.
#pragma once

#include <cstdint>

namespace swalp_fx {

// Format, rounding, dtype, sizes and strides are the plan's; whoever calls it sees to it that memory has them.
struct Plan {
  virtual ~Plan() = default;
  // From memory to memory, which may be the same; on a GPU, on the current stream.
  virtual void round(const void* from, void* to, uint64_t key, uint64_t stream) const = 0;
  // Whether every rounding is known to keep what lies there.
  virtual bool keeps(const void* from) const = 0;
};

}  // namespace swalp_fx
