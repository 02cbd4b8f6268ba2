// SPDX-License-Identifier: MIT
// What the library tells about itself: the window formulas as it computes them (for the parity test), the instruction
// set that it runs on, the scratch that a thread takes, and how often a key is packed.
#include "cpu_passes.h"

namespace natten {
namespace {

// rows of (index, length, kernel, stride, dilation, causal) -> rows of (group, start, end, inverse first, inverse last)
Tensor windows(const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 2 && rows.size(1) == 6 && rows.scalar_type() == ScalarType::Long && rows.is_contiguous(),
                  "natten: _windows takes a contiguous int64 tensor [n, 6]");
  const int64_t count = rows.size(0);
  Tensor out = torch::stable::new_empty(rows, Integers{count, 5});
  const int64_t* in = static_cast<const int64_t*>(rows.data_ptr());
  int64_t* to = static_cast<int64_t*>(out.data_ptr());
  for (int64_t i = 0; i < count; ++i, in += 6, to += 5) {
    STD_TORCH_CHECK(in[1] >= 1 && in[2] >= 1 && in[3] >= 1 && in[4] >= 1 && in[0] >= 0 && in[0] < in[1], "natten: _windows: bad row ", i);
    const Axis axis{in[1], in[2], in[3], in[4], in[5] != 0};
    const Span keys = window(axis, in[0]), queries = inverse_window(axis, in[0]);
    to[0] = keys.group, to[1] = keys.first, to[2] = keys.end, to[3] = queries.first, to[4] = queries.end - 1;
  }
  return out;
}

int64_t cpu_vector_bytes() { return cpu::vector_bytes(); }

// The largest scratch of one thread, over dtypes and passes; it depends on the head dims alone.
int64_t cpu_scratch_bytes(int64_t head_dim, int64_t value_dim) {
  Problem p{};
  p.head_dim = head_dim, p.value_dim = value_dim;
  int64_t most = 0;
  for (Dtype dtype : {Dtype::float64, Dtype::float32, Dtype::float16, Dtype::bfloat16})
    most = larger(most, larger(cpu::forward_kernels(dtype).scratch_bytes(p), cpu::backward_kernels(dtype).scratch_bytes(p)));
  return most;
}

// What the tiled path would do with a problem, of its shapes alone; 0 where it has nothing to do.
template <auto ask> auto ask_tiles(const Tensor& query, const Tensor& key, const Tensor& value, Integers kernel_size, Integers stride,
                                   Integers dilation, Flags is_causal, OptionalTensor additional_keys, OptionalTensor additional_values,
                                   OptionalTensor rpb, OptionalTensor key_mask, Integers q_origin, Integers kv_origin, Integers extent,
                                   bool whole) {
  const Arguments a{query, key, value, kernel_size, stride, dilation, is_causal, std::nullopt, additional_keys,
                    additional_values, rpb, key_mask, q_origin, kv_origin, extent};
  check(a);
  using Answer = decltype(ask(Problem{}, Dtype::float32));
  if (query.numel() == 0 || value.numel() == 0) return Answer(0);
  Problem p = make_problem(a);
  p.whole = whole;
  return ask(p, dtype_of(query));
}

// How often the forward packs a key, on average.
double times_packed(const Problem& p, Dtype dtype) { return cpu::tiled_forward_kernels(dtype).times_packed(p); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(natten, m) {
  m.def("_windows(Tensor rows) -> Tensor");
  m.def("_cpu_vector_bytes() -> int");
  m.def("_cpu_scratch_bytes(int head_dim, int value_dim) -> int");
#define PROBLEM "(Tensor query, Tensor key, Tensor value, int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, " \
  "Tensor? additional_keys, Tensor? additional_values, Tensor? rpb, Tensor? key_mask, int[] q_origin, int[] kv_origin, int[] extent, bool whole)"
  m.def("_cpu_tiled_scratch_bytes" PROBLEM " -> int");
  m.def("_cpu_tiled_times_packed" PROBLEM " -> float");
#undef PROBLEM
}
STABLE_TORCH_LIBRARY_IMPL(natten, CPU, m) {
  m.impl("_windows", TORCH_BOX(&windows));
  m.impl("_cpu_tiled_scratch_bytes", TORCH_BOX(&ask_tiles<cpu::tiled_scratch_bytes>));
  m.impl("_cpu_tiled_times_packed", TORCH_BOX(&ask_tiles<times_packed>));
}
STABLE_TORCH_LIBRARY_IMPL(natten, CompositeImplicitAutograd, m) {
  m.impl("_cpu_vector_bytes", TORCH_BOX(&cpu_vector_bytes));
  m.impl("_cpu_scratch_bytes", TORCH_BOX(&cpu_scratch_bytes));
}

}  // namespace natten
