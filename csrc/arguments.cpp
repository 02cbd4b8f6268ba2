// SPDX-License-Identifier: MIT
#include "arguments.h"

#include <cmath>
#include <string>

namespace natten {
namespace {

std::string text(const int64_t* values, size_t count) {
  std::string out = "[";
  for (size_t i = 0; i < count; ++i) out += (i ? ", " : "") + std::to_string(values[i]);
  return out + "]";
}
std::string shape_text(const Tensor& t) { return text(t.sizes().data(), t.sizes().size()); }

}  // namespace

void check_shape(const char* name, const Tensor& tensor, const Integers& expected) {
  bool same = tensor.dim() == int64_t(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = tensor.size(i) == expected[i];
  STD_TORCH_CHECK(same, "natten: ", name, " has shape ", shape_text(tensor), ", expected ", text(expected.data(), expected.size()));
}

void check_dtype(const char* name, const Tensor& tensor, ScalarType expected) {
  STD_TORCH_CHECK(tensor.scalar_type() == expected, "natten: ", name, " has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                  ", expected ", torch::headeronly::toString(expected));
}

void check_device(const char* name, const Tensor& tensor, const Tensor& query) {
  STD_TORCH_CHECK(tensor.device() == query.device(), "natten: ", name, " is on device type ", int(tensor.device().type()), ", query on ",
                  int(query.device().type()), "; they must be on one device");
}

namespace {

void check_tensor(const char* name, const Tensor& tensor, const Arguments& a, const Integers& expected) {
  check_shape(name, tensor, expected);
  check_dtype(name, tensor, a.query.scalar_type());
  check_device(name, tensor, a.query);
}

}  // namespace

void check_dim(const char* name, int64_t dim, int64_t least) {
  STD_TORCH_CHECK(dim >= least && dim <= kMaxHeadDim, "natten: head dim of ", name, " is ", dim, ", it must be ", least, " to ", kMaxHeadDim);
}

void check_windows(const Windows& w, int64_t rank) {
  const struct { const char* name; const Integers& list; } lists[] = {
      {"kernel_size", w.kernel_size}, {"stride", w.stride}, {"dilation", w.dilation}};
  for (const auto& [name, list] : lists) {
    STD_TORCH_CHECK(int64_t(list.size()) == rank, "natten: ", name, " has ", list.size(), " entries for ", rank, " spatial axes");
    for (int64_t axis = 0; axis < rank; ++axis)
      STD_TORCH_CHECK(list[axis] >= 1, "natten: ", name, "[", axis, "]=", list[axis], " must be at least 1");
  }
  STD_TORCH_CHECK(int64_t(w.is_causal.size()) == rank, "natten: is_causal has ", w.is_causal.size(), " entries for ", rank, " spatial axes");
  for (int64_t axis = 0; axis < rank; ++axis)
    STD_TORCH_CHECK(w.stride[axis] <= w.kernel_size[axis], "natten: stride[", axis, "]=", w.stride[axis],
                    " exceeds kernel_size[", axis, "]=", w.kernel_size[axis]);
}

void check_span(const Windows& w, int64_t axis, int64_t length) {
  STD_TORCH_CHECK(w.kernel_size[axis] <= length / w.dilation[axis],  // no product: it might overflow
                  "natten: kernel_size[", axis, "]=", w.kernel_size[axis], " with dilation[", axis, "]=", w.dilation[axis],
                  " spans more than the ", length, " tokens on axis ", axis);
}

void check_rpb(const Tensor& rpb, const Windows& w, const Tensor& query, int64_t heads) {
  Integers expected{heads};
  for (size_t axis = 0; axis < w.kernel_size.size(); ++axis) {
    STD_TORCH_CHECK(w.stride[axis] == 1, "natten: rpb is not defined for stride[", axis, "]=", w.stride[axis], ", only for 1");
    expected.push_back(2 * w.kernel_size[axis] - 1);
  }
  check_shape("rpb", rpb, expected);
  const bool wide = rpb.scalar_type() == ScalarType::Float && query.scalar_type() != ScalarType::Double;
  if (!wide) check_dtype("rpb", rpb, query.scalar_type());
  check_device("rpb", rpb, query);
}

namespace {

void check_box(const Arguments& a) {
  const int64_t rank = a.rank();
  const size_t given = a.q_origin.size() + a.kv_origin.size() + a.extent.size();
  STD_TORCH_CHECK(given == 0 || (int64_t(a.q_origin.size()) == rank && int64_t(a.kv_origin.size()) == rank && int64_t(a.extent.size()) == rank),
                  "natten: q_origin, kv_origin and extent have ", a.q_origin.size(), ", ", a.kv_origin.size(), " and ", a.extent.size(),
                  " entries; give ", rank, " each, or none");
}

void check_axis(const Arguments& a, int64_t axis) {
  const bool boxed = !a.extent.empty();
  const int64_t queries = a.query.size(axis + 1), keys = a.key.size(axis + 1);
  const int64_t length = boxed ? a.extent[axis] : queries;
  STD_TORCH_CHECK(length <= kMaxExtent, "natten: extent[", axis, "]=", length, " is more than ", kMaxExtent);
  check_span(a.windows(), axis, length);
  if (!boxed) {
    STD_TORCH_CHECK(queries == keys, "natten: query has ", queries, " tokens on axis ", axis, ", key has ", keys);
    return;
  }
  const int64_t q_origin = a.q_origin[axis], kv_origin = a.kv_origin[axis];
  STD_TORCH_CHECK(q_origin >= 0 && q_origin <= length - queries, "natten: q_origin[", axis, "]=", q_origin, " with ", queries,
                  " tokens leaves extent[", axis, "]=", length);
  STD_TORCH_CHECK(kv_origin >= 0 && kv_origin <= length - keys, "natten: kv_origin[", axis, "]=", kv_origin, " with ", keys,
                  " tokens leaves extent[", axis, "]=", length);
  if (a.query.numel() == 0) return;  // no query, no window
  // Starts and ends grow with the query inside a dilation group: the first and the last query of each group decide.
  const Axis geometry{length, a.kernel_size[axis], a.stride[axis], a.dilation[axis], a.is_causal[axis]};
  const int64_t reach = smaller(geometry.dilation, queries);
  for (int64_t i = 0; i < reach; ++i) {
    const Span low = window(geometry, q_origin + i), high = window(geometry, q_origin + queries - reach + i);
    const int64_t first = low.group + geometry.dilation * low.first, last = high.group + geometry.dilation * (high.end - 1);
    STD_TORCH_CHECK(first >= kv_origin && last < kv_origin + keys, "natten: queries on axis ", axis, " see keys ", first, " to ", last,
                    ", but key holds kv_origin[", axis, "]=", kv_origin, " to ", kv_origin + keys - 1);
  }
}

void check_extras(const Arguments& a) {
  const int64_t batch = a.query.size(0), heads_kv = a.key.size(-2), rank = a.rank();
  STD_TORCH_CHECK(a.additional_keys.has_value() == a.additional_values.has_value(),
                  "natten: additional_keys and additional_values must be given together");
  if (a.additional_keys) {
    STD_TORCH_CHECK(a.additional_keys->dim() == 4, "natten: additional_keys has ", a.additional_keys->dim(), " dims, expected 4");
    const int64_t tokens = a.additional_keys->size(1);
    check_tensor("additional_keys", *a.additional_keys, a, {batch, tokens, heads_kv, a.query.size(-1)});
    check_tensor("additional_values", *a.additional_values, a, {batch, tokens, heads_kv, a.value.size(-1)});
  }
  if (a.rpb) check_rpb(*a.rpb, a.windows(), a.query, a.query.size(-2));
  if (a.key_mask) {
    Integers expected{batch};
    for (int64_t axis = 0; axis < rank; ++axis) expected.push_back(a.key.size(axis + 1));
    check_shape("key_mask", *a.key_mask, expected);
    check_dtype("key_mask", *a.key_mask, ScalarType::Bool);
    check_device("key_mask", *a.key_mask, a.query);
  }
}

}  // namespace

void check_saved(const Tensor& query, const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out,
                 const Tensor& lse, const Integers& out_shape, const Integers& lse_shape, const Flags& needed) {
  STD_TORCH_CHECK(needed.size() == kGradients, "natten: needed has ", needed.size(), " entries, expected ", int(kGradients));
  auto require = [&](const char* name, const Tensor& tensor, const Integers& shape, ScalarType dtype) {
    check_shape(name, tensor, shape);
    check_dtype(name, tensor, dtype);
    check_device(name, tensor, query);
  };
  require("out", out, out_shape, query.scalar_type());
  if (grad_out) require("grad_out", *grad_out, out_shape, query.scalar_type());
  require("lse", lse, lse_shape, lse_dtype(query));
  if (grad_lse) require("grad_lse", *grad_lse, lse_shape, lse_dtype(query));
}

void check(const Arguments& a) {
  const int64_t rank = a.rank();
  STD_TORCH_CHECK(rank >= 1 && rank <= kAxes, "natten: query has shape ", shape_text(a.query), ", expected [batch, 1 to 3 axes, heads, dim]");
  dtype_of(a.query);
  check_windows(a.windows(), rank);
  check_box(a);
  STD_TORCH_CHECK(a.key.dim() == a.query.dim(), "natten: key has ", a.key.dim(), " dims, query ", a.query.dim());
  check_dim("query", a.query.size(-1), 1);
  Integers key_shape{a.query.size(0)};
  for (int64_t axis = 0; axis < rank; ++axis) key_shape.push_back(a.key.size(axis + 1));
  const int64_t heads = a.query.size(-2), heads_kv = a.key.size(-2);
  key_shape.push_back(heads_kv);
  key_shape.push_back(a.query.size(-1));
  check_tensor("key", a.key, a, key_shape);
  STD_TORCH_CHECK(a.value.dim() == a.query.dim(), "natten: value has ", a.value.dim(), " dims, query ", a.query.dim());
  check_dim("value", a.value.size(-1), 0);
  key_shape.back() = a.value.size(-1);
  check_tensor("value", a.value, a, key_shape);
  STD_TORCH_CHECK(heads_kv == 0 ? heads == 0 : heads % heads_kv == 0, "natten: ", heads, " heads of query are no multiple of the ",
                  heads_kv, " heads of key");
  STD_TORCH_CHECK(!a.scale || std::isfinite(*a.scale), "natten: scale=", *a.scale, " must be finite");
  for (int64_t axis = 0; axis < rank; ++axis) check_axis(a, axis);
  check_extras(a);
}

Rows rows_of(const Tensor& tensor, bool has_batch, int64_t spatial, bool has_head, bool has_dim) {
  Rows rows;
  rows.data = tensor.data_ptr();
  int64_t dim = 0;
  if (has_batch) rows.batch = tensor.stride(dim++);
  for (int64_t axis = 0; axis < spatial; ++axis) rows.token[kAxes - spatial + axis] = tensor.stride(dim++);
  if (has_head) rows.head = tensor.stride(dim++);
  if (has_dim) rows.dim = tensor.stride(dim);
  return rows;
}

Rows heads_first_rows(const Tensor& tensor, int64_t spatial) {
  Rows rows;
  rows.data = tensor.data_ptr();
  rows.batch = tensor.stride(0), rows.head = tensor.stride(1), rows.dim = tensor.stride(spatial + 2);
  for (int64_t axis = 0; axis < spatial; ++axis) rows.token[kAxes - spatial + axis] = tensor.stride(axis + 2);
  return rows;
}

void set_axis(Problem& p, const Windows& w, int64_t axis, int64_t rank, int64_t length) {
  p.axis[kAxes - rank + axis] = Axis{length, w.kernel_size[axis], w.stride[axis], w.dilation[axis], bool(w.is_causal[axis])};
}

void set_rpb(Problem& p, const Tensor& rpb, int64_t rank) {
  p.rpb = rows_of(rpb, false, 0, true, false);
  p.rpb_wide = rpb.scalar_type() == ScalarType::Float;
  for (int64_t axis = 0; axis < rank; ++axis) p.rpb.token[kAxes - rank + axis] = rpb.stride(axis + 1);
}

Problem make_problem(const Arguments& a) {
  Problem p{};
  const int64_t rank = a.rank(), lead = kAxes - rank;
  p.batch = a.query.size(0);
  p.heads = a.query.size(-2);
  p.heads_kv = a.key.size(-2);
  p.head_dim = a.query.size(-1);
  p.value_dim = a.value.size(-1);
  p.scale = a.scale ? *a.scale : 1.0 / std::sqrt(double(p.head_dim));
  for (int64_t i = 0; i < kAxes; ++i) {
    p.q_shape[i] = p.kv_shape[i] = 1;
    p.axis[i] = Axis{1, 1, 1, 1, false};
    if (i < lead) continue;
    const int64_t axis = i - lead;
    p.q_shape[i] = a.query.size(axis + 1);
    p.kv_shape[i] = a.key.size(axis + 1);
    if (!a.extent.empty()) p.q_origin[i] = a.q_origin[axis], p.kv_origin[i] = a.kv_origin[axis];
    const int64_t length = a.extent.empty() ? p.q_shape[i] : a.extent[axis];
    set_axis(p, a.windows(), axis, rank, length);
  }
  p.query = rows_of(a.query, true, rank, true, true);
  p.key = rows_of(a.key, true, rank, true, true);
  p.value = rows_of(a.value, true, rank, true, true);
  if (a.additional_keys && a.additional_keys->size(1) > 0) {
    p.additional = a.additional_keys->size(1);
    p.additional_keys = rows_of(*a.additional_keys, true, 1, true, true);
    p.additional_values = rows_of(*a.additional_values, true, 1, true, true);
  }
  if (a.rpb) set_rpb(p, *a.rpb, rank);
  if (a.key_mask) p.key_mask = rows_of(*a.key_mask, true, rank, false, false);
  return p;
}

}  // namespace natten
