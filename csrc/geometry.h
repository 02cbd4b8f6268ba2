// SPDX-License-Identifier: MIT
// C++ twin of natten_ops/geometry/params.py: the window of a query and the queries of a key, per axis.
// tests/test_geometry.py compares the two bit for bit. No torch, no std containers: kernels of every ISA include it.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define NATTEN_HOST_DEVICE __host__ __device__
#else
#define NATTEN_HOST_DEVICE
#endif

namespace natten {

struct Axis {
  int64_t length, kernel, stride, dilation;
  bool causal;
};

// Keys (or queries) group + dilation * t for first <= t < end.
struct Span {
  int64_t group, first, end;
};

namespace {  // internal linkage: an object compiled for a wide ISA must not export inline symbols

NATTEN_HOST_DEVICE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NATTEN_HOST_DEVICE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
NATTEN_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }  // a >= 0

NATTEN_HOST_DEVICE inline int64_t group_length(const Axis& axis, int64_t group) {
  return (axis.length - group - 1) / axis.dilation + 1;  // not ceil_div: lengths up to 2^62 must not overflow
}

NATTEN_HOST_DEVICE inline Span window(const Axis& axis, int64_t index) {
  const int64_t group = index % axis.dilation, position = index / axis.dilation;
  const int64_t count = group_length(axis, group);
  const int64_t first_of_stride = position / axis.stride * axis.stride;
  if (axis.causal) {
    const int64_t leader = smaller(first_of_stride + axis.stride - 1, count - 1);
    return {group, larger(leader - axis.kernel + 1, 0), position + 1};
  }
  const int64_t leader = smaller(first_of_stride + axis.stride / 2, count - 1);
  const int64_t start = smaller(larger(leader - axis.kernel / 2, 0), count - axis.kernel);
  return {group, start, start + axis.kernel};
}

NATTEN_HOST_DEVICE inline Span inverse_window(const Axis& axis, int64_t key) {
  const int64_t group = key % axis.dilation, position = key / axis.dilation;
  const int64_t final = group_length(axis, group) - 1;
  if (axis.causal) {
    const int64_t last = (position + axis.kernel) / axis.stride * axis.stride - 1;
    return {group, position, (position + axis.kernel - 1 >= final ? final : last) + 1};
  }
  const int64_t lead = axis.kernel / 2 - axis.stride / 2;  // >= 0, because stride <= kernel
  const int64_t before = position - axis.kernel + 1;
  const int64_t first = before <= 0 ? 0 : smaller(ceil_div(before + lead, axis.stride), final / axis.stride) * axis.stride;
  const int64_t last = position >= final + 1 - axis.kernel
      ? final
      : smaller((position + lead) / axis.stride * axis.stride + axis.stride - 1, final);
  return {group, first, last + 1};
}

}  // namespace
}  // namespace natten
