// SPDX-License-Identifier: MIT
// From a dtype known at run time to the type of its elements.
#pragma once
#include "dispatch.h"
#include "simd.h"

namespace natten {
namespace {

// make(T()), T the dtype's element.
template <class Make> auto with_element(cpu::Dtype dtype, const Make& make) {
  switch (dtype) {
    case cpu::Dtype::float64: return make(double());
    case cpu::Dtype::float32: return make(float());
    case cpu::Dtype::float16: return make(float16());
    default: return make(bfloat16());
  }
}

}  // namespace
}  // namespace natten
