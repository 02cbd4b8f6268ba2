// SPDX-License-Identifier: MIT
// What the fronts of every device share: tensors of the stable ABI, their dtypes and sizes.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>
#include <vector>

#include "problem.h"

namespace natten {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Integers = std::vector<int64_t>;
using Flags = std::vector<bool>;
using OptionalTensor = std::optional<Tensor>;

inline ScalarType lse_dtype(const Tensor& query) {
  return query.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Integers sizes_of(const Tensor& tensor) { return Integers(tensor.sizes().begin(), tensor.sizes().end()); }

// The bias table is a small parameter: kernels read it densely.
inline OptionalTensor dense(const OptionalTensor& table) {
  return table ? OptionalTensor(torch::stable::contiguous(*table)) : table;
}

inline Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Half: return Dtype::float16;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    default:
      STD_TORCH_CHECK(false, "natten: query has dtype ", torch::headeronly::toString(tensor.scalar_type()),
                      ", expected float64, float32, float16 or bfloat16");
      return {};
  }
}

}  // namespace natten
