// SPDX-License-Identifier: MIT
// Backward of the tiled path, in one walk over blocks of queries: five products, weights computed once.
//
// With e = exp(s - max), P = e / sum of e and delta = sum of e <dout, v> / sum of e - dlse:  ds = scale P (<dout, v> - delta),
// dq = ds k (owned by the query), dk = ds q and dv = P dout (added up by blocks of queries, in float32 rows). Neither out
// nor lse is read: both have been rounded (see ../neighborhood_attention_backward.cpp). Owners of one colour share no
// keys, and colours follow each other: deterministic without atomics, for any number of threads.
// Windows in parts are walked twice: for the statistics of whole rows, then for the gradients.
#pragma once
#include "spread.h"

namespace natten {
namespace {

template <class T> struct Backward {
  using Element = T;
  using A = Accumulate<T>;
  static constexpr int W = kLanes<A>;
  static constexpr bool kParts = true;
  const Problem& p;
  Tiling t;
  PackedKeys<T> keys;
  Strip<A> strip;
  BiasTables<A> bias;
  Spread<T> spread;
  Gathered<A> gathered;
  bool measuring = false;           // the first walk over the parts
  int most;                         // outputs of a group
  int additional_here;              // tokens that are attended to here: all with the first part of a window
  A *queries[2], *gradients[2];     // of a chunk: transposed, and dense rows [row][query][pitch]
  A *scores, *slopes;               // s, then P; <dout, v>, then ds
  A* sums;
  Visit<A>* visits;
  int listed[kRows];
  int64_t bytes;

  static Tiling tiling(const Problem& p) { return fit_tiling<Backward, T>(p, {128, 0, 0, 64 << 10, 16, true}, kMaxTiledBytes); }

  Backward(const Problem& problem, const Tiling& tiling, void* memory) : p(problem), t(tiling), keys(problem, t), spread(keys, strip) {
    keys.key.transposed = keys.key.dense = keys.value.transposed = true;
    keys.value.dense = false;
    Carver c{static_cast<char*>(memory)};
    keys.carve(c);
    strip.carve(c, t, true);
    bias.carve(c, p, t);
    const int64_t lanes = t.rows * t.chunk * W;
    queries[0] = c.take<A>(lanes * keys.score_dim);
    queries[1] = c.take<A>(lanes * keys.key.pitch);
    gradients[0] = c.take<A>(lanes * p.value_dim);
    gradients[1] = c.take<A>(lanes * keys.value.pitch);
    scores = c.take<A>(lanes * t.slots);
    slopes = c.take<A>(lanes * t.slots);
    sums = c.take<A>(kMaxOutputs * keys.key.pitch);
    gathered.carve(c, t, keys.key.pitch);
    visits = c.take<Visit<A>>(t.rows * visits_per_row());
    most = outputs_per_group(int(larger(keys.key.pitch, keys.value.pitch) / W), int(t.part[2]));
    spread.carve(c, most);
    bytes = c.used;
    if (memory) keys.clear();
    additional_here = int(p.additional);
  }
  int64_t visits_per_row() const { return t.part[0] * t.part[1]; }

  void run(const Owner& owner, const Partials<A>& partials) {
    bias.template fill<T>(p, owner.head);
    for (int64_t begin = owner.query_begin; begin < owner.query_end; begin += t.strip) {
      const int64_t end = smaller(begin + t.strip, owner.query_end);
      strip.fill(t, begin, end, most);
      keys.start(owner);
      spread.clear();
      for_blocks(p, t, owner, [&](const BlockRow* rows, int count) {
        if (!t.whole) return differentiate_in_parts(owner, begin, end, rows, count);
        keys.bring(owner, strip, rows, count);
        const int64_t group = p.heads / p.heads_kv;
        for (int64_t n = 0; n < t.heads_together; ++n) {
          list_block(owner, n, rows, count);
          for (int64_t h = 0; h < group; ++h) differentiate_block(owner, n, n * group + h, rows, count);
        }
      });
      spread.flush(owner, partials);
    }
  }
  // The rows of keys that the block sees: for each row of queries (dq), and with the rows that see each (dk, dv).
  void list_block(const Owner& owner, int64_t n, const BlockRow* rows, int count) {
    const A* const keys_of_head = keys.ring_of(keys.key, 1, n);
    for (int r = 0; r < count; ++r)
      listed[r] = list_rows(keys.ring, keys_of_head, keys.key.size[1], rows[r], t.part[2], visits + r * visits_per_row());
    spread.list(owner, n, rows, count);
  }

  // One head of queries, of one block: the owner's `local`-th, whose keys are those of its n-th head.
  void differentiate_block(const Owner& owner, int64_t n, int64_t local, const BlockRow* rows, int count) {
    const int64_t head = owner.head * (p.heads / p.heads_kv) + local;
    for (int chunk = 0, from = 0; from < strip.vectors; ++chunk, from += int(t.chunk)) {
      const int to = int(smaller(from + t.chunk, strip.vectors));
      pack(owner, head, rows, count, from, to);
      score(n, rows, count, from, to);
      for (int r = 0; r < count; ++r)
        for (int v = from; v < to; ++v) differentiate(owner, local, rows[r], r, v, from);
      if (measuring) continue;
      if (p.grad_query.data)
        for (int g = strip.group_begin[chunk]; g < strip.group_begin[chunk + 1]; ++g)  // rows innermost: they share keys
          for (int r = 0; r < count; ++r) sum_query(owner, n, head, rows[r], r, strip.groups[g]);
      const int first = from * W, stop = int(smaller(to * W, strip.queries));
      strip.for_key_groups(first, stop, most, [&](const Group& group) {
        if (p.grad_key.data) spread.add_keys(group, first, slopes, queries[1], keys.key.pitch, 0, p.sum_key.token[2]);
        if (p.grad_value.data && p.grad_out.data) spread.add_keys(group, first, scores, gradients[1], keys.value.pitch, 1, p.sum_value.token[2]);
      });
      if (!additional_here) continue;
      if (spread.additional[0]) spread.add_additional(n, rows, count, from, slopes, queries[1], keys.key.pitch, 0);
      if (spread.additional[1] && p.grad_out.data) spread.add_additional(n, rows, count, from, scores, gradients[1], keys.value.pitch, 1);
    }
  }
  void pack(const Owner& owner, int64_t head, const BlockRow* rows, int count, int from, int to) {
    const int tokens = int(smaller(to * W, strip.queries)) - from * W;
    pack_queries<T>(p, p.query, owner, head, rows, count, strip, t, from, to, p.head_dim, keys.score_dim, queries[0]);
    if (p.grad_out.data) pack_queries<T>(p, p.grad_out, owner, head, rows, count, strip, t, from, to, p.value_dim, p.value_dim, gradients[0]);
    for (int r = 0; r < count; ++r) {
      const int64_t z = rows[r].z, y = rows[r].y, *token = strip.query_token + from * W;
      if (p.grad_query.data) prefetch_to_write(row_of<T>(p.grad_query, owner.batch, head, z, y), token, tokens, p.grad_query.token[2], p.head_dim);
      if (p.grad_key.data || spread.additional[0])
        pack_dense(tokens_of<T>(p.query, owner.batch, head, z, y, token, y), tokens, p.head_dim, queries[1] + r * t.chunk * W * keys.key.pitch, keys.key.pitch);
      if ((p.grad_value.data || spread.additional[1]) && p.grad_out.data)
        pack_dense(tokens_of<T>(p.grad_out, owner.batch, head, z, y, token, y), tokens, p.value_dim, gradients[1] + r * t.chunk * W * keys.value.pitch, keys.value.pitch);
    }
  }
  void score(int64_t n, const BlockRow* rows, int count, int from, int to) {
    const Products<A> logits{queries[0], keys.ring_of(keys.key, 0, n), keys.score_dim, keys.key.size[0], scores};
    const Products<A> output{gradients[0], keys.ring_of(keys.value, 0, n), p.value_dim, keys.value.size[0], slopes};
    score_chunk<A, Anything>(logits, t, keys.ring, strip, rows, count, from, to);
    if (p.grad_out.data) score_chunk<A, Anything>(output, t, keys.ring, strip, rows, count, from, to);
    else std::memset(slopes, 0, size_t(t.rows * t.chunk * t.slots * W) * sizeof(A));
    if (!additional_here) return;
    score_additional<A, Anything>(logits, t, keys.additional_of(keys.key, 0, n), keys.additional_pitch(), additional_here, rows, count, from, to);
    if (p.grad_out.data)
      score_additional<A, Anything>(output, t, keys.additional_of(keys.value, 0, n), keys.additional_pitch(), additional_here, rows, count, from, to);
  }
  // Scores -> P and slopes -> ds, for one vector of queries; or, of parts, their statistics alone.
  void differentiate(const Owner& owner, int64_t local, const BlockRow& row, int r, int v, int from) {
    const int64_t head = owner.head * (p.heads / p.heads_kv) + local;
    const int64_t at = (r * t.chunk + v - from) * t.slots * W;
    const int kernel = int(t.part[2]), window = window_slots(row, t), slots = window + additional_here;
    A *s = scores + at, *g = slopes + at;
    Statistics<A> statistics = weigh_vector(s, p, t, strip, bias, head, row, v, additional_here);
    forget_hidden(keys, strip, row, v, s, statistics);
    cut_short<A>(g, window, kernel, strip.cut[v], A(0));
    Vector<A> total{};
    for (int i = 0; i < slots; ++i) total += load(s + i * W) * load(g + i * W);
    if (measuring) {
      gathered.join(r, v, statistics, total);
      return;
    }
    const auto dead = statistics.total == 0;  // every weight is 0, whatever the gradients are
    Vector<A> factor = splat(A(1));  // of weights, to those of the whole window
    if (!t.whole) {
      factor = gathered.relative(statistics.maximum, load(gathered.number(r, v, 0)));
      statistics.total = load(gathered.number(r, v, 1)), total = load(gathered.number(r, v, 2));
    }
    Vector<A> inverse = dead ? Vector<A>{} : 1 / statistics.total;
    const Vector<A> delta = dead ? Vector<A>{} : total * inverse - grad_lse(owner, head, row, v);
    inverse *= factor;
    for (int i = 0; i < slots; ++i) {
      const Vector<A> weight = load(s + i * W) * inverse;
      store(s + i * W, weight);
      store(g + i * W, dead ? Vector<A>{} : weight * (load(g + i * W) - delta));
    }
    if (spread.bias.sums) spread.add_bias(local, row, v, g);
    for (int i = 0; i < slots; ++i) store(g + i * W, load(g + i * W) * A(p.scale));
  }
  Vector<A> grad_lse(const Owner& owner, int64_t head, const BlockRow& row, int v) const {
    Vector<A> out{};
    if (!p.grad_lse.data) return out;
    const A* const from = row_of<A>(p.grad_lse, owner.batch, head, row.z, row.y);
    for (int l = 0; l < W && v * W + l < strip.queries; ++l) out[l] = from[strip.query_token[v * W + l] * p.grad_lse.token[2]];
    return out;
  }
  void sum_query(const Owner& owner, int64_t head_kv, int64_t head, const BlockRow& row, int r, const Group& group) {
    sum_group<T, Anything>(keys, keys.key, head_kv, strip, group, slopes + r * t.chunk * t.slots * W, visits + r * visits_per_row(), listed[r],
                           window_slots(row, t), additional_here, nullptr, sums);
    for (int n = 0; n < group.count; ++n) {
      const int q = group.first + n;
      const A* const from = sums + n * keys.key.pitch;
      if (t.whole) write_query(owner, head, row, q, from);
      else
        for (int64_t d = 0; d < gathered.pitch; d += W) store(gathered.row(r, q) + d, load(gathered.row(r, q) + d) + load(from + d));
    }
  }
  void write_query(const Owner& owner, int64_t head, const BlockRow& row, int q, const A* from) const {
    T* const to = row_of<T>(p.grad_query, owner.batch, head, row.z, row.y);
    write_row<T>(from, to + strip.query_token[q] * p.grad_query.token[2], p.head_dim);
  }
  // A block whose windows come in parts: one head of queries after the other, because each gathers rows of its own.
  void differentiate_in_parts(const Owner& owner, int64_t begin, int64_t end, const BlockRow* rows, int count) {
    const int64_t group = p.heads / p.heads_kv;
    for (int64_t h = 0; h < group; ++h) {
      gathered.clear(count);
      for (int walk = 0; walk < 2; ++walk) {
        measuring = walk == 0;
        for_parts(keys, strip, owner, begin, end, most, rows, count, [&](const BlockRow* part, bool first) {
          additional_here = first ? int(p.additional) : 0;
          list_block(owner, 0, part, count);
          differentiate_block(owner, 0, h, part, count);
        });
      }
      for (int r = 0; p.grad_query.data && r < count; ++r)
        for (int q = 0; q < strip.queries; ++q) write_query(owner, owner.head * group + h, rows[r], q, gathered.row(r, q));
    }
  }
};

}  // namespace
}  // namespace natten
