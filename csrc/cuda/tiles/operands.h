// SPDX-License-Identifier: MIT
// Tensor-core path: boxes of tokens in shared memory, and products of them.
// Legend: an operand is kRows or fewer tokens, a row of kDim 16-bit numbers each; a chunk is 16 bytes of a row, the unit of
// copies and of ldmatrix. Chunk c of row r lies at chunk c ^ (some bits of r), so that eight rows' chunks c lie in different
// banks. A fragment is what one thread holds of an mma operand: of 16 x 8 numbers of an accumulator rows lane / 4 and
// lane / 4 + 8, columns 2 * (lane % 4) and the next.
#pragma once
#include "../ptx.h"
#include "plan.h"

#define DEVICE __device__ __forceinline__

namespace natten::cuda::tiles {
namespace {

constexpr int kThreads = 128, kWarpRows = 16;

template <int kDim> struct Operand {
  static constexpr int kChunks = kDim / 8, kRowBytes = kDim * 2;
  static constexpr int kRowsOfLine = kRowBytes < 128 ? 128 / kRowBytes : 1;  // rows in the 128 bytes of all banks
  static constexpr int kMask = kChunks < 8 ? kChunks - 1 : 7;

  static constexpr int bytes(int rows) { return rows * kRowBytes; }
  static DEVICE uint32_t at(int row, int chunk) { return uint32_t(row * kRowBytes + ((chunk ^ (row / kRowsOfLine & kMask)) << 4)); }

  // The 16 rows of a warp, numbers [16 d, 16 d + 16), as the left operand.
  static DEVICE void load_left(uint32_t (&fragment)[4], uint32_t from, int warp, int d) {
    const int lane = ptx::lane_index();
    ptx::ldmatrix_x4(fragment, from + at(warp * kWarpRows + lane % 16, 2 * d + lane / 16));
  }
  // Rows [16 n, 16 n + 16), numbers [16 d, 16 d + 16), as two right operands whose columns are the rows: left . rows^T.
  static DEVICE void load_right(uint32_t (&fragment)[4], uint32_t from, int n, int d) {
    const int lane = ptx::lane_index();
    ptx::ldmatrix_x4(fragment, from + at(n * 16 + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
  }
  // The same numbers as two right operands whose columns are numbers: weights . rows.
  static DEVICE void load_right_summed(uint32_t (&fragment)[4], uint32_t from, int n, int d) {
    const int lane = ptx::lane_index();
    ptx::ldmatrix_x4_trans(fragment, from + at(n * 16 + lane % 16, 2 * d + lane / 16));
  }
};

// scores = rows . columns^T of the warp's 16 rows.
template <class T, int kDim, int kColumns>
DEVICE void multiply(float (&scores)[kColumns / 8][4], uint32_t rows, uint32_t columns) {
  const int warp = ptx::thread_index() / 32;
#pragma unroll
  for (int n = 0; n < kColumns / 8; ++n) scores[n][0] = scores[n][1] = scores[n][2] = scores[n][3] = 0.f;
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) {
    uint32_t left[4];
    Operand<kDim>::load_left(left, rows, warp, d);
#pragma unroll
    for (int n = 0; n < kColumns / 16; ++n) {
      uint32_t right[4];
      Operand<kDim>::load_right(right, columns, n, d);
      ptx::mma_m16n8k16<T>(scores[2 * n], left, right[0], right[1]);
      ptx::mma_m16n8k16<T>(scores[2 * n + 1], left, right[2], right[3]);
    }
  }
}

// sums += weights . columns, numbers [first, first + kOut) of the columns' rows. Weights are rounded to T here, once.
template <class T, int kDim, int kOut, int kColumns>
DEVICE void add_product(float (&sums)[kOut / 8][4], const float (&weights)[kColumns / 8][4], uint32_t columns, int first) {
#pragma unroll
  for (int n = 0; n < kColumns / 16; ++n) {
    const float(&low)[4] = weights[2 * n], (&high)[4] = weights[2 * n + 1];  // two accumulators of scores are one left operand
    const uint32_t left[4] = {ptx::pack<T>(low[0], low[1]), ptx::pack<T>(low[2], low[3]), ptx::pack<T>(high[0], high[1]), ptx::pack<T>(high[2], high[3])};
#pragma unroll
    for (int d = 0; d < kOut / 16; ++d) {
      uint32_t right[4];
      Operand<kDim>::load_right_summed(right, columns, n, first / 16 + d);
      ptx::mma_m16n8k16<T>(sums[2 * d], left, right[0], right[1]);
      ptx::mma_m16n8k16<T>(sums[2 * d + 1], left, right[2], right[3]);
    }
  }
}

}  // namespace
}  // namespace natten::cuda::tiles
