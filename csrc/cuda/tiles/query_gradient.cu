// SPDX-License-Identifier: MIT
// Tensor-core path, gradient of the query.
#include "run.h"

namespace natten::cuda::tiles {
const char* query_gradient(const Problem& p, Dtype dtype, Stream stream) { return run_sums<QueryGradient>(p, dtype, stream); }
}  // namespace natten::cuda::tiles
