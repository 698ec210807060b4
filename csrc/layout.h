// Where the elements of a dense tensor lie, which random word each draws, which block each is in.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "portable.h"

namespace swalp_fx {

// A loop over one dimension: what a step along it adds to each of three counters.
struct Dim {
  int64_t size;
  int64_t memory;  // elements in memory
  int64_t index;   // row-major index, which selects the random word
  int64_t block;   // block number; 0 along dimensions that a block spans
};

// Loops in memory order, outermost first, as few as possible. Empty for a tensor of one element.
struct Layout {
  static constexpr int kMaxDims = 16;
  Dim dims[kMaxDims];
  int rank = 0;
  int64_t numel = 1;
  int64_t blocks = 1;

  // Whether the elements of each block lie in one innermost run of memory, and nowhere else.
  bool blocks_are_rows() const {
    if (rank < 2 || dims[rank - 1].block != 0) return false;
    return std::all_of(dims, dims + rank - 1, [](const Dim& d) { return d.block != 0; });
  }
};

// The layout of `x` with blocks kept apart along `kept` (indices of dimensions, in range).
// Returns false where x is not dense in memory or needs too many loops: copy it first.
inline bool make_layout(const torch::stable::Tensor& x, const std::vector<bool>& kept, Layout& layout) {
  const int64_t rank = x.dim();
  std::vector<Dim> loops;
  int64_t index = 1, blocks = 1;
  for (int64_t d = rank - 1; d >= 0; --d) {
    const int64_t size = x.size(d);
    if (size != 1) loops.push_back({size, x.stride(d), index, kept[d] ? blocks : 0});
    index *= size;
    if (kept[d]) blocks *= size;
  }
  std::stable_sort(loops.begin(), loops.end(), [](const Dim& a, const Dim& b) { return a.memory < b.memory; });

  std::vector<Dim> merged;  // innermost first
  int64_t dense = 1;
  for (const Dim& d : loops) {
    if (d.memory != dense) return false;
    dense *= d.size;
    if (!merged.empty()) {
      Dim& inner = merged.back();
      if (d.memory == inner.memory * inner.size && d.index == inner.index * inner.size &&
          d.block == inner.block * inner.size) {
        inner.size *= d.size;
        continue;
      }
    }
    merged.push_back(d);
  }
  if (merged.size() > Layout::kMaxDims) return false;
  layout.rank = static_cast<int>(merged.size());
  std::copy(merged.rbegin(), merged.rend(), layout.dims);
  layout.numel = index;
  layout.blocks = blocks;
  return true;
}

}  // namespace swalp_fx
