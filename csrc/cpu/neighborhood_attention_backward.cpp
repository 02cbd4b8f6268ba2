// SPDX-License-Identifier: MIT
// Backward of the general path, deterministic without atomics: each gradient row has one owner that adds in a fixed
// order. Queries own their row of dq (keys of the window) and leave delta behind; keys own their rows of dk and dv
// (queries of the inverse window). Scores are computed in both: 7 products instead of 5, 9 where a window needs more than
// one chunk. Compiled once per ISA.
//
// With P = exp(s - lse) and delta = sum of P <dout, v> / sum of P - dlse:  ds = P (<dout, v> - delta),
// dq = scale ds k,  dk = scale ds q,  dv = P dout,  dbias = sum of ds.
//
// Why delta is not <dout, out>, which is the same number: out has been rounded to the type of the inputs. Where
// <dout, v> - delta cancels, gradients were off by 20 times the error of torch's op in float16. Division by sum of P
// removes the rounding of lse, which at |lse| = 15 is 5e-7 of every weight and of delta.
#include "dtypes.h"
#include "general.h"

namespace natten {
namespace {

// exp(s - lse). Both passes have the forward's logits bit for bit (to_logits), so the argument is at most the rounding
// of lse above 0.
template <class A> NATTEN_INLINE Vector<A> weight_of(Vector<A> score, Vector<A> lse) { return exp_negative(score - lse); }

// <dout, value> of the listed rows; 0 where out has no gradient.
template <class T, class A>
inline void output_slopes(const Problem& p, const A* row, const RowSource<T>& rows, const int64_t* offset, int64_t count, A* slopes) {
  if (p.grad_out.data) score_rows(row, rows, offset, count, slopes);
  else std::memset(slopes, 0, size_t(count) * sizeof(A));
}

// The keys of one (query, head), chunk by chunk: first those of the window, then the additional ones.
template <class T> struct QueryPass {
  using A = Accumulate<T>;
  const Problem& p;
  Scratch<T>& s;
  const Walk &window, &additional;
  int64_t b, h, kv_head;
  A lse;

  int64_t chunks() const { return chunks_of(window) + (p.additional ? chunks_of(additional) : 0); }

  // Leaves P in s.scores and <dout, v> in s.slopes, both padded to whole vectors; then calls visit(list, keys, biased).
  template <class Visit> void weigh(const Walk& walk, List& list, const Rows& key, const Rows& value, bool biased, const Visit& visit) {
    const auto keys = source_of<T>(key, b, kv_head, p.head_dim, s.packed);
    const auto values = source_of<T>(value, b, kv_head, p.value_dim, s.packed);
    for (int64_t chunk = 0; chunk < chunks_of(walk); ++chunk) {
      list_chunk(walk, chunk, list);
      score_rows(s.query, keys, list.offset[kKey], list.size, s.scores);
      to_logits<T>(p, h, biased ? list.offset[kBias] : nullptr, list.size, s.scores);
      output_slopes(p, s.grad, values, list.offset[kValue], list.size, s.slopes);
      pad(s.scores, list.size, -A(__builtin_inf()));
      pad(s.slopes, list.size, A(0));
      for (int64_t i = 0; i < list.size; i += kLanes<A>) store(s.scores + i, weight_of<A>(load(s.scores + i), splat(lse)));
      visit(list, keys, biased);
    }
  }
  template <class Visit> void for_chunks(const Visit& visit) {
    weigh(window, *s.window, p.key, p.value, p.rpb.data != nullptr, visit);
    if (p.additional) weigh(additional, *s.extra, p.additional_keys, p.additional_values, false, visit);
  }

  // Sum of P <dout, v> over sum of P. With a single chunk, its P and <dout, v> are still in place afterwards.
  A mean_slope() {
    Vector<A> weights{}, slopes{};
    for_chunks([&](const List& list, const RowSource<T>&, bool) {
      for (int64_t i = 0; i < list.size; i += kLanes<A>) {
        weights += load(s.scores + i);
        slopes += load(s.scores + i) * load(s.slopes + i);
      }
    });
    const A total = sum<A>(weights);
    return total == 0 ? A(0) : sum<A>(slopes) / total;
  }

  // ds of one chunk, into dq and the bias gradient.
  void add_gradients(const List& list, const RowSource<T>& keys, A delta, A* grad_bias) {
    for (int64_t i = 0; i < list.size; i += kLanes<A>)
      store(s.scores + i, load(s.scores + i) * (load(s.slopes + i) - splat(delta)));
    if (p.grad_query.data) add_rows(s.scores, keys, list.offset[kKey], list.size, s.sum_head);
    for (int64_t i = 0; grad_bias && i < list.size; ++i) grad_bias[list.offset[kBias][i]] += s.scores[i];
  }

  // dq to s.sum_head; returns delta.
  A run(A grad_lse, A* grad_bias) {
    A delta = mean_slope() - grad_lse;
    if (chunks() == 1) {
      const bool in_window = chunks_of(window) == 1;
      add_gradients(in_window ? *s.window : *s.extra,
                    source_of<T>(in_window ? p.key : p.additional_keys, b, kv_head, p.head_dim, s.packed), delta,
                    in_window ? grad_bias : nullptr);
    } else {
      for_chunks([&](const List& list, const RowSource<T>& keys, bool biased) {
        add_gradients(list, keys, delta, biased ? grad_bias : nullptr);
      });
    }
    return delta;
  }
};

// Also writes delta and row_lse, which the other passes read.
template <class T> void backward_query(const Problem& p, void* memory, int64_t part, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const A infinity = A(__builtin_inf());
  Scratch<T> s;
  Scratch<T>::carve(p, memory, &s);
  const int64_t table = table_size(p);
  A* partial = p.grad_rpb.data ? static_cast<A*>(p.partials) + part * p.heads * table : nullptr;
  const Walk additional = additional_walk(p);
  s.extra->loaded = -1;
  for_tokens(p.q_shape, begin, end, [&](int64_t b, const int64_t* token) {
    const Walk walk = window_walk(p, b, token);
    s.window->loaded = -1;
    for (int64_t h = 0; h < p.heads; ++h) {
      const A lse = head_of<A>(p.lse, b, h)[token_of(p.lse, token)];
      const bool dead = lse == -infinity;  // every weight is exp(-inf) = 0, whatever the gradients are
      const int64_t at = token_of(p.delta, token);
      head_of<A>(p.row_lse, b, h)[at] = dead ? infinity : lse;
      head_of<A>(p.delta, b, h)[at] = 0;
      std::memset(s.sum_head, 0, size_t(p.head_dim) * sizeof(A));
      if (!dead) {
        widen_row(head_of<T>(p.query, b, h) + token_of(p.query, token), p.query.dim, p.head_dim, A(1), s.query);
        if (p.grad_out.data)
          widen_row(head_of<T>(p.grad_out, b, h) + token_of(p.grad_out, token), p.grad_out.dim, p.value_dim, A(1), s.grad);
        const A grad_lse = p.grad_lse.data ? head_of<A>(p.grad_lse, b, h)[token_of(p.grad_lse, token)] : A(0);
        QueryPass<T> pass{p, s, walk, additional, b, h, h / (p.heads / p.heads_kv), lse};
        head_of<A>(p.delta, b, h)[at] = pass.run(grad_lse, partial ? partial + h * table : nullptr);
      }
      if (p.grad_query.data)
        narrow_row(s.sum_head, A(p.scale), head_of<T>(p.grad_query, b, h) + token_of(p.grad_query, token), 1, p.head_dim);
    }
  });
}

// The queries that see a token of the grid. Streams: query, grad_out, delta, [bias].
inline Walk inverse_walk(const Problem& p, const int64_t* token) {
  Walk walk;
  int64_t first[kAxes], offset[kAxes];
  for (int a = 0; a < kAxes; ++a) {
    const Axis& axis = p.axis[a];
    const int64_t key = token[a] + p.kv_origin[a];
    const Span span = queries_of(p, a, key);
    walk.count[a] = span.end - span.first;
    first[a] = span.group + axis.dilation * span.first - p.q_origin[a];
    offset[a] = axis.kernel - 1 + key / axis.dilation - span.first;
  }
  add_stream(walk, p, p.query, first);
  add_stream(walk, p, p.grad_out, first);
  add_stream(walk, p, p.delta, first);
  if (p.rpb.data) add_bias_stream(walk, p, offset, -1);
  return walk;
}

// Every query of the problem: who sees an additional token. The same streams, walked without dilation.
inline Walk all_queries_walk(const Problem& p) {
  Walk walk;
  walk.streams = 3;
  const Rows* const rows[] = {&p.query, &p.grad_out, &p.delta};
  for (int a = 0; a < kAxes; ++a) {
    walk.count[a] = p.q_shape[a];
    for (int s = 0; s < 3; ++s) walk.step[s][a] = rows[s]->token[a];
  }
  return walk;
}

// The gradients of one key and one value row, from all queries of `walk` in all heads of its group.
template <class T>
inline void key_gradients(const Problem& p, const Walk& walk, Scratch<T>& s, int64_t b, int64_t kv_head, const T* key,
                          int64_t key_stride, const T* value, int64_t value_stride, T* grad_key, T* grad_value, bool biased) {
  using A = Accumulate<T>;
  enum { kQuery, kGrad, kDelta, kInverseBias };
  widen_row(key, key_stride, p.head_dim, A(1), s.query);
  if (grad_key && p.grad_out.data) widen_row(value, value_stride, p.value_dim, A(1), s.grad);
  std::memset(s.sum_head, 0, size_t(p.head_dim) * sizeof(A));
  std::memset(s.sum_value, 0, size_t(p.value_dim) * sizeof(A));
  const int64_t group = p.heads / p.heads_kv;
  alignas(64) A delta[kChunk + 16], lse[kChunk + 16];
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; ++h) {
    const auto queries = source_of<T>(p.query, b, h, p.head_dim, s.packed);
    const auto grads = source_of<T>(p.grad_out, b, h, p.value_dim, s.packed);
    const A *row_lse = head_of<A>(p.row_lse, b, h), *row_delta = head_of<A>(p.delta, b, h);
    for (int64_t chunk = 0; chunk < chunks_of(walk); ++chunk) {
      list_chunk(walk, chunk, *s.window);
      const List& list = *s.window;
      score_rows(s.query, queries, list.offset[kQuery], list.size, s.scores);
      to_logits<T>(p, h, biased ? list.offset[kInverseBias] : nullptr, list.size, s.scores);
      for (int64_t i = 0; i < list.size; ++i) {
        lse[i] = row_lse[list.offset[kDelta][i]];
        delta[i] = row_delta[list.offset[kDelta][i]];
      }
      for (int64_t i = 0; i < list.size; i += kLanes<A>) store(s.scores + i, weight_of<A>(load(s.scores + i), load(lse + i)));
      if (grad_value && p.grad_out.data) add_rows(s.scores, grads, list.offset[kGrad], list.size, s.sum_value);
      if (!grad_key) continue;
      output_slopes(p, s.grad, grads, list.offset[kGrad], list.size, s.slopes);
      for (int64_t i = 0; i < list.size; i += kLanes<A>)
        store(s.scores + i, load(s.scores + i) * (load(s.slopes + i) - load(delta + i)));
      add_rows(s.scores, queries, list.offset[kQuery], list.size, s.sum_head);
    }
  }
  if (grad_key) narrow_row(s.sum_head, A(p.scale), grad_key, 1, p.head_dim);
  if (grad_value) narrow_row(s.sum_value, A(1), grad_value, 1, p.value_dim);
}

template <class T> T* row_or_null(const Rows& rows, int64_t b, int64_t head, const int64_t* token) {
  return rows.data ? head_of<T>(rows, b, head) + token_of(rows, token) : nullptr;
}

template <class T> void backward_key(const Problem& p, void* memory, int64_t, int64_t begin, int64_t end) {
  Scratch<T> s;
  Scratch<T>::carve(p, memory, &s);
  const bool biased = p.rpb.data != nullptr;
  for_tokens(p.kv_shape, begin, end, [&](int64_t b, const int64_t* token) {
    Walk walk = inverse_walk(p, token);
    if (p.key_mask.data && !head_of<uint8_t>(p.key_mask, b, 0)[token_of(p.key_mask, token)]) walk.count[0] = 0;
    s.window->loaded = -1;
    for (int64_t h = 0; h < p.heads_kv; ++h)
      key_gradients<T>(p, walk, s, b, h, head_of<T>(p.key, b, h) + token_of(p.key, token), p.key.dim,
                       head_of<T>(p.value, b, h) + token_of(p.value, token), p.value.dim,
                       row_or_null<T>(p.grad_key, b, h, token), row_or_null<T>(p.grad_value, b, h, token), biased);
  });
}

template <class T> void backward_additional(const Problem& p, void* memory, int64_t, int64_t begin, int64_t end) {
  Scratch<T> s;
  Scratch<T>::carve(p, memory, &s);
  const Walk walk = all_queries_walk(p);
  s.window->loaded = -1;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / p.additional, token[kAxes] = {0, 0, item % p.additional};
    const Rows &keys = p.additional_keys, &values = p.additional_values;
    for (int64_t h = 0; h < p.heads_kv; ++h)
      key_gradients<T>(p, walk, s, b, h, head_of<T>(keys, b, h) + token_of(keys, token), keys.dim,
                       head_of<T>(values, b, h) + token_of(values, token), values.dim,
                       row_or_null<T>(p.grad_additional_keys, b, h, token),
                       row_or_null<T>(p.grad_additional_values, b, h, token), false);
  }
}

template <class T> void reduce_rpb(const Problem& p, void*, int64_t, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t table = table_size(p);
  const A* partials = static_cast<const A*>(p.partials);
  for (int64_t at = begin * table; at < end * table; ++at) {
    A total = 0;
    for (int chunk = 0; chunk < kParts; ++chunk) total += partials[chunk * p.heads * table + at];
    if (p.rpb_wide) static_cast<float*>(p.grad_rpb.data)[at] = float(total);
    else narrow(total, static_cast<T*>(p.grad_rpb.data) + at);
  }
}

int64_t query_items(const Problem& p) { return items_of(p, p.q_shape); }
int64_t key_items(const Problem& p) { return items_of(p, p.kv_shape); }

template <class T> cpu::BackwardKernels make() {
  return {query_items, key_items, Scratch<T>::bytes, backward_query<T>, backward_key<T>,
          backward_additional<T>, reduce_rpb<T>};
}
}  // namespace

namespace cpu::NATTEN_ISA {
BackwardKernels backward_kernels(Dtype dtype) {
  return with_element(dtype, [](auto element) { return make<decltype(element)>(); });
}
}  // namespace cpu::NATTEN_ISA
}  // namespace natten
