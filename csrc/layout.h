// The place of each element of a tensor in memory, its random bits, and its block.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "portable.h"

namespace swalp_fx {

// Three counters: the place in memory (in elements), the row-major index (which selects the random
// bits) and the number of the block.
struct Place {
  int64_t memory = 0, index = 0, block = 0;
};

// A loop over one dimension, and the increment of each counter by a step along it.
struct Dim {
  int64_t size;
  Place step;  // step.block is 0 along dimensions that a block spans

  SWALP_HD void advance(Place& p, int64_t n) const {
    p.memory += n * step.memory;
    p.index += n * step.index;
    p.block += n * step.block;
  }
};

// Nested loops from a first place on, outermost first, as few as possible; none for one element.
struct Layout {
  static constexpr int kMaxDims = 12;
  Place first;
  Dim dims[kMaxDims];
  int rank = 0;
  int64_t numel = 1;

  Dim inner() const { return rank > 0 ? dims[rank - 1] : Dim{1, {1, 1, 0}}; }

  // Adds a loop inside the others, as part of the last one where the two are one. False: there are too many.
  bool add(const Dim& d) {
    numel *= d.size;
    if (d.size == 1) return true;
    if (rank > 0) {
      Dim& outer = dims[rank - 1];
      if (outer.step.memory == d.step.memory * d.size && outer.step.index == d.step.index * d.size &&
          outer.step.block == d.step.block * d.size) {
        outer = {outer.size * d.size, d.step};
        return true;
      }
    }
    if (rank == kMaxDims) return false;
    dims[rank++] = d;
    return true;
  }

  // Whether each block is one innermost run, and nothing else.
  bool blocks_are_rows() const {
    return rank > 1 && inner().step.block == 0 &&
           std::all_of(dims, dims + rank - 1, [](const Dim& d) { return d.step.block != 0; });
  }
};

// How a tensor is cut into blocks: along each dimension, one block for each run of `size` elements, or one block for all.
// The last run may be short.
struct Blocks {
  static constexpr int64_t kSpanned = 0;
  std::vector<int64_t> size;  // 1 keeps the elements along a dimension apart

  Blocks(int64_t rank, int64_t of_each) : size(static_cast<size_t>(rank), of_each) {}
  bool are_runs(int64_t d) const { return size[d] > 1; }
};

// The layouts that cover x: one, or twice as many for each axis with a short last run. None if x is empty, or must be copied
// first: it overlaps itself, or takes too many loops.
struct Cover {
  std::vector<Layout> layouts;
  int64_t blocks = 1;
  bool dense = true;  // false: x has gaps, or is to be copied

  int64_t numel() const {
    return std::accumulate(layouts.begin(), layouts.end(), int64_t{0}, [](int64_t n, const Layout& l) { return n + l.numel; });
  }
};

inline bool add_layout(std::vector<Dim> loops, const Place& first, std::vector<Layout>& layouts) {
  Layout layout;
  layout.first = first;
  std::stable_sort(loops.begin(), loops.end(), [](const Dim& a, const Dim& b) { return a.step.memory > b.step.memory; });
  for (const Dim& d : loops) {
    if (!layout.add(d)) return false;
  }
  if (layout.numel > 0) layouts.push_back(layout);
  return true;
}

// The same elements, numbered by their order in memory. It takes fewer loops if row-major order differs.
inline Layout in_memory_order(const Layout& l) {
  Layout numbered;
  numbered.first = {l.first.memory, 0, l.first.block};
  int64_t inside = l.numel;
  for (int d = 0; d < l.rank; ++d) {
    inside /= l.dims[d].size;
    numbered.add({l.dims[d].size, {l.dims[d].step.memory, inside, l.dims[d].step.block}});
  }
  return numbered;
}

enum class Gaps { None, Some, Overlaps };

// The gaps between the elements of x: none, some memory, or possibly other elements of x.
inline Gaps gaps_in(const torch::stable::Tensor& x) {
  std::vector<std::pair<int64_t, int64_t>> steps;
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) != 1) steps.emplace_back(x.stride(d), x.size(d));
  }
  std::sort(steps.begin(), steps.end());
  Gaps found = Gaps::None;
  int64_t reach = 1;  // one step beyond the last element of the loops so far
  for (const auto& [stride, size] : steps) {
    if (stride < reach) return Gaps::Overlaps;
    if (stride > reach) found = Gaps::Some;
    reach += stride * (size - 1);
  }
  return found;
}

inline bool is_dense(const torch::stable::Tensor& x) { return gaps_in(x) == Gaps::None; }

// Whether two elements of x lie in one place, so that neither can be written alone.
inline bool shares_places(const torch::stable::Tensor& x) {
  if (x.numel() == 0 || gaps_in(x) != Gaps::Overlaps) return false;
  std::vector<int64_t> places{0};
  for (int64_t d = 0; d < x.dim(); ++d) {
    if (x.size(d) > 1 && x.stride(d) == 0) return true;
    const size_t before = places.size();
    for (int64_t i = 1; i < x.size(d); ++i) {
      for (size_t j = 0; j < before; ++j) places.push_back(places[j] + i * x.stride(d));
    }
  }
  std::sort(places.begin(), places.end());
  return std::adjacent_find(places.begin(), places.end()) != places.end();
}

// The addresses of x's first byte and of the byte after its last.
inline std::pair<uintptr_t, uintptr_t> memory_of(const torch::stable::Tensor& x) {
  const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
  int64_t last = 0;
  for (int64_t d = 0; d < x.dim(); ++d) last += (x.size(d) - 1) * x.stride(d);
  return {begin, begin + (last + 1) * x.element_size()};
}

// Whether the memory of any two overlaps; interleaved elements count too.
inline bool share_memory(const std::vector<torch::stable::Tensor>& xs) {
  std::vector<std::pair<uintptr_t, uintptr_t>> memory;
  for (const torch::stable::Tensor& x : xs) {
    if (x.numel() > 0) memory.push_back(memory_of(x));
  }
  std::sort(memory.begin(), memory.end());
  return std::adjacent_find(memory.begin(), memory.end(), [](const auto& a, const auto& b) { return b.first < a.second; }) !=
         memory.end();
}

// Adds the layouts of `loops`. The first `left` loops are dimensions to be cut into runs, the last one first. False: there
// are too many loops.
inline bool add_layouts(std::vector<Dim> loops, size_t left, const Place& first, const Blocks& blocks,
                        std::vector<Layout>& layouts) {
  for (; left > 0 && !blocks.are_runs(static_cast<int64_t>(blocks.size.size() - left)); --left) {
  }
  if (left == 0) return add_layout(std::move(loops), first, layouts);
  const size_t at = left - 1;
  const int64_t size = blocks.size[blocks.size.size() - left];
  const Dim axis = loops[at];
  const int64_t full = axis.size / size, rest = axis.size % size;
  const Place within{axis.step.memory, axis.step.index, 0};
  const Place across{within.memory * size, within.index * size, axis.step.block};
  if (full > 0) {
    loops[at] = {size, within};
    loops.push_back({full, across});
    if (!add_layouts(loops, left - 1, first, blocks, layouts)) return false;
    loops.pop_back();
  }
  if (rest > 0) {
    Place beyond = first;
    Dim{full, across}.advance(beyond, full);
    loops[at] = {rest, within};
    return add_layouts(std::move(loops), left - 1, beyond, blocks, layouts);
  }
  return true;
}

// `most`: the gaps that the caller's kernels can step over.
inline Cover make_cover(const torch::stable::Tensor& x, const Blocks& blocks, Gaps most = Gaps::None) {
  Cover cover;
  if (x.numel() == 0) return cover;
  const Gaps gaps = gaps_in(x);
  cover.dense = gaps == Gaps::None;
  if (gaps > most) return cover;

  std::vector<Dim> loops;
  int64_t index = 1;
  for (int64_t d = x.dim() - 1; d >= 0; --d) {
    const bool spanned = blocks.size[d] == Blocks::kSpanned;
    loops.push_back({x.size(d), {x.stride(d), index, spanned ? 0 : cover.blocks}});
    index *= x.size(d);
    if (!spanned) cover.blocks *= (x.size(d) + blocks.size[d] - 1) / blocks.size[d];
  }
  const size_t dims = loops.size();
  if (!add_layouts(std::move(loops), dims, {}, blocks, cover.layouts)) {
    cover.dense = false;
    cover.layouts.clear();
  }
  return cover;
}

}  // namespace swalp_fx
