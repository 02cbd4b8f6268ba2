// SPDX-License-Identifier: MIT
// The general path's two inner loops, over lists of rows: scores (one row against many) and weighted sums of rows.
// Everything else of the general path only decides which rows are in the list.
#pragma once
#include "../problem.h"
#include "simd.h"

namespace natten {
namespace {

constexpr int64_t kChunk = 512;  // rows in a list; longer windows go chunk by chunk, so scratch does not grow with them
constexpr int64_t kBlock = 16;   // rows that are copied together where the head dim is not dense
constexpr int kStreams = 4;      // tensors that are walked together

// A box of up to three axes, walked at the same time in several tensors: element (t0, t1, t2) of stream s lies at
// base[s] + sum(t * step[s]). Backs both a query's window and a key's inverse window.
struct Walk {
  int64_t count[kAxes] = {0, 0, 0};
  int64_t base[kStreams] = {}, step[kStreams][kAxes] = {};
  int streams = 0;
  const uint8_t* mask = nullptr;  // rows with a 0 are left out; walked as stream `mask_stream`
  int mask_stream = 0;
  int64_t total() const { return count[0] * count[1] * count[2]; }
};

// The offsets of at most kChunk rows of a walk.
struct List {
  int64_t size;
  int64_t loaded;  // chunk that is listed now, so that heads that share a window list it once
  int64_t offset[kStreams][kChunk + 4];
};

inline void list_chunk(const Walk& walk, int64_t chunk, List& list) {
  if (list.loaded == chunk) return;
  list.loaded = chunk;
  const int64_t begin = chunk * kChunk, end = smaller(begin + kChunk, walk.total());
  int64_t t[kAxes] = {begin / (walk.count[1] * walk.count[2]), begin / walk.count[2] % walk.count[1], begin % walk.count[2]};
  int64_t n = 0;
  for (int64_t slot = begin; slot < end;) {
    const int64_t run = smaller(walk.count[2] - t[2], end - slot);
    int64_t start[kStreams];
    for (int s = 0; s < walk.streams; ++s)
      start[s] = walk.base[s] + t[0] * walk.step[s][0] + t[1] * walk.step[s][1] + t[2] * walk.step[s][2];
    for (int64_t i = 0; i < run; ++i) {
      for (int s = 0; s < walk.streams; ++s) list.offset[s][n] = start[s] + i * walk.step[s][2];
      n += walk.mask ? walk.mask[list.offset[walk.mask_stream][n]] != 0 : 1;
    }
    slot += run;
    t[2] = 0;
    if (++t[1] == walk.count[1]) t[1] = 0, ++t[0];
  }
  list.size = n;
  for (int s = 0; s < walk.streams; ++s)  // scores come four at a time
    for (int64_t i = n; n && i < n + 3; ++i) list.offset[s][i] = list.offset[s][n - 1];
}

// One row, widened, times a factor.
template <class T, class A> inline void widen_row(const T* row, int64_t stride, int64_t dim, A factor, A* out) {
  for (int64_t d = 0; d < dim; ++d) out[d] = widen(row[d * stride]) * factor;
}
template <class T, class A> inline void narrow_row(const A* row, A factor, T* out, int64_t stride, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) narrow(row[d] * factor, out + d * stride);
}

template <class T, class A>
NATTEN_INLINE void scores_of_four(const A* query, const T* const* row, int64_t dim, A* out) {
  constexpr int W = kLanes<A>;
  Vector<A> total[4] = {};
  int64_t d = 0;
  for (; d + W <= dim; d += W) {
    const Vector<A> q = load(query + d);
    for (int r = 0; r < 4; ++r) total[r] += q * load(row[r] + d);
  }
  if (d < dim) {
    const Vector<A> q = load_part(query + d, int(dim - d));
    for (int r = 0; r < 4; ++r) total[r] += q * load_part(row[r] + d, int(dim - d));
  }
  sums_of_four(total, out);
}

// sums[D] += weights . rows, C vectors of the head dim at a time; two rows at once hide the latency of the additions.
template <int C, class T, class A>
NATTEN_INLINE void add_columns(const A* weights, const T* rows, const int64_t* offset, int64_t count, A* sums) {
  constexpr int W = kLanes<A>;
  Vector<A> even[C], odd[C];
  for (int c = 0; c < C; ++c) even[c] = load(sums + c * W), odd[c] = Vector<A>{};
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    const T *row0 = rows + offset[i], *row1 = rows + offset[i + 1];
    for (int c = 0; c < C; ++c) {
      even[c] += splat(weights[i]) * load(row0 + c * W);
      odd[c] += splat(weights[i + 1]) * load(row1 + c * W);
    }
  }
  if (i < count)
    for (int c = 0; c < C; ++c) even[c] += splat(weights[i]) * load(rows + offset[i] + c * W);
  for (int c = 0; c < C; ++c) store(sums + c * W, even[c] + odd[c]);
}

template <class T, class A>
inline void add_dense(const A* weights, const T* rows, const int64_t* offset, int64_t count, int64_t dim, A* sums) {
  constexpr int W = kLanes<A>;
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) add_columns<4>(weights, rows + d, offset, count, sums + d);
  for (; d + 2 * W <= dim; d += 2 * W) add_columns<2>(weights, rows + d, offset, count, sums + d);
  for (; d + W <= dim; d += W) add_columns<1>(weights, rows + d, offset, count, sums + d);
  if (d == dim) return;
  const int rest = int(dim - d);
  Vector<A> total = load_part(sums + d, rest);
  for (int64_t i = 0; i < count; ++i) total += splat(weights[i]) * load_part(rows + offset[i] + d, rest);
  A tail[W];
  store(tail, total);
  std::memcpy(sums + d, tail, size_t(rest) * sizeof(A));
}

// Rows of a tensor whose head dim may have any stride; `packed` holds kBlock rows.
template <class T> struct RowSource {
  const T* rows;
  int64_t stride, dim;
  T* packed;

  // Copies rows [first, first + count) of the list where they are not dense; the copy has pitch `dim`.
  void pack(const int64_t* offset, int64_t count) const {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t d = 0; d < dim; ++d) packed[r * dim + d] = rows[offset[r] + d * stride];
  }
};

// out[i] = <query, row i>; writes up to three numbers past `count`.
template <class T, class A>
inline void score_rows(const A* query, const RowSource<T>& source, const int64_t* offset, int64_t count, A* out) {
  const T* row[4];
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t stop = smaller(block + kBlock, count);
    if (source.stride != 1) source.pack(offset + block, stop - block);
    for (int64_t i = block; i < stop; i += 4) {
      for (int r = 0; r < 4; ++r)
        row[r] = source.stride == 1 ? source.rows + offset[i + r]
                                    : source.packed + (smaller(i + r, stop - 1) - block) * source.dim;
      scores_of_four(query, row, source.dim, out + i);
    }
  }
}

// sums += sum over i of weights[i] * row i
template <class T, class A>
inline void add_rows(const A* weights, const RowSource<T>& source, const int64_t* offset, int64_t count, A* sums) {
  if (source.stride == 1) return add_dense(weights, source.rows, offset, count, source.dim, sums);
  int64_t dense[kBlock];
  for (int64_t r = 0; r < kBlock; ++r) dense[r] = r * source.dim;
  for (int64_t block = 0; block < count; block += kBlock) {
    const int64_t rows = smaller(kBlock, count - block);
    source.pack(offset + block, rows);
    add_dense(weights + block, source.packed, dense, rows, source.dim, sums);
  }
}

}  // namespace
}  // namespace natten
