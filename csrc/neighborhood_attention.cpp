// SPDX-License-Identifier: MIT
// The fused op: schemas, and its CPU kernels behind the front that all devices share (fused.h). Fake, autograd, autocast,
// vmap and FLOP rules, and na1d/na2d/na3d over the primitive, are registered in natten_ops/ops/fused.py.
#include "cpu_passes.h"
#include "fused.h"

namespace natten {
namespace {

struct Cpu {
  struct Guard { explicit Guard(const Tensor&) {} };  // there is one CPU

  static void check_backend(int64_t backend) {
    STD_TORCH_CHECK(backend == kChoose || backend == kCpuGeneral || backend == kCpuTiled, "natten: backend=", backend,
                    " cannot run on CPU tensors; use 0 (choose), 1 (cpu-general) or 2 (cpu-tiled)");
  }

  static Tensor gradient(const Tensor& tensor) { return tensor; }

  static void forward(const Problem& p, const Tensor& query, int64_t backend) {
    const Dtype dtype = dtype_of(query);
    const cpu::ForwardKernels kernels = takes_tiled(p, dtype, backend) ? cpu::tiled_forward_kernels(dtype) : cpu::forward_kernels(dtype);
    run(kernels.forward, p, kernels.query_items(p), kernels.scratch_bytes(p), work_of(p));
  }

  static void backward(Problem& p, const Tensor& lse, std::vector<Tensor>& gradients, int64_t rank, int64_t backend) {
    const Dtype dtype = dtype_of(gradients[kQuery]);
    if (takes_tiled(p, dtype, backend)) {
      const cpu::TiledBackwardKernels kernels = cpu::tiled_backward_kernels(dtype);
      const Tensor partials = torch::stable::new_zeros(lse, Integers{kParts * kernels.partial_size(p)});
      p.partials = partials.data_ptr();
      const auto rows = [rank](const Tensor& tensor) { return rows_of(tensor, true, rank, true, true); };
      OptionalTensor sum_key, sum_value;
      if (p.grad_key.data) sum_key = make_sums(gradients[kKey], p.grad_key, p.sum_key, rows);
      if (p.grad_value.data) sum_value = make_sums(gradients[kValue], p.grad_value, p.sum_value, rows);
      run_colours(kernels, p);
    } else {
      const Tensor delta = torch::stable::new_empty(lse, sizes_of(lse)), row_lse = torch::stable::new_empty(lse, sizes_of(lse));
      p.delta = rows_of(delta, true, rank, true, false);
      p.row_lse = rows_of(row_lse, true, rank, true, false);
      const Tensor partials = torch::stable::new_zeros(lse, Integers{p.grad_rpb.data ? kParts * p.heads * table_size(p) : 0});
      p.partials = partials.data_ptr();
      run_general(cpu::backward_kernels(dtype), p);
    }
  }
};

// The tiled forward with a tiling of the caller's choice: {strip, rows, heads together, bytes of a chunk}.
Tensor forward_with_tiling(const Tensor& query, const Tensor& key, const Tensor& value, Integers kernel_size, Integers stride,
                           Integers dilation, Flags is_causal, Integers tiling) {
  const Arguments a{query, key, value, kernel_size, stride, dilation, is_causal, std::nullopt, std::nullopt, std::nullopt,
                    std::nullopt, std::nullopt, {}, {}, {}};
  check(a);
  const bool zero = tiling.size() == 4 && tiling[0] == 0;  // the tiling that the kernels choose
  STD_TORCH_CHECK(query.numel() > 0 && (zero || (tiling.size() == 4 && tiling[0] >= 1 && tiling[1] >= 1 && tiling[1] <= 4 &&
                  tiling[2] >= 1 && key.size(-2) % tiling[2] == 0)), "natten: _cpu_tiled_forward: bad tiling");
  Integers shape = sizes_of(query);
  shape.back() = value.size(-1);
  Tensor out = torch::stable::new_empty(query, shape);
  shape.pop_back();
  const Tensor lse = torch::stable::new_empty(query, shape, lse_dtype(query));
  Problem p = make_problem(a);
  for (int i = 0; i < 4; ++i) p.tiling[i] = tiling[i];
  p.out = rows_of(out, true, a.rank(), true, true);
  p.lse = rows_of(lse, true, a.rank(), true, false);
  const cpu::ForwardKernels kernels = cpu::tiled_forward_kernels(dtype_of(query));
  run(kernels.forward, p, kernels.query_items(p), kernels.scratch_bytes(p), work_of(p));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(natten, m) {
#define NATTEN_COMPOSITE(rank, flags)                                                                                    \
  m.def("na" rank "d(Tensor query, Tensor key, Tensor value, int[" rank "] kernel_size, int[" rank "] stride=1, int[" rank \
        "] dilation=1, bool[" rank "] is_causal=" flags ", float? scale=None, Tensor? additional_keys=None, "              \
        "Tensor? additional_values=None, *, Tensor? rpb=None, Tensor? key_mask=None) -> Tensor");
  NATTEN_COMPOSITE("1", "[False]")
  NATTEN_COMPOSITE("2", "[False, False]")
  NATTEN_COMPOSITE("3", "[False, False, False]")
  m.def("_cpu_tiled_forward(Tensor query, Tensor key, Tensor value, " NATTEN_SETTINGS "int[] tiling) -> Tensor");
  m.def(kForwardSchema);
  m.def(kBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(natten, CPU, m) {
  m.impl("_cpu_tiled_forward", TORCH_BOX(&forward_with_tiling));
  m.impl("neighborhood_attention_lse", TORCH_BOX(&fused_forward<Cpu>));
  m.impl("neighborhood_attention_lse_backward", TORCH_BOX(&fused_backward<Cpu>));
}

}  // namespace natten
