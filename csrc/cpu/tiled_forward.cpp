// SPDX-License-Identifier: MIT
// The tiled path's forward as a pass over owners. Compiled once per ISA.
#include "dtypes.h"
#include "tiled/forward.h"
#include "tiled/passes.h"

namespace natten {
namespace cpu::NATTEN_ISA {
ForwardKernels tiled_forward_kernels(Dtype dtype) {
  return with_element(dtype, [](auto element) { return make_pass<Forward<decltype(element)>>(); });
}
}  // namespace cpu::NATTEN_ISA
}  // namespace natten
