// The loops of a layout, cut into boxes of elements near one another, and shared out over torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>
#include <memory>

#include "../layout.h"

namespace swalp_fx {

class Boxes {
 public:
  static constexpr int64_t kGrain = 1 << 14;     // elements worth waking a thread for
  static constexpr int64_t kMost = 1 << 14;      // elements of a box: the L1 cache holds some, and the L2 cache all
  static constexpr int64_t kFew = 1 << 11;       // elements of a box that the L1 cache holds together with a copy
  static constexpr int64_t kWholeRow = 1 << 17;  // elements of a row that stays whole: the L2 cache holds them

  // Boxes of neighbours in memory. `rows`: no row is cut.
  static Boxes of_memory(const Layout& layout, bool rows, int64_t most = kMost) {
    Boxes boxes(layout);
    int64_t left = most;
    for (int d = layout.rank - 1; d >= 0 && left > 0; --d) {
      const int64_t whole = layout.dims[d].size;
      boxes.size[d] = rows && d == layout.rank - 1 ? whole : std::min(whole, left);
      left = boxes.size[d] < whole ? 0 : left / whole;
    }
    return boxes;
  }

  // Boxes of neighbours in memory and in row-major order: every element of a loaded cache line is used, and random bits are
  // made for many neighbours at once.
  static Boxes of_both(const Layout& layout) {
    constexpr int64_t kInMemory = 64, kInOrder = kMost / kInMemory;
    Boxes boxes(layout);
    int64_t inside = 1;
    for (int d = layout.rank - 1; d >= 0 && inside < kInMemory; inside *= layout.dims[d--].size) {
      boxes.size[d] = std::min(layout.dims[d].size, std::max<int64_t>(1, kInMemory / inside));
    }
    for (int d = 0; d < layout.rank; ++d) {
      const Dim& dim = layout.dims[d];
      const int64_t near = std::min(dim.size, kInOrder / dim.step.index);
      boxes.size[d] = std::max(boxes.size[d], near);
    }
    return boxes;
  }

  // Calls body(each) on every thread; each(f) then calls f(box, a Layout) for every box of that thread.
  template <class Body>
  void for_each(const Body& body) const {
    int64_t count = 1, elements = 1;
    for (int d = 0; d < layout.rank; ++d) {
      count *= boxes_along(d);
      elements *= size[d];
    }
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrain / elements), [&](int64_t begin, int64_t end) {
      body([&](const auto& f) { visit(begin, end, f); });
    });
  }

 private:
  const Layout& layout;
  int64_t size[Layout::kMaxDims];  // of a box, along each dimension

  explicit Boxes(const Layout& l) : layout(l) { std::fill(size, size + l.rank, 1); }

  int64_t boxes_along(int d) const { return (layout.dims[d].size + size[d] - 1) / size[d]; }

  template <class F>
  void visit(int64_t begin, int64_t end, const F& f) const {
    // An odometer over the boxes, set to `begin`.
    int64_t at[Layout::kMaxDims] = {};
    int64_t rest = begin;
    for (int d = layout.rank - 1; d >= 0; --d) {
      at[d] = rest % boxes_along(d);
      rest /= boxes_along(d);
    }
    Layout box = layout;
    for (int64_t i = begin; i < end; ++i) {
      box.first = layout.first;
      box.numel = 1;
      for (int d = 0; d < layout.rank; ++d) {
        const int64_t done = at[d] * size[d];
        layout.dims[d].advance(box.first, done);
        box.dims[d].size = std::min(size[d], layout.dims[d].size - done);
        box.numel *= box.dims[d].size;
      }
      f(box);
      for (int d = layout.rank - 1; d >= 0 && ++at[d] == boxes_along(d); --d) at[d] = 0;
    }
  }
};

// A thread's memory for bringing boxes together, kept from call to call: some threads have smaller stacks, and fresh memory
// would cost page faults.
struct Room {
  alignas(64) uint32_t made[Boxes::kMost];       // the draws of a box, in row-major order
  alignas(64) uint32_t in_memory[Boxes::kMost];  // and in the order of memory
  alignas(64) std::byte elements[Boxes::kMost * sizeof(double)];

  template <class S>
  S* of() {
    static_assert(sizeof(S) <= sizeof(double));
    return reinterpret_cast<S*>(elements);
  }

  static Room& of_thread() {
    thread_local const std::unique_ptr<Room> room(new Room);
    return *room;
  }
};

// Calls f(place) for the first element of each innermost run of `box`, from the outer loops inwards.
template <class F>
void for_each_run(const Layout& box, const F& f) {
  int64_t at[Layout::kMaxDims] = {};
  Place p = box.first;
  for (int d = 0; d >= 0;) {
    f(p);
    for (d = box.rank - 2; d >= 0; --d) {
      box.dims[d].advance(p, 1);
      if (++at[d] < box.dims[d].size) break;
      box.dims[d].advance(p, -at[d]);
      at[d] = 0;
    }
  }
}

}  // namespace swalp_fx
