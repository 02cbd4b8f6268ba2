// SPDX-License-Identifier: MIT
// Every gradient is a sum over pairs (query, key) of a weight, or of a weight times a row. Weights are computed anew from the
// log-sum-exp (fused backward), or read from the slots of an unfused op; one pass serves both.
//   RowsOfQuery   a warp a query: sum of key rows                         gradient of the query; av
//   RowsOfKey     a warp a key: sums of query and gradient rows           gradients of key and value
//   RowsOfToken   a warp an additional token and a part of the queries    theirs, in parts
//   SumOfBias     a warp an entry of a bias table and a part              its, in parts
// Parts are a constant number, and added up in their order: results do not depend on what runs when.
#pragma once
#include "keys.h"

namespace natten::cuda::general {
namespace {

// ---- weights -----------------------------------------------------------------------------------------------------------
template <class T> struct Query {
  const T *row = nullptr, *grad = nullptr, *slots = nullptr;
  Accumulator<T> row_lse = 0, delta = 0;

  DEVICE Query(const Problem& p, int64_t b, int64_t h, const int64_t* token) {
    if (p.query.data) row = row_of<const T>(p.query, b, h, token);
    if (p.grad_out.data) grad = row_of<const T>(p.grad_out, b, h, token);
    if (p.slots_in.data) slots = row_of<const T>(p.slots_in, b, h, token);
    if (!p.delta.data) return;
    row_lse = ptx::load_global(row_of<const Accumulator<T>>(p.row_lse, b, h, token));
    delta = ptx::load_global(row_of<const Accumulator<T>>(p.delta, b, h, token));
  }
};

// For value rows the probability; for key and query rows the slope of the loss by the logit.
template <class A> struct Weights { A value = 0, key = 0; };

template <class T, bool kRead>
DEVICE Weights<Accumulator<T>> weights_of(const Work& work, int64_t h, const Query<T>& query, const Seen<T>& seen) {
  using A = Accumulator<T>;
  const Problem& p = work.p;
  if (!seen.visible) return {};
  if constexpr (kRead) {
    const A weight = ptx::widen(ptx::load_global(query.slots + seen.slot * p.slots_in.dim));
    return {weight, weight};
  } else {
    const A weight = ptx::exponential(logit_of(work, h, query.row, seen) - query.row_lse);
    const int64_t step = seen.in_window ? p.value.dim : p.additional_values.dim;
    const A slope = query.grad ? dot(query.grad, p.grad_out.dim, seen.value, step, p.value_dim, work.wide) : A(0);
    return {weight, weight * (slope - query.delta)};
  }
}

// ---- the sum of a query --------------------------------------------------------------------------------------------------
template <class T, int kRegisters, bool kRead> struct RowsOfQuery {
  static DEVICE void run(const Work& work, int64_t item) {
    const Problem& p = work.p;
    const Place place(item, p.heads, p.q_shape);
    const Query<T> query(p, place.b, place.h, place.token);
    for (int64_t first = 0; first < p.head_dim; first += 32 * kRegisters) {
      Accumulator<T> sum[kRegisters] = {};
      for_keys<T>(p, place, false, [&](const Seen<T>& seen, const Chunk& keys, const Chunk&) {
        add_rows<T>(weights_of<T, kRead>(work, place.h, query, seen).key, seen.key, keys, first, p.head_dim, sum);
      });
      store_row(sum, Accumulator<T>(p.scale), row_of<T>(p.grad_query, place.b, place.h, place.token), p.grad_query.dim, first, p.head_dim);
    }
  }
};

// ---- sums of keys --------------------------------------------------------------------------------------------------------
// The queries that see a key.
struct InverseWindow {
  Walk queries;
  int64_t bias = 0;  // place of the first query's entry in the bias table; it falls with the query

  DEVICE InverseWindow(const Problem& p, const int64_t* token) {
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const Axis& axis = p.axis[a];
      const int64_t key = token[a] + p.kv_origin[a];
      const Span span = queries_of(p, a, key);
      queries.first[a] = span.group + axis.dilation * span.first - p.q_origin[a];
      queries.step[a] = axis.dilation;
      queries.count[a] = span.end - span.first;
      bias += (axis.kernel - 1 + key / axis.dilation - span.first) * p.rpb.token[a];
    }
  }
};

DEVICE Walk all_queries(const Problem& p) {
  Walk walk;
  for (int a = 0; a < kAxes; ++a) walk.first[a] = 0, walk.step[a] = 1, walk.count[a] = p.q_shape[a];
  return walk;
}

// Calls visit(there, token, at, count) for places [begin, end) of a walk over queries, thirty-two at a time.
template <class Visit> DEVICE void for_queries(const Walk& walk, int64_t begin, int64_t end, const Visit& visit) {
  if (begin >= end) return;
  Cursor cursor(walk, begin + ptx::lane_index());
  for (int64_t base = begin; base < end; base += 32, cursor.advance(walk)) {
    int64_t token[kAxes];
    walk.token(cursor.at, token);
    visit(base + ptx::lane_index() < end, token, cursor.at, int(smaller(end - base, 32)));
  }
}

// Slot of the key at `key` among those of the query at `query`.
DEVICE int64_t slot_of(const Problem& p, const int64_t* query, const int64_t* key) {
  int64_t slot = 0;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = p.axis[a];
    slot += ((key[a] + p.kv_origin[a]) / axis.dilation - window(axis, query[a] + p.q_origin[a]).first) * p.slot_step[a];
  }
  return slot;
}

template <class T, int kRegisters> struct KeySums { Accumulator<T> key[kRegisters] = {}, value[kRegisters] = {}; };

// Adds what the queries of a walk give to one key (or additional token) in one head; `seen` says where its rows are, and
// place(seen, token, at) what depends on the query.
template <class T, int kRegisters, bool kRead, class Put>
DEVICE void add_queries(const Work& work, int64_t b, int64_t h, const Walk& walk, int64_t begin, int64_t end, Seen<T> seen, int64_t first,
                        KeySums<T, kRegisters>& sums, const Put& place) {
  const Problem& p = work.p;
  for_queries(walk, begin, end, [&](bool there, const int64_t* token, const int64_t* at, int count) {
    seen.visible = there;
    Weights<Accumulator<T>> weights;
    const T *row = nullptr, *grad = nullptr;
    if (there) {
      const Query<T> query(p, b, h, token);
      row = query.row, grad = query.grad;
      place(seen, token, at);
      weights = weights_of<T, kRead>(work, h, query, seen);
    }
    add_rows<T>(weights.key, row, Chunk{count, count, p.query.dim, 0}, first, p.head_dim, sums.key);
    if (!kRead && p.grad_out.data) add_rows<T>(weights.value, grad, Chunk{count, count, p.grad_out.dim, 0}, first, p.value_dim, sums.value);
  });
}

template <class T, int kRegisters, bool kRead> struct RowsOfKey {
  static DEVICE void run(const Work& work, int64_t item) {
    const Problem& p = work.p;
    const Place place(item, p.heads_kv, p.kv_shape);
    const int64_t b = place.b, group = p.heads / p.heads_kv;
    const InverseWindow window(p, place.token);
    const int64_t size = is_masked(p, b, place.token) ? 0 : window.queries.size();
    Seen<T> seen;
    seen.in_window = true;
    seen.key = row_of<const T>(p.key, b, place.h, place.token), seen.value = row_of<const T>(p.value, b, place.h, place.token);
    for (int64_t first = 0; first < larger(p.head_dim, p.value_dim); first += 32 * kRegisters) {
      KeySums<T, kRegisters> sums;
      for (int64_t h = place.h * group; h < (place.h + 1) * group; ++h)
        add_queries<T, kRegisters, kRead>(work, b, h, window.queries, 0, size, seen, first, sums, [&](Seen<T>& s, const int64_t* query, const int64_t* at) {
          s.bias = window.bias;
          for (int a = 0; a < kAxes; ++a) s.bias -= at[a] * p.rpb.token[a];
          if (kRead) s.slot = slot_of(p, query, place.token);
        });
      using A = Accumulator<T>;
      if (p.grad_key.data) store_row(sums.key, A(p.scale), row_of<T>(p.grad_key, b, place.h, place.token), p.grad_key.dim, first, p.head_dim);
      if (p.grad_value.data) store_row(sums.value, A(1), row_of<T>(p.grad_value, b, place.h, place.token), p.grad_value.dim, first, p.value_dim);
    }
  }
};

// ---- sums in parts: additional tokens and the bias table ---------------------------------------------------------------------
// Numbers of one additional token in one part: its key row, then its value row.
DEVICE int64_t token_numbers(const Problem& p) { return p.head_dim + p.value_dim; }

// Item ((b, token, head of keys), part) -> partials[item, numbers].
template <class T, int kRegisters, bool kRead> struct RowsOfToken {
  static DEVICE void run(const Work& work, int64_t item) {
    using A = Accumulator<T>;
    const Problem& p = work.p;
    const int64_t part = item % kParts, row = item / kParts;
    const int64_t kv = row % p.heads_kv, token = row / p.heads_kv % p.additional, b = row / p.heads_kv / p.additional;
    const int64_t group = p.heads / p.heads_kv, queries = volume(p.q_shape);
    const Walk walk = all_queries(p);
    Seen<T> seen;
    seen.key = row_of_additional<const T>(p.additional_keys, b, kv, token);
    seen.value = row_of_additional<const T>(p.additional_values, b, kv, token);
    seen.slot = slots_of_window(p) + token;
    A* partial = static_cast<A*>(p.partials) + item * token_numbers(p);
    for (int64_t first = 0; first < larger(p.head_dim, p.value_dim); first += 32 * kRegisters) {
      KeySums<T, kRegisters> sums;
      for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
        add_queries<T, kRegisters, kRead>(work, b, h, walk, part_begin(queries, part), part_begin(queries, part + 1), seen, first, sums,
                                          [](Seen<T>&, const int64_t*, const int64_t*) {});
      store_row(sums.key, A(1), partial, 1, first, p.head_dim);
      store_row(sums.value, A(1), partial + p.head_dim, 1, first, p.value_dim);
    }
  }
};

// Item (b, token, head of keys).
template <class T> struct SumOfTokenParts {
  static DEVICE void run(const Work& work, int64_t item) {
    using A = Accumulator<T>;
    const Problem& p = work.p;
    const int64_t kv = item % p.heads_kv, token = item / p.heads_kv % p.additional, b = item / p.heads_kv / p.additional;
    const A* partials = static_cast<const A*>(p.partials) + item * kParts * token_numbers(p);
    for (int64_t d = ptx::lane_index(); d < token_numbers(p); d += 32) {
      A total = 0;
      for (int64_t part = 0; part < kParts; ++part) total += ptx::load_global(partials + part * token_numbers(p) + d);
      const bool of_key = d < p.head_dim;
      const Rows& rows = of_key ? p.grad_additional_keys : p.grad_additional_values;
      const int64_t at = of_key ? d : d - p.head_dim;
      if (rows.data) ptx::store_global(row_of_additional<T>(rows, b, kv, token) + at * rows.dim, ptx::narrow<T>(of_key ? total * A(p.scale) : total));
    }
  }
};

// The key that lies `offset` places of the dilation group from a query, and whether the query sees it.
DEVICE bool find_key(const Problem& p, const int64_t* query, const int64_t* offset, int64_t* key, int64_t* slot) {
  bool visible = true;
  *slot = 0;
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = p.axis[a];
    const int64_t index = query[a] + p.q_origin[a], position = index / axis.dilation + offset[a];
    const Span span = window(axis, index);
    visible = visible && position >= span.first && position < span.end;
    key[a] = span.group + axis.dilation * position - p.kv_origin[a];
    *slot += (position - span.first) * p.slot_step[a];
  }
  return visible;
}

// Item ((head, entry of its table), part) -> partials[item].
template <class T, bool kRead> struct SumOfBias {
  static DEVICE void run(const Work& work, int64_t item) {
    using A = Accumulator<T>;
    const Problem& p = work.p;
    const int64_t part = item % kParts, table = table_size(p), h = item / kParts / table, entry = item / kParts % table;
    const int64_t sizes[kAxes] = {2 * p.axis[0].kernel - 1, 2 * p.axis[1].kernel - 1, 2 * p.axis[2].kernel - 1};
    int64_t offset[kAxes];
    unravel(entry, sizes, offset);
    for (int a = 0; a < kAxes; ++a) offset[a] -= p.axis[a].kernel - 1;
    const int64_t kv = h / (p.heads / p.heads_kv), queries = volume(p.q_shape);
    A total = 0;
    for (int64_t b = 0; b < p.batch; ++b)
      for_queries(all_queries(p), part_begin(queries, part), part_begin(queries, part + 1), [&](bool there, const int64_t* token, const int64_t*, int) {
        Seen<T> seen;
        int64_t key[kAxes];
        if (!there || !find_key(p, token, offset, key, &seen.slot) || is_masked(p, b, key)) return;
        seen.visible = seen.in_window = true;
        seen.bias = entry;
        seen.key = row_of<const T>(p.key, b, kv, key), seen.value = row_of<const T>(p.value, b, kv, key);
        total += weights_of<T, kRead>(work, h, Query<T>(p, b, h, token), seen).key;
      });
    total = sum_of_lanes(total);
    if (ptx::lane_index() == 0) ptx::store_global(static_cast<A*>(p.partials) + item, total);
  }
};

// Item: thirty-two entries of all heads' tables.
template <class T> struct SumOfBiasParts {
  static DEVICE void run(const Work& work, int64_t item) {
    using A = Accumulator<T>;
    const Problem& p = work.p;
    const int64_t entry = item * 32 + ptx::lane_index();
    if (entry >= p.heads * table_size(p)) return;
    A total = 0;
    for (int64_t part = 0; part < kParts; ++part) total += ptx::load_global(static_cast<const A*>(p.partials) + entry * kParts + part);
    if (p.rpb_wide) ptx::store_global(static_cast<float*>(p.grad_rpb.data) + entry, float(total));
    else ptx::store_global(static_cast<T*>(p.grad_rpb.data) + entry, ptx::narrow<T>(total));
  }
};

// ---- all gradients of a problem ------------------------------------------------------------------------------------------------
template <class T, bool kRead> const char* run_sums(const Work& work, Stream stream) {
  const Problem& p = work.p;
  const int64_t tokens = p.batch * p.additional * p.heads_kv, entries = p.grad_rpb.data ? p.heads * table_size(p) : 0;
  const char* error = nullptr;
  if (p.grad_query.data) error = with_registers(p.head_dim, [&](auto n) {
    return run<RowsOfQuery<T, decltype(n)::value, kRead>>(work, p.batch * p.heads * volume(p.q_shape), stream);
  });
  if (!error && (p.grad_key.data || p.grad_value.data)) error = with_registers(larger(p.head_dim, p.value_dim), [&](auto n) {
    return run<RowsOfKey<T, decltype(n)::value, kRead>>(work, p.batch * p.heads_kv * volume(p.kv_shape), stream);
  });
  if (!error && (p.grad_additional_keys.data || p.grad_additional_values.data)) {
    error = with_registers(larger(p.head_dim, p.value_dim), [&](auto n) {
      return run<RowsOfToken<T, decltype(n)::value, kRead>>(work, tokens * kParts, stream);
    });
    if (!error) error = run<SumOfTokenParts<T>>(work, tokens, stream);
  }
  if (!error && entries) error = run<SumOfBias<T, kRead>>(work, entries * kParts, stream);  // partials are free again: one stream
  if (!error && entries) error = run<SumOfBiasParts<T>>(work, ceil_div(entries, 32), stream);
  return error;
}

}  // namespace
}  // namespace natten::cuda::general
