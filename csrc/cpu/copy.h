// Copies of a box between two ways of laying it out. compiled.h includes this once for each instruction set.

// A loop over elements, and the steps along it in the memory read and the memory written.
struct Copied {
  int64_t size, from, to;
};

// `rows` runs of neighbours.
template <class E>
inline void copy_runs(const Copied& rows, int64_t n, const E* from, E* to) {
  constexpr int64_t chunk = 16;
  for (int64_t r = 0; r < rows.size; ++r, from += rows.from, to += rows.to) {
    if (n < chunk) {
      for (int64_t i = 0; i < n; ++i) to[i] = from[i];
      continue;
    }
    for (int64_t i = 0; i + chunk <= n; i += chunk) memcpy(to + i, from + i, chunk * sizeof(E));
    // The rest, in one more chunk that overlaps the one before: copying single elements would cost more.
    memcpy(to + n - chunk, from + n - chunk, chunk * sizeof(E));
  }
}

template <class E>
inline void copy_steps(const Copied& rows, const Copied& inner, const E* from, E* to) {
  for (int64_t r = 0; r < rows.size; ++r, from += rows.from, to += rows.to) {
    int64_t i = 0;
    if (inner.from == 2 && inner.to == 1) {
      for (; i < inner.size; ++i) to[i] = from[i * 2];
    } else if (sizeof(E) == 4 && inner.from == 1 && inner.to == 2) {
      for (; i + 16 <= inner.size; i += 16) Lanes::spread(from + i, to + i * 2);
    }
    for (; i < inner.size; ++i) to[i * inner.to] = from[i * inner.from];
  }
}

typedef uint32_t Eight __attribute__((vector_size(32)));
#if defined(__clang__)
#define SWALP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SWALP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Eight{__VA_ARGS__})
#endif

// In three rounds. Each round trades between rows that are twice as far apart as before.
inline void transpose_8x8(const uint32_t* from, int64_t from_step, uint32_t* to, int64_t to_step) {
  Eight a[8], b[8];
  SWALP_UNROLL
  for (int i = 0; i < 8; ++i) memcpy(&a[i], from + i * from_step, sizeof(Eight));
  SWALP_UNROLL
  for (int i = 0; i < 8; i += 2) {
    b[i] = SWALP_SHUFFLE(a[i], a[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    b[i + 1] = SWALP_SHUFFLE(a[i], a[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  SWALP_UNROLL
  for (int i = 0; i < 8; i += 4) {
    SWALP_UNROLL
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = SWALP_SHUFFLE(b[i + j], b[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[i + 2 * j + 1] = SWALP_SHUFFLE(b[i + j], b[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  SWALP_UNROLL
  for (int i = 0; i < 4; ++i) {
    b[i] = SWALP_SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    b[i + 4] = SWALP_SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  SWALP_UNROLL
  for (int i = 0; i < 8; ++i) memcpy(to + i * to_step, &b[i], sizeof(Eight));
}
#undef SWALP_SHUFFLE

// Rows become columns: rows.to is 1, and so is columns.from.
inline void transpose(const Copied& rows, const Copied& columns, const uint32_t* from, uint32_t* to) {
  const int64_t m = rows.size / 8 * 8, n = columns.size / 8 * 8;
  constexpr int64_t strip = 16;  // columns; their results stay in the L1 cache until they are complete
  for (int64_t left = 0; left < n; left += strip) {
    for (int64_t r = 0; r < m; r += 8) {
      for (int64_t c = left; c < std::min(n, left + strip); c += 8) {
        transpose_8x8(from + r * rows.from + c, rows.from, to + c * columns.to + r, columns.to);
      }
    }
  }
  const Copied low{rows.size - m, rows.from, 1}, right{columns.size - n, 1, columns.to};
  if (low.size > 0) copy_steps({n, 1, columns.to}, low, from + m * rows.from, to + m);
  if (right.size > 0) copy_steps({rows.size, rows.from, 1}, right, from + n, to + n * columns.to);
}

// Copies the elements of loops, outermost first. The innermost loop goes through neighbours in the memory read or written.
template <class E>
void copy(Copied* loops, int rank, const E* from, E* to) {
  if (rank == 0) return void(*to = *from);
  const Copied inner = loops[--rank];
  // Paired with the loop that reads neighbours, if that is another one; else with the next one.
  int with = rank - 1;
  for (int d = 0; d < rank; ++d) {
    if (loops[d].from == 1) with = d;
  }
  Copied rows{1, 0, 0};
  if (rank > 0) {
    rows = loops[with];
    std::copy(loops + with + 1, loops + rank, loops + with);
    --rank;
  }
  const auto copy_two = [&](const E* at, E* there) {
    if (inner.from == 1 && inner.to == 1) return copy_runs(rows, inner.size, at, there);
    if constexpr (std::is_same_v<E, uint32_t>) {
      if (rows.from == 1 && inner.to == 1) return transpose(inner, rows, at, there);
    }
    copy_steps(rows, inner, at, there);
  };
  int64_t index[Layout::kMaxDims] = {};
  for (int d = 0; d >= 0;) {
    copy_two(from, to);
    for (d = rank - 1; d >= 0; --d) {
      from += loops[d].from;
      to += loops[d].to;
      if (++index[d] < loops[d].size) break;
      from -= loops[d].from * index[d];
      to -= loops[d].to * index[d];
      index[d] = 0;
    }
  }
}

// The elements of a box, brought together in the order of its loops, and back.
template <class E>
void gather(const Layout& box, const E* from, E* to) {
  Copied loops[Layout::kMaxDims];
  for (int d = 0; d < box.rank; ++d) loops[d] = {box.dims[d].size, box.dims[d].step.memory, box.dims[d].step.index};
  copy(loops, box.rank, from + box.first.memory, to);
}

template <class E>
void scatter(const Layout& box, const E* from, E* to) {
  Copied loops[Layout::kMaxDims];
  for (int d = 0; d < box.rank; ++d) loops[d] = {box.dims[d].size, box.dims[d].step.index, box.dims[d].step.memory};
  copy(loops, box.rank, from, to + box.first.memory);
}
