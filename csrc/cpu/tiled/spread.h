// SPDX-License-Identifier: MIT
// What the queries of an owner add up for others: rows of gradients for the keys that they see (the transpose of a weighted
// sum over a window), for the additional tokens, and for the bias tables. Coefficients are ds or P of the fused backward,
// or slots of the unfused ops (unfused.h).
#pragma once
#include "parts.h"

namespace natten {
namespace {

// Sums of ds over queries, per entry of the bias table: per vector of queries first, [vector][row][slot][W], because the
// lanes of a vector keep their places in the window's rows from block to block.
template <class A> struct BiasGradients {
  A* sums;  // null: not wanted
  int64_t rows, kernel, vectors;

  void carve(Carver& c, const Problem& p, const Tiling& t) {
    rows = (2 * p.axis[0].kernel - 1) * (2 * p.axis[1].kernel - 1);
    kernel = p.axis[2].kernel;
    vectors = t.strip / kLanes<A>;
    sums = p.grad_rpb.data ? c.take<A>(p.heads / p.heads_kv * t.heads_together * size()) : nullptr;
  }
  int64_t size() const { return vectors * rows * kernel * kLanes<A>; }
  A* row(int64_t head, int vector, int64_t at) const { return sums + head * size() + (vector * rows + at) * kernel * kLanes<A>; }
  // Into one head's table, which has the strides of the bias.
  void flush(const Problem& p, const Strip<A>& strip, int64_t head, A* table) const {
    constexpr int W = kLanes<A>;
    const int64_t middle = 2 * p.axis[1].kernel - 1, *stride = p.rpb.token;
    for (int v = 0; v < strip.vectors; ++v)
      for (int64_t at = 0; at < rows; ++at) {
        const A* sum = row(head, v, at);
        A* const to = table + at / middle * stride[0] + at % middle * stride[1];
        for (int l = 0; l < W && v * W + l < strip.queries; ++l) {
          const int q = v * W + l;
          for (int64_t slot = 0; slot < strip.last[q] - strip.first[q]; ++slot) to[(strip.bias_of[q] + slot) * stride[2]] += sum[slot * W + l];
        }
      }
  }
};

// Partial sums of one part of the work, over its owners.
template <class A> struct Partials {
  A* bias;           // [head][table], or null
  A* additional[2];  // [batch][head of keys][token][pitch], or null
};

template <class T> struct Spread {
  using A = Accumulate<T>;
  static constexpr int W = kLanes<A>;
  const Problem& p;
  const Tiling& t;
  const PackedKeys<T>& keys;
  const Strip<A>& strip;
  BiasGradients<A> bias;
  A* additional[2];  // gradients of the additional keys and values of this owner: [token][pitch]; null: not wanted
  int most;          // outputs of a group
  struct KeyRow {
    A* sums[2];  // of its keys, of its values
    int count, row[kRows];
    int64_t slot[kRows];
  };
  KeyRow* key_row;  // of a block
  int key_rows;

  Spread(const PackedKeys<T>& packed, const Strip<A>& tables) : p(packed.p), t(packed.t), keys(packed), strip(tables) {}
  void carve(Carver& c, int outputs) {
    bias.carve(c, p, t);
    additional[0] = p.grad_additional_keys.data ? c.take<A>(t.heads_together * p.additional * keys.key.pitch) : nullptr;
    additional[1] = p.grad_additional_values.data ? c.take<A>(t.heads_together * p.additional * keys.value.pitch) : nullptr;
    key_row = c.take<KeyRow>(keys.rows());
    most = outputs;
  }
  int64_t additional_size(int i) const { return p.additional * (i ? keys.value.pitch : keys.key.pitch); }
  // A new strip of queries.
  void clear() const {
    const int64_t heads = p.heads / p.heads_kv * t.heads_together;
    if (bias.sums) std::memset(bias.sums, 0, size_t(heads * bias.size()) * sizeof(A));
    for (int i = 0; i < 2; ++i)
      if (additional[i]) std::memset(additional[i], 0, size_t(t.heads_together * additional_size(i)) * sizeof(A));
  }
  void flush(const Owner& owner, const Partials<A>& partials) const {
    const int64_t group = p.heads / p.heads_kv;
    for (int64_t h = 0; bias.sums && h < group * t.heads_together; ++h)
      bias.flush(p, strip, h, partials.bias + (owner.head * group + h) * p.rpb.head);
    for (int i = 0; i < 2; ++i) {
      if (!additional[i]) continue;
      A* const to = partials.additional[i] + (owner.batch * p.heads_kv + owner.head) * additional_size(i);
      for (int64_t j = 0; j < t.heads_together * additional_size(i); j += W) store(to + j, load(to + j) + load(additional[i] + j));
    }
  }
  // The rows of keys that a block sees, of its owner's n-th head, each with the rows of queries that see it.
  void list(const Owner& owner, int64_t n, const BlockRow* rows, int count) {
    key_rows = 0;
    for (int64_t z = rows[0].z_begin; z < rows[0].z_end; ++z)
      for (int64_t y = rows[0].y_begin; y < rows[count - 1].y_end; ++y) {
        KeyRow& key = key_row[key_rows++];
        const int64_t zt = t.axis[0].key_token(z), yt = t.axis[1].key_token(y);
        key.sums[0] = p.grad_key.data ? row_of<A>(p.sum_key, owner.batch, owner.head + n, zt, yt) : nullptr;
        key.sums[1] = p.grad_value.data ? row_of<A>(p.sum_value, owner.batch, owner.head + n, zt, yt) : nullptr;
        key.count = 0;
        for (int r = 0; r < count; ++r) {
          if (y < rows[r].y_begin || y >= rows[r].y_end) continue;
          key.row[key.count] = r;
          key.slot[key.count++] = ((z - rows[r].z_begin) * (rows[r].y_end - rows[r].y_begin) + y - rows[r].y_begin) * t.part[2];
        }
      }
  }
  // Adds coefficients * rows of the block's queries to the sums of keys (0) or values (1), whose tokens are `stride` apart.
  void add_keys(const Group& group, int first, const A* coefficients, const A* dense, int64_t pitch, int which, int64_t stride) const {
    const ByKey<A> coefficient{coefficients + group.first * W, strip.place + first};
    for (int k = 0; k < key_rows; ++k) {
      const KeyRow& key = key_row[k];
      Visit<A> seen[kRows];
      A* out[kMaxOutputs];
      for (int i = 0; i < key.count; ++i) seen[i] = {dense + key.row[i] * t.chunk * W * pitch, key.row[i] * t.chunk * t.slots + key.slot[i]};
      for (int n = 0; n < group.count; ++n) out[n] = key.sums[which] + strip.key_token[group.first + n] * stride;
      sum_columns<A, Anything>(group, coefficient, seen, key.count, pitch, out, nullptr, true);
    }
  }
  // The same for the additional tokens of the owner's n-th head, which every query sees.
  void add_additional(int64_t n, const BlockRow* rows, int count, int from, const A* coefficients, const A* dense, int64_t pitch, int which) const {
    const int tokens = int(smaller(t.chunk * W, strip.queries - from * W)), all = int(p.additional);
    A* const to = additional[which] + n * additional_size(which);
    Visit<A> seen[kRows];
    for (int r = 0; r < count; ++r) seen[r] = {dense + r * t.chunk * W * pitch, r * t.chunk * t.slots + window_slots(rows[r], t)};
    for (int first = 0; first < all; first += most) {
      const Group group = flat_group({first, int(smaller(most, all - first)), false, 0, {}}, tokens);
      A* out[kMaxOutputs];
      for (int i = 0; i < group.count; ++i) out[i] = to + (first + i) * pitch;
      const ByKey<A> coefficient{coefficients + first * W, strip.lane_place};
      sum_columns<A, Anything>(group, coefficient, seen, count, pitch, out, nullptr, true);
    }
  }
  // Adds the slots of one vector of queries to the sums of the bias tables; `local` counts the heads of the owner.
  void add_bias(int64_t local, const BlockRow& row, int v, const A* slots) const {
    const int64_t middle = 2 * p.axis[1].kernel - 1;
    for (int64_t z = 0; z < row.z_end - row.z_begin; ++z)
      for (int64_t y = 0; y < row.y_end - row.y_begin; ++y) {
        A* const sum = bias.row(local, v, (row.z_bias + z) * middle + row.y_bias + y);
        for (int64_t slot = 0; slot < p.axis[2].kernel; ++slot, slots += W) store(sum + slot * W, load(sum + slot * W) + load(slots));
      }
  }
};

}  // namespace
}  // namespace natten
