// SPDX-License-Identifier: MIT
// Tensor-core path: where a block's row tile lies, what it sees, and which column boxes cover that.
// Positions are places in a dilation group of the global grid; they and all lengths fit 32 bits (takes() in kernels.cpp).
#pragma once
#include "operands.h"

namespace natten::cuda::tiles {
namespace {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// What a kernel is given. Block i of a launch is block first + i of the pass.
struct TileWork {
  Problem p;
  Plan plan;
  int64_t first;
  float scale_log2;  // scale * log2(e)
};

// Three small coordinates in one word, nine bits each, the last axis lowest: 1 + coordinate; kNowhere is beside every range.
constexpr uint32_t kGuards = 1u << 8 | 1u << 17 | 1u << 26, kNowhere = 255;
DEVICE uint32_t packed(int x, int y, int z) { return uint32_t(x) << 18 | uint32_t(y) << 9 | uint32_t(z); }
DEVICE int field(uint32_t word, int a) { return int(word >> (18 - 9 * a) & 0x1FF); }
DEVICE int clamped(int x) { return x < 0 ? 0 : x > 127 ? 127 : x; }
// Whether first <= word <= last in every field: each difference keeps its guard bit. Four instructions a score.
DEVICE bool is_within(uint32_t word, uint32_t first_less_guards, uint32_t last_and_guards) {
  return ((word - first_less_guards) & (last_and_guards - word) & kGuards) == kGuards;
}
// Slot of a box, row-major, as coordinates plus one.
DEVICE uint32_t coordinates_of(int slot, const int* shape) {
  const int z = slot % shape[2], rest = slot / shape[2];
  if (rest / shape[1] >= shape[0]) return kNowhere;
  return packed(rest / shape[1] + 1, rest % shape[1] + 1, z + 1);
}

// Tables in shared memory, one after the other.
struct Tables {
  uint32_t row_offsets, column_offsets, row_word, column_word, column_bias, spans;
  int columns;
  DEVICE Tables(uint32_t base, int columns_) {
    columns = columns_;
    row_offsets = base, column_offsets = row_offsets + 16 * kRows, row_word = column_offsets + 16 * columns;
    column_word = row_word + 4 * kRows, column_bias = column_word + 4 * columns, spans = column_bias + 4 * columns;
  }
  // Of the first or second operand, in numbers.
  DEVICE uint32_t row_offset(int operand, int slot) const { return row_offsets + 8 * (operand * kRows + slot); }
  DEVICE uint32_t column_offset(int operand, int slot) const { return column_offsets + 8 * (operand * columns + slot); }
};
constexpr int table_bytes(int columns) { return 20 * kRows + 24 * columns + 8 * (kRows + kAxes); }

// The row tile of a block: rows base + [0, count) of a group on each axis; empty where the group is short.
template <bool kKeyRows> struct Tile {
  int b, head, heads_together;  // query heads of a head of keys
  int group[kAxes], base[kAxes], count[kAxes];
  int column_end[kAxes];  // behind the last position of the other side
  int span_at[kAxes];     // an axis's entries among the spans

  static DEVICE const int64_t* row_shape(const Problem& p) { return kKeyRows ? p.kv_shape : p.q_shape; }
  static DEVICE const int64_t* row_origin(const Problem& p) { return kKeyRows ? p.kv_origin : p.q_origin; }
  static DEVICE const int64_t* column_shape(const Problem& p) { return kKeyRows ? p.q_shape : p.kv_shape; }
  static DEVICE const int64_t* column_origin(const Problem& p) { return kKeyRows ? p.q_origin : p.kv_origin; }

  // First position of the group at or behind a token of the grid.
  static DEVICE int position_from(int64_t token, int group, int64_t dilation) {
    return token <= group ? 0 : int((token - group + dilation - 1) / dilation);
  }

  DEVICE Tile(const TileWork& work, int64_t item) {
    const Problem& p = work.p;
    int tile[kAxes];
    for (int a = kAxes - 1; a >= 0; --a) tile[a] = int(item % work.plan.tiles[a]), item /= work.plan.tiles[a];
    for (int a = kAxes - 1; a >= 0; --a) group[a] = int(item % p.axis[a].dilation), item /= p.axis[a].dilation;
    const int64_t heads = kKeyRows ? p.heads_kv : p.heads;
    head = int(item % heads), b = int(item / heads);
    heads_together = int(p.heads / p.heads_kv);
    int spans = 0;
    for (int a = 0; a < kAxes; ++a) {
      const int64_t origin = row_origin(p)[a], dilation = p.axis[a].dilation;
      base[a] = position_from(origin, group[a], dilation) + tile[a] * work.plan.rows[a];
      const int left = position_from(origin + row_shape(p)[a], group[a], dilation) - base[a];
      count[a] = left < work.plan.rows[a] ? left : work.plan.rows[a];
      column_end[a] = position_from(column_origin(p)[a] + column_shape(p)[a], group[a], dilation);
      span_at[a] = spans, spans += work.plan.rows[a];
    }
  }
  DEVICE bool is_empty() const { return count[0] <= 0 || count[1] <= 0 || count[2] <= 0; }

  // The range of column positions that a row sees on an axis; only those that the tensors hold.
  static DEVICE Span span_of(const Problem& p, int a, int group, int position) {
    const Axis& axis = p.axis[a];
    const int64_t index = group + axis.dilation * position;
    if (!kKeyRows) return window(axis, index);
    Span span = inverse_window(axis, index);
    span.first = larger(span.first, position_from(p.q_origin[a], group, axis.dilation));
    span.end = smaller(span.end, position_from(p.q_origin[a] + p.q_shape[a], group, axis.dilation));
    return span;
  }
};

// What a tile's rows see: on each axis a range of columns that some row sees, and one that every row sees.
struct Range {
  int begin[kAxes], boxes[kAxes], every_begin[kAxes], every_end[kAxes];
  int count;  // of boxes

  template <class Tile> DEVICE Range(const TileWork& work, const Tile& tile, const Tables& tables) {
    count = 1;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const uint32_t low = tables.spans + 8 * tile.span_at[a], high = low + 8 * (tile.count[a] - 1);
      begin[a] = ptx::load_shared<int>(low), every_end[a] = ptx::load_shared<int>(low + 4);
      every_begin[a] = ptx::load_shared<int>(high);
      const int end = ptx::load_shared<int>(high + 4), size = work.plan.columns[a];
      boxes[a] = end > begin[a] ? (end - begin[a] + size - 1) / size : 0;
      count *= boxes[a];
    }
  }
};

// A box of columns, or some additional tokens.
struct Box {
  int at[kAxes];     // which box of the range
  int start[kAxes];  // its first position
  int head;          // of the column operands
  int count;         // slots in use
  int token;         // first additional token, or -1
  bool full;         // every row sees every slot in use

  // Box 0 of the first head, which has one. `plain`: no bias, no mask.
  template <bool kKeyRows> static DEVICE Box first(const TileWork& work, const Tile<kKeyRows>& tile, const Range& range, bool plain) {
    Box box{};
    box.head = kKeyRows ? tile.head * tile.heads_together : tile.head / tile.heads_together;
    box.token = -1;
    box.settle(work, range, plain);
    return box;
  }
  // The next one: boxes row-major, then those of the next head or (queries) the additional tokens.
  template <bool kKeyRows> DEVICE void advance(const TileWork& work, const Range& range, int columns, bool plain) {
    if (token < 0) {
      if (++at[2] == range.boxes[2]) at[2] = 0, ++at[1];
      if (at[1] == range.boxes[1]) at[1] = 0, ++at[0];
      if (at[0] < range.boxes[0]) return settle(work, range, plain);
      at[0] = 0;
      if (kKeyRows) {
        ++head;
        return settle(work, range, plain);
      }
    }
    token = token < 0 ? 0 : token + columns;
    count = int(smaller(work.p.additional - token, columns)), full = false;
  }
  DEVICE void settle(const TileWork& work, const Range& range, bool plain) {
    count = work.plan.columns[0] * work.plan.columns[1] * work.plan.columns[2];
    full = plain && count % 8 == 0;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      start[a] = range.begin[a] + at[a] * work.plan.columns[a];
      full = full && start[a] >= range.every_begin[a] && start[a] + work.plan.columns[a] <= range.every_end[a];
    }
#if defined(NATTEN_ASSUME_FULL)  // the gates count the instructions of one kind of box at a time
    full = NATTEN_ASSUME_FULL;
#endif
  }
};

}  // namespace
}  // namespace natten::cuda::tiles
