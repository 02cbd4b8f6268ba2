// SPDX-License-Identifier: MIT
// Tensor-core path: boxes of tokens in shared memory, and products of them.
// Legend: an operand is 64 or fewer tokens, a row of kDim numbers each, 16-bit or float32 (multiplied as tf32); a chunk is 16
// bytes of a row, the unit of copies and of ldmatrix; a step is two chunks, what one mma multiplies. Chunk c of row r lies at
// chunk c ^ (some bits of r), so that eight rows' chunks c lie in different banks. A fragment is what one thread holds of an mma
// operand: of 16 x 8 numbers of an accumulator rows lane / 4 and lane / 4 + 8, columns 2 * (lane % 4) and the next.
#pragma once
#include "../ptx.h"
#include "plan.h"

#define DEVICE __device__ __forceinline__

namespace natten::cuda::tiles {
namespace {

constexpr int kWarpRows = 16;  // of a tile

template <class T, int kDim> struct Operand {
  static constexpr int kOfChunk = 16 / sizeof(T), kOfStep = 2 * kOfChunk;  // numbers
  static constexpr int kChunks = kDim / kOfChunk, kRowBytes = 16 * kChunks;
  static constexpr int kRowsOfLine = kRowBytes < 128 ? 128 / kRowBytes : 1;  // rows in the 128 bytes of all banks
  static constexpr int kMask = kChunks < 8 ? kChunks - 1 : 7;

  static constexpr int bytes(int rows) { return rows * kRowBytes; }
  static DEVICE uint32_t at(int row, int chunk) { return uint32_t(row * kRowBytes + ((chunk ^ (row / kRowsOfLine & kMask)) << 4)); }
  static DEVICE uint32_t at_number(int row, int d) { return at(row, d / kOfChunk) + d % kOfChunk * int(sizeof(T)); }

  // The 16 rows of a warp, numbers of one step, as the left operand.
  static DEVICE void load_left(uint32_t (&fragment)[4], uint32_t from, int warp, int step) {
    const int lane = ptx::lane_index();
    ptx::ldmatrix_x4(fragment, from + at(warp * kWarpRows + lane % 16, 2 * step + lane / 16));
  }
  // Rows [16 n, 16 n + 16), numbers of one step, as two right operands whose columns are the rows: left . rows^T.
  static DEVICE void load_right(uint32_t (&fragment)[4], uint32_t from, int n, int step) {
    const int lane = ptx::lane_index();
    ptx::ldmatrix_x4(fragment, from + at(n * 16 + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
  }
  // 16-bit: the same rows, numbers [16 d, 16 d + 16), as two right operands whose columns are numbers: weights . rows.
  static DEVICE void load_right_summed(uint32_t (&fragment)[4], uint32_t from, int n, int d) {
    const int lane = ptx::lane_index();
    ptx::ldmatrix_x4_trans(fragment, from + at(n * 16 + lane % 16, 2 * d + lane / 16));
  }
  // A number of a row, as a factor of a tf32 product.
  static DEVICE uint32_t load_tf32(uint32_t from, int row, int d) { return ptx::to_tf32(ptx::load_shared<float>(from + at_number(row, d))); }
};

template <class T> DEVICE void multiply_step(float (&sum)[4], const uint32_t (&left)[4], uint32_t low, uint32_t high) {
  if constexpr (sizeof(T) == 2) ptx::mma_m16n8k16<T>(sum, left, low, high);
  else ptx::mma_m16n8k8_tf32(sum, left, low, high);
}
template <class T> DEVICE void round_operand(uint32_t (&fragment)[4]) {
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < 4; ++i) fragment[i] = ptx::to_tf32(ptx::as_float(fragment[i]));
  }
}

// scores = rows . columns^T of the warp's 16 rows.
template <class T, int kDim, int kColumns> DEVICE void multiply(float (&scores)[kColumns / 8][4], uint32_t rows, uint32_t columns) {
  using Element = Operand<T, kDim>;
  const int warp = ptx::thread_index() / 32;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.f;
#pragma unroll
  for (int step = 0; step < kDim / Element::kOfStep; ++step) {
    uint32_t left[4];
    Element::load_left(left, rows, warp, step);
    round_operand<T>(left);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t right[4];
      Element::load_right(right, columns, n, step);
      round_operand<T>(right);
      multiply_step<T>(scores[2 * n], left, right[0], right[1]);
      multiply_step<T>(scores[2 * n + 1], left, right[2], right[3]);
    }
  }
}

// Weights of 16 columns as 16-bit left operand: two accumulators of scores. They are rounded here, once.
template <class T> DEVICE void pack_weights(uint32_t (&left)[4], const float (&low)[4], const float (&high)[4]) {
  left[0] = ptx::pack<T>(low[0], low[1]), left[1] = ptx::pack<T>(low[2], low[3]);
  left[2] = ptx::pack<T>(high[0], high[1]), left[3] = ptx::pack<T>(high[2], high[3]);
}

// sums += weights . columns, numbers [first, first + kOut) of the columns' rows.
template <class T, int kDim, int kOut, int kColumns>
DEVICE void add_product(float (&sums)[kOut / 8][4], const float (&weights)[kColumns / 8][4], uint32_t columns, int first) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t left[4];
      pack_weights<T>(left, weights[2 * n], weights[2 * n + 1]);
#pragma unroll
      for (int d = 0; d < kOut / 16; ++d) {
        uint32_t right[4];
        Operand<T, kDim>::load_right_summed(right, columns, n, first / 16 + d);
        ptx::mma_m16n8k16<T>(sums[2 * d], left, right[0], right[1]);
        ptx::mma_m16n8k16<T>(sums[2 * d + 1], left, right[2], right[3]);
      }
    }
  } else {
    const int lane = ptx::lane_index();
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      // An accumulator holds columns 2 t and 2 t + 1 where the operand wants t and t + 4, t = lane % 4: the sum does not mind the
      // order of columns, so the rows of the right operand are taken in the accumulator's.
      const float(&w)[4] = weights[n];
      const uint32_t left[4] = {ptx::to_tf32(w[0]), ptx::to_tf32(w[2]), ptx::to_tf32(w[1]), ptx::to_tf32(w[3])};
      const int row = n * 8 + lane % 4 * 2;
#pragma unroll
      for (int d = 0; d < kOut / 8; ++d) {
        const int number = first + d * 8 + lane / 4;
        ptx::mma_m16n8k8_tf32(sums[d], left, Operand<T, kDim>::load_tf32(columns, row, number), Operand<T, kDim>::load_tf32(columns, row + 1, number));
      }
    }
  }
}

}  // namespace
}  // namespace natten::cuda::tiles
