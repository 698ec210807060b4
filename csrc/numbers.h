// A format as numbers, as the op takes it, and its functor in formats.h.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "formats.h"

namespace swalp_fx {

struct Numbers {
  Grid grid;
  std::vector<float> table;  // a codebook, instead of a grid
  ScaleKind scale = ScaleKind::None;
  // A power of two has the smallest and the largest exponent, and the significand of the maximum from which on the scale is
  // twice as much. A static scale has its value. A two-level scale has the mantissa bits, the least exponent and the largest
  // number of the blocks' floats.
  std::array<double, 3> of_scale{};
  // The largest number of the compute type that the tensor's dtype does not store as infinity. float64 holds every product of
  // an element and a scale.
  float most = std::numeric_limits<float>::infinity();

  ElementKind element() const {
    if (!table.empty()) return ElementKind::Table;
    if (grid.least >= exponent_of_largest()) return ElementKind::Integers;
    return exponent_of_largest() > 126 ? ElementKind::WideFloats : ElementKind::Floats;
  }
  TailKind tail() const {
    if (!grid.subnormals) return TailKind::Any;
    return grid.beyond == Beyond::Saturate              ? TailKind::Saturates
           : grid.beyond == Beyond::SaturateButInfinity ? TailKind::KeepsInfinity
                                                        : TailKind::Any;
  }
  bool is_exact() const { return scale == ScaleKind::None || scale == ScaleKind::PowerOfTwo; }

  // Whether the product has no functor of its own.
  bool is_rare() const {
    switch (element()) {
      case ElementKind::Table:
        return true;
      case ElementKind::WideFloats:
        return scale != ScaleKind::None || tail() == TailKind::Any;
      case ElementKind::Integers:
        return scale >= ScaleKind::Static;
      default:
        if (scale == ScaleKind::TwoLevel) return tail() != TailKind::Saturates;
        return scale >= ScaleKind::Static || (scale != ScaleKind::None && tail() == TailKind::Any);
    }
  }
  Shared shared() const {
    if (is_rare() || scale == ScaleKind::TwoLevel) return Shared::BlockAndTensor;
    return scale == ScaleKind::None ? Shared::Nothing : Shared::Block;
  }

  float largest() const { return table.empty() ? grid.highest : std::max(-table.front(), table.back()); }
  int exponent_of_largest() const { return std::ilogb(std::max(largest(), -grid.lowest)); }

  // A rounded magnitude has at most 2^magnitude_bits steps.
  int magnitude_bits() const {
    if (element() != ElementKind::Integers) return grid.man + 1;
    if (scale == ScaleKind::Affine) return grid.man + 1;
    const double steps = std::ldexp(std::max(-grid.lowest, grid.highest), grid.man - grid.least);
    return static_cast<int>(std::ceil(std::log2(steps)));
  }

  Product product() const { return {grid, magnitude_bits(), most}; }

  // The largest exponent of a power of two under which every number is held.
  int largest_held() const {
    if (std::isinf(most)) return 1 << 20;
    const double most_of_grid = std::max(largest(), -grid.lowest);
    const int e = std::ilogb(most) - std::ilogb(most_of_grid);
    return std::ldexp(most_of_grid, e) <= most ? e : e - 1;
  }

  SharedExponent exponent() const {
    SharedExponent e;
    if (scale != ScaleKind::PowerOfTwo) return e;
    e.less = std::ilogb(largest());
    e.smallest = static_cast<int>(of_scale[0]);
    e.largest = static_cast<int>(of_scale[1]);
    e.carry = static_cast<uint64_t>(std::ldexp(2.0 - of_scale[2], Ieee<double>::mantissa));
    return e;
  }

  Grid inner() const {
    if (scale != ScaleKind::TwoLevel) return {};
    return {static_cast<int>(of_scale[0]), static_cast<int>(of_scale[1]), -static_cast<float>(of_scale[2]),
            static_cast<float>(of_scale[2])};
  }

  Rare rare() const {
    Rare r{product(), element(), scale, exponent(), scale == ScaleKind::Static ? static_cast<float>(of_scale[0]) : 1.0f,
           inner(), {}};
    r.table.size = static_cast<int>(table.size());
    for (r.table.half = 1; r.table.half * 2 < r.table.size;) r.table.half *= 2;
    for (int i = 0; i < r.table.size; ++i) {
      r.table.at[i] = table[i];
      if (table[i] == 0.0f) r.table.zero = i;
    }
    r.table.reach = table.empty() ? 0.0f : largest();
    return r;
  }
};

// Calls f with the functor for `n`.
template <class F>
void with_format(const Numbers& n, F&& f) {
  if (n.is_rare()) return f(n.rare());
  const bool integers = n.element() == ElementKind::Integers;
  const Product product = n.product();
  const int smallest = std::min(n.grid.least - n.grid.man, 0);
  const int largest = std::max(n.exponent_of_largest(), n.grid.least) - n.grid.man;
  switch (n.scale) {
    case ScaleKind::PowerOfTwo:
      if (integers) return f(OnPowerOfTwo<Integers>{product, n.exponent(), smallest, largest, n.largest_held()});
      if (n.tail() == TailKind::Saturates) {
        return f(OnPowerOfTwo<Floats<Saturates>>{product, n.exponent(), smallest, largest, n.largest_held()});
      }
      return f(OnPowerOfTwo<Floats<KeepsInfinity>>{product, n.exponent(), smallest, largest, n.largest_held()});
    case ScaleKind::Absmax:
      return integers ? f(OnAbsmax<Integers>{product}) : f(OnAbsmax<Floats<KeepsInfinity>>{product});
    case ScaleKind::TwoLevel:
      return f(FloatsOnTwoLevels{product, n.inner()});
    default: {
      const Product of_held{held<float>(n.grid, UnitScale(), n.most), n.magnitude_bits(), n.most};
      if (integers) return f(IntegersUnscaled{of_held});
      return f(FloatsUnscaled{of_held, n.element() == ElementKind::WideFloats, n.tail()});
    }
  }
}

}  // namespace swalp_fx
