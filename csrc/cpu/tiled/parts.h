// SPDX-License-Identifier: MIT
// Windows whose keys or scores do not fit into a thread's scratch: a block of queries meets them part after part, with a
// running softmax. A part is a box of slots, the same for every query: where a window is cut short (causal axes) or the
// last part is smaller, a query has fewer slots of it, or none.
//
// With m and t the maximum and total of the parts so far, and m', t' those of the next one:
//   m'' = max(m, m'),  t'' = exp(m - m'') t + exp(m' - m'') t',  and so for every sum that t divides in the end.
// python -m bench.run in_parts: 63x63 keys of 64, in parts of 4 rows; docs/benchmarks.md has its ratios.
#pragma once
#include "keys.h"

namespace natten {
namespace {

// The rows of a block with that part of their windows. False if no row has any of it.
inline bool cut_rows(const BlockRow* rows, int count, const Tiling& t, const int64_t* from, BlockRow* part) {
  bool any = false;
  for (int r = 0; r < count; ++r) {
    BlockRow& row = part[r] = rows[r];
    row.z_begin = smaller(row.z_begin + from[0], row.z_end), row.z_end = smaller(row.z_begin + t.part[0], row.z_end);
    row.y_begin = smaller(row.y_begin + from[1], row.y_end), row.y_end = smaller(row.y_begin + t.part[1], row.y_end);
    any |= row.z_begin < row.z_end && row.y_begin < row.y_end;
  }
  return any;
}

// Calls visit(rows, first) for the parts of the windows of a block of the queries [begin, end), whose keys are there then:
// the rows with that part of their windows, and whether it is the first part, which no query lacks. Parts along the
// innermost axis, which want other columns, follow each other last.
template <class T, class A = Accumulate<T>, class Visit>
inline void for_parts(const PackedKeys<T>& keys, Strip<A>& strip, const Owner& owner, int64_t begin, int64_t end, int most,
                      const BlockRow* rows, int count, const Visit& visit) {
  const Problem& p = keys.p;
  const Tiling& t = keys.t;
  int64_t from[kAxes];
  for (from[2] = 0; from[2] < p.axis[2].kernel; from[2] += t.part[2]) {
    if (t.part[2] < p.axis[2].kernel) {
      strip.fill(t, begin, end, most, from[2]);
      keys.ring.clear();
    }
    for (from[0] = 0; from[0] < p.axis[0].kernel; from[0] += t.part[0])
      for (from[1] = 0; from[1] < p.axis[1].kernel; from[1] += t.part[1]) {
        BlockRow part[kRows];
        if (!cut_rows(rows, count, t, from, part)) continue;
        keys.bring(owner, strip, part, count);
        visit(part, from[0] + from[1] + from[2] == 0);
      }
  }
}

// What one head of a block's queries has gathered from the parts so far.
template <class A> struct Gathered {
  static constexpr int W = kLanes<A>;
  static constexpr int kNumbers = 3;  // maximum, total, and what else total divides (the backward's)
  A* statistics;  // [row][vector][kNumbers][W]; null: windows are whole
  A* rows;        // [row][query][pitch]: sums, still to be divided
  int64_t vectors, strip, pitch;

  void carve(Carver& c, const Tiling& t, int64_t row_pitch) {
    vectors = t.strip / W, strip = t.strip, pitch = row_pitch;
    statistics = t.whole ? nullptr : c.take<A>(t.rows * vectors * kNumbers * W);
    rows = t.whole ? nullptr : c.take<A>(t.rows * strip * pitch);
  }
  A* number(int r, int v, int which) const { return statistics + ((r * vectors + v) * kNumbers + which) * W; }
  A* row(int r, int query) const { return rows + (r * strip + query) * pitch; }

  void clear(int count) const {
    for (int r = 0; r < count; ++r)
      for (int v = 0; v < vectors; ++v) {
        store(number(r, v, 0), splat(-A(__builtin_inf())));
        store(number(r, v, 1), Vector<A>{}), store(number(r, v, 2), Vector<A>{});
      }
    std::memset(rows, 0, size_t(count * strip * pitch) * sizeof(A));
  }
  // Takes in a part's statistics (and its sum number 2); returns the factors of earlier sums and of this part's.
  struct Factors {
    Vector<A> earlier, here;
  };
  Factors join(int r, int v, const Statistics<A>& part, Vector<A> sum) const {
    const Vector<A> before = load(number(r, v, 0)), now = maximum(before, part.maximum);
    const Factors f{relative(before, now), relative(part.maximum, now)};
    store(number(r, v, 0), now);
    store(number(r, v, 1), load(number(r, v, 1)) * f.earlier + part.total * f.here);
    store(number(r, v, 2), load(number(r, v, 2)) * f.earlier + sum * f.here);
    return f;
  }
  // exp(maximum - over), but never 0: a sum that is inf or NaN stays so, however small its weight.
  static Vector<A> relative(Vector<A> maximum_, Vector<A> over) {
    constexpr A kTiny = sizeof(A) == 8 ? A(1e-300) : A(1e-37);
    const Vector<A> lowest = splat(-A(__builtin_inf())), shift = over == lowest ? Vector<A>{} : over;
    return maximum(exp_negative(maximum_ - shift), splat(kTiny));
  }
};

}  // namespace
}  // namespace natten
