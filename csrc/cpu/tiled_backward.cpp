// SPDX-License-Identifier: MIT
// The tiled path's backward as passes over the owners of each colour. Compiled once per ISA.
#include "dtypes.h"
#include "tiled/backward.h"
#include "tiled/passes.h"

namespace natten {
namespace cpu::NATTEN_ISA {
TiledBackwardKernels tiled_backward_kernels(Dtype dtype) {
  return with_element(dtype, [](auto element) { return make_colour_passes<Backward<decltype(element)>>(); });
}
}  // namespace cpu::NATTEN_ISA
}  // namespace natten
