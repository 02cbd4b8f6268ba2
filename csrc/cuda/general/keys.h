// SPDX-License-Identifier: MIT
// A query and what it sees: the walk that the forward, the gradient of the query and the unfused ops share.
#pragma once
#include "rows.h"

namespace natten::cuda::general {
namespace {

// The row of a lane: a key of the window, an additional token, or (not visible) none, a masked or an absent one.
template <class T> struct Seen {
  const T *key = nullptr, *value = nullptr;
  int64_t bias = 0;  // place in the bias table; of keys of the window
  int64_t slot = 0;  // place among the slots of an unfused op
  bool visible = false, in_window = false;
};

struct Window {
  Walk keys;
  int64_t bias = 0;  // place of the first key in the bias table

  DEVICE Window(const Problem& p, const int64_t* query) {
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = p.axis[a];
      const int64_t index = query[a] + p.q_origin[a];
      const Span span = window(axis, index);
      keys.first[a] = span.group + axis.dilation * span.first - p.kv_origin[a];
      keys.step[a] = axis.dilation;
      keys.count[a] = span.end - span.first;
      bias += (axis.kernel - 1 + span.first - index / axis.dilation) * p.rpb.token[a];
    }
  }
};

// Calls visit(seen, chunk of keys, chunk of values) for all that the query of `place` sees, thirty-two rows at a time.
// `all_slots` also brings the slots that the window lacks.
template <class T, class Visit> DEVICE void for_keys(const Problem& p, const Place& place, bool all_slots, const Visit& visit) {
  const Window window(p, place.token);
  const int64_t b = place.b, h = place.h / (p.heads / p.heads_kv);
  Walk slots = window.keys;
  for (int a = 0; all_slots && a < kAxes; ++a) slots.count[a] = p.axis[a].kernel;
  const int64_t in_window = slots.size(), size = in_window + p.additional;
  Cursor cursor(slots, ptx::lane_index());
  for (int64_t base = 0; base < size; base += 32, cursor.advance(slots)) {
    const int64_t index = base + ptx::lane_index();
    Seen<T> seen;
    if (index < in_window) {
      int64_t key[kAxes];
      slots.token(cursor.at, key);
      seen.in_window = true;
      seen.visible = cursor.at[0] < window.keys.count[0] && cursor.at[1] < window.keys.count[1] && cursor.at[2] < window.keys.count[2];
      seen.visible = seen.visible && !is_masked(p, b, key);
      seen.key = row_of<const T>(p.key, b, h, key), seen.value = row_of<const T>(p.value, b, h, key);
      seen.bias = window.bias;
      for (int a = 0; a < kAxes; ++a) seen.bias += cursor.at[a] * p.rpb.token[a], seen.slot += cursor.at[a] * p.slot_step[a];
    } else if (index < size) {
      const int64_t token = index - in_window;
      seen.visible = true;
      seen.key = row_of_additional<const T>(p.additional_keys, b, h, token);
      seen.value = row_of_additional<const T>(p.additional_values, b, h, token);
      seen.slot = slots_of_window(p) + token;
    }
    const int count = int(smaller(size - base, 32)), own = int(larger(smaller(in_window - base, 32), 0));
    visit(seen, Chunk{count, own, p.key.dim, p.additional_keys.dim}, Chunk{count, own, p.value.dim, p.additional_values.dim});
  }
}

// scale * <query, key> + bias; of what is visible, in head h.
template <class T> DEVICE Accumulator<T> logit_of(const Work& work, int64_t h, const T* query, const Seen<T>& seen) {
  const Problem& p = work.p;
  const int64_t step = seen.in_window ? p.key.dim : p.additional_keys.dim;
  const Accumulator<T> score = Accumulator<T>(p.scale) * dot(query, p.query.dim, seen.key, step, p.head_dim, work.wide);
  return seen.in_window ? score + bias_at<T>(p, h, seen.bias) : score;
}

}  // namespace
}  // namespace natten::cuda::general
