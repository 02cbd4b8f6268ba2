// SPDX-License-Identifier: MIT
// Forward of the general path: one query at a time, online softmax over chunks of its window. Compiled once per ISA.
#include "dtypes.h"
#include "general.h"

namespace natten {
namespace {

// The running softmax of one (query, head).
template <class A> struct Softmax {
  A maximum = -A(__builtin_inf()), total = 0;
};

// Adds one chunk of rows; scores are scaled and biased.
template <class T, class A = Accumulate<T>>
inline void absorb(Softmax<A>& state, const RowSource<T>& values, const List& list, A* scores, A* sums) {
  constexpr int W = kLanes<A>;
  const int64_t count = list.size;
  const A infinity = A(__builtin_inf());
  A peak = state.maximum;
  for (int64_t i = 0; i < count; ++i) peak = scores[i] > peak ? scores[i] : peak;
  const A shift = peak == -infinity ? A(0) : peak;  // all -inf (weights 0) or NaN (which must survive)
  Vector<A> total{};
  pad(scores, count, -infinity);
  for (int64_t i = 0; i < count; i += W) {
    const Vector<A> weight = exp_negative(load(scores + i) - splat(shift));
    store(scores + i, weight);
    total += weight;
  }
  if (state.maximum != -infinity && state.maximum != peak) {
    const A factor = A(__builtin_exp(double(state.maximum - peak)));
    state.total *= factor;
    for (int64_t d = 0; d < values.dim; ++d) sums[d] *= factor;
  }
  state.maximum = peak;
  state.total += sum<A>(total);
  add_rows(scores, values, list.offset[kValue], count, sums);
}

template <class T> void forward(const Problem& p, void* memory, int64_t, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  Scratch<T> s;
  Scratch<T>::carve(p, memory, &s);
  const Walk additional = additional_walk(p);
  s.extra->loaded = -1;
  for_tokens(p.q_shape, begin, end, [&](int64_t b, const int64_t* token) {
    const Walk walk = window_walk(p, b, token);
    s.window->loaded = -1;
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t kv_head = h / (p.heads / p.heads_kv);
      widen_row(head_of<T>(p.query, b, h) + token_of(p.query, token), p.query.dim, p.head_dim, A(1), s.query);
      std::memset(s.sum_value, 0, size_t(p.value_dim) * sizeof(A));
      Softmax<A> state;
      for (int64_t chunk = 0; chunk < chunks_of(walk); ++chunk) {
        list_chunk(walk, chunk, *s.window);
        score_rows(s.query, source_of(p.key, b, kv_head, p.head_dim, s.packed), s.window->offset[kKey], s.window->size, s.scores);
        to_logits<T>(p, h, p.rpb.data ? s.window->offset[kBias] : nullptr, s.window->size, s.scores);
        absorb(state, source_of(p.value, b, kv_head, p.value_dim, s.packed), *s.window, s.scores, s.sum_value);
      }
      for (int64_t chunk = 0; p.additional && chunk < chunks_of(additional); ++chunk) {
        list_chunk(additional, chunk, *s.extra);
        score_rows(s.query, source_of(p.additional_keys, b, kv_head, p.head_dim, s.packed), s.extra->offset[kKey], s.extra->size, s.scores);
        to_logits<T>(p, h, nullptr, s.extra->size, s.scores);
        absorb(state, source_of(p.additional_values, b, kv_head, p.value_dim, s.packed), *s.extra, s.scores, s.sum_value);
      }
      const bool dead = state.total == 0;
      if (dead) std::memset(s.sum_value, 0, size_t(p.value_dim) * sizeof(A));  // 0 * NaN of a value that nobody attends to
      narrow_row(s.sum_value, dead ? A(0) : A(1) / state.total, head_of<T>(p.out, b, h) + token_of(p.out, token), p.out.dim, p.value_dim);
      head_of<A>(p.lse, b, h)[token_of(p.lse, token)] =
          dead ? -A(__builtin_inf()) : state.maximum + A(__builtin_log(double(state.total)));
    }
  });
}

int64_t query_items(const Problem& p) { return items_of(p, p.q_shape); }

template <class T> cpu::ForwardKernels make() { return {query_items, Scratch<T>::bytes, forward<T>}; }

}  // namespace

namespace cpu::NATTEN_ISA {
ForwardKernels forward_kernels(Dtype dtype) {
  return with_element(dtype, [](auto element) { return make<decltype(element)>(); });
}
}  // namespace cpu::NATTEN_ISA
}  // namespace natten
