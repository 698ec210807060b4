// The ops' arguments, checked once for every device. Each message names the op, the value and the remedy.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>
#include <utility>
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

constexpr auto kNoMemory = "x has no memory, as where its storage was freed; round it while it has some";

inline void check_input(const char* op, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  const bool served = type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::Half ||
                      type == ScalarType::BFloat16;
  require(served, op, "x must be float32, float64, float16 or bfloat16, not scalar type ", static_cast<int>(type),
          "; convert it first");
  require(x.numel() == 0 || x.const_data_ptr() != nullptr, op, kNoMemory);
}

// Calls f with a zero of the type that x, which check_input has passed, holds.
template <class F>
void with_scalar(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::Double:
      return f(double{});
    case ScalarType::Half:
      return f(torch::headeronly::Half());
    default:
      return f(torch::headeronly::BFloat16());
  }
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
    // A run longer than the axis is the axis; sizes near 2^63 would overflow what is computed from them.
    blocks.size = std::min(size, std::max<int64_t>(1, x.size(blocks.axis)));
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
  require(key->const_data_ptr() != nullptr, op, "the key has no memory; pass torch.tensor(key)");
  require(key->is_cpu() || (x.is_cuda() && key->is_cuda() && key->get_device() == x.get_device()), op,
          "the key must be on the CPU or on x's own device; move it there");
  if (key->is_cpu()) random.key = *static_cast<const uint64_t*>(key->const_data_ptr());
  return {Rounding::Stochastic, random, key};
}

inline void check_list(const char* op, const std::vector<Tensor>& xs, const std::vector<int64_t>& streams) {
  require(xs.size() == streams.size(), op, xs.size(), " tensors but ", streams.size(), " streams; give each tensor one");
  for (const Tensor& x : xs) {
    require(x.is_cuda() == xs[0].is_cuda(), op, "the tensors of a list must be on one kind of device; make a list for each");
  }
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
  static BlockFloat format(int64_t wl, bool symmetric, int64_t smallest_exponent, int64_t largest_exponent) {
    check_range(name, "wl", wl, 2, 24);
    check_range(name, "smallest_exponent", smallest_exponent, -128, 0);
    check_range(name, "largest_exponent", largest_exponent, 0, 127);
    return {static_cast<int>(wl), symmetric, static_cast<int>(smallest_exponent), static_cast<int>(largest_exponent)};
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
    check_range(name, "exp", exp, 2, 5);
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

// ---- the ops over a Device: run(format, cover, x, y, drawing) for dense x and y, in_place(calls) for a list, and
// ---- register_more<Forms>(library, name) for the forms that it alone has ---------------------------------------------

// A device whose kernels walk layouts with gaps says so by a member of this name; for another, such a tensor is copied.
template <class Device>
constexpr Gaps most_gaps() {
  if constexpr (requires { Device::most_gaps; }) return Device::most_gaps;
  return Gaps::None;
}

// One tensor's call, checked: nothing has been changed yet.
template <class Device, class Op, class Format>
struct Call {
  static constexpr auto op = Op::name;
  Tensor x;
  Format format;
  Drawing drawing;
  Blocks blocks;
  Cover cover;
  bool dense;
  Tensor copied;  // of x, where no layout covers x itself: then the cover is of the copy

  Call(Tensor input, const Format& f, const Dims& dims, int64_t axis, int64_t size, int64_t rounding, int64_t bits,
       const Key& key, int64_t stream)
      : x(std::move(input)),
        format(f),
        drawing(checked_drawing(x, rounding, bits, key, stream)),
        blocks(blocks_of(Op::name, x, dims, axis, size)),
        cover(make_cover(x, blocks, most_gaps<Device>())),
        dense(cover.dense) {
    if (dense || !cover.layouts.empty()) return;
    cover = make_cover(copied = torch::stable::contiguous(x), blocks);
    require(cover.dense, Op::name, "x needs more than ", Layout::kMaxDims, " nested loops; give its blocks fewer dimensions");
  }

  int64_t numel() const { return cover.numel(); }

  Tensor fresh() const {
    if (dense) {
      Tensor y = torch::stable::empty_like(x);
      run(cover, x, y);
      return y;
    }
    // Rounded in the copy's own memory, which is fresh, and nobody else's.
    Tensor y = is_copied() ? copied : torch::stable::contiguous(x);
    run(make_cover(y, blocks), y, y);
    return y;
  }

  void check_writable() const {
    require(!is_copied() || !shares_places(x), Op::name,
            "elements of x share memory, so that they cannot be rounded in place; clone it first");
  }

  void in_place() {
    Tensor& on = is_copied() ? copied : x;
    run(cover, on, on);
    if (is_copied()) torch::stable::copy_(x, copied);
  }

  // Of a dense tensor, the part that `part` covers.
  void in_place(const Cover& part) { Device::run(format, part, x, x, drawing); }

 private:
  bool is_copied() const { return copied.defined(); }

  void run(const Cover& of_both, const Tensor& from, Tensor& to) const {
    if (!of_both.layouts.empty()) Device::run(format, of_both, from, to, drawing);
  }

  static Drawing checked_drawing(const Tensor& x, int64_t rounding, int64_t bits, const Key& key, int64_t stream) {
    check_input(Op::name, x);
    return swalp_fx::drawing(Op::name, x, rounding, bits, key, stream);
  }
};

// The forms of an op that every device has: fresh, in place, and in place for a list of tensors with a stream each.
// Numbers are the op's own: what Op::format takes and, where elements share a scale, dims, axis and size.
template <class Device, class Op, class Format, class... Numbers>
struct Forms {
  using OneCall = Call<Device, Op, Format>;

  static Tensor fresh(Tensor x, Numbers... numbers, int64_t rounding, int64_t bits, Key key, int64_t stream) {
    return call(std::move(x), {numbers...}, rounding, bits, key, stream).fresh();
  }
  static void in_place(Tensor x, Numbers... numbers, int64_t rounding, int64_t bits, Key key, int64_t stream) {
    OneCall one = call(std::move(x), {numbers...}, rounding, bits, key, stream);
    one.check_writable();
    one.in_place();
  }
  static void foreach(std::vector<Tensor> xs, Numbers... numbers, int64_t rounding, int64_t bits, Key key,
                      std::vector<int64_t> streams) {
    check_list(Op::name, xs, streams);
    std::vector<OneCall> of_each = calls(xs, {numbers...}, rounding, bits, key, streams);
    for (const OneCall& each : of_each) each.check_writable();
    if (!share_memory(xs)) return Device::in_place(of_each);
    // One after another, each as the ones before have left it.
    for (size_t i = 0; i < xs.size(); ++i) call(xs[i], {numbers...}, rounding, bits, key, streams[i]).in_place();
  }

  static std::vector<OneCall> calls(const std::vector<Tensor>& xs, const std::tuple<Numbers...>& numbers, int64_t rounding,
                                    int64_t bits, const Key& key, const std::vector<int64_t>& streams) {
    std::vector<OneCall> of_each;
    for (size_t i = 0; i < xs.size(); ++i) of_each.push_back(call(xs[i], numbers, rounding, bits, key, streams[i]));
    return of_each;
  }

  static OneCall call(Tensor x, const std::tuple<Numbers...>& numbers, int64_t rounding, int64_t bits, const Key& key,
                      int64_t stream) {
    constexpr size_t n = sizeof...(Numbers) - (Format::shared == Shared::Nothing ? 0 : 3);
    const Format format = format_of(numbers, std::make_index_sequence<n>());
    if constexpr (Format::shared == Shared::Nothing) {
      return {std::move(x), format, {}, 0, 0, rounding, bits, key, stream};
    } else {
      const auto& [dims, axis, size] = std::tie(std::get<n>(numbers), std::get<n + 1>(numbers), std::get<n + 2>(numbers));
      return {std::move(x), format, dims, axis, size, rounding, bits, key, stream};
    }
  }

 private:
  template <size_t... I>
  static Format format_of(const std::tuple<Numbers...>& numbers, std::index_sequence<I...>) {
    return Op::format(std::get<I>(numbers)...);
  }
};

template <class Device, class Op, class Format, class... Numbers>
void register_op(torch::stable::detail::StableLibrary& m, Format (*)(Numbers...)) {
  using OfOp = std::conditional_t<Format::shared == Shared::Nothing, Forms<Device, Op, Format, Numbers...>,
                                  Forms<Device, Op, Format, Numbers..., Dims, int64_t, int64_t>>;
  const std::string name = Op::name;
  m.impl(name.c_str(), TORCH_BOX(&OfOp::fresh));
  m.impl((name + "_").c_str(), TORCH_BOX(&OfOp::in_place));
  m.impl((name + "_foreach_").c_str(), TORCH_BOX(&OfOp::foreach));
  Device::template register_more<OfOp>(m, name);
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
