// SPDX-License-Identifier: MIT
// General path, backward of the fused op: what each row of weights needs, then sums (sums.h).
#include "sums.h"

namespace natten::cuda::general {
namespace {

// delta = <grad_out, out> - grad_lse, and the log-sum-exp with +inf for rows that attend to nothing: their weights become 0.
template <class T> struct Delta {
  static DEVICE void run(const Work& work, int64_t item) {
    using A = Accumulator<T>;
    const Problem& p = work.p;
    const Place place(item, p.heads, p.q_shape);
    A delta = 0;
    if (p.grad_out.data) {
      const T* grad = row_of<const T>(p.grad_out, place.b, place.h, place.token);
      const T* out = row_of<const T>(p.out, place.b, place.h, place.token);
      for (int64_t d = ptx::lane_index(); d < p.value_dim; d += 32)
        delta += ptx::widen(ptx::load_global(grad + d * p.grad_out.dim)) * ptx::widen(ptx::load_global(out + d * p.out.dim));
    }
    delta = sum_of_lanes(delta);
    if (ptx::lane_index() != 0) return;
    const A lse = ptx::load_global(row_of<const A>(p.lse, place.b, place.h, place.token));
    if (p.grad_lse.data) delta -= ptx::load_global(row_of<const A>(p.grad_lse, place.b, place.h, place.token));
    const bool dead = lse == -A(ptx::infinity());
    ptx::store_global(row_of<A>(p.delta, place.b, place.h, place.token), dead ? A(0) : delta);
    ptx::store_global(row_of<A>(p.row_lse, place.b, place.h, place.token), dead ? -lse : lse);
  }
};

}  // namespace

int64_t partial_size(const Problem& p) {
  const int64_t tokens = p.grad_additional_keys.data || p.grad_additional_values.data ? p.batch * p.additional * p.heads_kv : 0;
  return kParts * larger(p.grad_rpb.data ? p.heads * table_size(p) : 0, tokens * (p.head_dim + p.value_dim));
}

const char* backward(const Problem& p, Dtype dtype, Stream stream) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const Work work{p, 0, 0, loads_wide<T>({&p.query, &p.key, &p.value, &p.grad_out, &p.additional_keys, &p.additional_values})};
    const char* error = run<Delta<T>>(work, p.batch * p.heads * volume(p.q_shape), stream);
    return error ? error : run_sums<T, false>(work, stream);
  });
}

}  // namespace natten::cuda::general
