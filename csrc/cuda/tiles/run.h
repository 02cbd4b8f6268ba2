// SPDX-License-Identifier: MIT
// Tensor-core path: starts a pass with the plan of its problem.
#pragma once
#include "attend.h"
#include "../launch.h"

namespace natten::cuda::tiles {
namespace {

template <class S> TileWork make_work(const Problem& p, int64_t reach = kAnyReach) {
  return {p, make_plan(p, S::kKeyRows, S::kRows, S::kColumns, reach), 0, float(p.scale) * kLog2e};
}

// Every block of a pass; Given is a TileWork.
template <class S, class Kernel, class Given> const char* start_blocks(Kernel kernel, int threads, Given& work, Stream stream) {
  const Problem& p = work.p;
  int64_t blocks = p.batch * (S::kKeyRows ? p.heads_kv : p.heads) * (S::kDim / S::kOut);
  for (int a = 0; a < kAxes; ++a) blocks *= int64_t(work.plan.groups[a]) * work.plan.tiles[a];
  for (; work.first < blocks; work.first += kMaxBlocks)
    if (const char* error = start(kernel, smaller(blocks - work.first, kMaxBlocks), threads, S::kBytes, work, stream)) return error;
  return nullptr;
}

template <class T, class Sums> const char* run_pass(const Problem& p, Stream stream) {
  TileWork work = make_work<typename Sums::S>(p);
  return start_blocks<typename Sums::S>(attend<T, Sums>, Sums::S::kThreads, work, stream);
}

// The smallest head dim of the table that holds both: rows are filled up with zeros in shared memory.
template <template <class, int, bool> class Sums, class T, bool kExtras> const char* run_dim(const Problem& p, Stream stream) {
  const int64_t dim = larger(p.head_dim, p.value_dim);
  if (dim <= 16) return run_pass<T, Sums<T, 16, kExtras>>(p, stream);
  if (dim <= 32) return run_pass<T, Sums<T, 32, kExtras>>(p, stream);
  if (dim <= 64) return run_pass<T, Sums<T, 64, kExtras>>(p, stream);
  if constexpr (sizeof(T) == 2) {
    if (dim > 128) return run_pass<T, Sums<T, 256, kExtras>>(p, stream);
  }
  return run_pass<T, Sums<T, 128, kExtras>>(p, stream);
}

template <template <class, int, bool> class Sums, class T> const char* run_extras(const Problem& p, Stream stream) {
  const bool extras = p.rpb.data || p.key_mask.data || p.additional;
  return extras ? run_dim<Sums, T, true>(p, stream) : run_dim<Sums, T, false>(p, stream);
}

template <template <class, int, bool> class Sums> const char* run_sums(const Problem& p, Dtype dtype, Stream stream) {
  if (dtype == Dtype::float16) return run_extras<Sums, ptx::f16>(p, stream);
  if (dtype == Dtype::bfloat16) return run_extras<Sums, ptx::bf16>(p, stream);
  return run_extras<Sums, float>(p, stream);
}

}  // namespace

const char* query_gradient(const Problem& problem, Dtype dtype, Stream stream);
const char* key_gradient(const Problem& problem, Dtype dtype, Stream stream);

}  // namespace natten::cuda::tiles
