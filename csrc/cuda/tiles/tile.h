// SPDX-License-Identifier: MIT
// Tensor-core path: where a block's row tile lies, what it sees, and which column boxes cover that.
// Positions are places in a dilation group of the global grid; they and all lengths fit 32 bits (why_not() in forward.cu).
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

// What all threads know alike lies in shared memory: registers are for sums. First facts of the tile, one a kind and axis.
enum Fact {
  kGroup, kBase, kCount,  // rows base + [0, count) of a dilation group
  kColumnEnd,             // behind the last position of the other side
  kSpanAt,                // an axis's entries among the spans
  kBegin, kEnd,           // columns that some row sees, in boxes: the end of the last box
  kEveryBegin, kEveryEnd, // columns that every row sees
  kFacts
};
struct Tables {
  uint32_t row_offsets, column_offsets, row_word, column_word, column_bias, facts, spans;
  int rows, columns;
  DEVICE Tables(uint32_t base, int rows_, int columns_) {
    rows = rows_, columns = columns_;
    row_offsets = base, column_offsets = row_offsets + 16 * rows, row_word = column_offsets + 16 * columns;
    column_word = row_word + 4 * rows, column_bias = column_word + 4 * columns, facts = column_bias + 4 * columns;
    spans = facts + 4 * kAxes * kFacts;
  }
  // Of the first or second operand, in numbers.
  DEVICE uint32_t row_offset(int operand, int slot) const { return row_offsets + 8 * (operand * rows + slot); }
  DEVICE uint32_t column_offset(int operand, int slot) const { return column_offsets + 8 * (operand * columns + slot); }
  DEVICE uint32_t span(int i) const { return spans + 8 * i; }
  DEVICE int fact(Fact which, int a) const { return ptx::load_shared<int>(facts + 4 * (kAxes * which + a)); }
  DEVICE void set_fact(Fact which, int a, int value) const { ptx::store_shared(facts + 4 * (kAxes * which + a), value); }
};
constexpr int table_bytes(int rows, int columns) { return 20 * rows + 24 * columns + 4 * kAxes * kFacts + 8 * (rows + kAxes) + 4; }

// The row tile of a block.
template <bool kKeyRows> struct Tile {
  int b, head;

  static DEVICE const int64_t* row_shape(const Problem& p) { return kKeyRows ? p.kv_shape : p.q_shape; }
  static DEVICE const int64_t* row_origin(const Problem& p) { return kKeyRows ? p.kv_origin : p.q_origin; }
  static DEVICE const int64_t* column_shape(const Problem& p) { return kKeyRows ? p.q_shape : p.kv_shape; }
  static DEVICE const int64_t* column_origin(const Problem& p) { return kKeyRows ? p.q_origin : p.kv_origin; }

  // First position of the group at or behind a token of the grid.
  static DEVICE int position_from(int64_t token, int group, int64_t dilation) {
    return token <= group ? 0 : int((token - group + dilation - 1) / dilation);
  }

  // One thread writes the facts.
  DEVICE Tile(const TileWork& work, int64_t item, const Tables& tables) {
    const Problem& p = work.p;
    const int64_t heads = kKeyRows ? p.heads_kv : p.heads;
    int64_t tiles = 1, groups = 1;
    for (int a = 0; a < kAxes; ++a) tiles *= work.plan.tiles[a], groups *= work.plan.groups[a];
    head = int(item / (tiles * groups) % heads), b = int(item / (tiles * groups) / heads);
    if (ptx::thread_index() != 0) return;
    int64_t tile = item % tiles, group = item / tiles % groups;
    int spans = 0;
    for (int a = kAxes - 1; a >= 0; --a) {
      const int64_t origin = row_origin(p)[a], dilation = p.axis[a].dilation;
      const int g = int((origin + group % work.plan.groups[a]) % dilation), base = position_from(origin, g, dilation) + int(tile % work.plan.tiles[a]) * work.plan.rows[a];
      group /= work.plan.groups[a], tile /= work.plan.tiles[a];
      tables.set_fact(kGroup, a, g);
      tables.set_fact(kBase, a, base);
      tables.set_fact(kCount, a, int(smaller(position_from(origin + row_shape(p)[a], g, dilation) - base, work.plan.rows[a])));
      tables.set_fact(kColumnEnd, a, position_from(column_origin(p)[a] + column_shape(p)[a], g, dilation));
      tables.set_fact(kSpanAt, a, spans);
      spans += work.plan.rows[a];
    }
  }
  // Where a group is shorter than others.
  static DEVICE bool is_empty(const Tables& tables) { return tables.fact(kCount, 0) <= 0 || tables.fact(kCount, 1) <= 0 || tables.fact(kCount, 2) <= 0; }

  // The range of column positions that a row sees on an axis; only those that the tensors hold.
  static DEVICE Span span_of(const Problem& p, int a, int group, int position) {
    const Axis& axis = p.axis[a];
    const int64_t index = group + axis.dilation * position;
    return kKeyRows ? queries_of(p, a, index) : window(axis, index);
  }
};

// From the spans of the first and last row of each axis what the rows see; a thread an axis.
DEVICE void find_range(const TileWork& work, const Tables& tables) {
  const int a = ptx::thread_index();
  if (a >= kAxes) return;
  const uint32_t low = tables.span(tables.fact(kSpanAt, a)), high = low + 8 * (tables.fact(kCount, a) - 1);
  const int begin = ptx::load_shared<int>(low), end = ptx::load_shared<int>(high + 4), size = work.plan.columns[a];
  tables.set_fact(kBegin, a, begin);
  tables.set_fact(kEnd, a, begin + (end - begin + size - 1) / size * size);
  tables.set_fact(kEveryBegin, a, ptx::load_shared<int>(high));
  tables.set_fact(kEveryEnd, a, ptx::load_shared<int>(low + 4));
}
// Boxes of a head.
DEVICE int count_boxes(const TileWork& work, const Tables& tables) {
  int count = 1;
  for (int a = 0; a < kAxes; ++a) count *= (tables.fact(kEnd, a) - tables.fact(kBegin, a)) / work.plan.columns[a];
  return count;
}

// A box of columns, or some additional tokens.
struct Box {
  int start[kAxes];  // its first position
  int head;          // of the column operands
  int token;         // first additional token, or -1
  int count;         // slots in use
  bool full;         // every row sees every slot in use

  // The first box of a head. `plain`: no bias, no mask.
  static DEVICE Box first(const TileWork& work, const Tables& tables, int head, bool plain) {
    Box box{};
    for (int a = 0; a < kAxes; ++a) box.start[a] = tables.fact(kBegin, a);
    box.head = head, box.token = -1;
    box.settle(work, tables, plain);
    return box;
  }
  // The next one: boxes row-major, then those of the next head (keys) or the additional tokens (queries).
  template <bool kKeyRows, bool kExtras> DEVICE void advance(const TileWork& work, const Tables& tables, int columns, bool plain) {
    if (!kExtras || token < 0) {
      bool wrapped = true;
#pragma unroll
      for (int a = kAxes - 1; a >= 0; --a) {
        if (!wrapped) continue;
        start[a] += work.plan.columns[a];
        wrapped = start[a] >= tables.fact(kEnd, a);
        if (wrapped) start[a] = tables.fact(kBegin, a);
      }
      if (kKeyRows && wrapped) ++head;
      if (kKeyRows || !kExtras || !wrapped) return settle(work, tables, plain);
    }
    token = token < 0 ? 0 : token + columns;
    count = int(smaller(work.p.additional - token, columns)), full = false;
  }
  DEVICE void settle(const TileWork& work, const Tables& tables, bool plain) {
    count = work.plan.columns[0] * work.plan.columns[1] * work.plan.columns[2];
    full = plain && count % 8 == 0;
#pragma unroll
    for (int a = 0; a < kAxes; ++a)
      full = full && start[a] >= tables.fact(kEveryBegin, a) && start[a] + work.plan.columns[a] <= tables.fact(kEveryEnd, a);
#if defined(NATTEN_ASSUME_FULL)  // the gates count the instructions of one kind of box at a time
    full = NATTEN_ASSUME_FULL;
#endif
  }
};

}  // namespace
}  // namespace natten::cuda::tiles
