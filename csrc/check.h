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

inline void check_input(const char* op, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  const bool served = type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16;
  require(served, op, "x must be float32, float64, float16 or bfloat16, not scalar type ", static_cast<int>(type),
          "; convert it first");
}

inline int64_t dimension(const char* op, const char* name, const Tensor& x, int64_t d) {
  const int64_t rank = x.dim();
  require(d >= -rank && d < rank, op, name, " ", d, " does not exist in a tensor of ", rank, " dimensions; use ", -rank,
          " to ", rank - 1);
  return d < 0 ? d + rank : d;
}

// dims: dimensions that keep blocks apart; none for one block. size > 0 also cuts `axis` into runs.
// A tensor of one dimension or none has no slices to keep apart, so `dims` does not split it.
inline Blocks blocks_of(const char* op, const Tensor& x, const std::vector<int64_t>& dims, int64_t axis, int64_t size) {
  require(size >= 0, op, "block size = ", size, " is out of range; use 0 (no runs) or more");
  Blocks blocks;
  blocks.kept.assign(x.dim(), false);
  if (x.dim() >= 2) {
    for (const int64_t d : dims) blocks.kept[dimension(op, "block dimension", x, d)] = true;
  }
  if (size > 0 && x.dim() > 0) {
    blocks.axis = dimension(op, "block axis", x, axis);
    blocks.size = size;
    blocks.kept.assign(x.dim(), true);
  }
  return blocks;
}

// How to round and what to draw from. `key` stays a tensor: only a device knows where it may read it.
struct Drawing {
  Rounding rounding;
  Random random;
  std::optional<Tensor> key;
};

inline Drawing drawing(const char* op, const Tensor& x, int64_t rounding, int64_t random_bits,
                       const std::optional<Tensor>& key, int64_t stream) {
  check_range(op, "rounding", rounding, 0, kRoundings - 1);
  check_range(op, "random_bits", random_bits, 1, 24);
  Random random;
  random.stream = static_cast<uint64_t>(stream);
  random.bits = static_cast<int>(random_bits);
  if (static_cast<Rounding>(rounding) != Rounding::Stochastic) return {static_cast<Rounding>(rounding), random, {}};
  require(key.has_value(), op, "stochastic rounding needs a key; pass one int64 tensor");
  require(key->scalar_type() == ScalarType::Long && key->numel() == 1, op,
          "the key must be a tensor of one int64; pass torch.tensor(key)");
  require(key->is_cpu() || (x.is_cuda() && key->is_cuda() && key->get_device() == x.get_device()), op,
          "the key must be on the CPU or on x's own device; move it there");
  if (key->is_cpu()) random.key = *static_cast<const uint64_t*>(key->const_data_ptr());
  return {Rounding::Stochastic, random, key};
}

inline void check_streams(const char* op, const std::vector<Tensor>& xs, const std::vector<int64_t>& streams) {
  require(xs.size() == streams.size(), op, xs.size(), " tensors but ", streams.size(), " streams; give each tensor one");
}

// ---- each op's numbers: checked, and turned into a functor of formats.h --------------------------

using Key = std::optional<Tensor>;
using Dims = std::vector<int64_t>;

struct QuantizeFixed {
  static constexpr auto name = "quantize_fixed";
  static FixedPoint format(int64_t wl, int64_t fl, bool symmetric) {
    check_range(name, "wl", wl, 2, 24);
    check_range(name, "fl", fl, -100, 100);
    return {static_cast<int>(wl), static_cast<int>(fl), symmetric};
  }
};

struct QuantizeBlock {
  static constexpr auto name = "quantize_block";
  static BlockFloat format(int64_t wl, bool symmetric, int64_t exponent_bits) {
    check_range(name, "wl", wl, 2, 24);
    check_range(name, "exponent_bits", exponent_bits, 2, 8);
    return {static_cast<int>(wl), symmetric, static_cast<int>(exponent_bits)};
  }
};

struct QuantizeFloat {
  static constexpr auto name = "quantize_float";
  static Float format(int64_t exp, int64_t man, int64_t top) {
    check_range(name, "exp", exp, 2, 8);
    check_range(name, "man", man, 0, 23);
    check_range(name, "top", top, 0, exp == 8 ? 0 : 2);
    return {static_cast<int>(exp), static_cast<int>(man), static_cast<int>(top)};
  }
};

struct QuantizeMicroscaling {
  static constexpr auto name = "quantize_microscaling";
  static Microscaling format(int64_t exp, int64_t man, int64_t top, int64_t largest_exponent) {
    check_range(name, "exp", exp, 0, 5);
    check_range(name, "man", man, 0, 22);
    check_range(name, "top", top, 0, 2);
    check_range(name, "largest_exponent", largest_exponent, 0, 31);
    return {static_cast<int>(exp), static_cast<int>(man), static_cast<int>(top), static_cast<int>(largest_exponent)};
  }
};

struct QuantizeInteger {
  static constexpr auto name = "quantize_integer";
  static ScaledInteger format(int64_t wl) {
    check_range(name, "wl", wl, 2, 16);
    return {static_cast<int>(wl)};
  }
};

struct QuantizeNvfp4 {
  static constexpr auto name = "quantize_nvfp4";
  static Nvfp4 format() { return {}; }
};

// ---- the ops over a Device, which provides run(format, cover, x, y, drawing) for dense x and y --------

template <class Device>
struct Ops {
  template <class Format>
  static void cover_and_run(const char* op, const Format& format, const Tensor& x, Tensor& y, const Cover& cover,
                            const Drawing& drawing) {
    require(cover.dense, op, "x needs more than ", Layout::kMaxDims, " nested loops; give its blocks fewer dimensions");
    if (!cover.layouts.empty()) Device::run(format, cover, x, y, drawing);
  }

  template <class Format>
  static Tensor fresh(const char* op, const Format& format, const Tensor& x, const Blocks& blocks,
                      const Drawing& drawing) {
    const Cover cover = make_cover(x, blocks);
    if (!cover.dense) {
      const Tensor copy = torch::stable::contiguous(x);
      Tensor y = torch::stable::empty_like(copy);
      cover_and_run(op, format, copy, y, make_cover(copy, blocks), drawing);
      return y;
    }
    Tensor y = torch::stable::empty_like(x);
    cover_and_run(op, format, x, y, cover, drawing);
    return y;
  }

  template <class Format>
  static void in_place(const char* op, const Format& format, Tensor& x, const Blocks& blocks, const Drawing& drawing) {
    const Cover cover = make_cover(x, blocks);
    if (!cover.dense) {
      Tensor copy = torch::stable::contiguous(x);
      cover_and_run(op, format, copy, copy, make_cover(copy, blocks), drawing);
      torch::stable::copy_(x, copy);
      return;
    }
    cover_and_run(op, format, x, x, cover, drawing);
  }

};

// The three forms of an op: fresh, in place, and in place for a list of tensors with a stream each.
template <class Device, class Op, class... Numbers>
struct Elementwise {
  static Tensor fresh(Tensor x, Numbers... numbers, int64_t rounding, int64_t bits, Key key, int64_t stream) {
    return Ops<Device>::fresh(Op::name, Op::format(numbers...), x, blocks_of(Op::name, x, {}, 0, 0),
                              drawing(Op::name, x, rounding, bits, key, stream));
  }
  static void in_place(Tensor x, Numbers... numbers, int64_t rounding, int64_t bits, Key key, int64_t stream) {
    Ops<Device>::in_place(Op::name, Op::format(numbers...), x, blocks_of(Op::name, x, {}, 0, 0),
                          drawing(Op::name, x, rounding, bits, key, stream));
  }
  static void foreach(std::vector<Tensor> xs, Numbers... numbers, int64_t rounding, int64_t bits, Key key,
                      std::vector<int64_t> streams) {
    check_streams(Op::name, xs, streams);
    for (size_t i = 0; i < xs.size(); ++i) in_place(xs[i], numbers..., rounding, bits, key, streams[i]);
  }
};

template <class Device, class Op, class... Numbers>
struct Blockwise {
  static Tensor fresh(Tensor x, Numbers... numbers, Dims dims, int64_t axis, int64_t size, int64_t rounding,
                      int64_t bits, Key key, int64_t stream) {
    return Ops<Device>::fresh(Op::name, Op::format(numbers...), x, blocks_of(Op::name, x, dims, axis, size),
                              drawing(Op::name, x, rounding, bits, key, stream));
  }
  static void in_place(Tensor x, Numbers... numbers, Dims dims, int64_t axis, int64_t size, int64_t rounding,
                       int64_t bits, Key key, int64_t stream) {
    Ops<Device>::in_place(Op::name, Op::format(numbers...), x, blocks_of(Op::name, x, dims, axis, size),
                          drawing(Op::name, x, rounding, bits, key, stream));
  }
  static void foreach(std::vector<Tensor> xs, Numbers... numbers, Dims dims, int64_t axis, int64_t size,
                      int64_t rounding, int64_t bits, Key key, std::vector<int64_t> streams) {
    check_streams(Op::name, xs, streams);
    for (size_t i = 0; i < xs.size(); ++i) {
      in_place(xs[i], numbers..., dims, axis, size, rounding, bits, key, streams[i]);
    }
  }
};

template <class Device, class Op, class Format, class... Numbers>
void register_op(torch::stable::detail::StableLibrary& m, Format (*)(Numbers...)) {
  using Forms = std::conditional_t<Format::shared == Shared::Nothing, Elementwise<Device, Op, Numbers...>,
                                   Blockwise<Device, Op, Numbers...>>;
  const std::string name = Op::name;
  m.impl(name.c_str(), TORCH_BOX(&Forms::fresh));
  m.impl((name + "_").c_str(), TORCH_BOX(&Forms::in_place));
  m.impl((name + "_foreach_").c_str(), TORCH_BOX(&Forms::foreach));
}

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  register_op<Device, QuantizeFixed>(m, &QuantizeFixed::format);
  register_op<Device, QuantizeBlock>(m, &QuantizeBlock::format);
  register_op<Device, QuantizeFloat>(m, &QuantizeFloat::format);
  register_op<Device, QuantizeMicroscaling>(m, &QuantizeMicroscaling::format);
  register_op<Device, QuantizeInteger>(m, &QuantizeInteger::format);
  register_op<Device, QuantizeNvfp4>(m, &QuantizeNvfp4::format);
}

}  // namespace swalp_fx
