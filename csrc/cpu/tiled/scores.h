// SPDX-License-Identifier: MIT
// Inner products of queries and keys. A lane is a query, so that a softmax needs no horizontal step; R rows of queries
// share every load of keys, T slots of the window share every load of a query.
//
// Shapes: D head dim, W lanes, R rows of queries, T slots.
#pragma once
#include "vectors.h"

namespace natten {
namespace {

constexpr bool kManyRegisters = NATTEN_VECTOR_BYTES == 64;  // 32; NEON has as many, but 16 is safe
constexpr int kAccumulators = kManyRegisters ? 24 : 12;
constexpr int kRows = 4;      // rows of queries in a block
constexpr int kMaxSlots = 8;  // slots of one call

// Which columns of a row the lanes of a block read: for slot t, lane l reads column base + index[l] + t (from a second
// vector, at base1, where index[l] >= W). Clamped windows, strides and dilation groups are nothing but maps.
enum MapKind { kContiguous, kBroadcast, kPermute, kTwo, kGather, kMapKinds };
template <class A> struct LaneMap {
  Index<A> index;
  int base, base1, kind;
  int reach() const {  // columns [base, base + reach) are read for slot 0
    int far = base1 - base + kLanes<A>;
    for (int l = 0; kind == kGather && l < kLanes<A>; ++l) far = int(index[l]) + 1 > far ? int(index[l]) + 1 : far;
    return kind == kBroadcast ? 1 : far;
  }
};

// What is known when a kernel is compiled: elements of a dense row (0: unknown), map kinds that occur (a bit each),
// additional tokens (-1: unknown), and the kernel sizes that the innermost axis may have (none: unknown). The library
// promises nothing; generated code (natten_ops/lowerings) knows its one problem, and fewer micro kernels are built.
template <int DIM, int KINDS, int ADDITIONAL, int... KERNELS> struct Given {
  static constexpr int dim = DIM, kinds = KINDS, additional = ADDITIONAL;
  template <class Test> static constexpr bool any_kernel(const Test& test) { return sizeof...(KERNELS) == 0 || (test(KERNELS) || ...); }
};
using Anything = Given<0, (1 << kMapKinds) - 1, -1>;

// From the first column of each lane.
template <class A> inline LaneMap<A> make_map(const int* first) {
  constexpr int W = kLanes<A>;
  LaneMap<A> map;
  bool linear = true, same = true;
  int low = first[0], second = 1 << 30, high = 0;
  for (int l = 0; l < W; ++l) {
    linear &= first[l] == first[0] + l;
    same &= first[l] == first[0];
    low = first[l] < low ? first[l] : low;
    high = first[l] > high ? first[l] : high;
  }
  for (int l = 0; l < W; ++l)
    if (first[l] >= low + W && first[l] < second) second = first[l];
  map.base = map.base1 = low;
  map.kind = same ? kBroadcast : linear ? kContiguous : high < low + W ? kPermute : high < second + W ? kTwo : kGather;
  if (map.kind == kTwo) map.base1 = second;
  for (int l = 0; l < W; ++l) map.index[l] = map.kind == kTwo && first[l] >= low + W ? W + first[l] - second : first[l] - low;
  return map;
}

// The map's lanes of the row that starts at `at` = row + map.base + slot; `apart` = base1 - base.
template <int KIND, class A> NATTEN_INLINE Vector<A> fetch(const A* at, Index<A> index, int64_t apart) {
  if constexpr (KIND == kContiguous) return load(at);
  else if constexpr (KIND == kBroadcast) return splat(*at);
  else if constexpr (KIND == kPermute) return permute<A>(load(at), index);
  else if constexpr (KIND == kTwo) return permute<A>(load(at), load(at + apart), index);
  else {
    Vector<A> v;
    for (int l = 0; l < kLanes<A>; ++l) v[l] = at[index[l]];
    return v;
  }
}

// g++ 12 reads a vector again for each product with it; reads across cache lines are slow.
template <class V> NATTEN_INLINE void keep_in_register(V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
}

// scores[r][first + t][W] = sum over d of query[r][d][W] * keys[d][map + first + t]; rows of keys are `pitch` apart. The
// pointers stay where they are (as in bands.h): g++ loads moved ones as vectors, which waits for the stores before it.
template <class A, int R, int T, int KIND>
void score_block(const A* const* query, const A* keys, int64_t pitch, const LaneMap<A>& map, int64_t dim, A* const* scores, int64_t first) {
  constexpr int W = kLanes<A>;
  Vector<A> sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = Vector<A>{};  // "= {}" of the whole array became a slow rep stos (g++ 12)
  const A* q[R];
  for (int r = 0; r < R; ++r) q[r] = query[r];
  const int64_t apart = map.base1 - map.base;
  const Index<A> index = map.index;
  const A* k = keys + map.base + first;
#pragma GCC unroll 2  // na_qk takes 0.93 of the time, the fused forward 0.98; 4 gives no more
  for (int64_t d = 0; d < dim; ++d, k += pitch) {
    Vector<A> a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = load(q[r] + d * W);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      Vector<A> b = fetch<KIND>(k + t, index, apart);
      if constexpr (R > 1 && KIND == kContiguous) keep_in_register(b);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][t] += a[r] * b;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) store(scores[r] + (first + t) * W, sum[r][t]);
}

template <class A> using ScoreBlock = void (*)(const A* const*, const A*, int64_t, const LaneMap<A>&, int64_t, A* const*, int64_t);
constexpr int slots_per_call(int rows) { return kAccumulators / rows < kMaxSlots ? kAccumulators / rows : kMaxSlots; }

// Whether some call for `rows` rows has T of `slots` slots in all: they are shared out in equal parts.
constexpr bool is_part(int slots, int rows, int T) {
  const int parts = (slots + slots_per_call(rows) - 1) / slots_per_call(rows);
  return parts > 0 && (T == slots / parts || T == (slots + parts - 1) / parts);
}
template <class G> constexpr bool may_score(int rows, int kind, int T) {
  const bool window = G::any_kernel([&](int kernel) { return is_part(kernel, rows, T); });
  const bool additional = kind == kBroadcast && (G::additional < 0 || is_part(G::additional, rows, T));
  return (G::kinds >> kind & 1 && window) || additional;
}

template <class A, class G, int R, int KIND, int T = 1> ScoreBlock<A> pick_slots(int slots) {
  if constexpr (T > slots_per_call(R)) return nullptr;
  else {
    if constexpr (may_score<G>(R, KIND, T))
      if (slots == T) return score_block<A, R, T, KIND>;
    return pick_slots<A, G, R, KIND, T + 1>(slots);
  }
}
template <class A, class G, int R, int KIND = 0> ScoreBlock<A> pick_kind(int kind, int slots) {
  if constexpr (KIND + 1 < kMapKinds) {
    if (kind != KIND) return pick_kind<A, G, R, KIND + 1>(kind, slots);
  }
  return pick_slots<A, G, R, KIND>(slots);
}
template <class A, class G, int R = 1> ScoreBlock<A> pick_score_block(int rows, int kind, int slots) {
  if constexpr (R < kRows) {
    if (rows != R) return pick_score_block<A, G, R + 1>(rows, kind, slots);
  }
  return pick_kind<A, G, R>(kind, slots);
}

// All slots of one row of keys, for `rows` rows of queries: in equal parts of what the registers hold.
template <class A, class G>
inline void score_row(int rows, const A* const* query, const A* keys, int64_t pitch, const LaneMap<A>& map, int64_t dim,
                      int slots, A* const* scores) {
  const int parts = (slots + slots_per_call(rows) - 1) / slots_per_call(rows);
  for (int part = 0, first = 0; part < parts; ++part) {
    const int next = slots * (part + 1) / parts;
    pick_score_block<A, G>(rows, map.kind, next - first)(query, keys, pitch, map, dim, scores, first);
    first = next;
  }
}

}  // namespace
}  // namespace natten
