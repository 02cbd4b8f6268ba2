// SPDX-License-Identifier: MIT
// The CPU kernels of one dtype and the choice of their instruction set. No torch.
#pragma once
#include "../problem.h"

namespace natten::cpu {

using natten::Dtype;

// Runs items [begin, end) of a pass; `part` numbers the caller's share and `scratch` is private to it.
using Pass = void (*)(const Problem&, void* scratch, int64_t part, int64_t begin, int64_t end);

struct ForwardKernels {
  int64_t (*query_items)(const Problem&);
  int64_t (*scratch_bytes)(const Problem&);
  Pass forward;  // items: query items
  double (*times_packed)(const Problem&);  // of the tiled path: how often a key is packed, on average
};

struct BackwardKernels {
  int64_t (*query_items)(const Problem&);
  int64_t (*key_items)(const Problem&);
  int64_t (*scratch_bytes)(const Problem&);
  Pass query;       // query items, always first: delta and row_lse, gradients of the query and (partial sums) of the bias
  Pass key;         // key items: gradients of key and value
  Pass additional;  // batch * additional items: gradients of the additional tokens
  Pass reduce_rpb;  // heads: the bias table's partial sums, in fixed order
};

// Backward of the tiled path: one pass after the other, in this order.
struct TiledBackwardKernels {
  int64_t (*owners)(const Problem&, int colour);
  int64_t (*scratch_bytes)(const Problem&);
  int64_t (*partial_size)(const Problem&);  // numbers of one part of Problem::partials
  Pass backward[4];  // owners of each colour
  Pass narrow;       // batch * key tokens: sum_key and sum_value to the gradients
  Pass reduce;       // one item: the partial sums, in fixed order, to the gradients
};

// The unfused ops: what reads and writes rows of queries alone, and what also adds to keys.
struct UnfusedKernels {
  ForwardKernels by_query;
  TiledBackwardKernels by_key;
};

ForwardKernels forward_kernels(Dtype dtype);
ForwardKernels tiled_forward_kernels(Dtype dtype);
BackwardKernels backward_kernels(Dtype dtype);
TiledBackwardKernels tiled_backward_kernels(Dtype dtype);
UnfusedKernels unfused_kernels(Dtype dtype);

// Bytes that a thread of the tiled path takes, of either pass and with every gradient: the same whichever pass asks, so that
// both choose alike. Above kMaxTiledBytes, or with a scale that is not positive, or an empty head dim, it is not chosen.
int64_t tiled_scratch_bytes(const Problem& problem, Dtype dtype);

int vector_bytes();  // of the instruction set in use: 16 (baseline), 32 (AVX2) or 64 (AVX-512)

}  // namespace natten::cpu
