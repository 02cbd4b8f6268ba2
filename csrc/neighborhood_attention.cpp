// SPDX-License-Identifier: MIT
// The fused op: schemas, and the CPU front of the primitive and its backward. Fake, autograd, autocast, vmap and FLOP
// rules, and na1d/na2d/na3d over the primitive, are registered in natten_ops/ops/fused.py.
#include "arguments.h"

namespace natten {
namespace {

void check_backend(int64_t backend) {
  STD_TORCH_CHECK(backend == kChoose || backend == kCpuGeneral || backend == kCpuTiled, "natten: backend=", backend,
                  " cannot run on CPU tensors; use 0 (choose), 1 (cpu-general) or 2 (cpu-tiled)");
}

std::tuple<Tensor, Tensor> forward_cpu(
    const Tensor& query, const Tensor& key, const Tensor& value, Integers kernel_size, Integers stride, Integers dilation,
    Flags is_causal, std::optional<double> scale, OptionalTensor additional_keys, OptionalTensor additional_values,
    OptionalTensor rpb, OptionalTensor key_mask, Integers q_origin, Integers kv_origin, Integers extent, int64_t backend) {
  const Arguments a{query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys,
                    additional_values, rpb, key_mask, q_origin, kv_origin, extent};
  check_backend(backend);
  check(a);
  rpb = dense(rpb);
  Integers shape = sizes_of(query);
  shape.back() = value.size(-1);
  Tensor out = torch::stable::new_empty(query, shape);
  shape.pop_back();
  Tensor lse = torch::stable::new_empty(query, shape, lse_dtype(query));
  if (lse.numel() == 0) return {out, lse};
  Problem p = make_problem(a);
  p.out = rows_of(out, true, a.rank(), true, true);
  p.lse = rows_of(lse, true, a.rank(), true, false);
  const cpu::Dtype dtype = cpu_dtype(query);
  const cpu::ForwardKernels kernels = takes_tiled(p, dtype, backend) ? cpu::tiled_forward_kernels(dtype) : cpu::forward_kernels(dtype);
  run(kernels.forward, p, kernels.query_items(p), kernels.scratch_bytes(p), work_of(p));
  return {out, lse};
}

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
  const cpu::ForwardKernels kernels = cpu::tiled_forward_kernels(cpu_dtype(query));
  run(kernels.forward, p, kernels.query_items(p), kernels.scratch_bytes(p), work_of(p));
  return out;
}

// The gradients that are wanted and exist, zero-filled where no kernel will write; size 0 for the others.
std::vector<Tensor> make_gradients(const Arguments& a, const Flags& needed, Problem& p) {
  const Tensor* inputs[kGradients] = {&a.query, &a.key, &a.value, a.rpb ? &*a.rpb : nullptr,
                                      a.additional_keys ? &*a.additional_keys : nullptr,
                                      a.additional_values ? &*a.additional_values : nullptr};
  Rows* rows[kGradients] = {&p.grad_query, &p.grad_key, &p.grad_value, &p.grad_rpb, &p.grad_additional_keys, &p.grad_additional_values};
  const int64_t spatial[kGradients] = {a.rank(), a.rank(), a.rank(), 0, 1, 1};
  std::vector<Tensor> gradients;
  for (int i = 0; i < kGradients; ++i) {
    if (!needed[i] || !inputs[i]) {
      gradients.push_back(torch::stable::new_empty(a.query, Integers{0}));
      continue;
    }
    gradients.push_back(torch::stable::new_empty(*inputs[i], sizes_of(*inputs[i])));
    Tensor& gradient = gradients.back();
    if (i == kRpb) rows[i]->data = gradient.data_ptr();
    else *rows[i] = rows_of(gradient, true, spatial[i], true, true);
    if (p.batch == 0 || p.heads == 0) torch::stable::zero_(gradient);
  }
  return gradients;
}

using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Six backward_cpu(
    OptionalTensor grad_out, OptionalTensor grad_lse, const Tensor& out, const Tensor& lse, const Tensor& query,
    const Tensor& key, const Tensor& value, Integers kernel_size, Integers stride, Integers dilation, Flags is_causal,
    std::optional<double> scale, OptionalTensor additional_keys, OptionalTensor additional_values, OptionalTensor rpb,
    OptionalTensor key_mask, Integers q_origin, Integers kv_origin, Integers extent, int64_t backend, Flags needed,
    bool /*deterministic: this backward always is*/) {
  const Arguments a{query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys,
                    additional_values, rpb, key_mask, q_origin, kv_origin, extent};
  check_backend(backend);
  check(a);
  rpb = dense(rpb);
  Integers shape = sizes_of(query), rows = shape;
  shape.back() = value.size(-1);
  rows.pop_back();
  check_saved(query, grad_out, grad_lse, out, lse, shape, rows, needed);
  Problem p = make_problem(a);
  std::vector<Tensor> g = make_gradients(a, needed, p);
  Six result{g[0], g[1], g[2], g[3], g[4], g[5]};
  if (p.batch == 0 || p.heads == 0) return result;
  const int64_t rank = a.rank();
  p.out = rows_of(out, true, rank, true, true);
  p.lse = rows_of(lse, true, rank, true, false);
  if (grad_out) p.grad_out = rows_of(*grad_out, true, rank, true, true);
  if (grad_lse) p.grad_lse = rows_of(*grad_lse, true, rank, true, false);
  const cpu::Dtype dtype = cpu_dtype(query);
  const bool tiled = takes_tiled(p, dtype, backend);
  if (tiled) {
    const cpu::TiledBackwardKernels kernels = cpu::tiled_backward_kernels(dtype);
    const Tensor partials = torch::stable::new_zeros(lse, Integers{kParts * kernels.partial_size(p)});
    p.partials = partials.data_ptr();
    const auto rows = [rank](const Tensor& tensor) { return rows_of(tensor, true, rank, true, true); };
    OptionalTensor sum_key, sum_value;
    if (p.grad_key.data) sum_key = make_sums(g[kKey], p.grad_key, p.sum_key, rows);
    if (p.grad_value.data) sum_value = make_sums(g[kValue], p.grad_value, p.sum_value, rows);
    run_colours(kernels, p);
  } else {
    const Tensor delta = torch::stable::new_empty(lse, sizes_of(lse)), row_lse = torch::stable::new_empty(lse, sizes_of(lse));
    p.delta = rows_of(delta, true, rank, true, false);
    p.row_lse = rows_of(row_lse, true, rank, true, false);
    const Tensor partials = torch::stable::new_zeros(lse, Integers{p.grad_rpb.data ? kParts * rpb->numel() : 0});
    p.partials = partials.data_ptr();
    run_general(cpu::backward_kernels(dtype), p);
  }
  return result;
}

}  // namespace

#define NATTEN_SETTINGS "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, "

STABLE_TORCH_LIBRARY_FRAGMENT(natten, m) {
#define NATTEN_COMPOSITE(rank, flags)                                                                                    \
  m.def("na" rank "d(Tensor query, Tensor key, Tensor value, int[" rank "] kernel_size, int[" rank "] stride=1, int[" rank \
        "] dilation=1, bool[" rank "] is_causal=" flags ", float? scale=None, Tensor? additional_keys=None, "              \
        "Tensor? additional_values=None, *, Tensor? rpb=None, Tensor? key_mask=None) -> Tensor");
  NATTEN_COMPOSITE("1", "[False]")
  NATTEN_COMPOSITE("2", "[False, False]")
  NATTEN_COMPOSITE("3", "[False, False, False]")
  m.def("_cpu_tiled_forward(Tensor query, Tensor key, Tensor value, " NATTEN_SETTINGS "int[] tiling) -> Tensor");
  m.def("neighborhood_attention_lse(Tensor query, Tensor key, Tensor value, " NATTEN_SETTINGS
        "float? scale=None, Tensor? additional_keys=None, Tensor? additional_values=None, *, Tensor? rpb=None, "
        "Tensor? key_mask=None, SymInt[] q_origin=[], SymInt[] kv_origin=[], SymInt[] extent=[], int backend=0) "
        "-> (Tensor out, Tensor lse)");
  m.def("neighborhood_attention_lse_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor query, "
        "Tensor key, Tensor value, " NATTEN_SETTINGS
        "float? scale, Tensor? additional_keys, Tensor? additional_values, Tensor? rpb, Tensor? key_mask, "
        "SymInt[] q_origin, SymInt[] kv_origin, SymInt[] extent, int backend, bool[] needed, bool deterministic) "
        "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_rpb, Tensor grad_additional_keys, "
        "Tensor grad_additional_values)");
}

STABLE_TORCH_LIBRARY_IMPL(natten, CPU, m) {
  m.impl("_cpu_tiled_forward", TORCH_BOX(&forward_with_tiling));
  m.impl("neighborhood_attention_lse", TORCH_BOX(&forward_cpu));
  m.impl("neighborhood_attention_lse_backward", TORCH_BOX(&backward_cpu));
}

}  // namespace natten
