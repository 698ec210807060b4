// Formats as an element on a scale: quantize(x) = scale * element(x / scale).
//
// A functor here is a product of both. It declares `shared`, and magnitude_bits: every rounded magnitude is at most
// 2^magnitude_bits steps. with_quantizer calls f with a Quantizer. Products on a scale also name their usual blocks. The
// quantizers of usual blocks have one type, and are found without a branch: so tiles can be rounded in batches.
#pragma once

#include "elements.h"
#include "scales.h"

namespace swalp_fx {

template <class T, class Element, class Scale>
struct Quantizer {
  Element element;
  Scale scale;

  template <class Round>
  SWALP_HD T apply(T x, uint32_t draw, const Round& round) const {
    const T q = scale.multiply(element.round(scale.divide(x), x, draw, round));
    if constexpr (Round::loses_nan && !Element::keeps_nan) return x == x ? q : x;
    return q;
  }
};

// ---- kinds of elements ------------------------------------------------------------------------------

struct Integers {
  template <class T>
  using Element = IntegerElement<T>;
};

template <template <class> class Tail>
struct Floats {
  template <class T>
  using Element = FloatElement<T, Tail>;
};

enum class TailKind : int { Saturates, KeepsInfinity, Any };
enum class Shared { Nothing, Block, BlockAndTensor };

// The fields of every product.
struct Product {
  static constexpr bool rare = false;  // compiled once, and served one element at a time
  Grid grid;
  int bits;    // of a rounded magnitude, in steps
  float most;  // the largest number that the tensor's dtype holds, see Numbers
  int magnitude_bits() const { return bits; }
};

// ---- products -----------------------------------------------------------------------------------------

struct IntegersUnscaled : Product {
  static constexpr auto shared = Shared::Nothing;

  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits, T, F&& f) const {
    f(Quantizer<T, IntegerElement<T>, UnitScale>{IntegerElement<T>(grid), {}});
  }
};

struct FloatsUnscaled : Product {
  static constexpr auto shared = Shared::Nothing;
  bool wide;
  TailKind tail;

  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits, T, F&& f) const {
    using Wide = WideFloatElement<T, KeepsInfinity>;
    if (wide) return f(Quantizer<T, Wide, UnitScale>{Wide(grid), {}});
    if (tail == TailKind::Saturates) return of_tail<T, Saturates>(f);
    if (tail == TailKind::KeepsInfinity) return of_tail<T, KeepsInfinity>(f);
    of_tail<T, AnyTail>(f);
  }

 private:
  template <class T, template <class> class Tail, class F>
  SWALP_HD void of_tail(F&& f) const {
    f(Quantizer<T, FloatElement<T, Tail>, UnitScale>{FloatElement<T, Tail>(grid), {}});
  }
};

template <class Kind>
struct OnPowerOfTwo : Product {
  static constexpr auto shared = Shared::Block;
  SharedExponent exponent;
  int smallest_step, largest_step;  // exponents of the element's; the smallest is 0 at most
  int largest_held;                 // of the exponents under which the tensor's dtype holds every number

  template <class T>
  using Element = typename Kind::template Element<T>;

  template <class T>
  SWALP_HD bool takes_scale_in(int e) const {
    return takes_in<T>(smallest_step + e, largest_step + e) & (e <= largest_held);
  }
  template <class T>
  SWALP_HD bool is_usual(typename Ieee<T>::Bits maximum) const {
    return exponent.is_normal<T>(maximum) & takes_scale_in<T>(exponent.of_normal<T>(maximum));
  }
  template <class T>
  SWALP_HD auto usual(typename Ieee<T>::Bits maximum, T) const {
    return Quantizer<T, Element<T>, UnitScale>{Element<T>(grid, power_of_two<T>(exponent.of_normal<T>(maximum))), {}};
  }
  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T, F&& f) const {
    const int e = exponent.of<T>(maximum);
    if (takes_scale_in<T>(e)) {
      f(Quantizer<T, Element<T>, UnitScale>{Element<T>(grid, power_of_two<T>(e)), {}});
    } else {
      const FarScale<T> far(e);
      const Grid of_block = maximum == 0 ? grid : held<T>(grid, far, most);
      f(Quantizer<T, Element<T>, FarScale<T>>{Element<T>(of_block), far});
    }
  }
};

template <class Kind>
struct OnAbsmax : Product {
  static constexpr auto shared = Shared::Block;

  template <class T>
  using Element = typename Kind::template Element<T>;

  template <class T>
  SWALP_HD bool is_usual(typename Ieee<T>::Bits) const {
    return true;
  }
  template <class T>
  SWALP_HD auto usual(typename Ieee<T>::Bits maximum, T) const {
    const T scale = absmax_scale<T>(maximum, static_cast<T>(grid.highest));
    return Quantizer<T, Element<T>, RealScale<T>>{Element<T>(grid), {scale}};
  }
  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T most, F&& f) const {
    f(usual<T>(maximum, most));
  }
};

// The float32 of the tensor: divided by it, the float of the largest block is the largest float.
template <class T>
SWALP_HD T outer_scale(const Grid& inner, T tensor_maximum, T element_max) {
  const T most = element_max * static_cast<T>(inner.highest);
  return real_scale<T>(static_cast<float>(tensor_maximum / most), most);
}

// The float of a block: divided by it and by the tensor's float32, the block's maximum is the largest element.
template <class T>
SWALP_HD T inner_scale(const Grid& inner, typename Ieee<T>::Bits maximum, T outer, T element_max) {
  const T wanted = bit_cast<T>(maximum) / element_max / outer;
  const T of_block = FloatElement<T, Saturates>(inner).round(wanted, wanted, 0u, RoundNearest{});
  return of_block > T(0) ? of_block : power_of_two<T>(inner.least - inner.man);  // a block never loses its scale
}

template <class T>
SWALP_HD T two_level_scale(const Grid& inner, typename Ieee<T>::Bits maximum, T tensor_maximum, T element_max) {
  const T outer = outer_scale<T>(inner, tensor_maximum, element_max);
  // The product may underflow if the tensor's maximum is tiny, and 0 / 0 is no zero.
  const T scale = inner_scale<T>(inner, maximum, outer, element_max) * outer;
  constexpr T least = std::numeric_limits<T>::denorm_min();
  return scale > T(0) ? finite_scale(scale, element_max) : least;
}

struct FloatsOnTwoLevels : Product {
  static constexpr auto shared = Shared::BlockAndTensor;
  Grid inner;

  template <class T>
  SWALP_HD bool is_usual(typename Ieee<T>::Bits) const {
    return true;
  }
  template <class T>
  SWALP_HD auto usual(typename Ieee<T>::Bits maximum, T tensor_maximum) const {
    const FloatElement<T, Saturates> element(grid);
    return Quantizer<T, FloatElement<T, Saturates>, RealScale<T>>{
        element, {two_level_scale<T>(inner, maximum, tensor_maximum, element.tail.max)}};
  }
  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T tensor_maximum, F&& f) const {
    f(usual<T>(maximum, tensor_maximum));
  }
};

// As many integers as a grid has. The first is moved by a whole number, so that they cover a block's range.
template <class T>
struct Moved {
  T count, scale, below;  // the number of integers minus one; their scale; how many are negative
  SWALP_HD Moved(const Grid& grid, T positive, T negative)
      : count((static_cast<T>(grid.highest) - static_cast<T>(grid.lowest)) * power_of_two<T>(grid.man - grid.least)),
        scale(real_scale<T>(static_cast<float>((positive + negative) / count), count)),
        below(std::rint(negative / scale)) {
    below = below < count ? below : count;
  }
};

// In the order of SCALES in swalp_fx/ops.py.
enum class ScaleKind : int { None, PowerOfTwo, Absmax, Static, TwoLevel, Affine };
constexpr int kScaleKinds = 6;
enum class ElementKind : int { Integers, Floats, WideFloats, Table };

// Every other product, chosen at run time. For an affine scale, `maximum` is the maximum of the block's positive numbers, and
// the argument for the tensor's maximum is the largest magnitude of the block's negative numbers.
struct Rare : Product {
  static constexpr auto shared = Shared::BlockAndTensor;
  static constexpr bool rare = true;
  ElementKind element;
  ScaleKind scale;
  SharedExponent exponent;
  float constant;  // a static scale
  Grid inner;
  Table table;

  template <class T, class F>
  SWALP_HD void with_quantizer(typename Ieee<T>::Bits maximum, T second, F&& f) const {
    using Float = FloatElement<T, AnyTail>;
    using Wide = WideFloatElement<T, AnyTail>;
    if (scale == ScaleKind::Affine) return affine<T>(bit_cast<T>(maximum), second, f);
    // The largest scale, of zeros and infinities, takes all of these beyond what a dtype holds.
    const bool is_empty = maximum == 0 && shares_scale() && (scale != ScaleKind::TwoLevel || second == T(0));
    const T bound = is_empty ? std::numeric_limits<T>::infinity() : static_cast<T>(most);
    const int e = scale == ScaleKind::PowerOfTwo ? exponent.of<T>(maximum) : 0;
    if (scale == ScaleKind::PowerOfTwo && (element == ElementKind::Floats || element == ElementKind::WideFloats)) {
      const FarScale<T> far(e);
      const Grid of_block = held<T>(grid, far, bound);
      if (element == ElementKind::Floats) return f(Quantizer<T, Float, FarScale<T>>{Float(of_block), far});
      return f(Quantizer<T, Wide, FarScale<T>>{Wide(of_block), far});
    }
    const RealScale<T> real{real_of<T>(maximum, second, e)};
    if (element == ElementKind::Table) {
      return f(Quantizer<T, TableElement<T>, RealScale<T>>{TableElement<T>(table, real, bound), real});
    }
    const Grid of_block = held<T>(grid, real, bound);
    switch (element) {
      case ElementKind::Integers:
        return f(Quantizer<T, IntegerElement<T>, RealScale<T>>{IntegerElement<T>(of_block), real});
      case ElementKind::Floats:
        return f(Quantizer<T, Float, RealScale<T>>{Float(of_block), real});
      default:
        return f(Quantizer<T, Wide, RealScale<T>>{Wide(of_block), real});
    }
  }

 private:
  SWALP_HD bool shares_scale() const { return scale != ScaleKind::None && scale != ScaleKind::Static; }

  template <class T>
  SWALP_HD T real_of(typename Ieee<T>::Bits maximum, T tensor_maximum, int e) const {
    const T reach = element == ElementKind::Table ? table.reach : grid.highest;
    switch (scale) {
      case ScaleKind::PowerOfTwo:  // of a table: quotients and products are exact
        return FarScale<T>(e).multiply(T(1));
      case ScaleKind::Absmax:
        return absmax_scale<T>(maximum, reach);
      case ScaleKind::Static:
        return static_cast<T>(constant);
      case ScaleKind::TwoLevel:
        return two_level_scale<T>(inner, maximum, tensor_maximum, reach);
      default:
        return T(1);
    }
  }

  template <class T, class F>
  SWALP_HD void affine(T positive, T negative, F&& f) const {
    const Moved<T> moved(grid, positive, negative);
    const RealScale<T> real{moved.scale};
    Grid integers;
    integers.man = integers.least = 24;  // one step of 1
    integers.lowest = static_cast<float>(-moved.below);
    integers.highest = static_cast<float>(moved.count - moved.below);
    if (positive > T(0) || negative > T(0)) integers = held<T>(integers, real, most);
    f(Quantizer<T, MovedElement<T>, RealScale<T>>{MovedElement<T>(integers, moved.below), real});
  }
};

}  // namespace swalp_fx
