// SPDX-License-Identifier: MIT
// Weighted sums of rows: out[n] += sum of coefficient(n, t) * row[t], N outputs at once, lanes along the head dim, so
// that a row is loaded once for all outputs that use it. Which t an output uses is a band: both its ends never move back
// from one output to the next. Outputs are queries and rows are values (P V) or keys (dS K); or outputs are keys and rows
// are queries (dS' Q) or gradients (P' dO).
//
// Shapes: N outputs, C vectors of the head dim, W lanes.
#pragma once
#include "scores.h"

namespace natten {
namespace {

constexpr int kMaxColumns = 4;  // vectors of the head dim in one call
constexpr int kMaxOutputs = 8;
constexpr int outputs_per_call(int columns) {
  return kAccumulators / columns < kMaxOutputs ? kAccumulators / columns : kMaxOutputs;
}

// For t in [begin, end) the outputs [low, high) are active; low is 0 or high is all.
struct Run { int begin, end, low, high; };
struct Group {
  int first, count;  // outputs [first, first + count)
  bool diagonal;     // each band is one further than the last, and at least `count` long
  int runs;
  Run run[2 * kMaxOutputs];
};

// Calls visit(group) for groups of at most `most` of the outputs [begin, end), whose bands are [first[i], last[i]). The
// bands of one group overlap all, so that low is 0 or high is all. Outputs with empty bands are in no group.
template <class Visit> inline void for_groups(const int* first, const int* last, int begin, int end, int most, const Visit& visit) {
  for (int from = begin; from < end;) {
    if (first[from] >= last[from]) { ++from; continue; }
    int stop = from + 1;  // outputs without a gap between their bands are shared out evenly
    while (stop < end && first[stop] < last[stop] && first[stop] < last[stop - 1]) ++stop;
    const int wanted = (stop - from + most - 1) / most, even = (stop - from + wanted - 1) / wanted;
    Group g;
    g.first = from;
    g.count = 1;
    while (g.count < even && first[from + g.count] < last[from]) ++g.count;
    const int *group_last = last + from, *group_first = first + from;
    g.diagonal = g.count > 1 && group_last[0] - group_first[0] >= g.count;
    for (int i = 1; i < g.count; ++i)
      g.diagonal &= group_first[i] == group_first[0] + i && group_last[i] == group_last[0] + i;
    g.runs = 0;
    for (int t = group_first[0], low = 0, high = 0; t < group_last[g.count - 1];) {
      while (group_last[low] <= t) ++low;
      while (high < g.count && group_first[high] <= t) ++high;
      int next = group_last[low];
      if (high < g.count && group_first[high] < next) next = group_first[high];
      g.run[g.runs++] = {t, next, low, high};
      t = next;
    }
    visit(g);
    from += g.count;
  }
}

// The same outputs, all of which use the rows [0, rows).
inline Group flat_group(const Group& group, int rows) { return {group.first, group.count, false, 1, {{0, rows, 0, group.count}}}; }

// Coefficients of outputs that are queries: a pointer for each, one vector of lanes a slot. `slots` is the visit's.
template <class A> struct ByQuery {
  const A* at[kMaxOutputs];
  NATTEN_INLINE A operator()(int n, int64_t slots, int64_t t) const { return at[n][(slots + t) * kLanes<A>]; }
};
// Of outputs that are keys: the slot of a key moves back by one with each output; `place` holds where each query's are.
template <class A> struct ByKey {
  const A* at;
  const int* place;
  NATTEN_INLINE A operator()(int n, int64_t slots, int64_t t) const { return at[place[t] + (slots + n) * kLanes<A>]; }
};

template <int C, int LOW, int HIGH, class A, int N, class Coefficient>
NATTEN_INLINE void add_row(Vector<A> (&sum)[N][C], const Coefficient& coefficient, int64_t slots, int64_t t, const A* row) {
  Vector<A> b[N];
#pragma GCC unroll 16
  for (int n = LOW; n < HIGH; ++n) b[n] = splat(coefficient(n, slots, t));
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    const Vector<A> v = load(row + c * kLanes<A>);
#pragma GCC unroll 16
    for (int n = LOW; n < HIGH; ++n) sum[n][c] += b[n] * v;
  }
}
template <int I, int N, int C, class A, class Coefficient>
NATTEN_INLINE void ramp_up(Vector<A> (&sum)[N][C], const Coefficient& coefficient, int64_t slots, int64_t t,
                          const A* row, int64_t pitch) {
  if constexpr (I < N) {
    add_row<C, 0, I>(sum, coefficient, slots, t, row);
    ramp_up<I + 1>(sum, coefficient, slots, t + 1, row + pitch, pitch);
  }
}
template <int I, int N, int C, class A, class Coefficient>
NATTEN_INLINE void ramp_down(Vector<A> (&sum)[N][C], const Coefficient& coefficient, int64_t slots, int64_t t,
                          const A* row, int64_t pitch) {
  if constexpr (I < N) {
    add_row<C, I, N>(sum, coefficient, slots, t, row);
    ramp_down<I + 1>(sum, coefficient, slots, t + 1, row + pitch, pitch);
  }
}
template <int I, int N, int C, class A, class Coefficient>
NATTEN_INLINE void add_run(Vector<A> (&sum)[N][C], const Coefficient& coefficient, int64_t slots, const A* rows, int64_t pitch,
                           const Run& run) {
  if constexpr (I > 0) {  // all first: the longest run
    if (run.low == 0 && run.high == I) {
      for (int64_t t = run.begin; t < run.end; ++t) add_row<C, 0, I>(sum, coefficient, slots, t, rows + t * pitch);
    } else if (I < N && run.low == I) {
      for (int64_t t = run.begin; t < run.end; ++t) add_row<C, (I < N ? I : 0), N>(sum, coefficient, slots, t, rows + t * pitch);
    } else {
      add_run<I - 1>(sum, coefficient, slots, rows, pitch, run);
    }
  }
}

// A row of keys (or of queries): where its rows start, and how far the coefficients are from those of the band.
template <class A> struct Visit {
  const A* rows;
  int64_t slots;
};
template <class A> struct Band {
  const Group& group;
  const Visit<A>* visits;
  int visit_count;
  int64_t pitch;    // from row to row
  A* const* out;    // of each output
  const A* factor;  // of each output; null: 1
  bool add;         // to what `out` holds
};

// Columns [offset, offset + C * W) of every row. The pointers stay where they are: an array of moved ones would be stored
// one by one and loaded as vectors, which waits for all stores before it, also those of outputs that miss the cache.
template <class A, int N, int C, bool DIAGONAL, class Coefficient>
void sum_band(const Band<A>& band, const Coefficient& coefficient, int64_t offset) {
  constexpr int W = kLanes<A>;
  Vector<A> sum[N][C];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sum[n][c] = band.add ? load(band.out[n] + offset + c * W) : Vector<A>{};
  const Group& g = band.group;
  for (int v = 0; v < band.visit_count; ++v) {
    const int64_t slots = band.visits[v].slots;
    const A* rows = band.visits[v].rows + offset;
    if constexpr (DIAGONAL) {
      const int begin = g.run[0].begin, end = g.run[N - 1].end;
      ramp_up<1>(sum, coefficient, slots, begin, rows + begin * band.pitch, band.pitch);
      for (int64_t t = begin + N - 1; t < end; ++t) add_row<C, 0, N>(sum, coefficient, slots, t, rows + t * band.pitch);
      ramp_down<1>(sum, coefficient, slots, end, rows + end * band.pitch, band.pitch);
    } else {
      for (int i = 0; i < g.runs; ++i) add_run<N>(sum, coefficient, slots, rows, band.pitch, g.run[i]);
    }
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(band.out[n] + offset + c * W, band.factor ? sum[n][c] * band.factor[n] : sum[n][c]);
}

// Columns of one call where a row has `vectors` of them.
constexpr int columns_per_call(int vectors) { return vectors < kMaxColumns ? vectors : kMaxColumns; }
// Outputs of a group: what the registers hold beside the widest call, but no more than overlap.
constexpr int outputs_per_group(int vectors, int kernel) {
  const int most = outputs_per_call(columns_per_call(vectors));
  return most < kernel ? most : kernel;
}
template <class A, class G> constexpr bool may_sum(int columns, int outputs) {
  constexpr int vectors = (G::dim + kLanes<A> - 1) / kLanes<A>;
  if (G::dim == 0) return true;
  const bool whole = columns == columns_per_call(vectors), rest = vectors > kMaxColumns && columns == vectors % kMaxColumns;
  return (whole || rest) && G::any_kernel([&](int kernel) { return outputs <= outputs_per_group(vectors, kernel); });
}

template <class A, class Coefficient> using SumBand = void (*)(const Band<A>&, const Coefficient&, int64_t);
template <class A, class G, class Coefficient, int C, int N = 1> SumBand<A, Coefficient> pick_outputs(int count, bool diagonal) {
  if constexpr (N > outputs_per_call(C)) return nullptr;
  else {
    if constexpr (may_sum<A, G>(C, N))
      if (count == N) return diagonal ? sum_band<A, N, C, true, Coefficient> : sum_band<A, N, C, false, Coefficient>;
    return pick_outputs<A, G, Coefficient, C, N + 1>(count, diagonal);
  }
}
template <class A, class G, class Coefficient, int C = 1> SumBand<A, Coefficient> pick_sum_band(int columns, int count, bool diagonal) {
  if constexpr (C < kMaxColumns) {
    if (columns != C) return pick_sum_band<A, G, Coefficient, C + 1>(columns, count, diagonal);
  }
  return pick_outputs<A, G, Coefficient, C>(count, diagonal);
}

}  // namespace
}  // namespace natten
