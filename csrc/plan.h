// A rounding of similar tensors, or their codes, again and again: looked up and checked once, then called without a dispatcher.
#pragma once

#include <cstdint>

namespace swalp_fx {

struct AnyPlan {
  virtual ~AnyPlan() = default;
};

// A plan has a format, a rounding, a dtype, sizes and strides. The caller makes sure that the memory has them.
struct Plan : AnyPlan {
  // `from` and `to` may be the same memory. On a GPU it runs on the current stream.
  virtual void round(const void* from, void* to, uint64_t key, uint64_t stream) const = 0;
  // Whether every rounding is known to keep the numbers at `from`.
  virtual bool keeps(const void* from) const = 0;
};

// A plan of codes (codes.h), of a row-major float32 x.
struct CodePlan : AnyPlan {
  // Writes codes side by side, and scales as in swalp_fx/codes/stored.py. False if x is not finite; then they mean nothing.
  virtual bool write(const void* x, void* packed, void* scales, void* second, uint64_t key, uint64_t stream) const = 0;
};

}  // namespace swalp_fx
