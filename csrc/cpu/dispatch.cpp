// SPDX-License-Identifier: MIT
// Chooses the instruction set at run time. Compiled for the baseline CPU.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

// Each ISA's objects provide the kernels in a namespace of their own; CMake lists the ISAs of this platform.
#define DECLARE(isa)                            \
  namespace natten::cpu::isa {                  \
  ForwardKernels forward_kernels(Dtype);        \
  ForwardKernels tiled_forward_kernels(Dtype);  \
  BackwardKernels backward_kernels(Dtype);      \
  TiledBackwardKernels tiled_backward_kernels(Dtype); \
  UnfusedKernels unfused_kernels(Dtype);        \
  }
NATTEN_ISA_LIST(DECLARE)
#undef DECLARE

namespace natten::cpu {
namespace {

enum Level { kBase, kAvx2, kAvx512 };
const char* const kNames[] = {"default", "avx2", "avx512"};

Level detect() {
  Level best = kBase;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = kAvx2;
  if (best == kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    best = kAvx512;
#endif
  // NATTEN_OPS_CPU_CAPABILITY only ever lowers the level; an unknown word changes nothing.
  if (const char* wish = std::getenv("NATTEN_OPS_CPU_CAPABILITY"))
    for (int level = kBase; level < best; ++level)
      if (!std::strcmp(wish, kNames[level])) best = Level(level);
  return best;
}

Level level() {
  static const Level chosen = detect();
  return chosen;
}
}  // namespace

#if defined(__x86_64__)
#define CHOOSE(function) level() == kAvx512 ? avx512::function : level() == kAvx2 ? avx2::function : base::function
#else
#define CHOOSE(function) base::function
#endif

ForwardKernels forward_kernels(Dtype dtype) { return (CHOOSE(forward_kernels))(dtype); }
ForwardKernels tiled_forward_kernels(Dtype dtype) { return (CHOOSE(tiled_forward_kernels))(dtype); }
BackwardKernels backward_kernels(Dtype dtype) { return (CHOOSE(backward_kernels))(dtype); }
TiledBackwardKernels tiled_backward_kernels(Dtype dtype) { return (CHOOSE(tiled_backward_kernels))(dtype); }
UnfusedKernels unfused_kernels(Dtype dtype) { return (CHOOSE(unfused_kernels))(dtype); }

int64_t tiled_scratch_bytes(const Problem& problem, Dtype dtype) {
  Problem p = problem;
  p.grad_rpb = p.rpb;
  p.grad_additional_keys = p.additional_keys, p.grad_additional_values = p.additional_values;
  return larger(tiled_forward_kernels(dtype).scratch_bytes(p), tiled_backward_kernels(dtype).scratch_bytes(p));
}

int vector_bytes() { return 16 << level(); }

}  // namespace natten::cpu
