// SPDX-License-Identifier: MIT
// One neighborhood attention as plain data: what the fronts (*.cpp) fill in and every kernel reads. No torch.
// Spatial axes are padded to three with leading axes of one token, so that kernels know a single rank.
#pragma once
#include "geometry.h"

namespace natten {

constexpr int kAxes = 3;

enum class Dtype { float64, float32, float16, bfloat16 };

// A tensor [batch, axes.., head, dim]; strides in elements, 0 where it has no such dimension.
struct Rows {
  void* data = nullptr;
  int64_t batch = 0, token[kAxes] = {0, 0, 0}, head = 0, dim = 1;
};

struct Problem {
  int64_t batch, heads, heads_kv, head_dim, value_dim, additional;
  int64_t q_shape[kAxes], kv_shape[kAxes], q_origin[kAxes], kv_origin[kAxes];
  Axis axis[kAxes];  // lengths are those of the global grid
  int order[kAxes];  // of a turned problem (cpu/tiled/tiling.h): which of the caller's axes each axis is
  double scale;
  Rows query, key, value, additional_keys, additional_values, out, lse;
  Rows rpb;       // dense; token: strides of the table's axes, dim unused
  bool rpb_wide;  // the table is float32 beside 16-bit inputs
  bool whole;     // tiled path: windows may not be handled in parts
  // Tiled path, for bench.tune_cpu: queries of a strip, rows of a block, heads together, bytes of a chunk; 0: choose.
  int64_t tiling[4];
  Rows key_mask;
  // Unfused ops: weights that are read and written, [.., slot]; `dim` is the stride of slots. In a window, neighbours on an
  // axis are slot_step slots apart; slots that a window lacks are written as `absent`.
  Rows slots_in, slots_out;
  int64_t slot_step[kAxes];
  double absent;
  // backward
  Rows grad_out, grad_lse, grad_query, grad_key, grad_value, grad_additional_keys, grad_additional_values, grad_rpb;
  Rows delta;            // [batch, queries, heads], dtype of lse: <grad_out, out> - grad_lse, before out was rounded
  Rows row_lse;          // the same shape: lse, with +inf for rows that attend to nothing
  void* partials;        // [kParts, ..] in the dtype of lse, zeros: sums of one part for gradients that all queries share
  Rows sum_key, sum_value;  // tiled path: zeros to add the gradients of keys and values to, in the dtype of lse, rows padded
};

// Scratch that a thread of the tiled CPU path may have; problems whose smallest tiles take more are the general path's.
constexpr int64_t kMaxTiledBytes = 2 << 20;

// Parts of the work on gradients that all queries share: a constant number, so that the result does not depend on threads.
constexpr int kParts = 16;

namespace {  // internal linkage, as in geometry.h

// Entries of one head's bias table.
NATTEN_HOST_DEVICE inline int64_t table_size(const Problem& p) {
  int64_t size = 1;
  for (int a = 0; a < kAxes; ++a) size *= 2 * p.axis[a].kernel - 1;
  return size;
}

// Places in a dilation group of the queries that see a key (an index of the grid) on an axis; of the inverse window those that this
// problem holds: [q_origin, q_origin + q_shape). Spans of keys in their order are in that order too, empty ones as well.
NATTEN_HOST_DEVICE inline Span queries_of(const Problem& p, int a, int64_t key) {
  const int64_t dilation = p.axis[a].dilation;
  Span span = inverse_window(p.axis[a], key);
  const int64_t low = larger(p.q_origin[a] - span.group, 0), stop = p.q_origin[a] + p.q_shape[a] - span.group;
  const int64_t begin = ceil_div(low, dilation), end = stop <= 0 ? 0 : ceil_div(stop, dilation);
  span.first = smaller(larger(span.first, begin), end);
  span.end = larger(smaller(span.end, end), span.first);
  return span;
}

// Of the unfused ops: whether queries add to what other queries add to as well.
inline bool adds_to_keys(const Problem& p) { return p.grad_key.data || p.grad_additional_keys.data || p.grad_rpb.data; }

// Multiply-adds of one product (queries x window x head dim) over the whole problem.
inline double work_of(const Problem& p) {
  double work = double(p.batch) * double(p.heads) * double(p.head_dim + p.value_dim), window = 1;
  for (int i = 0; i < kAxes; ++i) work *= double(p.q_shape[i]), window *= double(p.axis[i].kernel);
  return work * (window + double(p.additional));
}
// As many shares as may be, but none of fewer than kGrain multiply-adds: waking a thread costs about 5 us.
inline int64_t useful_shares(double work, int64_t most) {
  constexpr double kGrain = 1 << 17;
  return larger(smaller(most, int64_t(work / kGrain) + 1), 1);
}

}  // namespace
}  // namespace natten
