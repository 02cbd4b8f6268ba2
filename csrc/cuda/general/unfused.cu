// SPDX-License-Identifier: MIT
// General path, unfused ops: logits of every slot, one a lane; everything else is a sum with weights that lie in memory.
#include "sums.h"

namespace natten::cuda::general {
namespace {

template <class T> struct Logits {
  static DEVICE void run(const Work& work, int64_t item) {
    const Problem& p = work.p;
    const Place place(item, p.heads, p.q_shape);
    const T* query = row_of<const T>(p.query, place.b, place.h, place.token);
    T* slots = row_of<T>(p.slots_out, place.b, place.h, place.token);
    for_keys<T>(p, place, true, [&](const Seen<T>& seen, const Chunk& keys, const Chunk&) {
      if (ptx::lane_index() >= keys.count) return;
      const Accumulator<T> logit = seen.visible ? logit_of(work, place.h, query, seen) : Accumulator<T>(p.absent);
      ptx::store_global(slots + seen.slot * p.slots_out.dim, ptx::narrow<T>(logit));
    });
  }
};

}  // namespace

const char* unfused(const Problem& p, Dtype dtype, Stream stream) {
  return with_element(dtype, [&](auto element) {
    using T = decltype(element);
    const Work work{p, 0, 0, loads_wide<T>({&p.query, &p.key, &p.additional_keys})};
    const char* error = p.slots_out.data ? run<Logits<T>>(work, p.batch * p.heads * volume(p.q_shape), stream) : nullptr;
    return error ? error : run_sums<T, true>(work, stream);
  });
}

}  // namespace natten::cuda::general
