// SPDX-License-Identifier: MIT
// What the passes of the general path share: scratch, the order in which tokens are visited, and the walks of windows.
//
// Lab notebook. Tokens are visited in segments of kSegment along the innermost axis, so that a single long row (1-D) is
// many items too, and all outer rows of a segment come after each other, so that the keys of kernel rows x (segment +
// kernel) columns fit a small L2 however wide the grid is. With 2 MB of L2 it makes no difference: cost of a pixel at
// 448x448 over that at 56x56 was 1.02 with segments and 1.04 without (median of 9, one thread). Smaller L2: not measured.
#pragma once
#include "dispatch.h"
#include "carver.h"
#include "rows.h"

namespace natten {
namespace {

constexpr int64_t kSegment = 32;

template <class T> struct Scratch {
  using A = Accumulate<T>;
  List* window;
  List* extra;
  A *scores, *slopes;  // kChunk + 16 each
  A *query, *grad;     // one row of the head dim and of the value dim, widened
  A *sum_head, *sum_value;
  T* packed;

  static int64_t carve(const Problem& p, void* memory, Scratch* scratch) {
    Carver carver{static_cast<char*>(memory)};
    Scratch s;
    s.window = carver.take<List>(1);
    s.extra = carver.take<List>(1);
    s.scores = carver.take<A>(kChunk + 16);
    s.slopes = carver.take<A>(kChunk + 16);
    s.query = carver.take<A>(p.head_dim);
    s.sum_head = carver.take<A>(p.head_dim);
    s.grad = carver.take<A>(p.value_dim);
    s.sum_value = carver.take<A>(p.value_dim);
    s.packed = carver.take<T>(kBlock * larger(p.head_dim, p.value_dim));
    if (scratch) *scratch = s;
    return carver.used;
  }
  static int64_t bytes(const Problem& p) { return carve(p, nullptr, nullptr); }
};

// ---- addresses -----------------------------------------------------------------------------------------------------
template <class T> NATTEN_INLINE T* head_of(const Rows& rows, int64_t batch, int64_t head) {
  return static_cast<T*>(rows.data) + batch * rows.batch + head * rows.head;
}
NATTEN_INLINE int64_t token_of(const Rows& rows, const int64_t* at) {
  return at[0] * rows.token[0] + at[1] * rows.token[1] + at[2] * rows.token[2];
}
template <class T> NATTEN_INLINE RowSource<T> source_of(const Rows& rows, int64_t batch, int64_t head, int64_t dim, T* packed) {
  return {head_of<T>(rows, batch, head), rows.dim, dim, packed};
}

// ---- the order of tokens -------------------------------------------------------------------------------------------
inline int64_t items_of(const Problem& p, const int64_t* shape) {
  return p.batch * ceil_div(shape[2], kSegment) * shape[0] * shape[1];
}
// Calls visit(batch, token) for every token of items [begin, end).
template <class Visit> NATTEN_INLINE void for_tokens(const int64_t* shape, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t rows = shape[0] * shape[1], segments = ceil_div(shape[2], kSegment);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t row = item % rows, segment = item / rows % segments, batch = item / rows / segments;
    int64_t token[kAxes] = {row / shape[1], row % shape[1], segment * kSegment};
    const int64_t stop = smaller(token[2] + kSegment, shape[2]);
    for (; token[2] < stop; ++token[2]) visit(batch, token);
  }
}

// ---- walks ---------------------------------------------------------------------------------------------------------
// Adds a tensor to a walk over positions first[a], first[a] + dilation, .. of its tokens.
NATTEN_INLINE int add_stream(Walk& walk, const Problem& p, const Rows& rows, const int64_t* first) {
  const int s = walk.streams++;
  walk.base[s] = token_of(rows, first);
  for (int a = 0; a < kAxes; ++a) walk.step[s][a] = p.axis[a].dilation * rows.token[a];
  return s;
}
// Adds the bias table: entry kernel - 1 + key - query in the dilation group; `direction` is -1 when queries are walked.
NATTEN_INLINE int add_bias_stream(Walk& walk, const Problem& p, const int64_t* offset, int64_t direction) {
  const int s = walk.streams++;
  walk.base[s] = token_of(p.rpb, offset);
  for (int a = 0; a < kAxes; ++a) walk.step[s][a] = direction * p.rpb.token[a];
  return s;
}

enum WindowStream { kKey, kValue, kBias };  // then the mask

// The keys that a query sees. Streams: key, value, [bias], [mask].
inline Walk window_walk(const Problem& p, int64_t batch, const int64_t* query) {
  Walk walk;
  int64_t first[kAxes], offset[kAxes];
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = p.axis[a];
    const int64_t index = query[a] + p.q_origin[a];
    const Span span = window(axis, index);
    walk.count[a] = span.end - span.first;
    first[a] = span.group + axis.dilation * span.first - p.kv_origin[a];
    offset[a] = axis.kernel - 1 + span.first - index / axis.dilation;
  }
  add_stream(walk, p, p.key, first);
  add_stream(walk, p, p.value, first);
  if (p.rpb.data) add_bias_stream(walk, p, offset, 1);
  if (p.key_mask.data) {
    walk.mask = static_cast<const uint8_t*>(p.key_mask.data) + batch * p.key_mask.batch;
    walk.mask_stream = add_stream(walk, p, p.key_mask, first);
  }
  return walk;
}

// The additional tokens, which every query sees. Streams: key, value.
inline Walk additional_walk(const Problem& p) {
  Walk walk;
  walk.count[0] = walk.count[1] = 1;
  walk.count[2] = p.additional;
  walk.streams = 2;
  walk.step[kKey][2] = p.additional_keys.token[2];
  walk.step[kValue][2] = p.additional_values.token[2];
  return walk;
}

NATTEN_INLINE int64_t chunks_of(const Walk& walk) { return ceil_div(walk.total(), kChunk); }

// The entry of a bias table, whichever of its two types it has.
template <class T> NATTEN_INLINE Accumulate<T> bias_at(const Problem& p, int64_t head, int64_t offset) {
  const int64_t at = head * p.rpb.head + offset;
  if (p.rpb_wide) return Accumulate<T>(static_cast<const float*>(p.rpb.data)[at]);
  return widen(static_cast<const T*>(p.rpb.data)[at]);
}

// Dot products to logits: scores = scale * scores [+ bias]. The scale comes after the sum, so that the key pass, which
// sums the same products with the factors swapped, gets the forward's logits bit for bit: with the scale inside, P of
// the backward was off by 22 % at logits of 4e6, and infinite at 4e8.
template <class T>
NATTEN_INLINE void to_logits(const Problem& p, int64_t head, const int64_t* bias, int64_t count, Accumulate<T>* scores) {
  const Accumulate<T> scale = Accumulate<T>(p.scale);
  if (!bias) {
    for (int64_t i = 0; i < count; ++i) scores[i] *= scale;
    return;
  }
  for (int64_t i = 0; i < count; ++i) scores[i] = scores[i] * scale + bias_at<T>(p, head, bias[i]);
}

// Fill up to a whole vector.
template <class A> NATTEN_INLINE void pad(A* values, int64_t count, A filler) {
  for (int64_t i = count; i % kLanes<A>; ++i) values[i] = filler;
}

}  // namespace
}  // namespace natten
