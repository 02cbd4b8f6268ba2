// SPDX-License-Identifier: MIT
// Arguments of the primitive and its backward: checked for safety (Python raises the friendly sentences) and brought
// into a Problem.
#pragma once
#include "common.h"

namespace natten {

// Backend ids, the same as in natten_ops/backends.py (tests/test_backends.py compares them). kPreferTf32: 5 where it takes the
// problem, else the kernels' choice.
enum Backend : int64_t { kChoose = 0, kCpuGeneral = 1, kCpuTiled = 2, kCudaGeneral = 3, kCudaMma = 4, kCudaMmaTf32 = 5, kCudaWgmma = 6, kPreferTf32 = -5 };

// What attends to what, one entry an axis.
struct Windows {
  const Integers &kernel_size, &stride, &dilation;
  const Flags& is_causal;
};

// The order of `needed` and of the gradients of the fused op's backward.
enum Gradient { kQuery, kKey, kValue, kRpb, kAdditionalKeys, kAdditionalValues, kGradients };

struct Arguments {
  const Tensor &query, &key, &value;
  const Integers &kernel_size, &stride, &dilation;
  const Flags& is_causal;
  std::optional<double> scale;
  const OptionalTensor &additional_keys, &additional_values, &rpb, &key_mask;
  const Integers &q_origin, &kv_origin, &extent;

  int64_t rank() const { return query.dim() - 3; }
  Windows windows() const { return {kernel_size, stride, dilation, is_causal}; }
};

// Far above any use, far below what would overflow in sizes of scratch and in window arithmetic.
constexpr int64_t kMaxHeadDim = int64_t(1) << 20, kMaxExtent = int64_t(1) << 62;

// Raises with both shapes unless they are equal.
void check_shape(const char* name, const Tensor& tensor, const Integers& expected);
// Raises with both dtypes unless they are equal; and with both devices.
void check_dtype(const char* name, const Tensor& tensor, ScalarType expected);
void check_device(const char* name, const Tensor& tensor, const Tensor& query);

// Raises unless what the forward returned, and its gradients where they are there, have these shapes, and the dtypes and the
// device that go with the query, and `needed` has an entry for each gradient.
void check_saved(const Tensor& query, const OptionalTensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out,
                 const Tensor& lse, const Integers& out_shape, const Integers& lse_shape, const Flags& needed);

// Raises unless each list has `rank` entries that lie within their bounds.
void check_windows(const Windows& windows, int64_t rank);
// Raises unless the window of that axis fits into `length` tokens.
void check_span(const Windows& windows, int64_t axis, int64_t length);
// Raises unless the bias table fits tensors like `query`, with that many heads.
void check_rpb(const Tensor& rpb, const Windows& windows, const Tensor& query, int64_t heads);
void check_dim(const char* name, int64_t dim, int64_t least);

// Raises unless a kernel may run on the arguments without touching memory that is not theirs.
void check(const Arguments& arguments);

// Axis `axis` of `rank`, of `length` tokens in the whole grid.
void set_axis(Problem& problem, const Windows& windows, int64_t axis, int64_t rank, int64_t length);
void set_rpb(Problem& problem, const Tensor& rpb, int64_t rank);

// The problem of checked arguments; outputs and gradients are still to be set.
Problem make_problem(const Arguments& arguments);

// A tensor of shape [batch, spatial.., heads, dim], or without dim, as rows; `spatial` dims are right-aligned.
Rows rows_of(const Tensor& tensor, bool has_batch, int64_t spatial, bool has_head, bool has_dim);
// The same of a tensor of shape [batch, heads, spatial.., dim].
Rows heads_first_rows(const Tensor& tensor, int64_t spatial);

}  // namespace natten
