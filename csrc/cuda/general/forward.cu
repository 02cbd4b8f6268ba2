// SPDX-License-Identifier: MIT
// General path, forward: a warp a query of one head. Scores one key a lane; softmax over chunks of thirty-two keys with a
// running maximum; outputs one number of the row a lane, 32 to 128 of them at a time.
#include "keys.h"

namespace natten::cuda::general {
namespace {

template <class T, int kRegisters> struct Forward {
  using A = Accumulator<T>;

  static DEVICE void run(const Work& work, int64_t item) {
    const Place place(item, work.p.heads, work.p.q_shape);
    for (int64_t first = 0; first == 0 || first < work.p.value_dim; first += 32 * kRegisters) numbers(work, place, first);
  }

  // Numbers [first, first + 32 * kRegisters) of the output's row; with the first of them the log-sum-exp.
  static DEVICE void numbers(const Work& work, const Place& place, int64_t first) {
    const Problem& p = work.p;
    const T* query = row_of<const T>(p.query, place.b, place.h, place.token);
    A largest = -A(ptx::infinity()), total = 0, sum[kRegisters] = {};
    for_keys<T>(p, place, false, [&](const Seen<T>& seen, const Chunk&, const Chunk& values) {
      const A logit = seen.visible ? logit_of(work, place.h, query, seen) : -A(ptx::infinity());
      const A before = largest;
      largest = larger_of(before, largest_of_lanes(logit));
      const A shift = largest == -A(ptx::infinity()) ? 0 : largest;  // nothing visible so far: no exp(-inf + inf)
      const A rescale = ptx::exponential(before - shift), weight = ptx::exponential(logit - shift);
      total = total * rescale + weight;
#pragma unroll
      for (int r = 0; r < kRegisters; ++r) sum[r] *= rescale;
      add_rows<T>(weight, seen.value, values, first, p.value_dim, sum);
    });
    total = sum_of_lanes(total);
    const bool dead = total == 0;  // and not: largest is -inf, which it is too when every logit is NaN
    store_row(sum, dead ? A(0) : 1 / total, row_of<T>(p.out, place.b, place.h, place.token), p.out.dim, first, p.value_dim);
    if (first == 0 && ptx::lane_index() == 0)
      ptx::store_global(row_of<A>(p.lse, place.b, place.h, place.token), dead ? largest : largest + ptx::logarithm(total));
  }
};

}  // namespace

const char* forward(const Problem& p, Dtype dtype, Stream stream) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const Work work{p, 0, 0, loads_wide<T>({&p.query, &p.key, &p.additional_keys})};
    return with_registers(p.value_dim, [&](auto registers) {
      return run<Forward<T, decltype(registers)::value>>(work, p.batch * p.heads * volume(p.q_shape), stream);
    });
  });
}

}  // namespace natten::cuda::general
