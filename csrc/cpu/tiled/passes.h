// SPDX-License-Identifier: MIT
// Passes over owners: over all of them where they share nothing; or colour after colour, with the partial sums that those
// leave and the rounding of their sums of keys.
#pragma once
#include "spread.h"

namespace natten {
namespace {

template <class Pass> Problem turned_for(const Problem& p) { return turned<Accumulate<typename Pass::Element>>(p); }
template <class Pass> int64_t owners(const Problem& p, int colour) {
  const Problem q = turned_for<Pass>(p);
  return Owner::count(q, Pass::tiling(q), colour);
}
template <class Pass> int64_t scratch_bytes(const Problem& p) {
  const Problem q = turned_for<Pass>(p);
  return Pass(q, Pass::tiling(q), nullptr).bytes;
}

template <class Pass> int64_t all_owners(const Problem& p) {
  const Problem q = turned_for<Pass>(p);
  return Pass::tiling(q).owners(q);
}
template <class Pass> void run_all(const Problem& p, void* memory, int64_t, int64_t begin, int64_t end) {
  const Problem q = turned_for<Pass>(p);
  Pass pass(q, Pass::tiling(q), memory);
  for (int64_t item = begin; item < end; ++item) pass.run(Owner::of(q, pass.t, item));
}
template <class Pass> double times_packed_by(const Problem& p) {
  const Problem q = turned_for<Pass>(p);
  return times_packed(q, Pass::tiling(q));
}
template <class Pass> cpu::ForwardKernels make_pass() { return {all_owners<Pass>, scratch_bytes<Pass>, run_all<Pass>, times_packed_by<Pass>}; }

template <class A> int64_t pitch_of(int64_t dim) { return round_up(dim, kLanes<A>); }
// Of each part: sums of the bias tables, of the additional keys and of the additional values.
template <class T> void partial_sizes(const Problem& p, int64_t* size) {
  using A = Accumulate<T>;
  const int64_t tokens = p.batch * p.heads_kv * p.additional;
  size[0] = p.grad_rpb.data ? p.heads * table_size(p) : 0;
  size[1] = p.grad_additional_keys.data ? tokens * pitch_of<A>(p.head_dim) : 0;
  size[2] = p.grad_additional_values.data ? tokens * pitch_of<A>(p.value_dim) : 0;
}
template <class T> int64_t partial_size(const Problem& p) {
  int64_t size[3];
  partial_sizes<T>(p, size);
  return size[0] + size[1] + size[2];
}

template <class Pass, int COLOUR> void run_colour(const Problem& p, void* memory, int64_t part, int64_t begin, int64_t end) {
  using T = typename Pass::Element;
  using A = Accumulate<T>;
  const Problem q = turned_for<Pass>(p);
  Pass pass(q, Pass::tiling(q), memory);
  int64_t size[3];
  partial_sizes<T>(p, size);
  A* const at = static_cast<A*>(p.partials) + part * partial_size<T>(p);
  const Partials<A> partials{size[0] ? at : nullptr, {at + size[0], at + size[0] + size[1]}};
  for (int64_t item = begin; item < end; ++item) pass.run(Owner::of(q, pass.t, COLOUR, item), partials);
}

// Sums over parts, in their order.
template <class T> void reduce(const Problem& p, void*, int64_t, int64_t, int64_t) {
  using A = Accumulate<T>;
  int64_t size[3];
  partial_sizes<T>(p, size);
  const int64_t all = partial_size<T>(p);
  A* const total = static_cast<A*>(p.partials);
  for (int64_t at = 0; at < all; ++at)
    for (int part = 1; part < kParts; ++part) total[at] += total[part * all + at];
  for (int64_t at = 0; at < size[0]; ++at) {
    if (p.rpb_wide) static_cast<float*>(p.grad_rpb.data)[at] = float(total[at]);
    else narrow(total[at], static_cast<T*>(p.grad_rpb.data) + at);
  }
  const Rows* const gradients[] = {&p.grad_additional_keys, &p.grad_additional_values};
  const int64_t dims[] = {p.head_dim, p.value_dim};
  const A* from = total + size[0];
  for (int i = 0; i < 2; ++i)
    for (int64_t at = 0; at < (size[i + 1] ? p.batch * p.heads_kv * p.additional : 0); ++at, from += pitch_of<A>(dims[i]))
      write_row<T>(from, row_of<T>(*gradients[i], at / p.additional / p.heads_kv, at / p.additional % p.heads_kv, 0, 0) +
                             at % p.additional * gradients[i]->token[2], dims[i]);
}

// The sums of keys and values become their gradients.
template <class T> void narrow_rows(const Problem& p, const Rows& from, const Rows& to, int64_t dim, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const int64_t tokens = p.kv_shape[0] * p.kv_shape[1] * p.kv_shape[2];
  if (!to.data || from.data == to.data) return;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / tokens, z = item % tokens / (p.kv_shape[1] * p.kv_shape[2]), y = item / p.kv_shape[2] % p.kv_shape[1], x = item % p.kv_shape[2];
    for (int64_t h = 0; h < p.heads_kv; ++h)
      write_row<T>(row_of<A>(from, b, h, z, y) + x * from.token[2], row_of<T>(to, b, h, z, y) + x * to.token[2], dim);
  }
}
template <class T> void narrow_keys(const Problem& p, void*, int64_t, int64_t begin, int64_t end) {
  narrow_rows<T>(p, p.sum_key, p.grad_key, p.head_dim, begin, end);
  narrow_rows<T>(p, p.sum_value, p.grad_value, p.value_dim, begin, end);
}

template <class Pass> cpu::TiledBackwardKernels make_colour_passes() {
  using T = typename Pass::Element;
  return {owners<Pass>, scratch_bytes<Pass>, partial_size<T>,
          {run_colour<Pass, 0>, run_colour<Pass, 1>, run_colour<Pass, 2>, run_colour<Pass, 3>}, narrow_keys<T>, reduce<T>};
}

}  // namespace
}  // namespace natten
