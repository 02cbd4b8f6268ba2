// SPDX-License-Identifier: MIT
// The unfused ops as passes over owners. Compiled once per ISA.
#include "dtypes.h"
#include "tiled/passes.h"
#include "tiled/unfused.h"

namespace natten {
namespace cpu::NATTEN_ISA {
UnfusedKernels unfused_kernels(Dtype dtype) {
  return with_element(dtype, [](auto element) {
    using Pass = Unfused<decltype(element)>;
    return UnfusedKernels{make_pass<Pass>(), make_colour_passes<Pass>()};
  });
}
}  // namespace cpu::NATTEN_ISA
}  // namespace natten
