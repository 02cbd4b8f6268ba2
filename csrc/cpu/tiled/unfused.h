// SPDX-License-Identifier: MIT
// Attention in two halves, whose weights lie in memory, slot by slot of each query's window. Over the same tiles as the
// fused pass, and made of its parts:
//   slots_out  = <query, key of the slot> [+ bias]             qk; or the gradient of av by its weights
//   grad_query = sum over the slots of slots_in * key          av; or the gradient of qk by its query
//   grad_key   = sum over the queries of slots_in * query      the gradients by keys and values, and by
//                                                              additional tokens and the bias table
// The names are those of qk's backward. A problem has outputs for what is to be computed.
#pragma once
#include "spread.h"

namespace natten {
namespace {

template <class T> struct Unfused {
  using Element = T;
  using A = Accumulate<T>;
  static constexpr int W = kLanes<A>;
  // The weights of a whole window are in memory, many times over: what a thread needs is little beside them.
  static constexpr bool kParts = false;
  const Problem& p;
  Tiling t;
  PackedKeys<T> keys;
  Strip<A> strip;
  BiasTables<A> bias;
  Spread<T> spread;
  const bool spreads;
  bool uncached;     // slots that are written are in no cache yet, and are fetched before: at 224x224 0.85 of the time of qk, at 56x56 1.02
  bool contiguous;   // slots of the caller are in the order of those of whole windows here
  int64_t window;    // slots of a whole window
  int most;          // outputs of a group
  A *queries[2];     // of a chunk: transposed, and dense rows [row][query][pitch]
  A *slots, *sums;   // slots: [row][vector of the chunk][slot][W]
  Visit<A>* visits;  // of each row of a block
  int listed[kRows];
  int64_t bytes;

  // A chunk of all of 56 queries with windows of 7x7, where the fused pass has one of half of them: av takes 0.95 of the time,
  // qk the same. Owners that add to keys have four colours, so there are more.
  static Tiling tiling(const Problem& p) {
    const bool adds = adds_to_keys(p);
    return fit_tiling<Unfused, T>(p, {128, 0, 0, 96 << 10, adds ? 16 : 8, adds}, kMaxTiledBytes);
  }

  Unfused(const Problem& problem, const Tiling& tiling, void* memory)
      : p(problem), t(tiling), keys(problem, t), spread(keys, strip), spreads(adds_to_keys(problem)) {
    keys.key.transposed = p.slots_out.data, keys.key.dense = p.grad_query.data;
    keys.value.transposed = keys.value.dense = false;
    Carver c{static_cast<char*>(memory)};
    keys.carve(c);
    strip.carve(c, t, spreads);
    bias.carve(c, p, t);
    const int64_t lanes = t.rows * t.chunk * W;
    queries[0] = p.slots_out.data ? c.take<A>(lanes * p.head_dim) : nullptr;
    queries[1] = spreads ? c.take<A>(lanes * keys.key.pitch) : nullptr;
    slots = c.take<A>(lanes * t.slots);
    sums = c.take<A>(kMaxOutputs * keys.key.pitch);
    visits = c.take<Visit<A>>(t.rows * visits_per_row());
    most = outputs_per_group(int(keys.key.pitch / W), int(t.part[2]));
    spread.carve(c, most);
    bytes = c.used;
    window = t.part[0] * t.part[1] * t.part[2];
    uncached = p.slots_out.dim == 1 && p.heads * p.q_shape[0] * p.q_shape[1] * p.q_shape[2] * window * int64_t(sizeof(T)) > kCached;
    contiguous = p.slot_step[2] == 1 && (t.part[1] == 1 || p.slot_step[1] == t.part[2]) &&
                 (t.part[0] == 1 || p.slot_step[0] == t.part[1] * t.part[2]);
    if (memory) keys.clear();
  }
  int64_t visits_per_row() const { return t.part[0] * t.part[1]; }

  void run(const Owner& owner) { run(owner, {}); }
  void run(const Owner& owner, const Partials<A>& partials) {
    bias.template fill<T>(p, owner.head);
    for (int64_t begin = owner.query_begin; begin < owner.query_end; begin += t.strip) {
      strip.fill(t, begin, smaller(begin + t.strip, owner.query_end), most);
      keys.start(owner);
      spread.clear();
      for_blocks(p, t, owner, [&](const BlockRow* rows, int count) {
        keys.bring(owner, strip, rows, count);
        for (int64_t n = 0; n < t.heads_together; ++n) run_block(owner, n, rows, count);
      });
      spread.flush(owner, partials);
    }
  }

  // The owner's n-th head, of one block.
  void run_block(const Owner& owner, int64_t n, const BlockRow* rows, int count) {
    for (int r = 0; p.grad_query.data && r < count; ++r)
      listed[r] = list_rows(keys.ring, keys.ring_of(keys.key, 1, n), keys.key.size[1], rows[r], t.part[2], visits + r * visits_per_row());
    if (p.grad_key.data) spread.list(owner, n, rows, count);
    for (int chunk = 0, from = 0; from < strip.vectors; ++chunk, from += int(t.chunk)) {
      const int to = int(smaller(from + t.chunk, strip.vectors));
      if (p.slots_out.data) score(owner, n, rows, count, from, to);
      if (!p.slots_in.data) continue;
      for (int r = 0; r < count; ++r) read_slots(owner, n, rows[r], r, from, to);
      for (int g = strip.group_begin[chunk]; p.grad_query.data && g < strip.group_begin[chunk + 1]; ++g)  // rows innermost: they share keys
        for (int r = 0; r < count; ++r) sum_keys(owner, n, rows[r], r, strip.groups[g]);
      if (spreads) spread_block(owner, n, rows, count, from, to);
    }
  }
  void score(const Owner& owner, int64_t n, const BlockRow* rows, int count, int from, int to) {
    const int tokens = int(smaller(to * W, strip.queries)) - from * W;
    for (int r = 0; uncached && r < count; ++r)
      prefetch_to_write(row_of<T>(p.slots_out, owner.batch, owner.head + n, rows[r].z, rows[r].y), strip.query_token + from * W, tokens,
                        p.slots_out.token[2], window);
    pack_queries<T>(p, p.query, owner, owner.head + n, rows, count, strip, t, from, to, p.head_dim, p.head_dim, queries[0]);
    const Products<A> products{queries[0], keys.ring_of(keys.key, 0, n), p.head_dim, keys.key.size[0], slots};
    score_chunk<A, Anything>(products, t, keys.ring, strip, rows, count, from, to);
    if (p.additional)
      score_additional<A, Anything>(products, t, keys.additional_of(keys.key, 0, n), keys.additional_pitch(), int(p.additional), rows, count, from, to);
    for (int r = 0; r < count; ++r) {
      for (int v = from; v < to; ++v) {
        A* const at = slots_of(r, v - from);
        if (bias.tables) add_bias_of_window(at, A(1), t, strip, bias, owner.head + n, rows[r], v);
        cut_short<A>(at, window_slots(rows[r], t), int(t.part[2]), strip.cut[v], A(p.absent));
      }
      write_slots(owner, n, rows[r], r, from, to);
    }
  }
  void sum_keys(const Owner& owner, int64_t n, const BlockRow& row, int r, const Group& group) {
    sum_group<T, Anything>(keys, keys.key, n, strip, group, slots_of(r, 0), visits + r * visits_per_row(), listed[r], window_slots(row, t),
                           int(p.additional), nullptr, sums);
    T* const to = row_of<T>(p.grad_query, owner.batch, owner.head + n, row.z, row.y);
    for (int i = 0; i < group.count; ++i)
      write_row<T>(sums + i * keys.key.pitch, to + strip.query_token[group.first + i] * p.grad_query.token[2], p.head_dim);
  }
  void spread_block(const Owner& owner, int64_t n, const BlockRow* rows, int count, int from, int to) {
    const int first = from * W, stop = int(smaller(to * W, strip.queries));
    for (int r = 0; r < count; ++r) {
      const int64_t z = rows[r].z, y = rows[r].y;
      pack_dense(tokens_of<T>(p.query, owner.batch, owner.head + n, z, y, strip.query_token + first, y), stop - first, p.head_dim,
                 queries[1] + r * t.chunk * W * keys.key.pitch, keys.key.pitch);
      for (int v = from; spread.bias.sums && v < to; ++v) spread.add_bias(n, rows[r], v, slots_of(r, v - from));
    }
    if (p.grad_key.data)
      strip.for_key_groups(first, stop, most, [&](const Group& group) {
        spread.add_keys(group, first, slots, queries[1], keys.key.pitch, 0, p.sum_key.token[2]);
      });
    if (spread.additional[0]) spread.add_additional(n, rows, count, from, slots, queries[1], keys.key.pitch, 0);
  }

  A* slots_of(int r, int v) const { return slots + (r * t.chunk + v) * t.slots * W; }

  // Calls visit(slot here, slot of the caller, slots, steps of the caller) for runs of the slots that a row of queries has.
  template <class Visit> void for_runs(const BlockRow& row, const Visit& visit) const {
    const int here = window_slots(row, t), additional = int(p.additional);
    if (contiguous && here == window) return visit(0, int64_t(0), here + additional, int64_t(1));
    const int kernel = int(t.part[2]);
    int at = 0;
    for (int64_t z = 0; z < row.z_end - row.z_begin; ++z)
      for (int64_t y = 0; y < row.y_end - row.y_begin; ++y, at += kernel)
        visit(at, z * p.slot_step[0] + y * p.slot_step[1], kernel, p.slot_step[2]);
    if (additional) visit(at, window, additional, int64_t(1));
  }
  void read_slots(const Owner& owner, int64_t n, const BlockRow& row, int r, int from, int to) const {
    const T* const base = row_of<T>(p.slots_in, owner.batch, owner.head + n, row.z, row.y);
    const int tokens = int(smaller(to * W, strip.queries)) - from * W;
    for_runs(row, [&](int here, int64_t there, int count, int64_t step) {
      const TokenRow<T> run{base + there * p.slots_in.dim, strip.query_token + from * W, p.slots_in.token[2], step * p.slots_in.dim, 0};
      pack_transposed(run, tokens, count, slots_of(r, 0) + here * W, W, t.slots * W);
    });
    for (int v = from; v < to; ++v) cut_short<A>(slots_of(r, v - from), window_slots(row, t), int(t.part[2]), strip.cut[v], A(0));
  }
  void write_slots(const Owner& owner, int64_t n, const BlockRow& row, int r, int from, int to) const {
    T* const base = row_of<T>(p.slots_out, owner.batch, owner.head + n, row.z, row.y);
    const int64_t* const token = strip.query_token + from * W;
    const int tokens = int(smaller(to * W, strip.queries)) - from * W;
    if (window_slots(row, t) < window) {  // the outer axes cut this window short
      T absent;
      narrow(A(p.absent), &absent);
      for (int i = 0; i < tokens; ++i)
        for (int64_t s = 0; s < window; ++s) base[token[i] * p.slots_out.token[2] + s] = absent;
    }
    for_runs(row, [&](int here, int64_t there, int count, int64_t step) {
      unpack_transposed(slots_of(r, 0) + here * W, t.slots * W, tokens, count, base + there, token, p.slots_out.token[2], step);
    });
  }
};

}  // namespace
}  // namespace natten
