// SPDX-License-Identifier: MIT
// Tensor-core path, forward; and which problems the path takes.
#include "run.h"

#include <cmath>

namespace natten::cuda::tiles {
namespace {

// Shared memory of a block, of the pass that takes most.
template <class T, int kDim> constexpr int64_t most_bytes() {
  return larger(Shape<T, kDim, Pass::kForward, true>::kBytes,
                larger(Shape<T, kDim, Pass::kQueryGradient, true>::kBytes, Shape<T, kDim, Pass::kKeyGradient, true>::kBytes));
}
// The least that a block of a device of 8.0 and up may ask for, 8.6 and 8.9: no head dim is refused on some of them only.
constexpr int64_t kLeastOfDevices = 99 << 10;
static_assert(most_bytes<ptx::f16, 256>() <= kLeastOfDevices && most_bytes<ptx::bf16, 256>() <= kLeastOfDevices && most_bytes<float, 128>() <= kLeastOfDevices,
              "the longest rows fit the shared memory of every device");

template <class T> int64_t bytes_of(int64_t dim) {
  return dim <= 16 ? most_bytes<T, 16>() : dim <= 32 ? most_bytes<T, 32>() : dim <= 64 ? most_bytes<T, 64>()
      : dim <= 128 ? most_bytes<T, 128>() : most_bytes<T, 256>();
}

}  // namespace

const char* why_not(const Problem& p, Dtype dtype, bool backward, const DeviceFacts& device) {
  if (device.capability < 80) return "takes devices of compute capability 8.0 and up";
  if (dtype == Dtype::float64) return "takes float16, bfloat16 and (as tf32) float32";
  if (!(float(p.scale) > 0 && float(p.scale) < HUGE_VALF)) return "takes scales that are positive as float32: the softmax orders scores first";
  const int64_t dim = larger(p.head_dim, p.value_dim);
  const bool wide = dtype == Dtype::float32;
  if (p.head_dim % 8 || p.value_dim % 8 || p.value_dim == 0) return "takes head dims that are multiples of 8";
  if (dim > (wide ? 128 : 256)) return "takes head dims up to 256, of float32 up to 128";
  if (!(wide ? loads_wide<float> : loads_wide<ptx::f16>)({&p.query, &p.key, &p.value, &p.additional_keys, &p.additional_values, &p.out}))
    return "takes rows that begin at multiples of 16 bytes and lie densely";
  if (backward && !(wide ? loads_wide<float> : loads_wide<ptx::f16>)({&p.grad_out, &p.grad_query, &p.grad_key, &p.grad_value}))
    return "takes gradients whose rows begin at multiples of 16 bytes and lie densely";
  constexpr int64_t kLimit = (int64_t(1) << 31) - 1;  // positions, places in a bias table and boxes are counted in 32 bits
  if (p.batch > kLimit || p.heads > kLimit) return "takes fewer than 2^31 samples and heads";
  int64_t seen = 1;
  for (int a = 0; a < kAxes; ++a) {
    if (p.axis[a].length >= kLimit - 1024) return "takes fewer than 2^31 tokens on an axis";  // a box may reach beyond the end
    seen *= smaller(p.axis[a].kernel, kLimit);
    if (seen >= kLimit / 64) return "takes windows of fewer than 2^25 tokens";
  }
  if (p.additional >= kLimit - 1024) return "takes fewer than 2^31 additional tokens";
  if (p.rpb.data && table_size(p) >= kLimit) return "takes bias tables of fewer than 2^31 entries a head";
  const int64_t bytes = wide ? bytes_of<float>(dim) : bytes_of<ptx::f16>(dim);
  return device.shared_bytes < bytes ? "takes more shared memory than a block of this device has" : nullptr;
}

const char* forward(const Problem& p, Dtype dtype, Stream stream) { return run_sums<Forward>(p, dtype, stream); }

}  // namespace natten::cuda::tiles
