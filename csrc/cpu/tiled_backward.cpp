// SPDX-License-Identifier: MIT
// The tiled path's backward as passes over the owners of each colour. Compiled once per ISA.
#include "dispatch.h"
#include "tiled/backward.h"

namespace natten {
namespace {

template <class T> int64_t owners(const Problem& p, int colour) {
  const Problem q = turned(p);
  return Owner::count(q, Backward<T>::tiling(q), colour);
}
template <class T> int64_t scratch_bytes(const Problem& p) {
  const Problem q = turned(p);
  return Backward<T>(q, nullptr).bytes;
}
template <class T, int COLOUR> void backward(const Problem& p, void* memory, int64_t part, int64_t begin, int64_t end) {
  using A = Accumulate<T>;
  const Problem q = turned(p);
  Backward<T> pass(q, memory);
  A* partials = nullptr;
  if (q.grad_rpb.data) {
    int64_t table = q.heads;
    for (int a = 0; a < kAxes; ++a) table *= 2 * q.axis[a].kernel - 1;
    partials = static_cast<A*>(q.rpb_partials) + part * table;
  }
  for (int64_t item = begin; item < end; ++item) pass.run(Owner::of(q, pass.t, COLOUR, item), partials);
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
template <class T> void narrow(const Problem& p, void*, int64_t, int64_t begin, int64_t end) {
  narrow_rows<T>(p, p.sum_key, p.grad_key, p.head_dim, begin, end);
  narrow_rows<T>(p, p.sum_value, p.grad_value, p.value_dim, begin, end);
}

template <class T> cpu::TiledBackwardKernels make() {
  return {owners<T>, scratch_bytes<T>, {backward<T, 0>, backward<T, 1>, backward<T, 2>, backward<T, 3>}, narrow<T>};
}

}  // namespace

namespace cpu::NATTEN_ISA {
TiledBackwardKernels tiled_backward_kernels(Dtype dtype) {
  switch (dtype) {
    case Dtype::float64: return make<double>();
    case Dtype::float32: return make<float>();
    case Dtype::float16: return make<float16>();
    default: return make<bfloat16>();
  }
}
}  // namespace cpu::NATTEN_ISA
}  // namespace natten
