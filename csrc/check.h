// The ops' arguments, checked once for every device. Each message names the op, the value and the remedy.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "formats.h"
#include "layout.h"

namespace swalp_fx {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws one sentence. (STD_TORCH_CHECK would put the function, file and line before it.)
template <class... Parts>
void require(bool ok, const char* op, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  message << "swalp_fx::" << op << ": ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline void check_range(const char* op, const char* name, int64_t value, int64_t lo, int64_t hi) {
  require(value >= lo && value <= hi, op, name, " = ", value, " is out of range; use ", lo, " to ", hi);
}

inline FixedPoint fixed_point(const char* op, int64_t wl, int64_t fl, bool symmetric) {
  check_range(op, "wl", wl, 2, 24);
  check_range(op, "fl", fl, -100, 100);
  return {static_cast<int>(wl), static_cast<int>(fl), symmetric};
}

inline BlockFloat block_float(const char* op, int64_t wl, bool symmetric, int64_t exponent_bits) {
  check_range(op, "wl", wl, 2, 24);
  check_range(op, "exponent_bits", exponent_bits, 2, 8);
  return {static_cast<int>(wl), symmetric, static_cast<int>(exponent_bits)};
}

inline Float floating(const char* op, int64_t exp, int64_t man, int64_t top) {
  check_range(op, "exp", exp, 2, 8);
  check_range(op, "man", man, 0, 23);
  check_range(op, "top", top, 0, exp == 8 ? 0 : 2);
  return {static_cast<int>(exp), static_cast<int>(man), static_cast<Float::Top>(top)};
}

inline void check_input(const char* op, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  const bool served = type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16;
  require(served, op, "x must be float32, float64, float16 or bfloat16, not scalar type ", static_cast<int>(type),
          "; convert it first");
}

// Which dimensions keep blocks apart. A tensor of one dimension or none is one block.
inline std::vector<bool> kept_dims(const char* op, const Tensor& x, const std::vector<int64_t>& dims) {
  const int64_t rank = x.dim();
  std::vector<bool> kept(rank, false);
  if (rank < 2) return kept;
  for (const int64_t d : dims) {
    require(d >= -rank && d < rank, op, "block dimension ", d, " does not exist in a tensor of ", rank,
            " dimensions; use ", -rank, " to ", rank - 1);
    kept[d < 0 ? d + rank : d] = true;
  }
  return kept;
}

// How to round and what to draw from. `key` stays a tensor: only a device knows where it may read it.
struct Draws {
  Rounding rounding;
  Random random;
  std::optional<Tensor> key;
};

inline Draws draws(const char* op, const Tensor& x, int64_t rounding, int64_t random_bits, std::optional<Tensor> key,
                   int64_t stream) {
  check_range(op, "rounding", rounding, 0, kRoundings - 1);
  check_range(op, "random_bits", random_bits, 1, 31);
  const bool stochastic = static_cast<Rounding>(rounding) == Rounding::Stochastic;
  if (stochastic) {
    require(key.has_value(), op, "stochastic rounding needs a key; pass one int64 tensor");
    require(key->scalar_type() == ScalarType::Long && key->numel() == 1, op,
            "the key must be a tensor of one int64; pass torch.tensor(key)");
    require(key->is_cpu() || (x.is_cuda() && key->is_cuda() && key->get_device() == x.get_device()), op,
            "the key must be on the CPU or on x's own device; move it there");
  }
  Random random;
  random.stream = static_cast<uint64_t>(stream);
  random.bits = static_cast<int>(random_bits);
  if (stochastic && key->is_cpu()) random.key = *static_cast<const uint64_t*>(key->const_data_ptr());
  return {static_cast<Rounding>(rounding), random, std::move(key)};
}

// The ops over a Device, which provides run(format, layout, x, y, draws) for dense x and y of one layout.
template <class Device>
struct Ops {
  template <class Format>
  static void into(const Format& format, const Tensor& x, Tensor& y, const std::vector<bool>& kept, const Draws& draws) {
    Layout layout;
    require(make_layout(x, kept, layout), "quantize", "x needs more than ", Layout::kMaxDims,
            " nested loops; give its blocks fewer dimensions");
    if (x.numel() > 0) Device::run(format, layout, x, y, draws);
  }

  template <class Format>
  static Tensor fresh(const Format& format, const Tensor& x, const std::vector<bool>& kept, const Draws& draws) {
    Layout probe;
    const Tensor dense = make_layout(x, kept, probe) ? x : torch::stable::contiguous(x);
    Tensor y = torch::stable::empty_like(dense);
    into(format, dense, y, kept, draws);
    return y;
  }

  template <class Format>
  static void in_place(const Format& format, Tensor& x, const std::vector<bool>& kept, const Draws& draws) {
    Layout probe;
    if (make_layout(x, kept, probe)) {
      into(format, x, x, kept, draws);
    } else {
      Tensor dense = torch::stable::contiguous(x);
      into(format, dense, dense, kept, draws);
      torch::stable::copy_(x, dense);
    }
  }

  using Key = std::optional<Tensor>;

  static Tensor quantize_fixed(Tensor x, int64_t wl, int64_t fl, bool symmetric, int64_t rounding, int64_t bits,
                               Key key, int64_t stream) {
    constexpr auto op = "quantize_fixed";
    check_input(op, x);
    return fresh(fixed_point(op, wl, fl, symmetric), x, kept_dims(op, x, {}), draws(op, x, rounding, bits, key, stream));
  }
  static void quantize_fixed_(Tensor x, int64_t wl, int64_t fl, bool symmetric, int64_t rounding, int64_t bits, Key key,
                              int64_t stream) {
    constexpr auto op = "quantize_fixed_";
    check_input(op, x);
    in_place(fixed_point(op, wl, fl, symmetric), x, kept_dims(op, x, {}), draws(op, x, rounding, bits, key, stream));
  }

  static Tensor quantize_block(Tensor x, int64_t wl, std::vector<int64_t> dims, bool symmetric, int64_t exponent_bits,
                               int64_t rounding, int64_t bits, Key key, int64_t stream) {
    constexpr auto op = "quantize_block";
    check_input(op, x);
    return fresh(block_float(op, wl, symmetric, exponent_bits), x, kept_dims(op, x, dims),
                 draws(op, x, rounding, bits, key, stream));
  }
  static void quantize_block_(Tensor x, int64_t wl, std::vector<int64_t> dims, bool symmetric, int64_t exponent_bits,
                              int64_t rounding, int64_t bits, Key key, int64_t stream) {
    constexpr auto op = "quantize_block_";
    check_input(op, x);
    in_place(block_float(op, wl, symmetric, exponent_bits), x, kept_dims(op, x, dims),
             draws(op, x, rounding, bits, key, stream));
  }

  static Tensor quantize_float(Tensor x, int64_t exp, int64_t man, int64_t top, int64_t rounding, int64_t bits, Key key,
                               int64_t stream) {
    constexpr auto op = "quantize_float";
    check_input(op, x);
    return fresh(floating(op, exp, man, top), x, kept_dims(op, x, {}), draws(op, x, rounding, bits, key, stream));
  }
  static void quantize_float_(Tensor x, int64_t exp, int64_t man, int64_t top, int64_t rounding, int64_t bits, Key key,
                              int64_t stream) {
    constexpr auto op = "quantize_float_";
    check_input(op, x);
    in_place(floating(op, exp, man, top), x, kept_dims(op, x, {}), draws(op, x, rounding, bits, key, stream));
  }

  static void register_in(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize_fixed", TORCH_BOX(&quantize_fixed));
    m.impl("quantize_fixed_", TORCH_BOX(&quantize_fixed_));
    m.impl("quantize_block", TORCH_BOX(&quantize_block));
    m.impl("quantize_block_", TORCH_BOX(&quantize_block_));
    m.impl("quantize_float", TORCH_BOX(&quantize_float));
    m.impl("quantize_float_", TORCH_BOX(&quantize_float_));
  }
};

}  // namespace swalp_fx
