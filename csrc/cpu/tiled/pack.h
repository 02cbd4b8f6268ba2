// SPDX-License-Identifier: MIT
// Copies of tensor rows as the kernels read them: transposed (a lane is a token) or dense, always in the type of sums.
// Only packing knows dtypes and strides.
#pragma once
#include "bands.h"

namespace natten {
namespace {

// Tokens of one tensor row: token i lies at base + offset[i] * stride elements.
template <class T> struct TokenRow {
  const T* base;
  const int64_t* token;
  int64_t stride, dim_stride;
  int64_t ahead;  // from a token to the one that will be packed a row later: it is fetched into the cache
  const T* at(int64_t i) const { return base + token[i] * stride; }
  // Heads-last tokens lie heads * dim apart, and the hardware does not follow.
  void prefetch(const T* token, int64_t dim) const {
    for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(token + ahead + d);
  }
};

// Tokens that will be written (or added to) soon: at 448x448 a row of the output is in no cache before it is stored.
template <class T> inline void prefetch_to_write(T* base, const int64_t* token, int count, int64_t stride, int64_t dim) {
  for (int i = 0; i < count; ++i)
    for (int64_t d = 0; d < dim; d += 64 / int64_t(sizeof(T))) __builtin_prefetch(base + token[i] * stride + d, 1);
}

// out[d * pitch + i] = element d of token i, for i < count; up to a whole vector the last token is repeated.
template <class T, class A>
__attribute__((noinline)) void pack_transposed(const TokenRow<T>& row, int count, int64_t dim, A* out, int64_t pitch, int64_t block) {
  constexpr int W = kLanes<A>;
  for (int i = 0; i < count; i += W, out += block) {
    const T* token[W];
    for (int l = 0; l < W; ++l) token[l] = row.at(i + l < count ? i + l : count - 1);
    for (int l = 0; row.ahead && l < W; ++l) row.prefetch(token[l], dim);
    int64_t d = 0;
    if constexpr (sizeof(A) == 4) {
      const T* part[4][W / 4];
      for (int l = 0; l < W; ++l) part[l % 4][l / 4] = token[l];
      for (; row.dim_stride == 1 && d + 4 <= dim; d += 4) {
        Vector<float> v[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) v[j] = load_parts(part[j], d);
        transpose_parts(v);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store(out + (d + j) * pitch, v[j]);
      }
    }
    for (; d < dim; ++d)
      for (int l = 0; l < W; ++l) out[d * pitch + l] = widen(token[l][d * row.dim_stride]);
  }
}

// The way back: element d of token i, at base + token[i] * stride + d * dim_stride, = in[d][lane of i], rounded; a block of
// in holds the tokens of one vector.
template <class T, class A>
__attribute__((noinline)) void unpack_transposed(const A* in, int64_t block, int count, int64_t dim, T* base, const int64_t* token, int64_t stride, int64_t dim_stride) {
  constexpr int W = kLanes<A>;
  for (int i = 0; i < count; i += W, in += block) {
    const int lanes = count - i < W ? count - i : W;
    T* to[W];
    for (int l = 0; l < lanes; ++l) to[l] = base + token[i + l] * stride;
    int64_t d = 0;
    if constexpr (sizeof(A) == 4) {
      for (; dim_stride == 1 && d + 4 <= dim; d += 4) {
        Vector<float> v[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) v[j] = load(in + (d + j) * W);
        transpose_parts(v);
        T part[4][W];  // [lane mod 4][lane / 4][element]
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) store_narrow(part[j], v[j]);
        for (int l = 0; l < lanes; ++l) std::memcpy(to[l] + d, part[l % 4] + l / 4 * 4, 4 * sizeof(T));
      }
    }
    for (; d < dim; ++d)
      for (int l = 0; l < lanes; ++l) narrow(in[d * W + l], to[l] + d * dim_stride);
  }
}

// out[i * pitch + d] = element d of token i, zero from dim to pitch.
template <class T, class A>
__attribute__((noinline)) void pack_dense(const TokenRow<T>& row, int count, int64_t dim, A* out, int64_t pitch) {
  constexpr int W = kLanes<A>;
  for (int i = 0; i < count; ++i, out += pitch) {
    const T* token = row.at(i);
    if (row.ahead) row.prefetch(token, dim);
    int64_t d = 0;
    for (; row.dim_stride == 1 && d + W <= dim; d += W) store(out + d, load(token + d));
    for (; d < dim; ++d) out[d] = widen(token[d * row.dim_stride]);
    for (; d < pitch; ++d) out[d] = 0;
  }
}

}  // namespace
}  // namespace natten
