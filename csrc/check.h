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

#include "layout.h"
#include "numbers.h"

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

// Calls f with a zero of x's type; check_input has passed x.
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

// See Numbers: a number above the dtype's largest by less than half of a last place is stored as that.
inline float most_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return std::numeric_limits<float>::infinity();
    case ScalarType::Half:
      return 0x1.FFDFFEp+15f;  // below 65,520
    case ScalarType::BFloat16:
      return 0x1.FEFFFEp+127f;
    default:
      return std::numeric_limits<float>::max();
  }
}

inline int64_t dimension(const char* op, const char* name, const Tensor& x, int64_t d) {
  const int64_t rank = x.dim();
  require(d >= -rank && d < rank, op, name, " ", d, " does not exist in a tensor of ", rank, " dimensions; use ", -rank,
          " to ", rank - 1);
  return d < 0 ? d + rank : d;
}

// dims: the dimensions that keep blocks apart; none for one block. With sizes, each of dims is cut into runs of its size,
// and all other dimensions keep blocks apart.
// A tensor of one dimension or none has no slices, so `dims` alone does not split it.
inline Blocks blocks_of(const char* op, const Tensor& x, const std::vector<int64_t>& dims, const std::vector<int64_t>& sizes) {
  require(sizes.empty() || sizes.size() == dims.size(), op, dims.size(), " dims but ", sizes.size(), " sizes; give each one");
  Blocks blocks(x.dim(), sizes.empty() ? Blocks::kSpanned : 1);
  if (x.dim() < (sizes.empty() ? 2 : 1) && sizes.size() < 2) return blocks;
  require(sizes.size() < 2 || x.dim() >= static_cast<int64_t>(sizes.size()), op, "the block has ", sizes.size(),
          " axes, and x ", x.dim(), "; use a tensor with more, or blocks of fewer");
  for (size_t i = 0; i < dims.size(); ++i) {
    const int64_t d = dimension(op, sizes.empty() ? "block dimension" : "block axis", x, dims[i]);
    const int64_t size = sizes.empty() ? 1 : sizes[i];
    require(size >= 1, op, "block size = ", size, " is out of range; use 1 or more");
    // A run is at most as long as the axis: sizes near 2^63 would overflow later sums.
    blocks.size[d] = std::min(size, std::max<int64_t>(1, x.size(d)));
  }
  return blocks;
}

// A rounding and its source of random bits. `key` stays a tensor: only a device knows where it may read it.
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

// ---- the op's numbers, checked ---------------------------------------------------------------------

constexpr auto kOp = "quantize";
using Key = std::optional<Tensor>;
using Dims = std::vector<int64_t>;

inline void check_of_scale(const Numbers& n, const std::vector<double>& given) {
  constexpr size_t due[kScaleKinds] = {0, 3, 0, 1, 3, 0};
  const size_t count = due[static_cast<int>(n.scale)];
  require(given.size() == count, kOp, "of_scale has ", given.size(), " numbers; give it ", count);
  if (n.scale == ScaleKind::PowerOfTwo) {
    check_range(kOp, "smallest exponent", static_cast<int64_t>(given[0]), -128, 0);
    check_range(kOp, "largest exponent", static_cast<int64_t>(given[1]), 0, 127);
    require(given[2] > 1.0 && given[2] <= 2.0, kOp, "significand = ", given[2], " is out of range; use more than 1, to 2");
  } else if (n.scale == ScaleKind::Static) {
    require(given[0] > 0.0 && static_cast<float>(given[0]) < std::numeric_limits<float>::infinity(), kOp,
            "static scale = ", given[0], " is out of range; use a positive float32");
  } else if (n.scale == ScaleKind::TwoLevel) {
    check_range(kOp, "man of scales", static_cast<int64_t>(given[0]), 0, 22);
    check_range(kOp, "least of scales", static_cast<int64_t>(given[1]), -80, 126);
  }
}

inline Numbers numbers(int64_t man, int64_t least, double lowest, double highest, bool subnormals, int64_t beyond,
                       const std::vector<double>& table, int64_t scale, const std::vector<double>& of_scale) {
  check_range(kOp, "man", man, 0, 23);
  check_range(kOp, "least", least, -126, 126);
  check_range(kOp, "beyond", beyond, 0, kBeyonds - 1);
  check_range(kOp, "scale", scale, 0, kScaleKinds - 1);
  check_range(kOp, "numbers of the table", static_cast<int64_t>(table.size()), 0, Table::kMost);
  require(table.size() != 1 && std::is_sorted(table.begin(), table.end()), kOp, "the table does not ascend; sort it");
  require(!table.empty() || highest > 0, kOp, "highest = ", highest, " is out of range; use a positive number");
  Numbers n;
  n.grid = {static_cast<int>(man),
            static_cast<int>(least),
            lowest == 0 ? -0.0f : static_cast<float>(lowest),  // a negative x becomes -0: it keeps its sign
            static_cast<float>(highest),
            subnormals,
            static_cast<Beyond>(beyond)};
  n.table.assign(table.begin(), table.end());
  n.scale = static_cast<ScaleKind>(scale);
  check_of_scale(n, of_scale);
  std::copy(of_scale.begin(), of_scale.end(), n.of_scale.begin());
  return n;
}

// ---- the op over a Device ---------------------------------------------------------------------------------------------
//
// A Device has run(format, cover, x, y, drawing) for dense x and y, in_place(calls) for a list, and
// register_more<Forms>(library) for forms of its own.

// A device with the member most_gaps has kernels for layouts with gaps. For other devices such a tensor is copied.
template <class Device>
constexpr Gaps most_gaps() {
  if constexpr (requires { Device::most_gaps; }) return Device::most_gaps;
  return Gaps::None;
}

// One tensor's call, checked: nothing has been changed yet.
template <class Device>
struct Call {
  Tensor x;
  Numbers format;
  Drawing drawing;
  Blocks blocks;
  Cover cover;
  bool dense;
  Tensor copied;  // a copy of x, if no layout covers x itself; the cover is then the copy's

  Call(Tensor input, const Numbers& f, const Dims& dims, const Dims& sizes, int64_t rounding, int64_t bits, const Key& key,
       int64_t stream)
      : x(std::move(input)),
        format(f),
        drawing(checked_drawing(x, rounding, bits, key, stream)),
        // A format that shares nothing has no blocks, whatever dims say.
        blocks(f.shared() == Shared::Nothing ? Blocks(x.dim(), Blocks::kSpanned) : blocks_of(kOp, x, dims, sizes)),
        cover(make_cover(x, blocks, most_gaps<Device>())),
        dense(cover.dense) {
    format.most = most_of(x.scalar_type());
    if (dense || !cover.layouts.empty()) return;
    cover = make_cover(copied = torch::stable::contiguous(x), blocks);
    require(cover.dense, kOp, "x needs more than ", Layout::kMaxDims, " nested loops; give its blocks fewer dimensions");
  }

  int64_t numel() const { return cover.numel(); }

  Tensor fresh() const {
    if (dense) {
      Tensor y = torch::stable::empty_like(x);
      run(cover, x, y);
      return y;
    }
    // Rounded in the memory of the copy, since nobody else has it.
    Tensor y = is_copied() ? copied : torch::stable::contiguous(x);
    run(make_cover(y, blocks), y, y);
    return y;
  }

  void check_writable() const {
    require(!is_copied() || !shares_places(x), kOp,
            "elements of x share memory, so that they cannot be rounded in place; clone it first");
  }

  void in_place() {
    Tensor& on = is_copied() ? copied : x;
    run(cover, on, on);
    if (is_copied()) torch::stable::copy_(x, copied);
  }

  // Rounds only the part of a dense tensor that `part` covers.
  void in_place(const Cover& part) { Device::run(format, part, x, x, drawing); }

 private:
  bool is_copied() const { return copied.defined(); }

  void run(const Cover& of_both, const Tensor& from, Tensor& to) const {
    if (!of_both.layouts.empty()) Device::run(format, of_both, from, to, drawing);
  }

  static Drawing checked_drawing(const Tensor& x, int64_t rounding, int64_t bits, const Key& key, int64_t stream) {
    check_input(kOp, x);
    return swalp_fx::drawing(kOp, x, rounding, bits, key, stream);
  }
};

// The forms of the op that every device has: fresh, in place, in place for a list of tensors with a stream each, and a plan.
// N are the numbers of the format, as `numbers` takes them.
template <class Device, class... N>
struct Forms {
  using OneCall = Call<Device>;

  static Tensor fresh(Tensor x, N... format, Dims dims, Dims sizes, int64_t rounding, int64_t bits, Key key, int64_t stream) {
    return OneCall(std::move(x), numbers(format...), dims, sizes, rounding, bits, key, stream).fresh();
  }
  static void in_place(Tensor x, N... format, Dims dims, Dims sizes, int64_t rounding, int64_t bits, Key key,
                       int64_t stream) {
    OneCall one(std::move(x), numbers(format...), dims, sizes, rounding, bits, key, stream);
    one.check_writable();
    one.in_place();
  }
  static void foreach(std::vector<Tensor> xs, N... format, Dims dims, Dims sizes, int64_t rounding, int64_t bits, Key key,
                      std::vector<int64_t> streams) {
    check_list(kOp, xs, streams);
    const Numbers n = numbers(format...);
    std::vector<OneCall> of_each = calls(xs, n, dims, sizes, rounding, bits, key, streams);
    for (const OneCall& each : of_each) each.check_writable();
    if (!share_memory(xs)) return Device::in_place(of_each);
    // One after another: a tensor may hold results of those before it.
    for (size_t i = 0; i < xs.size(); ++i) OneCall(xs[i], n, dims, sizes, rounding, bits, key, streams[i]).in_place();
  }

  // The address of a plan of this call, for the caller to delete; 0 if x is not dense.
  static int64_t plan(Tensor x, N... format, Dims dims, Dims sizes, int64_t rounding, int64_t bits, Key key, int64_t stream) {
    const OneCall call(std::move(x), numbers(format...), dims, sizes, rounding, bits, key, stream);
    return call.dense ? reinterpret_cast<int64_t>(new typename Device::PlanOf(call)) : 0;
  }

  static std::vector<OneCall> calls(const std::vector<Tensor>& xs, const Numbers& n, const Dims& dims, const Dims& sizes,
                                    int64_t rounding, int64_t bits, const Key& key, const std::vector<int64_t>& streams) {
    std::vector<OneCall> of_each;
    for (size_t i = 0; i < xs.size(); ++i) of_each.emplace_back(xs[i], n, dims, sizes, rounding, bits, key, streams[i]);
    return of_each;
  }
};

template <class Device>
void register_ops(torch::stable::detail::StableLibrary& m) {
  using OfDevice = Forms<Device, int64_t, int64_t, double, double, bool, int64_t, std::vector<double>, int64_t,
                         std::vector<double>>;
  m.impl("quantize", TORCH_BOX(&OfDevice::fresh));
  m.impl("quantize_", TORCH_BOX(&OfDevice::in_place));
  m.impl("quantize_foreach_", TORCH_BOX(&OfDevice::foreach));
  m.impl("quantize_plan", TORCH_BOX(&OfDevice::plan));
  Device::template register_more<OfDevice>(m);
}

}  // namespace swalp_fx
