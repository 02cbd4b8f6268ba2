// SPDX-License-Identifier: MIT
// What every pass of the general path is made of: rows of tensors, products of two rows by one lane, sums of rows by a warp,
// and walks over boxes of tokens, thirty-two at a time.
#pragma once
#include "../launch.h"

#define DEVICE __device__ __forceinline__

namespace natten::cuda::general {
namespace {

template <class T> struct AccumulatorOf { using type = float; };
template <> struct AccumulatorOf<double> { using type = double; };
template <class T> using Accumulator = typename AccumulatorOf<T>::type;

// ---- rows ------------------------------------------------------------------------------------------------------------
template <class T> DEVICE T* row_of(const Rows& rows, int64_t b, int64_t h, const int64_t* token) {
  return static_cast<T*>(rows.data) + b * rows.batch + h * rows.head + token[0] * rows.token[0] + token[1] * rows.token[1] +
      token[2] * rows.token[2];
}
template <class T> DEVICE T* row_of_additional(const Rows& rows, int64_t b, int64_t h, int64_t token) {
  return static_cast<T*>(rows.data) + b * rows.batch + h * rows.head + token * rows.token[kAxes - 1];
}

// <a, b>, by one lane.
template <class T> DEVICE Accumulator<T> dot(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t dims, bool wide) {
  constexpr int kWide = 16 / sizeof(T);
  Accumulator<T> sum = 0;
  int64_t d = 0;
  for (; wide && d + kWide <= dims; d += kWide) {
    const auto x = ptx::load_global(reinterpret_cast<const ptx::Sixteen<T>*>(a + d));
    const auto y = ptx::load_global(reinterpret_cast<const ptx::Sixteen<T>*>(b + d));
#pragma unroll
    for (int i = 0; i < kWide; ++i) sum += ptx::widen(x.value[i]) * ptx::widen(y.value[i]);
  }
  for (; d < dims; ++d) sum += ptx::widen(ptx::load_global(a + d * a_step)) * ptx::widen(ptx::load_global(b + d * b_step));
  return sum;
}

// Thirty-two rows, one a lane, of which `count` are there. Those from `own` on lie with another step between their numbers.
struct Chunk {
  int count, own;
  int64_t step, other_step;
};

// sum[r] of a lane: numbers first + lane + 32 r of weight * row, over the rows of a chunk in their order. What has no weight
// is not read: it may hold anything.
template <class T, int kRegisters>
DEVICE void add_rows(Accumulator<T> weight, const T* row, const Chunk& chunk, int64_t first, int64_t dims, Accumulator<T> (&sum)[kRegisters]) {
  for (int j = 0; j < chunk.count; ++j) {
    const Accumulator<T> w = ptx::shfl(weight, j);
    const T* from = ptx::shfl(row, j);
    const int64_t step = j < chunk.own ? chunk.step : chunk.other_step;
    if (w == 0) continue;
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      const int64_t d = first + ptx::lane_index() + 32 * r;
      if (d < dims) sum[r] += w * ptx::widen(ptx::load_global(from + d * step));
    }
  }
}

template <class T, int kRegisters, class A>
DEVICE void store_row(const A (&sum)[kRegisters], A factor, T* row, int64_t step, int64_t first, int64_t dims) {
#pragma unroll
  for (int r = 0; r < kRegisters; ++r) {
    const int64_t d = first + ptx::lane_index() + 32 * r;
    if (d < dims) ptx::store_global(row + d * step, ptx::narrow<T>(sum[r] * factor));
  }
}

template <class A> DEVICE A sum_of_lanes(A x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x += ptx::shfl_xor(x, mask);
  return x;
}
// NaN loses, on either side: all lanes come to one result.
template <class A> DEVICE A larger_of(A x, A y) { return x > y || y != y ? x : y; }
template <class A> DEVICE A largest_of_lanes(A x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) x = larger_of(x, ptx::shfl_xor(x, mask));
  return x;
}

// ---- walks -----------------------------------------------------------------------------------------------------------
// Tokens first + step * at of a tensor, 0 <= at < count on each axis, row-major.
struct Walk {
  int64_t first[kAxes], step[kAxes], count[kAxes];

  DEVICE int64_t size() const { return count[0] * count[1] * count[2]; }
  DEVICE void token(const int64_t* at, int64_t* token) const {
#pragma unroll
    for (int a = 0; a < kAxes; ++a) token[a] = first[a] + step[a] * at[a];
  }
};

DEVICE void unravel(int64_t index, const int64_t* count, int64_t* at) {
  at[2] = index % count[2], index /= count[2];
  at[1] = index % count[1], at[0] = index / count[1];
}

// Every thirty-second place of a walk that is not empty. One division at the start, none on the way.
struct Cursor {
  int64_t at[kAxes], jump[kAxes];

  DEVICE Cursor(const Walk& walk, int64_t index) {
    unravel(index, walk.count, at);
    unravel(32, walk.count, jump);
  }
  DEVICE void advance(const Walk& walk) {
    at[0] += jump[0], at[1] += jump[1], at[2] += jump[2];
    if (at[2] >= walk.count[2]) at[2] -= walk.count[2], ++at[1];
    if (at[1] >= walk.count[1]) at[1] -= walk.count[1], ++at[0];
  }
};

// ---- what both sides of a pair need -------------------------------------------------------------------------------------
// Entry `at` of a head's bias table.
template <class T> DEVICE Accumulator<T> bias_at(const Problem& p, int64_t h, int64_t at) {
  if (!p.rpb.data) return 0;
  at += h * p.rpb.head;
  return p.rpb_wide ? Accumulator<T>(ptx::load_global(static_cast<const float*>(p.rpb.data) + at))
                    : Accumulator<T>(ptx::widen(ptx::load_global(static_cast<const T*>(p.rpb.data) + at)));
}

DEVICE bool is_masked(const Problem& p, int64_t b, const int64_t* key) {
  return p.key_mask.data && !ptx::load_global(row_of<uint8_t>(p.key_mask, b, 0, key));
}

NATTEN_HOST_DEVICE inline int64_t volume(const int64_t* shape) { return shape[0] * shape[1] * shape[2]; }
// The first of a part's items.
DEVICE int64_t part_begin(int64_t items, int64_t part) { return items / kParts * part + items % kParts * part / kParts; }
DEVICE int64_t slots_of_window(const Problem& p) { return p.axis[0].kernel * p.axis[1].kernel * p.axis[2].kernel; }

// Item (b, h, token) of a pass over tokens.
struct Place {
  int64_t b, h, token[kAxes];

  DEVICE Place(int64_t item, int64_t heads, const int64_t* shape) {
    const int64_t tokens = volume(shape);
    unravel(item % tokens, shape, token);
    b = item / tokens / heads, h = item / tokens % heads;
  }
};

}  // namespace
}  // namespace natten::cuda::general
