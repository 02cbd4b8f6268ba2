// SPDX-License-Identifier: MIT
// Backward of the tiled path, in one walk over blocks of queries: five products, weights computed once.
//
// With e = exp(s - max), P = e / sum of e and delta = sum of e <dout, v> / sum of e - dlse:  ds = scale P (<dout, v> - delta),
// dq = ds k (owned by the query), dk = ds q and dv = P dout (added up by blocks of queries, in float32 rows). Neither out
// nor lse is read: both have been rounded (see ../neighborhood_attention_backward.cpp). Owners of one colour share no
// keys, and colours follow each other: deterministic without atomics, for any number of threads.
// Windows in parts are walked twice: for the statistics of whole rows, then for the gradients.
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

template <class T> struct Backward {
  using A = Accumulate<T>;
  static constexpr int W = kLanes<A>;
  static constexpr bool kParts = true;
  const Problem& p;
  Tiling t;
  PackedKeys<T> keys;
  Strip<A> strip;
  BiasTables<A> bias;
  BiasGradients<A> bias_gradients;
  Gathered<A> gathered;
  bool measuring = false;           // the first walk over the parts
  int most;                         // outputs of a group
  int additional_here;              // tokens that are attended to here: all with the first part of a window
  A *queries[2], *gradients[2];     // of a chunk: transposed, and dense rows [row][query][pitch]
  A *scores, *slopes;               // s, then P; <dout, v>, then ds
  A* sums;
  A* additional[2];                 // gradients of the additional tokens of this owner: [token][pitch]; null: not wanted
  Visit<A>* visits;
  int listed[kRows];
  struct KeyRow {
    A* sums[2];  // of its keys, of its values
    int count, row[kRows];
    int64_t slot[kRows];
  };
  KeyRow* key_row;  // of a block
  int key_rows;
  int64_t bytes;

  static Tiling tiling(const Problem& p) { return fit_tiling<Backward, T>(p, {128, 0, 0, 64 << 10, 16, true}, kMaxTiledBytes); }

  Backward(const Problem& problem, const Tiling& tiling, void* memory) : p(problem), t(tiling), keys(problem, t) {
    keys.key.transposed = keys.key.dense = keys.value.transposed = true;
    keys.value.dense = false;
    Carver c{static_cast<char*>(memory)};
    keys.carve(c);
    strip.carve(c, t, true);
    bias.carve(c, p, t);
    bias_gradients.carve(c, p, t);
    const int64_t lanes = t.rows * t.chunk * W;
    queries[0] = c.take<A>(lanes * keys.score_dim);
    queries[1] = c.take<A>(lanes * keys.key.pitch);
    gradients[0] = c.take<A>(lanes * p.value_dim);
    gradients[1] = c.take<A>(lanes * keys.value.pitch);
    scores = c.take<A>(lanes * t.slots);
    slopes = c.take<A>(lanes * t.slots);
    sums = c.take<A>(kMaxOutputs * keys.key.pitch);
    gathered.carve(c, t, keys.key.pitch);
    additional[0] = p.grad_additional_keys.data ? c.take<A>(t.heads_together * p.additional * keys.key.pitch) : nullptr;
    additional[1] = p.grad_additional_values.data ? c.take<A>(t.heads_together * p.additional * keys.value.pitch) : nullptr;
    visits = c.take<Visit<A>>(t.rows * visits_per_row());
    key_row = c.take<KeyRow>(keys.rows());
    bytes = c.used;
    if (memory) keys.clear();
    most = outputs_per_group(int(larger(keys.key.pitch, keys.value.pitch) / W), int(t.part[2]));
    additional_here = int(p.additional);
  }
  int64_t visits_per_row() const { return t.part[0] * t.part[1]; }

  // Partial sums of one part, over its owners.
  struct Partials {
    A* bias;           // [head][table], or null
    A* additional[2];  // [batch][head of keys][token][pitch], or null
  };
  void run(const Owner& owner, const Partials& partials) {
    bias.template fill<T>(p, owner.head);
    for (int64_t begin = owner.query_begin; begin < owner.query_end; begin += t.strip) {
      const int64_t end = smaller(begin + t.strip, owner.query_end);
      strip.fill(t, begin, end, most);
      keys.start(owner);
      clear_sums();
      for_blocks(p, t, owner, [&](const BlockRow* rows, int count) {
        if (!t.whole) return differentiate_in_parts(owner, begin, end, rows, count);
        keys.bring(owner, strip, rows, count);
        const int64_t group = p.heads / p.heads_kv;
        for (int64_t n = 0; n < t.heads_together; ++n) {
          list_block(owner, n, rows, count);
          for (int64_t h = 0; h < group; ++h) differentiate_block(owner, n, n * group + h, rows, count);
        }
      });
      flush_sums(owner, partials);
    }
  }
  int64_t additional_size(int i) const { return p.additional * (i ? keys.value.pitch : keys.key.pitch); }
  void clear_sums() const {
    const int64_t heads = p.heads / p.heads_kv * t.heads_together;
    if (bias_gradients.sums) std::memset(bias_gradients.sums, 0, size_t(heads * bias_gradients.size()) * sizeof(A));
    for (int i = 0; i < 2; ++i)
      if (additional[i]) std::memset(additional[i], 0, size_t(t.heads_together * additional_size(i)) * sizeof(A));
  }
  void flush_sums(const Owner& owner, const Partials& partials) const {
    const int64_t group = p.heads / p.heads_kv;
    for (int64_t h = 0; bias_gradients.sums && h < group * t.heads_together; ++h)
      bias_gradients.flush(p, strip, h, partials.bias + (owner.head * group + h) * p.rpb.head);
    for (int i = 0; i < 2; ++i) {
      if (!additional[i]) continue;
      A* const to = partials.additional[i] + (owner.batch * p.heads_kv + owner.head) * additional_size(i);
      for (int64_t j = 0; j < t.heads_together * additional_size(i); j += W) store(to + j, load(to + j) + load(additional[i] + j));
    }
  }
  // The rows of keys that the block sees: for each row of queries (dq), and with the rows that see each (dk, dv).
  void list_block(const Owner& owner, int64_t n, const BlockRow* rows, int count) {
    const A* const keys_of_head = keys.ring_of(keys.key, 1, n);
    for (int r = 0; r < count; ++r)
      listed[r] = list_rows(keys.ring, keys_of_head, keys.key.size[1], rows[r], t.part[2], visits + r * visits_per_row());
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
        if (p.grad_key.data) add_keys(group, first, slopes, queries[1], keys.key.pitch, 0, p.sum_key.token[2]);
        if (p.grad_value.data && p.grad_out.data) add_keys(group, first, scores, gradients[1], keys.value.pitch, 1, p.sum_value.token[2]);
      });
      if (!additional_here) continue;
      if (additional[0]) add_additional(rows, count, from, slopes, queries[1], keys.key.pitch, additional[0] + n * additional_size(0));
      if (additional[1] && p.grad_out.data) add_additional(rows, count, from, scores, gradients[1], keys.value.pitch, additional[1] + n * additional_size(1));
    }
  }
  void pack(const Owner& owner, int64_t head, const BlockRow* rows, int count, int from, int to) {
    const int tokens = int(smaller(to * W, strip.queries)) - from * W;
    pack_queries<T>(p, p.query, owner, head, rows, count, strip, t, from, to, p.head_dim, keys.score_dim, queries[0]);
    if (p.grad_out.data) pack_queries<T>(p, p.grad_out, owner, head, rows, count, strip, t, from, to, p.value_dim, p.value_dim, gradients[0]);
    for (int r = 0; r < count; ++r) {
      const int64_t z = rows[r].z, y = rows[r].y, *token = strip.query_token + from * W;
      if (p.grad_query.data) prefetch_to_write(row_of<T>(p.grad_query, owner.batch, head, z, y), token, tokens, p.grad_query.token[2], p.head_dim);
      if (p.grad_key.data || additional[0])
        pack_dense(tokens_of<T>(p.query, owner.batch, head, z, y, token, y), tokens, p.head_dim, queries[1] + r * t.chunk * W * keys.key.pitch, keys.key.pitch);
      if ((p.grad_value.data || additional[1]) && p.grad_out.data)
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
    if (bias_gradients.sums) add_bias_gradients(local, row, v, g);
    for (int i = 0; i < slots; ++i) store(g + i * W, load(g + i * W) * A(p.scale));
  }
  Vector<A> grad_lse(const Owner& owner, int64_t head, const BlockRow& row, int v) const {
    Vector<A> out{};
    if (!p.grad_lse.data) return out;
    const A* const from = row_of<A>(p.grad_lse, owner.batch, head, row.z, row.y);
    for (int l = 0; l < W && v * W + l < strip.queries; ++l) out[l] = from[strip.query_token[v * W + l] * p.grad_lse.token[2]];
    return out;
  }
  void add_bias_gradients(int64_t local, const BlockRow& row, int v, const A* g) const {
    const int64_t middle = 2 * p.axis[1].kernel - 1;
    for (int64_t z = 0; z < row.z_end - row.z_begin; ++z)
      for (int64_t y = 0; y < row.y_end - row.y_begin; ++y) {
        A* const sum = bias_gradients.row(local, v, (row.z_bias + z) * middle + row.y_bias + y);
        for (int64_t slot = 0; slot < p.axis[2].kernel; ++slot, g += W) store(sum + slot * W, load(sum + slot * W) + load(g));
      }
  }
  void sum_query(const Owner& owner, int64_t head_kv, int64_t head, const BlockRow& row, int r, const Group& group) {
    const int window = window_slots(row, t);
    ByQuery<A> coefficient, extra;
    A* out[kMaxOutputs];
    for (int n = 0; n < group.count; ++n) {
      coefficient.at[n] = slopes + r * t.chunk * t.slots * W + strip.place[group.first + n];
      extra.at[n] = coefficient.at[n] + (strip.first[group.first + n] + window) * W;
      out[n] = sums + n * keys.key.pitch;
    }
    sum_columns<A, Anything>(group, coefficient, visits + r * visits_per_row(), listed[r], keys.key.pitch, out, nullptr, false);
    if (additional_here) {
      const Visit<A> all{keys.additional_of(keys.key, 1, head_kv), 0};
      sum_columns<A, Anything>(flat_group(group, additional_here), extra, &all, 1, keys.key.pitch, out, nullptr, true);
    }
    for (int n = 0; n < group.count; ++n) {
      const int q = group.first + n;
      if (t.whole) write_query(owner, head, row, q, out[n]);
      else
        for (int64_t d = 0; d < gathered.pitch; d += W) store(gathered.row(r, q) + d, load(gathered.row(r, q) + d) + load(out[n] + d));
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
  // Adds coefficients * rows of the block's queries to the keys' sums: dk (0) from ds and queries, dv (1) from P and dout.
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
  // The same for the additional tokens, which every query sees.
  void add_additional(const BlockRow* rows, int count, int from, const A* coefficients, const A* dense, int64_t pitch, A* to) {
    const int tokens = int(smaller(t.chunk * W, strip.queries - from * W)), all = int(p.additional);
    Visit<A> seen[kRows];
    for (int r = 0; r < count; ++r) seen[r] = {dense + r * t.chunk * W * pitch, r * t.chunk * t.slots + window_slots(rows[r], t)};
    for (int first = 0; first < all; first += most) {
      const Group group = flat_group({first, int(smaller(most, all - first)), false, 0, {}}, tokens);
      A* out[kMaxOutputs];
      for (int n = 0; n < group.count; ++n) out[n] = to + (first + n) * pitch;
      const ByKey<A> coefficient{coefficients + first * W, strip.lane_place};
      sum_columns<A, Anything>(group, coefficient, seen, count, pitch, out, nullptr, true);
    }
  }
};

}  // namespace
}  // namespace natten
