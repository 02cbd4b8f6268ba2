// SPDX-License-Identifier: MIT
// The CUDA kernels as the fronts call them: on a problem and a stream. No torch, no CUDA header.
// Each returns null, or what the driver said of a launch that it refused.
#pragma once
#include "../problem.h"

namespace natten::cuda {

using Stream = void*;  // a cudaStream_t

// Whether rows of numbers of that size lie so that 16 bytes of them can be read at once.
inline bool lies_in_pieces(const Rows& rows, int64_t bytes) {
  bool fits = rows.dim == 1 && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.batch * bytes % 16 == 0 && rows.head * bytes % 16 == 0;
  for (int a = 0; a < kAxes; ++a) fits = fits && rows.token[a] * bytes % 16 == 0;
  return fits;
}

struct DeviceFacts {
  int capability;        // ten times the compute capability: 80 for 8.0
  int64_t shared_bytes;  // of shared memory that a block may ask for
};
DeviceFacts current_device();

// Plain CUDA: every dtype, option, head dim and stride. A warp has a query (or a key) of one head; nothing is added up in an
// order that the hardware chooses.
namespace general {
const char* forward(const Problem& problem, Dtype dtype, Stream stream);
// The gradients that the problem has. Reads out and lse; `delta` and `row_lse` are written, `partials` has
// partial_size(problem) numbers in the dtype of lse.
const char* backward(const Problem& problem, Dtype dtype, Stream stream);
// The unfused ops: slots_out, and the gradients that the problem has.
const char* unfused(const Problem& problem, Dtype dtype, Stream stream);
int64_t partial_size(const Problem& problem);
}  // namespace general

// Tensor cores (mma.sync, sm_80 and up): float16 and bfloat16, head dims that are multiples of 8 up to 256; float32, whose
// products are tf32, up to 128.
namespace tiles {
// Why it cannot run the problem, or null.
const char* why_not(const Problem& problem, Dtype dtype, bool backward, const DeviceFacts& device);
const char* forward(const Problem& problem, Dtype dtype, Stream stream);
// As general::backward, which it calls for what all queries share.
const char* backward(const Problem& problem, Dtype dtype, Stream stream);
}  // namespace tiles

// The forward of the same path on Hopper (TMA and wgmma, sm_90a): float16 and bfloat16, head dims 64 and 128, no bias table, mask or
// additional tokens.
namespace hopper {
// Why it cannot run the problem, or null.
const char* why_not(const Problem& problem, Dtype dtype, const DeviceFacts& device);
const char* forward(const Problem& problem, Dtype dtype, Stream stream);
}  // namespace hopper

}  // namespace natten::cuda
