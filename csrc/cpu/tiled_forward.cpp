// SPDX-License-Identifier: MIT
// The tiled path's forward as a pass over owners. Compiled once per ISA.
#include "dtypes.h"
#include "tiled/forward.h"

namespace natten {
namespace {

template <class T> int64_t owners(const Problem& p) {
  const Problem q = turned<Accumulate<T>>(p);
  return Forward<T>::tiling(q).owners(q);
}
template <class T> int64_t scratch_bytes(const Problem& p) {
  const Problem q = turned<Accumulate<T>>(p);
  return Forward<T>::scratch_bytes(q, Forward<T>::tiling(q));
}
template <class T> void forward(const Problem& p, void* memory, int64_t, int64_t begin, int64_t end) {
  const Problem q = turned<Accumulate<T>>(p);
  Forward<T> pass(q, Forward<T>::tiling(q), memory);
  for (int64_t item = begin; item < end; ++item) pass.run(Owner::of(q, pass.t, item));
}
template <class T> cpu::ForwardKernels make() { return {owners<T>, scratch_bytes<T>, forward<T>}; }

}  // namespace

namespace cpu::NATTEN_ISA {
ForwardKernels tiled_forward_kernels(Dtype dtype) {
  return with_element(dtype, [](auto element) { return make<decltype(element)>(); });
}
}  // namespace cpu::NATTEN_ISA
}  // namespace natten
