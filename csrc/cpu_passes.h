// SPDX-License-Identifier: MIT
// How fronts run CPU kernels: shares of work for torch's thread pool, the passes of each path in their order.
#pragma once
#include <atomic>
#include <cstdlib>
#include <memory>

#include "arguments.h"
#include "cpu/dispatch.h"

namespace natten {

// True if the tiled kernels run the problem; raises where the backend that was named cannot.
inline bool takes_tiled(const Problem& p, Dtype dtype, int64_t backend) {
  if (backend == kCpuGeneral) return false;
  const bool able = p.head_dim > 0 && p.value_dim > 0 && p.scale > 0 && cpu::tiled_scratch_bytes(p, dtype) <= kMaxTiledBytes;
  STD_TORCH_CHECK(able || backend != kCpuTiled, "natten: backend=2 (cpu-tiled) cannot run this problem: it takes positive scales, "
                  "head dims above 0, and tiles of at most ", kMaxTiledBytes, " bytes; use 0 (choose) or 1 (cpu-general)");
  return able;
}

// The scratch of one thread; null if there is no memory.
struct Free { void operator()(void* p) const { std::free(p); } };
using ScratchMemory = std::unique_ptr<void, Free>;
inline ScratchMemory make_scratch(int64_t bytes) { return ScratchMemory(std::aligned_alloc(64, size_t((bytes + 127) / 64 * 64))); }

// Runs a pass over [0, items) in `parts` shares. Every item is computed alike whichever share it falls into.
inline void run_parts(cpu::Pass pass, const Problem& problem, int64_t items, int64_t scratch_bytes, int64_t parts) {
  if (items == 0) return;
  std::atomic<bool> enough{true};  // what a thread throws reaches the caller without its words
  torch::stable::parallel_for(0, parts, 1, [&](int64_t first, int64_t last) {
    const ScratchMemory scratch = make_scratch(scratch_bytes);
    if (!scratch) enough = false;
    for (int64_t part = first; scratch && part < last; ++part)
      pass(problem, scratch.get(), part, items * part / parts, items * (part + 1) / parts);
  });
  STD_TORCH_CHECK(enough, "natten: out of memory for ", scratch_bytes, " bytes of scratch a thread");
}

inline void run(cpu::Pass pass, const Problem& problem, int64_t items, int64_t scratch_bytes, double work) {
  run_parts(pass, problem, items, scratch_bytes, useful_shares(work, smaller(torch::stable::get_num_threads(), items)));
}

// Passes that add to keys: colour after colour, then the sums become gradients.
inline void run_colours(const cpu::TiledBackwardKernels& kernels, const Problem& p) {
  const int64_t scratch = kernels.scratch_bytes(p);
  const bool in_parts = kernels.partial_size(p) > 0;
  for (int colour = 0; colour < 4; ++colour) {
    const int64_t owners = kernels.owners(p, colour);
    if (in_parts) run_parts(kernels.backward[colour], p, owners, scratch, kParts);
    else run(kernels.backward[colour], p, owners, scratch, work_of(p));
  }
  run(kernels.narrow, p, p.batch * p.kv_shape[0] * p.kv_shape[1] * p.kv_shape[2], 0, work_of(p) / 16);
  if (in_parts) run_parts(kernels.reduce, p, 1, 0, 1);
}

// The backward of the general path.
inline void run_general(const cpu::BackwardKernels& kernels, const Problem& p) {
  const int64_t scratch = kernels.scratch_bytes(p), queries = kernels.query_items(p);
  const double work = work_of(p);
  if (p.grad_rpb.data) {
    run_parts(kernels.query, p, queries, scratch, kParts);
    run_parts(kernels.reduce_rpb, p, p.heads, scratch, 1);
  } else {
    run(kernels.query, p, queries, scratch, 2 * work);
  }
  if (p.grad_key.data || p.grad_value.data) run(kernels.key, p, kernels.key_items(p), scratch, 2 * work);
  if (p.grad_additional_keys.data || p.grad_additional_values.data)
    run(kernels.additional, p, p.batch * p.additional, scratch, 2 * work);
}

// Zeros that the gradients of keys (or values) are added to: the gradient itself where it has the type of sums and rows
// of whole vectors, else a padded copy, which the last pass rounds. `view` makes rows of a tensor.
template <class View> Tensor make_sums(Tensor& gradient, const Rows& rows, Rows& sums, const View& view) {
  const ScalarType dtype = lse_dtype(gradient);
  const int64_t lanes = dtype == ScalarType::Double ? 8 : 16;  // of the widest vectors
  Integers shape = sizes_of(gradient);
  if (dtype == gradient.scalar_type() && shape.back() % lanes == 0) {
    torch::stable::zero_(gradient);
    sums = rows;
    return gradient;
  }
  shape.back() = ceil_div(shape.back(), lanes) * lanes;
  Tensor padded = torch::stable::new_zeros(gradient, shape, dtype);
  sums = view(padded);
  return padded;
}

}  // namespace natten
