// SPDX-License-Identifier: MIT
// Tensor-core path, gradients of key and value; and the whole backward.
#include "run.h"

namespace natten::cuda::tiles {

const char* key_gradient(const Problem& p, Dtype dtype, Stream stream) { return run_sums<KeyGradient>(p, dtype, stream); }

const char* backward(const Problem& p, Dtype dtype, Stream stream) {
  Problem shared = p;  // delta, and what all queries add to: additional tokens and the bias table
  shared.grad_query.data = shared.grad_key.data = shared.grad_value.data = nullptr;
  const char* error = general::backward(shared, dtype, stream);
  if (!error && p.grad_query.data) error = query_gradient(p, dtype, stream);
  if (!error && (p.grad_key.data || p.grad_value.data)) error = key_gradient(p, dtype, stream);
  return error;
}

}  // namespace natten::cuda::tiles
