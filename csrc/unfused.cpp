// SPDX-License-Identifier: MIT
// The unfused ops: schemas, and their CPU kernels behind the fronts that all devices share (unfused.h). Fake, autograd,
// autocast, vmap and FLOP rules are in natten_ops/ops/unfused.py.
#include "unfused.h"

#include "cpu_passes.h"

namespace natten {
namespace {

struct Cpu {
  struct Guard { explicit Guard(const Tensor&) {} };  // there is one CPU

  static void unfused(Problem& p, const Tensor& tokens, Tensor* grad_key) {
    const cpu::UnfusedKernels kernels = cpu::unfused_kernels(dtype_of(tokens));
    if (adds_to_keys(p)) {
      const Tensor partials = torch::stable::new_zeros(tokens, Integers{kParts * kernels.by_key.partial_size(p)}, lse_dtype(tokens));
      p.partials = partials.data_ptr();
      OptionalTensor sums;
      const int64_t rank = tokens.dim() - 3;
      if (p.grad_key.data) sums = make_sums(*grad_key, p.grad_key, p.sum_key, [rank](const Tensor& tensor) { return heads_first_rows(tensor, rank); });
      run_colours(kernels.by_key, p);
    } else if (p.slots_out.data || p.grad_query.data) {
      run(kernels.by_query.forward, p, kernels.by_query.query_items(p), kernels.by_query.scratch_bytes(p), work_of(p));
    }
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(natten, m) {
  for (const char* schema : kUnfusedSchemas) m.def(schema);
}

STABLE_TORCH_LIBRARY_IMPL(natten, CPU, m) {
  m.impl("na_qk", TORCH_BOX(&unfused_qk<Cpu>));
  m.impl("na_av", TORCH_BOX(&unfused_av<Cpu>));
  m.impl("na_qk_backward", TORCH_BOX(&unfused_qk_backward<Cpu>));
  m.impl("na_av_backward", TORCH_BOX(&unfused_av_backward<Cpu>));
}

}  // namespace natten
