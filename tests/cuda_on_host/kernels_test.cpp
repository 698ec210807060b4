// Every CUDA kernel, run on the CPU, against the law it stands for, bit for bit: each element rounded by itself, with
// the draw of its index and the maximum of its block. Any NaN equals any other. Exits with 1 if an element differs.
#include "cuda_on_host.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdio>
#include <limits>
#include <new>

#include "../../csrc/cuda/kernels.cuh"
#include "../../csrc/numbers.h"

namespace swalp_fx {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
template <class S>
using BitsOf = typename Ieee<Compute<S>>::Bits;

std::mt19937 generator(2024);
int64_t below(int64_t n) { return static_cast<int64_t>(generator() % static_cast<uint64_t>(n)); }

// ---- results ----------------------------------------------------------------------------------------

struct Tally {
  const char* kernel;
  int64_t launches = 0, values = 0, wrong = 0;

  template <class S>
  void compare(S actual, S due, int64_t i) {
    ++values;
    if (memcmp(&actual, &due, sizeof(S)) == 0 || (actual != actual && due != due)) return;
    if (++wrong <= 5) {
      fprintf(stderr, "%s, launch %lld, at %lld: %a where %a is due\n", kernel, static_cast<long long>(launches),
              static_cast<long long>(i), static_cast<double>(actual), static_cast<double>(due));
    }
  }
  void print() const {
    printf("%-18s %5lld launches %9lld values %lld wrong\n", kernel, static_cast<long long>(launches),
           static_cast<long long>(values), static_cast<long long>(wrong));
  }
};

Tally quads{"quantize_quads"}, rows{"quantize_rows"}, elements{"quantize_elements"}, tiled{"quantize_tiles"},
    of_blocks{"block_maxima"}, of_rows{"maxima_of_rows"}, of_maxima{"maximum_of_maxima"};

// ---- memory -----------------------------------------------------------------------------------------

// `size` values aligned to a Vector, and not a byte more: what lies beyond is the address sanitizer's.
template <class S>
class Memory {
 public:
  explicit Memory(int64_t size) : n(size), p(static_cast<S*>(operator new(n * sizeof(S), kAlignment))) {}
  Memory(const Memory& m) : Memory(m.n) { memcpy(p, m.p, n * sizeof(S)); }
  ~Memory() { operator delete(p, kAlignment); }
  Memory& operator=(const Memory&) = delete;
  S& operator[](int64_t i) const { return p[i]; }
  S* data() const { return p; }
  int64_t size() const { return n; }

 private:
  static constexpr auto kAlignment = static_cast<std::align_val_t>(alignof(Vector<S>));
  int64_t n;
  S* p;
};

// Neighbours of one scale, 16 within 1024, and among them zeros, infinities and NaN. Half of the results also have
// bits of any pattern: their largest values are so large that in a long block little else is left.
template <class S>
Memory<S> hard_values(int64_t n) {
  using Limits = std::numeric_limits<S>;
  const S special[] = {S(0.0f), S(-0.0f), Limits::infinity(), -Limits::infinity(), Limits::quiet_NaN(),
                       Limits::denorm_min()};
  const bool any_pattern = below(2) == 0;
  Memory<S> x(n);
  int far = 0, near = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (i % 1024 == 0) far = below(4) == 0 ? -140 + static_cast<int>(below(260)) : -16 + static_cast<int>(below(24));
    if (i % 16 == 0) near = far - static_cast<int>(below(8));
    if (any_pattern && below(40) == 0) {
      for (size_t b = 0; b < sizeof(S); ++b) reinterpret_cast<unsigned char*>(&x[i])[b] = generator() & 0xFF;
    } else if (below(40) == 0) {
      x[i] = special[below(6)];
    } else {
      x[i] = static_cast<S>(static_cast<float>(std::ldexp(static_cast<double>(below(1 << 25) - (1 << 24)), near - 24)));
    }
  }
  return x;
}

// ---- the law ----------------------------------------------------------------------------------------

template <class S, class Format, class Round>
__attribute__((noinline)) S law(const Format& format, const Round& round, S x, BitsOf<S> maximum, Compute<S> most, const Random& random,
      int64_t index) {
  using T = Compute<S>;
  S y{};
  format.template with_quantizer<T>(maximum, most, [&](const auto& quantizer) {
    const uint32_t draw = Round::draws ? draw_at(random, index) : 0u;
    y = static_cast<S>(quantizer.apply(static_cast<T>(x), draw, round));
  });
  return y;
}

template <class S>
void raise_to(BitsOf<S>& maximum, S x) {
  maximum = std::max(maximum, finite_magnitude(static_cast<Compute<S>>(x)));
}

Random any_random(int bits) {
  const uint64_t high = generator(), low = generator();
  return {high << 32 | low, low << 33 | high, bits};
}

// The key passed with the launch, or left in the device's memory.
struct KeyAt {
  Random passed;
  Memory<uint64_t> device{1};
  const uint64_t* pointer;
  KeyAt(const Random& random, bool on_device) : passed(random), pointer(on_device ? device.data() : nullptr) {
    device[0] = random.key;
    if (on_device) passed.key = ~random.key;
  }
};

// ---- contiguous memory ------------------------------------------------------------------------------

// tile > 0: tiles of so many neighbours; row > 0: rows of so many, whose maxima the kernel is given.
template <class S, class Format, class Round>
void check_quads(const Format& format, const Round& round, int64_t n, int tile, int64_t row, unsigned blocks, int bits) {
  const Random random = any_random(bits);
  const KeyAt key(random, below(2) == 0);
  const auto x = hard_values<S>(n);
  BitsOf<S> most = 0;
  for (int64_t i = 0; i < n; ++i) raise_to<S>(most, x[i]);
  const int64_t size = tile > 0 ? tile : row > 0 ? row : n;
  Memory<BitsOf<S>> maxima((n + size - 1) / size), given(tile > 0 ? 1 : maxima.size());
  for (int64_t b = 0; b < maxima.size(); ++b) {
    maxima[b] = 0;
    for (int64_t i = b * size; i < n && i < (b + 1) * size; ++i) raise_to<S>(maxima[b], x[i]);
    if (tile == 0) given[b] = maxima[b];
  }
  if (tile > 0) given[0] = most;
  for (const bool in_place : {false, true}) {
    const Memory<S> from = x, to(n);
    S* const y = in_place ? from.data() : to.data();
    ++quads.launches;
    cuda_on_host::launch(quantize_quads<S, Format, Round>, blocks, 64, format, round, from.data(), y, n, tile, row,
                         given.data(), key.passed, key.pointer);
    for (int64_t i = 0; i < n; ++i) {
      const S due = law<S>(format, round, x[i], maxima[i / size], bit_cast<Compute<S>>(most), random, i);
      quads.compare(y[i], due, i);
    }
  }
}

template <class S, class Format, class Round>
void check_rows(const Format& format, const Round& round, int64_t count, int64_t size, unsigned blocks, unsigned threads,
                int bits) {
  const Random random = any_random(bits);
  const KeyAt key(random, below(2) == 0);
  const auto x = hard_values<S>(count * size);
  for (const bool in_place : {false, true}) {
    const Memory<S> from = x, to(x.size());
    S* const y = in_place ? from.data() : to.data();
    ++rows.launches;
    cuda_on_host::launch(quantize_rows<S, Format, Round>, blocks, threads, format, round, from.data(), y, count, size,
                         key.passed, key.pointer);
    for (int64_t i = 0; i < x.size();) {
      BitsOf<S> maximum = 0;
      const int64_t end = i + size;
      for (int64_t j = i; j < end; ++j) raise_to<S>(maximum, x[j]);
      for (; i < end; ++i) rows.compare(y[i], law<S>(format, round, x[i], maximum, 0, random, i), i);
    }
  }
}

// Grids that are smaller than the work, as large, and larger; ends within a block of random bits and within a Vector.
template <class S, class Format, class Round>
void check_contiguous(const Format& format, const Round& round, int bits) {
  if constexpr (Format::shared == Shared::Nothing) {
    for (const int64_t n : {1, 3, 127, 128, 5 * 128 + 6, 67 * 128}) check_quads<S>(format, round, n, 0, 0, 1 + below(3), bits);
  } else {
    for (const int tile : {16, 32, 64, 128}) check_quads<S>(format, round, 21 * kBlock + tile, tile, 0, 1, bits);
    check_quads<S>(format, round, 3 * kBlock, 32, 0, 3, bits);
  }
  if constexpr (Format::shared == Shared::Block) {
    for (const int64_t row : {128, 130, 333, 1024}) check_quads<S>(format, round, 7 * row, 0, row, 2, bits);
    // Rows that are held, and rows that are not: 32 threads hold 8 blocks of random bits.
    for (const int64_t size : {1, 3, 17, 130, 896, 1021, 1024, 2500}) check_rows<S>(format, round, 3, size, 2, 32, bits);
    check_rows<S>(format, round, 2, 1500, 3, 64, bits);
    check_rows<S>(format, round, 2, 1030, 2, kThreads, bits);
  }
}

// ---- any layout -------------------------------------------------------------------------------------

struct Case {
  std::vector<Layout> layouts;
  int64_t numel = 0, blocks = 1;
};

Layout nest(const Place& first, std::initializer_list<Dim> dims) {
  Layout layout;
  layout.first = first;
  for (const Dim& d : dims) {
    layout.dims[layout.rank++] = d;
    layout.numel *= d.size;
  }
  return layout;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  all.push_back({{nest({}, {})}, 1, 1});
  all.push_back({{nest({}, {{1003, {1, 1, 0}}})}, 1003, 1});
  // [37, 29] transposed in memory: a block for each row, for each column, for each element.
  all.push_back({{nest({}, {{29, {37, 1, 0}}, {37, {1, 29, 1}}})}, 1073, 37});
  all.push_back({{nest({}, {{29, {37, 1, 1}}, {37, {1, 29, 0}}})}, 1073, 29});
  all.push_back({{nest({}, {{29, {37, 1, 1}}, {37, {1, 29, 29}}})}, 1073, 1073});
  // [5, 7, 11] with the middle dimension last in memory, a block for each of the first.
  all.push_back({{nest({}, {{5, {77, 77, 1}}, {11, {7, 1, 0}}, {7, {1, 11, 0}}})}, 385, 5});
  // [9, 100] in runs of 32 along the rows, the last of 4.
  all.push_back({{nest({}, {{9, {100, 100, 4}}, {3, {32, 32, 1}}, {32, {1, 1, 0}}}),
                  nest({96, 96, 3}, {{9, {100, 100, 4}}, {4, {1, 1, 0}}})},
                 900,
                 36});
  // [70, 13] in runs of 32 down the columns, the last of 6.
  all.push_back({{nest({}, {{2, {416, 416, 13}}, {32, {13, 13, 0}}, {13, {1, 1, 1}}}),
                  nest({832, 832, 26}, {{6, {13, 13, 0}}, {13, {1, 1, 1}}})},
                 910,
                 39});
  // As many loops as there can be, in the opposite order in memory.
  Layout deep;
  for (int d = 0; d < Layout::kMaxDims; ++d) {
    deep.dims[deep.rank++] = {2, {int64_t{1} << (Layout::kMaxDims - 1 - d), int64_t{1} << d, d % 2 << (d / 2)}};
    deep.numel *= 2;
  }
  all.push_back({{deep}, deep.numel, 1 << Layout::kMaxDims / 2});
  return all;
}

// Where each element of memory comes in the row-major order, and its block: counted up, one loop after another.
void count_up(const Layout& layout, int d, const Place& p, std::vector<Place>& of_memory) {
  if (d == layout.rank) {
    of_memory[p.memory] = p;
    return;
  }
  Place at = p;
  for (int64_t i = 0; i < layout.dims[d].size; ++i) {
    count_up(layout, d + 1, at, of_memory);
    at.memory += layout.dims[d].step.memory;
    at.index += layout.dims[d].step.index;
    at.block += layout.dims[d].step.block;
  }
}

std::vector<Place> places(const Case& c) {
  std::vector<Place> of_memory(c.numel, {-1, -1, -1});
  for (const Layout& layout : c.layouts) count_up(layout, 0, layout.first, of_memory);
  return of_memory;
}

template <class S>
std::vector<BitsOf<S>> maxima_of(const std::vector<Place>& of_memory, const Memory<S>& x, int64_t blocks) {
  std::vector<BitsOf<S>> maxima(blocks);
  for (const Place& p : of_memory) raise_to<S>(maxima.at(p.block), x[p.memory]);
  return maxima;
}

template <class S, class Format, class Round>
void check_elements(const Format& format, const Round& round, int bits) {
  for (const Case& c : cases()) {
    const Random random = any_random(bits);
    const KeyAt key(random, below(2) == 0);
    const auto of_memory = places(c);
    const auto x = hard_values<S>(c.numel);
    const auto maxima = maxima_of(of_memory, x, c.blocks);
    const BitsOf<S> most = *std::max_element(maxima.begin(), maxima.end());
    for (const bool in_place : {false, true}) {
      const Memory<S> from = x, to(x.size());
      S* const y = in_place ? from.data() : to.data();
      for (const Layout& layout : c.layouts) {
        ++elements.launches;
        cuda_on_host::launch(quantize_elements<S, Format, Round>, 1 + below(3), 64, format, round, layout, from.data(),
                             y, maxima.data(), &most, false, key.passed, key.pointer);
      }
      for (const Place& p : of_memory) {
        const S due = law<S>(format, round, x[p.memory], maxima[p.block], bit_cast<Compute<S>>(most), random, p.index);
        elements.compare(y[p.memory], due, p.memory);
      }
    }
  }
}

// ---- tiles of memory in another order ---------------------------------------------------------------

struct Cut {
  Tiles tiles;
  int64_t numel, blocks;
};

// Of [2, width, height] with height last in memory for the rows, a block each of the first dimension, or each column.
Cut cut(int64_t height, int64_t width, int64_t rows, int64_t columns, bool joined, bool block_a_column) {
  Cut c{{}, 2 * height * width, block_a_column ? 2 * width : 2};
  c.tiles.outer = nest({}, {{2, {height * width, height * width, block_a_column ? width : 1}}});
  c.tiles.along = {height, {width, 1, 0}};
  c.tiles.across = {width, {1, height, block_a_column}};
  c.tiles.rows = rows;
  c.tiles.columns = columns;
  c.tiles.slots = joined ? height : rows + 2;
  c.tiles.joined = joined;
  return c;
}

std::vector<Cut> cuts() {
  std::vector<Cut> all;
  for (const bool block_a_column : {false, true}) {
    all.push_back(cut(49, 12, 49, 8, true, block_a_column));
    all.push_back(cut(300, 20, 130, 16, false, block_a_column));
    all.push_back(cut(200, 3, 200, 3, false, block_a_column));
  }
  // Runs of memory that are runs of the row-major order too, elsewhere: [5, 300] with the rows in opposite order.
  Cut runs{{}, 1500, 5};
  runs.tiles.outer = nest({0, 1200, 4}, {{5, {300, -300, -1}}});
  runs.tiles.along = {1, {0, 1, 0}};
  runs.tiles.across = {300, {1, 1, 0}};
  runs.tiles.rows = 1, runs.tiles.columns = 256, runs.tiles.slots = 1, runs.tiles.joined = true;
  all.push_back(runs);
  return all;
}

template <class S, class Format, class Round>
void check_tiles(const Format& format, const Round& round, int bits) {
  for (const Cut& c : cuts()) {
    const Random random = any_random(bits);
    const KeyAt key(random, below(2) == 0);
    Layout all = c.tiles.outer;
    for (const Dim& d : {c.tiles.along, c.tiles.across}) {
      all.dims[all.rank++] = d;
      all.numel *= d.size;
    }
    const auto of_memory = places({{all}, c.numel, c.blocks});
    const auto x = hard_values<S>(c.numel);
    const auto maxima = maxima_of(of_memory, x, c.blocks);
    const bool even = c.tiles.across.size % kVector == 0;
    for (const bool in_place : {false, true}) {
      const Memory<S> from = x, to(x.size());
      S* const y = in_place ? from.data() : to.data();
      ++tiled.launches;
      cuda_on_host::launch(even ? quantize_tiles<S, Format, Round, kVector> : quantize_tiles<S, Format, Round, 1>,
                           1 + below(3), 64, format, round, c.tiles, from.data(), y, maxima.data(), key.passed, key.pointer);
      for (const Place& p : of_memory) {
        tiled.compare(y[p.memory], law<S>(format, round, x[p.memory], maxima[p.block], 0, random, p.index), p.memory);
      }
    }
  }
}

// ---- maxima -----------------------------------------------------------------------------------------

template <class S>
void check_maxima() {
  for (const Case& c : cases()) {
    const auto x = hard_values<S>(c.numel);
    const auto due = maxima_of(places(c), x, c.blocks);
    Memory<BitsOf<S>> maxima(c.blocks);
    memset(maxima.data(), 0, c.blocks * sizeof(BitsOf<S>));
    for (const Layout& layout : c.layouts) {
      ++of_blocks.launches;
      cuda_on_host::launch(block_maxima<S>, 1 + below(3), 64, layout, x.data(), maxima.data());
    }
    for (int64_t b = 0; b < c.blocks; ++b) of_blocks.compare(maxima[b], due[b], b);
  }
  for (const int64_t size : {1, 3, 4, 1027, 9001}) {
    for (const int64_t count : {1, 3}) {
      auto x = hard_values<S>(count * size);
      x[below(count * size)] = S(12345.0f);  // whichever thread holds the largest
      Memory<BitsOf<S>> found(count);
      memset(found.data(), 0, count * sizeof(BitsOf<S>));
      ++of_rows.launches;
      constexpr int kWide = std::max<int>(kVector, 16 / sizeof(S));
      // Memory aligns to a Vector only.
      const bool wide = reinterpret_cast<uintptr_t>(x.data()) % (kWide * sizeof(S)) == 0;
      cuda_on_host::launch(wide ? maxima_of_rows<S, kWide> : maxima_of_rows<S, kVector>, 1 + below(3), kThreads, x.data(), count, size, found.data());
      for (int64_t row = 0; row < count; ++row) {
        BitsOf<S> due = 0;
        for (int64_t i = row * size; i < (row + 1) * size; ++i) raise_to<S>(due, x[i]);
        of_rows.compare(found[row], due, row);
      }
    }
  }
}

template <class Bits>
void check_maximum_of_maxima() {
  for (const int64_t n : {1, 31, 257, 3001}) {
    for (const unsigned blocks : {1u, 2u}) {
      Memory<Bits> maxima(n), found(1);
      for (int64_t i = 0; i < n; ++i) maxima[i] = static_cast<Bits>(generator()) << (8 * sizeof(Bits) - 32);
      found[0] = 0;
      ++of_maxima.launches;
      cuda_on_host::launch(maximum_of_maxima<Bits>, blocks, kThreads, maxima.data(), n, found.data());
      of_maxima.compare(found[0], *std::max_element(maxima.data(), maxima.data() + n), n);
    }
  }
}

// ---- what runs --------------------------------------------------------------------------------------

template <class S, class Format>
void check_product(const Format& format) {
  const auto check = [&](Rounding rounding, int bits, bool contiguous) {
    with_rounding<Compute<S>>(rounding, bits, format.magnitude_bits(), [&](const auto& round) {
      if constexpr (!std::is_same_v<std::decay_t<decltype(round)>, RoundOther>) {
        if (!contiguous) check_elements<S>(format, round, bits);
        if constexpr (!Format::rare) {
          if (contiguous) check_contiguous<S>(format, round, bits);
        }
        if constexpr (Format::shared != Shared::BlockAndTensor && std::decay_t<decltype(round)>::draws) {
          if (contiguous) check_tiles<S>(format, round, bits);
        }
      }
    });
  };
  for (const bool contiguous : {false, true}) {
    check(Rounding::Nearest, 16, contiguous);
    check(Rounding::Stochastic, 16, contiguous);
  }
  check(Rounding::Stochastic, 24, false);
  check(Rounding::Stochastic, 3, true);
}

template <class S>
void check_format(const Numbers& numbers) {
  with_format(numbers, [](const auto& product) { check_product<S>(product); });
}

// ---- formats ------------------------------------------------------------------------------------------

using OfScale = std::array<double, 3>;

Numbers on(const Grid& grid, ScaleKind scale = ScaleKind::None, const OfScale& of_scale = {}) {
  return {grid, {}, scale, of_scale};
}
const Grid kInteger8{7, 1, -127.0f / 64, 127.0f / 64}, kTwos4{3, 1, -2.0f, 1.75f}, kE4m3{3, -6, -448.0f, 448.0f};
const Grid kE2m1{1, 0, -6.0f, 6.0f}, kE5m2{2, -14, -57344.0f, 57344.0f, true, Beyond::SaturateButInfinity};
const Grid kBf16{7, -126, -0x1.FEp127f, 0x1.FEp127f, true, Beyond::Infinity};
const OfScale kE8m0{-127, 127, 2}, kExp8{-128, 127, 2}, kCeil{-127, 127, 1 + 0x1p-52}, kInner{3, -6, 448};
const Numbers kBfp8 = on(kInteger8, ScaleKind::PowerOfTwo, kExp8);
const Numbers kTernary{{}, {-1.0f, 0.0f, 1.0f}, ScaleKind::Absmax, {}};

template <class S>
void check_main_formats() {
  check_format<S>(kBfp8);
  check_format<S>(on(kE4m3));
  check_maxima<S>();
}

void check_everything() {
  check_main_formats<float>();
  check_main_formats<double>();
  check_main_formats<Half>();
  check_main_formats<BFloat16>();
  check_maximum_of_maxima<uint32_t>();
  check_maximum_of_maxima<uint64_t>();
  check_format<float>(on(kTwos4));
  check_format<float>(on(kE4m3, ScaleKind::PowerOfTwo, kE8m0));
  check_format<float>(on(kE5m2, ScaleKind::PowerOfTwo, kCeil));
  check_format<float>(on(kInteger8, ScaleKind::Absmax));
  check_format<float>(on(kE5m2, ScaleKind::Absmax));
  check_format<float>(on(kE2m1, ScaleKind::TwoLevel, kInner));
  check_format<float>(on(kBf16));
  check_format<float>(on(kBf16, ScaleKind::PowerOfTwo, kE8m0));
  check_format<float>(on(kInteger8, ScaleKind::Static, {0.37}));
  check_format<float>(kTernary);
  check_format<BFloat16>(on(kE2m1, ScaleKind::PowerOfTwo, kE8m0));
  for (const Rounding r : {Rounding::TowardZero, Rounding::Down, Rounding::Up, Rounding::NearestAway, Rounding::NearestUp}) {
    for (const Numbers& numbers : {on(kTwos4, ScaleKind::PowerOfTwo, kExp8), on(kE5m2), kTernary}) {
      with_format(numbers, [&](const auto& product) { check_elements<float>(product, RoundOther{r}, 16); });
    }
  }
}

// ---- the engine itself ------------------------------------------------------------------------------

void lacks_the_other(int* y) { y[threadIdx.x] = __shfl_xor_sync(0x3u, static_cast<int>(threadIdx.x), 2); }
void two_masks(int* y) { y[threadIdx.x] = __shfl_xor_sync(threadIdx.x == 0 ? 0x3u : 0xFu, 1, 1); }
void two_shuffles(int* y) { y[threadIdx.x] = __shfl_xor_sync(0xFu, 1, threadIdx.x < 2 ? 1 : 2); }
void barrier_in_a_branch(int* y) {
  if (threadIdx.x > 0) __syncthreads();
  y[threadIdx.x] = 1;
}
void no_barrier(int* y) {
  __shared__ int of_thread[4];
  of_thread[threadIdx.x] = static_cast<int>(blockIdx.x);
  y[threadIdx.x] += of_thread[threadIdx.x ^ 1u] == static_cast<int>(blockIdx.x);
}

bool engine_refuses(void (*kernel)(int*)) {
  int y[4] = {};
  try {
    cuda_on_host::launch(kernel, 1, 4, y);
  } catch (const std::runtime_error&) {
    return true;
  }
  return false;
}

bool engine_shows(void (*race)(int*)) {
  int y[4] = {};
  cuda_on_host::launch(race, 9, 4, y);
  return std::any_of(y, y + 4, [](int right) { return right < 9; });
}

}  // namespace
}  // namespace swalp_fx

int main() {
  using namespace swalp_fx;
  for (const auto kernel : {lacks_the_other, two_masks, two_shuffles, barrier_in_a_branch}) {
    if (!engine_refuses(kernel)) return puts("a kernel that breaks the rules ran to its end"), 1;
  }
  if (!engine_shows(no_barrier)) return puts("a missing barrier did not show"), 1;
  check_everything();
  Tally all{"total"};
  for (const Tally* t : {&quads, &rows, &elements, &tiled, &of_blocks, &of_rows, &of_maxima}) {
    t->print();
    all.launches += t->launches;
    all.values += t->values;
    all.wrong += t->wrong;
  }
  all.print();
  return all.wrong > 0;
}
