// SPDX-License-Identifier: MIT
// The fronts of the unfused ops, heads first, for any device. na_qk makes the logits of every window slot, na_av sums values
// by weights that lie in memory. Both are bilinear, so each one's backward is the other and its transpose. A Device has a
// Guard (fused.h) and
//   unfused(problem, tokens, grad_key)   writes those of slots_out, grad_query, grad_key, grad_rpb and
//                                        grad_additional_keys that the problem has; grad_key is the tensor of that name
#pragma once
#include "arguments.h"

#include <cmath>

namespace natten {

// Every tensor of either op is [batch, heads, tokens.., last]; additional tokens are [batch, heads, tokens, dim].
struct Halves {
  const char* name;        // of the tensor that has the tokens and the head dim
  const Tensor& tokens;
  const Windows windows;
  const char* additional_name;
  const OptionalTensor& additional;

  int64_t rank() const { return tokens.dim() - 3; }
  int64_t dim() const { return tokens.size(-1); }
  int64_t additional_tokens() const { return additional ? additional->size(2) : 0; }
  Integers shape(int64_t last) const {
    Integers sizes = sizes_of(tokens);
    sizes.back() = last;
    return sizes;
  }
  int64_t slots() const {
    int64_t count = 1;
    for (const int64_t kernel : windows.kernel_size) count *= kernel;
    return count + additional_tokens();
  }
  bool empty() const { return tokens.numel() == 0; }
};

inline void check(const Halves& h, int64_t least_dim) {
  const int64_t rank = h.rank();
  STD_TORCH_CHECK(rank >= 1 && rank <= kAxes, "natten: ", h.name, " has ", h.tokens.dim(), " dims, expected 4 to 6: [batch, heads, 1 to 3 axes, dim]");
  dtype_of(h.tokens);
  check_dim(h.name, h.dim(), least_dim);
  check_windows(h.windows, rank);
  for (int64_t axis = 0; axis < rank; ++axis) check_span(h.windows, axis, h.tokens.size(axis + 2));
  if (!h.additional) return;
  STD_TORCH_CHECK(h.additional->dim() == 4, "natten: ", h.additional_name, " has ", h.additional->dim(), " dims, expected 4");
  check_shape(h.additional_name, *h.additional, {h.tokens.size(0), h.tokens.size(1), h.additional->size(2), h.dim()});
  check_dtype(h.additional_name, *h.additional, h.tokens.scalar_type());
  check_device(h.additional_name, *h.additional, h.tokens);
}
inline void check_like(const Halves& h, const char* name, const Tensor& tensor, int64_t last) {
  check_shape(name, tensor, h.shape(last));
  check_dtype(name, tensor, h.tokens.scalar_type());
  check_device(name, tensor, h.tokens);
}
inline void check_needed(const Flags& needed, size_t count) {
  STD_TORCH_CHECK(needed.size() == count, "natten: needed has ", needed.size(), " entries, expected ", count);
}

// Queries, keys and outputs are still to be set.
inline Problem make_problem(const Halves& h) {
  Problem p{};
  const int64_t rank = h.rank();
  p.batch = h.tokens.size(0);
  p.heads = p.heads_kv = h.tokens.size(1);
  p.head_dim = p.value_dim = h.dim();
  p.scale = 1;
  int64_t step = 1;
  for (int64_t i = kAxes - 1; i >= 0; --i) {
    const int64_t axis = i - (kAxes - rank);
    p.q_shape[i] = p.kv_shape[i] = axis < 0 ? 1 : h.tokens.size(axis + 2);
    p.axis[i] = Axis{1, 1, 1, 1, false};
    if (axis >= 0) set_axis(p, h.windows, axis, rank, p.q_shape[i]);
    p.slot_step[i] = step;
    step *= p.axis[i].kernel;
  }
  p.additional = h.additional_tokens();
  if (p.additional) p.additional_keys = p.additional_values = heads_first_rows(*h.additional, 1);
  return p;
}
inline void set_keys(Problem& p, const Tensor& key, int64_t rank) { p.key = p.value = heads_first_rows(key, rank); }

// A gradient like `tensor` as rows, or a tensor of size 0 where it is not needed; zeros where no kernel will write.
inline Tensor make_gradient(const Halves& h, const Tensor* tensor, bool needed, int64_t spatial, Rows& rows) {
  if (!needed || !tensor) return torch::stable::new_empty(h.tokens, Integers{0});
  Tensor gradient = torch::stable::new_empty(*tensor, sizes_of(*tensor));
  if (h.empty()) torch::stable::zero_(gradient);
  else if (gradient.numel() > 0) rows = heads_first_rows(gradient, spatial);
  return gradient;
}

template <class Device>
Tensor unfused_qk(const Tensor& query, const Tensor& key, Integers kernel_size, Integers stride, Integers dilation, Flags is_causal,
                  OptionalTensor rpb, OptionalTensor additional_keys) {
  const Halves h{"query", query, {kernel_size, stride, dilation, is_causal}, "additional_keys", additional_keys};
  check(h, 1);
  check_like(h, "key", key, h.dim());
  if (rpb) check_rpb(*rpb, h.windows, query, query.size(1));
  rpb = dense(rpb);
  const typename Device::Guard guard(h.tokens);
  Tensor attn = torch::stable::new_empty(query, h.shape(h.slots()));
  if (h.empty()) return attn;
  Problem p = make_problem(h);
  p.query = heads_first_rows(query, h.rank());
  set_keys(p, key, h.rank());
  if (rpb) set_rpb(p, *rpb, h.rank());
  p.slots_out = heads_first_rows(attn, h.rank());
  p.absent = -HUGE_VAL;
  Device::unfused(p, h.tokens, nullptr);
  return attn;
}

template <class Device>
Tensor unfused_av(const Tensor& attn, const Tensor& value, Integers kernel_size, Integers stride, Integers dilation, Flags is_causal,
                  OptionalTensor additional_values) {
  const Halves h{"value", value, {kernel_size, stride, dilation, is_causal}, "additional_values", additional_values};
  check(h, 0);
  check_like(h, "attn", attn, h.slots());
  const typename Device::Guard guard(h.tokens);
  Tensor out = torch::stable::new_empty(value, sizes_of(value));
  if (h.empty()) return out;
  Problem p = make_problem(h);
  set_keys(p, value, h.rank());
  p.slots_in = heads_first_rows(attn, h.rank());
  p.grad_query = heads_first_rows(out, h.rank());
  Device::unfused(p, h.tokens, nullptr);
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> unfused_qk_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, Integers kernel_size, Integers stride, Integers dilation, Flags is_causal,
    OptionalTensor rpb, OptionalTensor additional_keys, Flags needed) {
  const Halves h{"query", query, {kernel_size, stride, dilation, is_causal}, "additional_keys", additional_keys};
  check(h, 1);
  check_like(h, "key", key, h.dim());
  check_like(h, "grad", grad, h.slots());
  check_needed(needed, 4);
  const typename Device::Guard guard(h.tokens);
  if (rpb) check_rpb(*rpb, h.windows, query, query.size(1));
  rpb = dense(rpb);
  Problem p = make_problem(h);
  Rows table;
  Tensor grad_query = make_gradient(h, &query, needed[0], h.rank(), p.grad_query);
  Tensor grad_key = make_gradient(h, &key, needed[1], h.rank(), p.grad_key);
  Tensor grad_rpb = torch::stable::new_empty(query, Integers{0});
  Tensor grad_additional = make_gradient(h, additional_keys ? &*additional_keys : nullptr, needed[3], 1, p.grad_additional_keys);
  if (rpb && needed[2]) {
    grad_rpb = torch::stable::new_empty(*rpb, sizes_of(*rpb));
    set_rpb(p, *rpb, h.rank());
    p.rpb.data = nullptr;  // its strides alone
    p.grad_rpb.data = grad_rpb.data_ptr();
    if (h.empty()) torch::stable::zero_(grad_rpb);
  }
  if (!h.empty()) {
    p.query = heads_first_rows(query, h.rank());
    set_keys(p, key, h.rank());
    p.slots_in = heads_first_rows(grad, h.rank());
    Device::unfused(p, h.tokens, &grad_key);
  }
  return {grad_query, grad_key, grad_rpb, grad_additional};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> unfused_av_backward(
    const Tensor& grad, const Tensor& attn, const Tensor& value, Integers kernel_size, Integers stride, Integers dilation, Flags is_causal,
    OptionalTensor additional_values, Flags needed) {
  const Halves h{"value", value, {kernel_size, stride, dilation, is_causal}, "additional_values", additional_values};
  check(h, 0);
  check_like(h, "attn", attn, h.slots());
  check_like(h, "grad", grad, h.dim());
  check_needed(needed, 3);
  const typename Device::Guard guard(h.tokens);
  Problem p = make_problem(h);
  Tensor grad_attn = make_gradient(h, &attn, needed[0], h.rank(), p.slots_out);
  Tensor grad_value = make_gradient(h, &value, needed[1], h.rank(), p.grad_key);
  Tensor grad_additional = make_gradient(h, additional_values ? &*additional_values : nullptr, needed[2], 1, p.grad_additional_keys);
  if (!h.empty()) {
    p.query = heads_first_rows(grad, h.rank());
    set_keys(p, value, h.rank());
    if (p.grad_key.data || p.grad_additional_keys.data) p.slots_in = heads_first_rows(attn, h.rank());
    Device::unfused(p, h.tokens, &grad_value);
  }
  return {grad_attn, grad_value, grad_additional};
}

#define NATTEN_WINDOWS "int[] kernel_size, int[] stride, int[] dilation, bool[] is_causal, "

constexpr const char* kUnfusedSchemas[] = {
    "na_qk(Tensor query, Tensor key, " NATTEN_WINDOWS "*, Tensor? rpb=None, Tensor? additional_keys=None) -> Tensor",
    "na_av(Tensor attn, Tensor value, " NATTEN_WINDOWS "*, Tensor? additional_values=None) -> Tensor",
    "na_qk_backward(Tensor grad, Tensor query, Tensor key, " NATTEN_WINDOWS
    "Tensor? rpb, Tensor? additional_keys, bool[] needed) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_rpb, Tensor grad_additional_keys)",
    "na_av_backward(Tensor grad, Tensor attn, Tensor value, " NATTEN_WINDOWS
    "Tensor? additional_values, bool[] needed) -> (Tensor grad_attn, Tensor grad_value, Tensor grad_additional_values)"};

}  // namespace natten
