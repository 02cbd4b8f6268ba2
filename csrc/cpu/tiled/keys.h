// SPDX-License-Identifier: MIT
// What both passes share: the keys of an owner in a ring, and the scores and weights of a chunk of queries.
#pragma once
#include "softmax.h"
#include "tiling.h"

namespace natten {
namespace {

// A ring of packed rows of keys: place (z, y) lies in slot (z mod ring[0], y mod ring[1]).
struct Ring {
  int64_t* tag;
  int64_t size[2];

  void carve(Carver& c, const Tiling& t) {
    size[0] = t.ring[0], size[1] = t.ring[1];
    tag = c.take<int64_t>(size[0] * size[1]);
  }
  void clear() const {
    for (int64_t i = 0; i < size[0] * size[1]; ++i) tag[i] = -1;
  }
  int64_t slot(int64_t z, int64_t y) const { return z % size[0] * size[1] + y % size[1]; }
  // True if the slot does not hold that row yet: it is to be packed now.
  bool claim(int64_t slot, int64_t id) const {
    if (tag[slot] == id) return false;
    tag[slot] = id;
    return true;
  }
};

// The bias tables of the heads that share an owner's keys, in the type of sums, with room for loads of whole vectors.
template <class A> struct BiasTables {
  A* tables;  // null: no bias
  int64_t pitch, middle, count, heads;

  void carve(Carver& c, const Problem& p, const Tiling& t) {
    middle = 2 * p.axis[1].kernel - 1;
    count = (2 * p.axis[0].kernel - 1) * middle;
    pitch = 2 * p.axis[2].kernel - 1 + 2 * kLanes<A>;
    heads = p.heads / p.heads_kv * t.heads_together;
    tables = p.rpb.data ? c.take<A>(heads * count * pitch) : nullptr;
  }
  template <class T> void fill(const Problem& p, int64_t head_kv) const {
    const int64_t width = 2 * p.axis[2].kernel - 1;
    for (int64_t i = 0; tables && i < heads * count; ++i)
      for (int64_t x = 0; x < pitch; ++x) {
        const int64_t row = i % count, head = head_kv * (p.heads / p.heads_kv) + i / count;
        const int64_t at = head * p.rpb.head + row / middle * p.rpb.token[0] + row % middle * p.rpb.token[1] + x * p.rpb.token[2];
        A& entry = tables[i * pitch + x];
        if (x >= width) entry = 0;
        else if (p.rpb_wide) entry = A(static_cast<const float*>(p.rpb.data)[at]);
        else entry = widen(static_cast<const T*>(p.rpb.data)[at]);
      }
  }
  const A* row(int64_t head, int64_t z, int64_t y) const { return tables + ((head % heads) * count + z * middle + y) * pitch; }
};

template <class T> NATTEN_INLINE T* row_of(const Rows& rows, int64_t batch, int64_t head, int64_t z, int64_t y) {
  return static_cast<T*>(rows.data) + batch * rows.batch + head * rows.head + z * rows.token[0] + y * rows.token[1];
}
template <class T> NATTEN_INLINE TokenRow<T> tokens_of(const Rows& rows, int64_t batch, int64_t head, int64_t z, int64_t y, const int64_t* token, int64_t next) {
  return {row_of<T>(rows, batch, head, z, y), token, rows.token[2], rows.dim, (next - y) * rows.token[1]};
}

// One row of queries (or of gradients) of one chunk, transposed: [vector][dim][W]; elements past the tensor's are 1.
template <class T, class A = Accumulate<T>>
inline void pack_query_row(const TokenRow<T>& row, int tokens, int64_t dim, int64_t score_dim, A* out) {
  constexpr int W = kLanes<A>;
  pack_transposed(row, tokens, dim, out, W, score_dim * W);
  for (int v = 0; v * W < tokens; ++v)
    for (int64_t d = dim; d < score_dim; ++d) store(out + (v * score_dim + d) * W, splat(A(1)));
}
// The row of the next block that is likely to follow row r of this one.
inline int64_t next_row(const BlockRow* rows, int count, int r, const Problem& p) {
  return smaller(rows[r].y + (count > 1 ? count * (rows[1].y - rows[0].y) : 1), p.q_shape[1] - 1);
}
// The rows of a block: [row][vector][dim][W].
template <class T, class A = Accumulate<T>>
inline void pack_queries(const Problem& p, const Rows& tensor, const Owner& owner, int64_t head, const BlockRow* rows, int count, const Strip<A>& strip,
                         const Tiling& t, int from, int to, int64_t dim, int64_t score_dim, A* out) {
  constexpr int W = kLanes<A>;
  const int tokens = int(smaller(to * W, strip.queries)) - from * W;
  for (int r = 0; r < count; ++r) {
    const int64_t next = next_row(rows, count, r, p);
    pack_query_row(tokens_of<T>(tensor, owner.batch, head, rows[r].z, rows[r].y, strip.query_token + from * W, next), tokens, dim,
                   score_dim, out + r * t.chunk * score_dim * W);
  }
}

// Scores of one kind (queries and keys; or gradients and values) for all rows of a block and one chunk of queries.
template <class A> struct Products {
  const A* query;   // [row][vector][D][W]
  const A* keys;    // ring of [D][pitch]
  int64_t dim, key_size;
  A* scores;        // [row][vector of the chunk][slot][W]
};

template <class A, class G>
inline void score_chunk(const Products<A>& a, const Tiling& t, const Ring& ring, const Strip<A>& strip, const BlockRow* rows,
                        int count, int from, int to) {
  constexpr int W = kLanes<A>;
  const int kernel = int(t.part[2]);
  for (int64_t z = rows[0].z_begin; z < rows[0].z_end; ++z)
    for (int64_t y = rows[0].y_begin; y < rows[count - 1].y_end; ++y) {
      int low = 0, high = 0;  // the rows that see this row of keys
      while (low < count && rows[low].y_end <= y) ++low;
      while (high < count && rows[high].y_begin <= y) ++high;
      if (low >= high) continue;  // between parts of windows
      const A* keys = a.keys + ring.slot(z, y) * a.key_size;
      for (int v = from; v < to; ++v) {
        const A* query[kRows];
        A* scores[kRows];
        for (int r = low; r < high; ++r) {
          const int64_t slot = ((z - rows[r].z_begin) * (rows[r].y_end - rows[r].y_begin) + y - rows[r].y_begin) * kernel;
          query[r - low] = a.query + (r * t.chunk + v - from) * a.dim * W;
          scores[r - low] = a.scores + ((r * t.chunk + v - from) * t.slots + slot) * W;
        }
        score_row<A, G>(high - low, query, keys, t.pitch, strip.map[v], a.dim, kernel, scores);
      }
    }
}

inline int window_slots(const BlockRow& row, const Tiling& t) {
  return int((row.z_end - row.z_begin) * (row.y_end - row.y_begin) * t.part[2]);
}

// The additional tokens' scores, after those of the window.
template <class A, class G>
inline void score_additional(const Products<A>& a, const Tiling& t, const A* keys, int64_t pitch, int additional, const BlockRow* rows,
                             int count, int from, int to) {
  constexpr int W = kLanes<A>;
  LaneMap<A> all;
  all.base = all.base1 = 0;
  all.index = Index<A>{};
  all.kind = kBroadcast;
  for (int v = from; v < to; ++v) {
    const A* query[kRows];
    A* scores[kRows];
    for (int r = 0; r < count; ++r) {
      query[r] = a.query + (r * t.chunk + v - from) * a.dim * W;
      scores[r] = a.scores + ((r * t.chunk + v - from) * t.slots + window_slots(rows[r], t)) * W;
    }
    score_row<A, G>(count, query, keys, pitch, all, a.dim, additional, scores);
  }
}

// Scores of one vector of queries -> scale * score + bias; not those of additional tokens, which have none.
template <class A>
inline void add_bias_of_window(A* scores, A scale, const Tiling& t, const Strip<A>& strip, const BiasTables<A>& bias, int64_t head,
                               const BlockRow& row, int vector) {
  const int kernel = int(t.part[2]);
  for (int64_t z = 0; z < row.z_end - row.z_begin; ++z)
    for (int64_t y = 0; y < row.y_end - row.y_begin; ++y, scores += kernel * kLanes<A>)
      add_bias_of_map<A>(scores, kernel, scale, bias.row(head, row.z_bias + z, row.y_bias + y), strip.bias[vector]);
}

// Scores of one vector of queries -> weights, not yet divided by their total. Returns the statistics of scale * score.
template <class A>
inline Statistics<A> weigh_vector(A* scores, const Problem& p, const Tiling& t, const Strip<A>& strip, const BiasTables<A>& bias,
                                  int64_t head, const BlockRow& row, int vector, int additional) {
  constexpr A kLog2e = A(1.4426950408889634);
  const int kernel = int(t.part[2]), window = window_slots(row, t), slots = window + additional;
  const A scale = A(p.scale);
  if (bias.tables) {
    add_bias_of_window(scores, scale, t, strip, bias, head, row, vector);
    for (int i = window; i < slots; ++i) store(scores + i * kLanes<A>, load(scores + i * kLanes<A>) * scale);
  }
  cut_short<A>(scores, window, kernel, strip.cut[vector], -A(__builtin_inf()));
  Statistics<A> s = weigh<A>(scores, slots, bias.tables ? kLog2e : scale * kLog2e);
  if (!bias.tables) s.maximum *= scale;
  return s;
}

// A source of keys and values that has nothing to compute.
struct InMemory {
  template <int I> static constexpr bool computes = false;
};

// The packed rows of keys and values that an owner's block sees, and its additional tokens, in the forms that a pass wants.
template <class T> struct PackedKeys {
  using A = Accumulate<T>;
  static constexpr int W = kLanes<A>;
  // One of the two tensors, in each form that a pass asked for.
  struct Form {
    bool transposed, dense;
    int64_t dim, pitch;       // of a dense row
    int64_t size[2];          // of a row of keys: transposed [dim (+ mask)][t.pitch], dense [columns][pitch]
    int64_t additional_size[2];
    A *ring[2], *additional[2];  // of the owner's first head; the others follow
  };
  const Problem& p;
  const Tiling& t;
  Ring ring;
  Form form[2];       // of the keys, of the values
  Form &key = form[0], &value = form[1];
  int64_t score_dim;  // a mask is one more element of the head dim: 1 * (0 or -inf)

  PackedKeys(const Problem& problem, const Tiling& tiling) : p(problem), t(tiling) {
    score_dim = p.head_dim + (p.key_mask.data ? 1 : 0);
    key.dim = p.head_dim, value.dim = p.value_dim;
  }
  int64_t additional_pitch() const { return round_up(p.additional, W); }
  int64_t rows() const { return t.ring[0] * t.ring[1]; }
  // Where the ring (or the additional tokens) of the owner's n-th head begins; form 0 is transposed, 1 dense.
  A* ring_of(const Form& f, int i, int64_t n) const { return f.ring[i] + n * rows() * f.size[i]; }
  A* additional_of(const Form& f, int i, int64_t n) const { return f.additional[i] + n * f.additional_size[i]; }

  void carve(Carver& c) {
    ring.carve(c, t);
    carve(c, key, score_dim);
    carve(c, value, p.value_dim);
  }
  void carve(Carver& c, Form& form, int64_t transposed_dim) const {
    form.pitch = round_up(form.dim, W);
    form.size[0] = transposed_dim * t.pitch, form.size[1] = t.columns * form.pitch;
    form.additional_size[0] = transposed_dim * additional_pitch(), form.additional_size[1] = p.additional * form.pitch;
    const int64_t heads = t.heads_together;
    form.ring[0] = form.transposed ? c.take<A>(heads * rows() * form.size[0]) : nullptr;
    form.ring[1] = form.dense ? c.take<A>(heads * rows() * form.size[1]) : nullptr;
    form.additional[0] = form.transposed ? c.take<A>(heads * form.additional_size[0]) : nullptr;
    form.additional[1] = form.dense ? c.take<A>(heads * form.additional_size[1]) : nullptr;
  }

  // Once, before the first owner: loads of whole vectors reach past the packed columns, for lanes whose results nobody
  // reads. Whatever memory holds may be denormal, which is slow; later they find columns of earlier rows.
  void clear() const {
    for (const Form& f : form)
      if (f.transposed) std::memset(f.ring[0], 0, size_t(t.heads_together * rows() * f.size[0]) * sizeof(A));
  }
  // Another owner: the ring is empty.
  void start(const Owner& owner) const {
    ring.clear();
    for (int64_t n = 0; p.additional && n < t.heads_together; ++n) {
      pack_additional(owner, p.additional_keys, key, n);
      pack_additional(owner, p.additional_values, value, n);
      if (score_dim > p.head_dim)
        std::memset(additional_of(key, 0, n) + p.head_dim * additional_pitch(), 0, size_t(additional_pitch()) * sizeof(A));
    }
  }
  // `source` computes what the problem's tensors do not hold.
  template <class Source = InMemory> void bring(const Owner& owner, const Strip<A>& strip, const BlockRow* block, int count, const Source& source = {}) const {
    for (int64_t z = block[0].z_begin; z < block[0].z_end; ++z)
      for (int64_t y = block[0].y_begin; y < block[count - 1].y_end; ++y) {
        const int64_t slot = ring.slot(z, y);
        if (!ring.claim(slot, z * p.kv_shape[1] + y)) continue;
        const int64_t zt = t.axis[0].key_token(z), yt = t.axis[1].key_token(y);
        const int64_t next = y + 1 < p.kv_shape[1] ? t.axis[1].key_token(y + 1) : yt;
        for (int64_t n = 0; n < t.heads_together; ++n) {
          bring_row<0>(source, owner, n, zt, yt, next, strip, n * rows() + slot);
          bring_row<1>(source, owner, n, zt, yt, next, strip, n * rows() + slot);
          if (p.key_mask.data) mask_row(row_of<uint8_t>(p.key_mask, owner.batch, 0, zt, yt), strip, n * rows() + slot);
        }
      }
  }

 private:
  template <int I, class Source>
  void bring_row(const Source& source, const Owner& owner, int64_t n, int64_t z, int64_t y, int64_t next, const Strip<A>& strip, int64_t slot) const {
    if constexpr (Source::template computes<I>) {
      for (int i = 0; i < strip.columns; i += W) {
        const int some = int(smaller(W, strip.columns - i));
        pack(source.template compute<I>(owner, owner.head + n, z, y, strip.key_token + i, some), some, form[I], slot, i);
      }
    } else {
      pack(tokens_of<T>(I ? p.value : p.key, owner.batch, owner.head + n, z, y, strip.key_token, next), strip.columns, form[I], slot, 0);
    }
  }
  template <class E> void pack(const TokenRow<E>& row, int columns, const Form& to, int64_t slot, int first) const {
    if (to.transposed) pack_transposed(row, columns, to.dim, to.ring[0] + slot * to.size[0] + first, t.pitch, W);
    if (to.dense) pack_dense(row, columns, to.dim, to.ring[1] + slot * to.size[1] + first * to.pitch, to.pitch);
  }
  void pack_additional(const Owner& owner, const Rows& rows, const Form& form, int64_t n) const {
    for (int64_t from = 0; from < p.additional; from += W) {
      const int some = int(smaller(p.additional - from, W));
      int64_t here[W];
      for (int i = 0; i < some; ++i) here[i] = from + i;
      const TokenRow<T> row{row_of<T>(rows, owner.batch, owner.head + n, 0, 0), here, rows.token[2], rows.dim, 0};
      if (form.transposed) pack_transposed(row, some, form.dim, additional_of(form, 0, n) + from, additional_pitch(), W);
      if (form.dense) pack_dense(row, some, form.dim, additional_of(form, 1, n) + from * form.pitch, form.pitch);
    }
  }
  // Hidden keys: score -inf, and zeros instead of what they hold, which may be NaN.
  void mask_row(const uint8_t* mask, const Strip<A>& strip, int64_t slot) const {
    A* const scores = key.ring[0] + slot * key.size[0] + p.head_dim * t.pitch;
    for (int i = 0; i < strip.columns; ++i) {
      const bool seen = mask[strip.key_token[i] * p.key_mask.token[2]];
      scores[i] = seen ? A(0) : -A(__builtin_inf());
      if (seen) continue;
      for (const Form& f : form) {
        for (int64_t d = 0; f.transposed && d < f.dim; ++d) f.ring[0][slot * f.size[0] + d * t.pitch + i] = 0;
        if (f.dense) std::memset(f.ring[1] + slot * f.size[1] + i * f.pitch, 0, size_t(f.pitch) * sizeof(A));
      }
    }
  }
};

// A hidden key has the score -inf, but NaN where the query holds NaN or inf: harmless where the query sees another key, for
// then its row is NaN anyway. A query whose keys are all hidden gets its zeros back here.
template <class T, class A = Accumulate<T>>
inline void forget_hidden(const PackedKeys<T>& keys, const Strip<A>& strip, const BlockRow& row, int vector, A* scores, Statistics<A>& s) {
  constexpr int W = kLanes<A>;
  const Problem& p = keys.p;
  if (!p.key_mask.data || p.additional) return;
  for (int l = 0; l < W && vector * W + l < strip.queries; ++l) {
    if (s.total[l] == s.total[l]) continue;
    const int q = vector * W + l;
    bool hidden = true;
    for (int64_t z = row.z_begin; z < row.z_end; ++z)
      for (int64_t y = row.y_begin; y < row.y_end; ++y) {
        const A* const mask = keys.key.ring[0] + keys.ring.slot(z, y) * keys.key.size[0] + p.head_dim * keys.t.pitch;
        for (int column = strip.first[q]; column < strip.last[q]; ++column) hidden &= mask[column] != 0;
      }
    if (!hidden) continue;
    s.maximum[l] = -A(__builtin_inf()), s.total[l] = 0;
    for (int i = 0; i < window_slots(row, keys.t); ++i) scores[i * W + l] = 0;
  }
}

// The rows of one form of the keys that a row of queries sees.
template <class A> inline int list_rows(const Ring& ring, const A* rows, int64_t size, const BlockRow& row, int64_t slots, Visit<A>* list) {
  int count = 0;
  for (int64_t z = row.z_begin; z < row.z_end; ++z)
    for (int64_t y = row.y_begin; y < row.y_end; ++y, ++count) list[count] = {rows + ring.slot(z, y) * size, count * slots};
  return count;
}

// One band over all columns of the head dim: out[n][pitch] (+)= factor[n] * sum of coefficients * rows.
template <class A, class G, class Coefficient>
inline void sum_columns(const Group& group, const Coefficient& coefficient, const Visit<A>* visits, int count, int64_t pitch,
                        A* const* out, const A* factor, bool add) {
  const int all = int(pitch / kLanes<A>);
  const Band<A> band{group, visits, count, pitch, out, factor, add};
  for (int c = 0; c < all; c += kMaxColumns)
    pick_sum_band<A, G, Coefficient>(columns_per_call(all - c), group.count, group.diagonal)(band, coefficient, c * kLanes<A>);
}
// The sums of a group of queries over the rows that they see of one form of the keys, and over the additional tokens:
// factor[n] * sum of coefficients * rows, to sums[n][pitch]. `coefficients` are those of the queries' row of the block.
template <class T, class G, class A = Accumulate<T>>
inline void sum_group(const PackedKeys<T>& keys, const typename PackedKeys<T>::Form& form, int64_t n, const Strip<A>& strip,
                      const Group& group, const A* coefficients, const Visit<A>* visits, int count, int window, int additional,
                      const Accumulate<T>* factor, A* sums) {
  ByQuery<A> coefficient, extra;
  A* out[kMaxOutputs];
  for (int i = 0; i < group.count; ++i) {
    const int q = group.first + i;
    coefficient.at[i] = coefficients + strip.place[q];
    extra.at[i] = coefficient.at[i] + (strip.first[q] + window) * kLanes<A>;
    out[i] = sums + i * form.pitch;
  }
  sum_columns<A, G>(group, coefficient, visits, count, form.pitch, out, additional ? nullptr : factor, false);
  if (!additional) return;
  const Visit<A> all{keys.additional_of(form, 1, n), 0};
  sum_columns<A, G>(flat_group(group, additional), extra, &all, 1, form.pitch, out, factor, true);
}

// One row of sums to the output's type.
template <class T, class A = Accumulate<T>> inline void write_row(const A* sums, T* out, int64_t dim) {
  constexpr int W = kLanes<A>;
  int64_t d = 0;
  for (; d + W <= dim; d += W) store_narrow(out + d, load(sums + d));
  if (d < dim) store_narrow_part(out + d, load(sums + d), int(dim - d));
}

}  // namespace
}  // namespace natten
