// The random bits of each element, made for many neighbours at once. compiled.h includes this once for each
// instruction set, like kernels.h.

// Prefetches memory into the L2 cache; beyond the end of memory it does nothing. Always inline, like its callers: GCC takes a
// function that only prefetches to have no effect, and drops calls of it.
inline __attribute__((always_inline)) void ask_for(const void* memory, int64_t bytes) {
  const char* at = static_cast<const char*>(memory);
  for (const char* end = at + bytes; at < end; at += 64) __builtin_prefetch(at, 0, 2);
}

// A box with runs in memory shorter than this is brought together first.
constexpr int64_t kShortRun = 32;

// A window on the draws, moved along as a thread goes through its elements.
class Draws {
  struct Later {
    const char* at = nullptr;
    int64_t size = 0;  // of an element, in bytes
    void ask(int64_t elements) {
      ask_for(at, elements * size);
      at += elements * size;
    }
  };

 public:
  explicit Draws(const Random& r) : random(r), keys(r.key) {}

  const Random random;

  // The draws from element `index` on, and in `count` how many there are: at least one, at most `wanted`. x holds the
  // elements of `index`. While it makes the draws, it prefetches the elements one piece later into the L2 cache.
  template <class S>
  const uint32_t* from(int64_t index, int64_t wanted, int64_t& count, const S* x) {
    return from(index, wanted, count, Later{reinterpret_cast<const char*>(x + Boxes::kGrain), sizeof(S)});
  }

  // Writes the draws of `n` elements from `index` on, or the first of them; how many these are.
  int64_t write(int64_t index, int64_t n, uint32_t* to) {
    const int64_t whole = std::max(kAtOnce, kCounters) / kCounters * random.block();
    int64_t count = n / whole * whole;
    if (index % whole != 0 || count == 0) {
      const uint32_t* made = from(index, std::min(n, whole - index % whole), count, Later{});
      copy_runs(Copied{1, 0, 0}, count, made, to);
    } else {
      fill(index, count, to, Later{});
    }
    return count;
  }

 private:
  // Few, so that memory does not stay idle for long between results.
  static constexpr int64_t kWindow = 512;
  RoundKeys keys;
  int64_t begin = 0, end = 0;
  alignas(64) uint32_t draw[kWindow];

  // Counters at a time, in two pairs of vectors, one of even counters and one of odd ones: their low halves join into
  // rows.
  static constexpr int64_t kPair = 2 * kLanes, kAtOnce = 2 * kPair;

  const uint32_t* from(int64_t index, int64_t wanted, int64_t& count, Later later) {
    if (index < begin || index >= end) refill(index, wanted, later);
    count = std::min(wanted, end - index);
    return draw + (index - begin);
  }

  void refill(int64_t index, int64_t wanted, Later later) {
    const int64_t whole = std::max(kAtOnce, kCounters) / kCounters * random.block();
    begin = index / whole * whole;
    const int64_t needed = std::min(begin + kWindow, index + wanted) - begin;
    end = begin + (needed + whole - 1) / whole * whole;
    fill(begin, end - begin, draw, later);
  }

  // index and n are multiples of kAtOnce.
  void fill(int64_t index, int64_t n, uint32_t* to, Later later) {
    if (random.bits == 16) return fill_with<2>(index, n, to, std::integral_constant<int, 0>(), later);
    if (random.draws_per_word() == 2) return fill_with<2>(index, n, to, 16 - random.bits, later);
    fill_with<1>(index, n, to, 32 - random.bits, later);
  }

  template <int kPerWord, class Shift>
  __attribute__((noinline)) void fill_with(int64_t index, int64_t n, uint32_t* to, const Shift unused_bits, Later later) {
    constexpr int64_t block = 4 * kPerWord * kCounters;
    const int64_t first = index / block * kCounters, last = (index + n) / block * kCounters;
    for (int64_t counter = first; counter < last; counter += kAtOnce) {
      later.ask(4 * kPerWord * kAtOnce);
      const int64_t at = (counter - first) / kCounters * block + (counter - first) % kCounters;
      generate<kPerWord>(counter, to + at, unused_bits);
    }
  }

  template <int kPerWord, class Shift>
  __attribute__((always_inline)) void generate(int64_t counter, uint32_t* to, const Shift unused_bits) {
    using Vector = Lanes::Vector;
    const int shift = unused_bits;
    const auto first = static_cast<uint64_t>(counter);
    const Vector zero = Vector{};
    Vector c[4][4];
    SWALP_UNROLL
    for (int set = 0; set < 4; ++set) {
      c[set][0] = Lanes::twice_lane_number() + first + (set / 2 * kPair + set % 2);
      c[set][1] = zero + (first >> 32);  // one for all, since kAtOnce divides 2^32: its first product is too
      c[set][2] = zero + random.stream;
      c[set][3] = zero + (random.stream >> 32);
    }
    philox4x32<Lanes>(c, keys);
    SWALP_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t* row = to + pair * (kPair < kCounters ? kPair : 4 * kPerWord * kCounters);
      SWALP_UNROLL
      for (int j = 0; j < 4; ++j, row += kPerWord * kCounters) {
        const Vector words = Lanes::join(c[2 * pair][j], c[2 * pair + 1][j]);
        if constexpr (kPerWord == 1) {
          store(row, (words >> shift) & mask(0xFFFFFFFFu >> shift));
        } else {
          store(row, (words >> shift) & mask(0xFFFFu >> shift));
          store(row + kCounters, (words >> (16 + shift)) & mask(0xFFFFu >> shift));
        }
      }
    }
  }

  static uint64_t mask(uint32_t m) { return uint64_t{m} << 32 | m; }
  static void store(uint32_t* row, const Lanes::Vector& v) { memcpy(row, &v, sizeof(v)); }
};

// The innermost runs of a box, prefetched a part at a time.
struct Runs {
  const char* at[Boxes::kMost / kShortRun];
  int64_t size = 0;  // of a run, in elements
  int64_t bytes = 0;

  template <class S>
  Runs(const Layout& box, const S* x) : size(box.inner().size), bytes(size * sizeof(S)) {
    int64_t count = 0;
    if (size >= kShortRun) for_each_run(box, [&](const Place& p) { at[count++] = reinterpret_cast<const char*>(x + p.memory); });
  }
  // Prefetches `n` elements from the i-th on.
  __attribute__((always_inline)) void ask(int64_t i, int64_t n) const {
    if (size < kShortRun) return;
    for (int64_t end = i + n; i < end;) {
      const int64_t run = i / size, within = i % size, part = std::min(end - i, size - within);
      ask_for(at[run] + within * bytes / size, part * bytes / size);
      i += part;
    }
  }
};

// The draws of a box of elements, which may lie in any order.
class DrawsOfBox {
 public:
  DrawsOfBox(const Random& random, Room& room) : draws(random), made(room.made), in_memory(room.in_memory) {}

  // In the order of the box's loops.
  const uint32_t* of(const Layout& box, const Runs& elements) {
    // The box's loops in row-major order, and the increment of a step along each in both orders.
    int order[Layout::kMaxDims];
    int64_t in_order[Layout::kMaxDims], in_box[Layout::kMaxDims], inside = box.numel;
    for (int d = 0; d < box.rank; ++d) {
      in_box[d] = inside /= box.dims[d].size;
      int at = d;
      for (; at > 0 && box.dims[order[at - 1]].step.index < box.dims[d].step.index; --at) order[at] = order[at - 1];
      order[at] = d;
    }
    Layout rows;
    rows.first = box.first;
    inside = box.numel;
    for (int i = 0; i < box.rank; ++i) {
      const Dim& d = box.dims[order[i]];
      in_order[order[i]] = inside /= d.size;
      rows.add({d.size, {d.step.index, d.step.index, 0}});
    }
    make(rows, elements);
    if (std::is_sorted(order, order + box.rank)) return made;
    Layout turned;
    for (int d = 0; d < box.rank; ++d) turned.add({box.dims[d].size, {in_order[d], in_box[d], 0}});
    gather(turned, made, in_memory);
    return in_memory;
  }

 private:
  static constexpr int64_t kPiece = 256;
  Draws draws;
  uint32_t* const made;
  uint32_t* const in_memory;

  // In row-major order, as `rows` goes through them.
  void make(const Layout& rows, const Runs& elements) {
    const Dim inner = rows.inner();
    const int64_t neighbours = inner.step.index == 1 ? inner.size : 1;
    uint32_t* to = made;
    for_each_run(rows, [&](const Place& p) {
      for (int64_t i = 0; i < inner.size; i += neighbours) {
        for (int64_t done = 0, count; done < neighbours; done += count, to += count) {
          // A piece at a time, with prefetches of the elements in between.
          count = draws.write(p.index + i * inner.step.index + done, std::min(kPiece, neighbours - done), to);
          elements.ask(to - made, count);
        }
      }
    });
  }
};
