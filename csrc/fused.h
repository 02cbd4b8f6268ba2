// SPDX-License-Identifier: MIT
// The front of the fused op for any device: checks, outputs, gradients and the problem, which the kernels of a Device run.
// A Device has
//   Guard                                            made of the query: what must be current while memory is asked for
//   check_backend(backend)                           raises unless it knows the id
//   gradient(tensor)                                 that tensor, or a copy that its kernels would rather read
//   forward(problem, query, backend)                 with out and lse
//   backward(problem, lse, gradients, rank, backend) with those gradients that are wanted
#pragma once
#include "arguments.h"

namespace natten {

template <class Device> std::tuple<Tensor, Tensor> fused_forward(
    const Tensor& query, const Tensor& key, const Tensor& value, Integers kernel_size, Integers stride, Integers dilation,
    Flags is_causal, std::optional<double> scale, OptionalTensor additional_keys, OptionalTensor additional_values,
    OptionalTensor rpb, OptionalTensor key_mask, Integers q_origin, Integers kv_origin, Integers extent, int64_t backend) {
  const Arguments a{query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys,
                    additional_values, rpb, key_mask, q_origin, kv_origin, extent};
  Device::check_backend(backend);
  check(a);
  const typename Device::Guard guard(query);
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
  Device::forward(p, query, backend);
  return {out, lse};
}

// The gradients that are wanted and exist, zero-filled where no kernel will write; size 0 for the others.
inline std::vector<Tensor> make_gradients(const Arguments& a, const Flags& needed, Problem& p) {
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

template <class Device> Six fused_backward(
    OptionalTensor grad_out, OptionalTensor grad_lse, const Tensor& out, const Tensor& lse, const Tensor& query,
    const Tensor& key, const Tensor& value, Integers kernel_size, Integers stride, Integers dilation, Flags is_causal,
    std::optional<double> scale, OptionalTensor additional_keys, OptionalTensor additional_values, OptionalTensor rpb,
    OptionalTensor key_mask, Integers q_origin, Integers kv_origin, Integers extent, int64_t backend, Flags needed,
    bool /*deterministic: every backward here is*/) {
  const Arguments a{query, key, value, kernel_size, stride, dilation, is_causal, scale, additional_keys,
                    additional_values, rpb, key_mask, q_origin, kv_origin, extent};
  Device::check_backend(backend);
  check(a);
  Integers shape = sizes_of(query), rows = shape;
  shape.back() = value.size(-1);
  rows.pop_back();
  check_saved(query, grad_out, grad_lse, out, lse, shape, rows, needed);
  const typename Device::Guard guard(query);
  rpb = dense(rpb);
  Problem p = make_problem(a);
  std::vector<Tensor> g = make_gradients(a, needed, p);
  Six result{g[0], g[1], g[2], g[3], g[4], g[5]};
  if (p.batch == 0 || p.heads == 0) return result;
  const int64_t rank = a.rank();
  p.out = rows_of(out, true, rank, true, true);
  p.lse = rows_of(lse, true, rank, true, false);
  if (grad_out) grad_out = Device::gradient(*grad_out);
  if (grad_out) p.grad_out = rows_of(*grad_out, true, rank, true, true);
  if (grad_lse) p.grad_lse = rows_of(*grad_lse, true, rank, true, false);
  Device::backward(p, lse, g, rank, backend);
  return result;
}

#define NATTEN_SETTINGS "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, "

constexpr char kForwardSchema[] =
    "neighborhood_attention_lse(Tensor query, Tensor key, Tensor value, " NATTEN_SETTINGS
    "float? scale=None, Tensor? additional_keys=None, Tensor? additional_values=None, *, Tensor? rpb=None, "
    "Tensor? key_mask=None, SymInt[] q_origin=[], SymInt[] kv_origin=[], SymInt[] extent=[], int backend=0) "
    "-> (Tensor out, Tensor lse)";
constexpr char kBackwardSchema[] =
    "neighborhood_attention_lse_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor query, "
    "Tensor key, Tensor value, " NATTEN_SETTINGS
    "float? scale, Tensor? additional_keys, Tensor? additional_values, Tensor? rpb, Tensor? key_mask, "
    "SymInt[] q_origin, SymInt[] kv_origin, SymInt[] extent, int backend, bool[] needed, bool deterministic) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_rpb, Tensor grad_additional_keys, "
    "Tensor grad_additional_values)";

}  // namespace natten
