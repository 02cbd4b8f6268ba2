// SPDX-License-Identifier: MIT
// What happens between the two products: scores [slot][lane] of W queries become weights.
#pragma once
#include "scores.h"

namespace natten {
namespace {

// logits = scores * scale + bias, for the slots of one row of keys; `table` is the bias of that row of the window.
template <class A, int KIND>
void add_bias(A* scores, int slots, A scale, const A* table, const LaneMap<A>& map) {
  constexpr int W = kLanes<A>;
  const A* bias = table + map.base;
  for (int t = 0; t < slots; ++t)
    store(scores + t * W, load(scores + t * W) * scale + fetch<KIND>(bias + t, map.index, int64_t(map.base1 - map.base)));
}
template <class A, int KIND = 0>
inline void add_bias_of_map(A* scores, int slots, A scale, const A* table, const LaneMap<A>& map) {
  if constexpr (KIND < kMapKinds) {
    if (map.kind == KIND) return add_bias<A, KIND>(scores, slots, scale, table, map);
    add_bias_of_map<A, KIND + 1>(scores, slots, scale, table, map);
  }
}

// The lanes whose window is shorter than `kernel` (causal axes): scores of the missing slots become `filler`.
template <class A> struct Short {
  int from;  // the first slot that some lane lacks; kernel: none
  Index<A> count;
};
template <class A> inline void cut_short(A* scores, int slots, int kernel, const Short<A>& lanes, A filler) {
  constexpr int W = kLanes<A>;
  if (lanes.from >= kernel) return;
  for (int row = 0; row < slots; row += kernel)
    for (int t = lanes.from; t < kernel; ++t) {
      A* const at = scores + (row + t) * W;
      store(at, (Index<A>{} + t) < lanes.count ? load(at) : splat(filler));
    }
}

template <class A> struct Statistics {
  Vector<A> maximum, total;  // of the logits, and sum of exp(logit - maximum): 0 where every logit is -inf
};

// scores -> exp2((score - maximum) * factor), not yet divided by the total. factor > 0.
template <class A> inline Statistics<A> weigh(A* scores, int slots, A factor) {
  constexpr int W = kLanes<A>;
  const Vector<A> lowest = splat(-A(__builtin_inf()));
  Vector<A> peak[4] = {lowest, lowest, lowest, lowest};
  int t = 0;
  for (; t + 4 <= slots; t += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) peak[i] = maximum(peak[i], load(scores + (t + i) * W));
  for (; t < slots; ++t) peak[0] = maximum(peak[0], load(scores + t * W));
  const Vector<A> top = maximum(maximum(peak[0], peak[1]), maximum(peak[2], peak[3]));
  const Vector<A> shift = top == lowest ? Vector<A>{} : top;  // all -inf: weights 0. A NaN is lost here, but comes back below
  Vector<A> total[2] = {};
  for (t = 0; t + 2 <= slots; t += 2)
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const Vector<A> weight = exp2_negative((load(scores + (t + i) * W) - shift) * factor);
      store(scores + (t + i) * W, weight);
      total[i] += weight;
    }
  for (; t < slots; ++t) {
    const Vector<A> weight = exp2_negative((load(scores + t * W) - shift) * factor);
    store(scores + t * W, weight);
    total[0] += weight;
  }
  return {top, total[0] + total[1]};
}

}  // namespace
}  // namespace natten
