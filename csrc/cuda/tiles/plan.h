// SPDX-License-Identifier: MIT
// Tensor-core path: what a block works on, and the boxes that make it cheap. No device code.
//
// Rows are a box of 64 tokens, or 128, of one dilation group and one head: queries, or keys in the pass for the gradients of keys
// and values. Columns are the tokens of the other side that those rows see: on each axis a range, because windows (and inverse
// windows) grow with the token. The range is walked in boxes that start where it starts, not on a fixed grid.
#pragma once
#include "../../problem.h"

namespace natten::cuda::tiles {

enum class Pass { kForward, kQueryGradient, kKeyGradient };

constexpr int64_t kAnyReach = INT64_MAX;

struct Plan {
  int rows[kAxes];     // shape of a row tile, powers of two
  int columns[kAxes];  // shape of a column box
  int tiles[kAxes];    // row tiles of a dilation group on each axis
  int groups[kAxes];   // dilation groups that have rows; the first is that of the first row
};

namespace {

// Tokens of the other side that the rows of a tile see together on one axis: in the middle, and at its ends, where windows are
// shifted or cut.
struct Seen {
  int middle, end;
  double tiles, at_ends;
  int64_t reach;  // what a box may have of them

  // Boxes of `size` over all tiles of the axis.
  double boxes(int size) const {
    return (tiles - at_ends) * ((middle + size - 1) / size) + at_ends * ((end + size - 1) / size);
  }
};

inline Seen seen_together(const Problem& p, int a, bool key_rows, int64_t rows, int64_t tiles, int64_t reach) {
  const Axis& axis = p.axis[a];
  const int64_t length = group_length(axis, 0);
  const auto of_tile = [&](int64_t first) {
    const auto span = [&](int64_t position) { return key_rows ? inverse_window(axis, position * axis.dilation) : window(axis, position * axis.dilation); };
    const int64_t seen = span(smaller(first + rows, length) - 1).end - span(first).first;
    return int(smaller(larger(seen, 1), 1 << 30));
  };
  const double at_ends = 2 * double(larger(axis.kernel / 2 / rows, 1));
  return {of_tile(larger(length / 2 - rows / 2, 0)), of_tile(0), double(tiles), at_ends < double(tiles) ? at_ends : double(tiles), reach / axis.dilation};
}

// Sizes of a box that cut a range evenly: the next smaller one.
inline int smaller_size(int range, int size) {
  const int next = (range + (range + size - 1) / size) / ((range + size - 1) / size + 1);  // one box more
  return next < size ? next : size - 1;
}

// The best column box for ranges of `seen` tokens: the fewest boxes, since each costs the same however many of its `most` slots
// are in use; of those the one with the fewest slots, for its copies.
inline double choose_columns(const Seen* seen, int most, int* columns) {
  double best = -1;
  const auto fitting = [](const Seen& axis, int left) { return int(smaller(smaller(axis.middle, axis.reach), left)); };
  for (int x = fitting(seen[0], most); x >= 1; x = smaller_size(seen[0].middle, x)) {
    for (int y = fitting(seen[1], most / x); y >= 1; y = smaller_size(seen[1].middle, y)) {
      int z = fitting(seen[2], most / (x * y));
      z = (seen[2].middle + (seen[2].middle + z - 1) / z - 1) / ((seen[2].middle + z - 1) / z);  // as many boxes, cut evenly
      const double cost = seen[0].boxes(x) * seen[1].boxes(y) * seen[2].boxes(z) * (most + 0.01 * x * y * z);
      if (best < 0 || cost < best) best = cost, columns[0] = x, columns[1] = y, columns[2] = z;
    }
  }
  return best;
}

// The plan of a pass whose row tiles hold `rows` tokens, a power of two, and whose column boxes hold at most `most` tokens and
// reach no further than `reach` on any axis, which is at least the dilation. From geometry alone, deterministic.
inline Plan make_plan(const Problem& p, bool key_rows, int rows, int most, int64_t reach = kAnyReach) {
  Plan best{};
  double least = -1;
  const int64_t* shape = key_rows ? p.kv_shape : p.q_shape;
  for (int x = rows; x >= 1; x /= 2)
    for (int y = rows / x; y >= 1; y /= 2) {
      Plan plan{{x, y, rows / (x * y)}, {}, {}, {}};
      Seen seen[kAxes];
      for (int a = 0; a < kAxes; ++a) {
        const int64_t length = ceil_div(shape[a], p.axis[a].dilation);  // tokens of this tensor in one group, at most
        plan.groups[a] = int(smaller(p.axis[a].dilation, shape[a]));
        plan.tiles[a] = int(ceil_div(length, plan.rows[a]));
        seen[a] = seen_together(p, a, key_rows, smaller(plan.rows[a], length), plan.tiles[a], reach);
      }
      const double cost = choose_columns(seen, most, plan.columns);
      if (least < 0 || cost < least) least = cost, best = plan;
    }
  return best;
}

}  // namespace
}  // namespace natten::cuda::tiles
