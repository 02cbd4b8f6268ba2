// SPDX-License-Identifier: MIT
// Merging partial attentions: the schema. The op is a composition of ATen ops (natten_ops/ops/merge.py), which every
// compiler fuses and every transform differentiates; a kernel of its own would lose both.
#include "common.h"

STABLE_TORCH_LIBRARY_FRAGMENT(natten, m) {
  m.def("merge_attentions(Tensor[] outputs, Tensor[] lses) -> (Tensor out, Tensor lse)");
}
