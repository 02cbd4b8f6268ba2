// SPDX-License-Identifier: MIT
// How a problem is cut into tiles, from its geometry alone. Both passes and the choice of the backend read it.
//
// An owner has a strip of queries along the innermost axis and a range of rows along the middle one, of one (batch,
// key head); it walks blocks of up to kRows rows and keeps the rows of keys that they see in a ring. Outer axes are lists
// of rows only. Queries of one block row are handled in chunks of a few vectors. Windows that do not fit are met in parts.
#pragma once
#include "../carver.h"
#include "axis.h"
#include "pack.h"

namespace natten {
namespace {

NATTEN_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// How well an axis serves as the innermost: how many of its lanes are filled, and how many slots share a load of the
// query. Memory is walked across unless the last axis is a quarter worse.
template <class A> inline double merit(const Problem& p, int a) {
  const double length = double(p.q_shape[a]), kernel = double(p.axis[a].kernel);
  return length / double(round_up(p.q_shape[a], kLanes<A>)) * kernel / (kernel + 1) * (a == 2 ? 1.25 : 1);
}

// The same problem with its axes reordered: the best becomes the innermost, whose queries are lanes; of the other two the
// longer is in the middle.
template <class A> inline Problem turned(const Problem& p) {
  int inner = 2;
  for (int a = 1; a >= 0; --a)
    if (merit<A>(p, a) > merit<A>(p, inner)) inner = a;
  const int first = inner == 0 ? 1 : 0, second = 3 - inner - first;
  const bool swap = p.q_shape[first] > p.q_shape[second];
  const int order[kAxes] = {swap ? second : first, swap ? first : second, inner};
  Problem q = p;
  Rows* const rows[] = {&q.query, &q.key, &q.value, &q.out, &q.lse, &q.rpb, &q.key_mask, &q.grad_out, &q.grad_lse,
                        &q.grad_query, &q.grad_key, &q.grad_value, &q.sum_key, &q.sum_value, &q.slots_in, &q.slots_out};
  const int64_t* const from[] = {p.q_shape, p.kv_shape, p.q_origin, p.kv_origin, p.slot_step};
  int64_t* const to[] = {q.q_shape, q.kv_shape, q.q_origin, q.kv_origin, q.slot_step};
  for (int a = 0; a < kAxes; ++a) {
    for (int i = 0; i < 5; ++i) to[i][a] = from[i][order[a]];
    q.axis[a] = p.axis[order[a]], q.order[a] = order[a];
  }
  for (Rows* r : rows) {
    const int64_t old[kAxes] = {r->token[0], r->token[1], r->token[2]};
    for (int a = 0; a < kAxes; ++a) r->token[a] = old[order[a]];
  }
  return q;
}

struct Tiling {
  PlacedAxis axis[kAxes];
  int64_t part[kAxes];          // slots of the window that are handled at a time: all of them (whole), or a part (parts.h)
  bool whole;
  int64_t strip, strips;        // queries of a strip: a multiple of the lanes
  int64_t strips_together;      // consecutive strips of one owner
  int64_t heads_together;       // heads of keys of one owner
  int64_t range, ranges;        // rows of the middle axis that one owner has
  int64_t columns;              // keys of the longest strip
  int64_t pitch;                // of a transposed row of keys: room for the loads of every lane map
  int64_t ring[2];              // rows of keys that are kept: outer x middle axis
  int64_t slots;                // of the longest window or part, additional tokens included
  int64_t rows, chunk;          // rows of a block, vectors of queries of a chunk
  int64_t strip_owners() const { return ceil_div(strips, strips_together); }
  int64_t pairs(const Problem& p) const { return p.batch * p.heads_kv / heads_together; }
  int64_t owners(const Problem& p) const { return pairs(p) * ranges * strip_owners(); }
};

// Keys that `rows` consecutive queries of one dilation group see together of windows (or parts) of `slots`, at most.
inline int64_t union_of(const Axis& a, int64_t slots, int64_t rows) {
  return smaller(slots + rows - 1 + a.stride - 1, ceil_div(a.length, a.dilation));
}
// Keys that a strip of queries sees of parts of their windows, at most: those between two windows have no column. Within a
// dilation group the parts move on by no more than the queries and one stride, and by one part at each stride.
inline int64_t columns_of_parts(const PlacedAxis& placed, int64_t slots, int64_t strip) {
  const int64_t stride = placed.axis.stride, shortest = larger(placed.queries.quotient, 1);  // group of the box's queries
  const int64_t groups = smaller(smaller(strip / shortest + 2, strip), placed.axis.dilation);
  return smaller(strip + groups * (slots + stride), (strip / stride + 2 * groups) * slots);
}

struct TilingOptions {
  int64_t strip, rows, heads_together, chunk_bytes, owners;
  bool exclusive;                   // owners add to their keys, which no other of their colour may do then
  int64_t part[kAxes] = {0, 0, 0};  // 0: whole
};

// True if pieces of `size` queries, two apart, never share a key: then pieces of equal parity may add to the keys'
// gradients at the same time.
inline bool apart(const PlacedAxis& axis, int64_t size) {
  const int64_t length = axis.queries.length;
  for (int64_t begin = 0; begin + 2 * size < length; begin += size)
    if (axis.query_at(begin + size - 1).end > axis.query_at(begin + 2 * size).first) return false;
  return true;
}

template <class A> inline Tiling make_tiling(const Problem& p, const TilingOptions& options) {
  constexpr int W = kLanes<A>;
  Tiling t;
  t.whole = true;
  t.slots = 1;
  for (int a = 0; a < kAxes; ++a) {
    t.axis[a] = PlacedAxis::of(p, a);
    t.part[a] = options.part[a] ? options.part[a] : p.axis[a].kernel;
    t.whole &= t.part[a] == p.axis[a].kernel;
    t.slots *= t.part[a];
  }
  t.slots += p.additional;
  const PlacedAxis &middle = t.axis[1], &inner = t.axis[2];
  const int64_t length = p.q_shape[2];
  t.strips = ceil_div(length, options.strip);
  t.strip = round_up(ceil_div(length, t.strips), W);
  t.strips = ceil_div(length, t.strip);
  t.strips_together = !options.exclusive || apart(inner, t.strip) ? 1 : t.strips;
  const bool parted = t.part[2] < inner.axis.kernel;
  t.columns = parted ? columns_of_parts(inner, t.part[2], t.strip) : 0;
  for (int64_t s = 0; !parted && s < t.strips; ++s) {
    const int64_t last = smaller((s + 1) * t.strip, length) - 1;
    t.columns = larger(t.columns, inner.query_at(last).end - inner.query_at(s * t.strip).first);
  }
  // Loads of whole vectors reach past the last column, those of lanes whose window is cut short past it too. An odd
  // multiple of 8: rows do not share L1 sets.
  t.pitch = round_up(t.columns + W + (inner.axis.causal || parted ? t.part[2] : 0), 16) + 8;
  const int64_t row_bytes = t.slots * W * int64_t(sizeof(A));
  t.rows = options.rows;
  t.heads_together = options.heads_together;
  t.ring[0] = t.part[0];
  t.ring[1] = union_of(middle.axis, t.part[1], t.rows);
  const int64_t vectors = t.strip / W, fitting = larger(1, smaller(options.chunk_bytes / (row_bytes * t.rows), vectors));
  t.chunk = ceil_div(vectors, ceil_div(vectors, fitting));  // even chunks
  const int64_t wanted = ceil_div(options.owners, t.pairs(p) * t.strip_owners());
  // Each range packs keys of its own; parts of windows are packed for every block.
  const int64_t most = p.q_shape[1] / (2 * larger(t.rows, t.whole ? middle.axis.kernel : 1));
  t.range = ceil_div(p.q_shape[1], larger(1, smaller(wanted, most)));
  while (options.exclusive && !apart(middle, t.range)) t.range *= 2;
  t.ranges = ceil_div(p.q_shape[1], t.range);
  return t;
}

// One owner's place in the problem. Owners of one colour (parities of their strip and range) share no keys; there are
// four colours.
struct Owner {
  int64_t batch, head;            // the first of its heads of keys
  int64_t row_begin, row_end;     // places of the middle axis
  int64_t query_begin, query_end; // places of the inner axis

  static int64_t count(const Problem& p, const Tiling& t, int colour) {
    return t.pairs(p) * ((t.strip_owners() + 1 - colour % 2) / 2) * ((t.ranges + 1 - colour / 2) / 2);
  }
  static Owner of(const Problem& p, const Tiling& t, int colour, int64_t item) {
    const int64_t strips = (t.strip_owners() + 1 - colour % 2) / 2, ranges = (t.ranges + 1 - colour / 2) / 2;
    return at(p, t, item / strips / ranges, item / strips % ranges * 2 + colour / 2, item % strips * 2 + colour % 2);
  }
  static Owner of(const Problem& p, const Tiling& t, int64_t item) {
    const int64_t strips = t.strip_owners();
    return at(p, t, item / strips / t.ranges, item / strips % t.ranges, item % strips);
  }
  static Owner at(const Problem& p, const Tiling& t, int64_t pair, int64_t range, int64_t strip) {
    const int64_t width = t.strip * t.strips_together, heads = p.heads_kv / t.heads_together;
    return {pair / heads, pair % heads * t.heads_together, range * t.range, smaller((range + 1) * t.range, p.q_shape[1]),
            strip * width, smaller((strip + 1) * width, p.q_shape[2])};
  }
};

// A row of queries in a block: tokens and places of its window on the outer axes.
struct BlockRow {
  int64_t z, y, z_begin, z_end, y_begin, y_end, z_bias, y_bias;
};

// Calls visit(rows, count) for blocks of the rows [begin, end) of the middle axis; all of a block are of one dilation group.
template <class Visit> inline void for_middle_blocks(const Tiling& t, int64_t begin, int64_t end, const Visit& visit) {
  const PlacedAxis& middle = t.axis[1];
  for (int64_t place = begin; place < end;) {
    const int64_t left = smaller(middle.group_end(place), end) - place;
    const int count = int(ceil_div(left, ceil_div(left, t.rows)));
    BlockRow rows[kRows];
    int made = 0;
    middle.for_queries(place, place + count, [&](const Query& q) {
      rows[made].y = q.token, rows[made].y_begin = q.first, rows[made].y_end = q.end, rows[made++].y_bias = q.bias;
    });
    visit(rows, count);
    place += count;
  }
}
// The same for the blocks of an owner, at each place of the outer axis.
template <class Visit> inline void for_blocks(const Problem& p, const Tiling& t, const Owner& owner, const Visit& visit) {
  for_middle_blocks(t, owner.row_begin, owner.row_end, [&](BlockRow* rows, int count) {
    t.axis[0].for_queries(0, p.q_shape[0], [&](const Query& q) {
      for (int r = 0; r < count; ++r) rows[r].z = q.token, rows[r].z_begin = q.first, rows[r].z_end = q.end, rows[r].z_bias = q.bias;
      visit(rows, count);
    });
  });
}

// How many times a key is packed, on average: strips overlap, and so do ranges of rows, or blocks of them where each walks
// an outer axis that the ring does not hold.
inline double times_packed(const Problem& p, const Tiling& t) {
  const bool walked = p.q_shape[0] > 1 && p.kv_shape[0] > t.ring[0];
  double columns = 0, rows = 0;
  for (int64_t begin = 0; begin < p.q_shape[2]; begin += t.strip)
    columns += double(t.axis[2].query_at(smaller(begin + t.strip, p.q_shape[2]) - 1).end - t.axis[2].query_at(begin).first);
  for (int64_t begin = 0; begin < p.q_shape[1]; begin += t.range) {
    int64_t kept = 0;  // the end of the rows of keys that are still there
    for_middle_blocks(t, begin, smaller(begin + t.range, p.q_shape[1]), [&](const BlockRow* block, int count) {
      const int64_t end = block[count - 1].y_end, first = walked ? block[0].y_begin : larger(kept, block[0].y_begin);
      rows += double(larger(end - first, 0)), kept = larger(kept, end);
    });
  }
  return columns / double(p.kv_shape[2]) * rows / double(p.kv_shape[1]);
}

// The tables of a strip.
template <class A> struct Strip {
  int queries, columns, vectors;
  int64_t *query_token, *key_token;
  int *first, *last;        // columns of each query's keys
  int* bias_of;             // entry of the bias table of each query's first key
  int* place;               // of a query in the scores: vector, lane, minus its first column
  int* lane_place;          // of the queries of a chunk: vector and lane alone
  LaneMap<A>*map, *bias;    // per vector of queries
  Short<A>* cut;
  Group* groups;            // of queries
  int *group_begin;         // per chunk
  int *seen_from, *seen_to; // per column, in a chunk: the queries that see it; backward only
  int64_t filled[3] = {0, 0, 0};  // begin, end and slot of what the tables tell

  void carve(Carver& c, const Tiling& t, bool keys) {
    query_token = c.take<int64_t>(t.strip);
    key_token = c.take<int64_t>(t.columns);
    first = c.take<int>(t.strip);
    last = c.take<int>(t.strip);
    bias_of = c.take<int>(t.strip);
    place = c.take<int>(t.strip);
    lane_place = c.take<int>(t.strip);
    map = c.take<LaneMap<A>>(t.strip / kLanes<A>);
    bias = c.take<LaneMap<A>>(t.strip / kLanes<A>);
    cut = c.take<Short<A>>(t.strip / kLanes<A>);
    groups = c.take<Group>(t.strip);
    group_begin = c.take<int>(t.strip / kLanes<A> + 1);
    seen_from = keys ? c.take<int>(t.columns) : nullptr;
    seen_to = keys ? c.take<int>(t.columns) : nullptr;
  }

  // The queries [begin, end), and of their windows the slots from `slot` on, as many as fit.
  void fill(const Tiling& t, int64_t begin, int64_t end, int most, int64_t slot = 0) {
    constexpr int W = kLanes<A>;
    const PlacedAxis& inner = t.axis[2];
    if (filled[0] == begin && filled[1] == end && filled[2] == slot) return;  // other owners of the strip
    filled[0] = begin, filled[1] = end, filled[2] = slot;
    queries = int(end - begin);
    vectors = (queries + W - 1) / W;
    int made = 0;
    int64_t zero = 0, listed = 0;  // the place of column 0, and of the first key that has no column yet
    int offset_of[W], first_of[W], count_of[W];
    columns = 0;
    inner.for_queries(begin, end, [&](const Query& window) {
      const Query q = part_of(window, slot, t.part[2]);
      if (!made) zero = listed = q.first;
      if (q.first > listed) zero += q.first - listed, listed = q.first;  // keys that nobody sees have no column
      if (q.end > listed) inner.for_keys(listed, q.end, [&](int64_t token) { key_token[columns++] = token; });
      listed = larger(listed, q.end);
      query_token[made] = q.token;
      first[made] = int(q.first - zero);
      last[made] = int(q.end - zero);
      bias_of[made] = int(q.bias);
      const int lane = made % W, vector = made / W;
      place[made] = int((vector % t.chunk * t.slots - first[made]) * W + lane);
      lane_place[made] = int(vector * t.slots * W + lane);
      for (int l = lane; l < W; ++l) offset_of[l] = int(q.bias), first_of[l] = first[made], count_of[l] = int(q.end - q.first);
      if (lane == W - 1 || made == queries - 1) finish_vector(vector, int(t.part[2]), first_of, count_of, offset_of);
      ++made;
    });
    int at = 0;
    for (int c = 0; c * t.chunk < vectors; ++c) {
      group_begin[c] = at;
      const int from = int(c * t.chunk * W), stop = int(smaller((c + 1) * t.chunk * W, queries));
      for_groups(first, last, from, stop, most, [&](const Group& g) { groups[at++] = g; });
      group_begin[c + 1] = at;
    }
  }
  // Calls visit(group) for groups of the keys that queries [from, stop) see; bands are relative to `from`.
  template <class Visit> void for_key_groups(int from, int stop, int most, const Visit& visit) const {
    const int begin = first[from], end = last[stop - 1];
    for (int column = begin, low = from, high = from; column < end; ++column) {
      while (low < stop && last[low] <= column) ++low;
      while (high < stop && first[high] <= column) ++high;
      seen_from[column] = low - from, seen_to[column] = high - from;
    }
    for_groups(seen_from, seen_to, begin, end, most, visit);
  }

 private:
  void finish_vector(int vector, int kernel, const int* first_of, const int* count_of, const int* offset_of) {
    map[vector] = make_map<A>(first_of);
    bias[vector] = make_map<A>(offset_of);
    cut[vector].from = kernel;
    for (int l = 0; l < kLanes<A>; ++l) {
      cut[vector].count[l] = count_of[l];
      cut[vector].from = count_of[l] < cut[vector].from ? count_of[l] : cut[vector].from;
    }
  }
};

constexpr int64_t kCached = 8 << 20;  // an image of more bytes is in no cache when it is met again

// Heads of keys that one owner walks together. Heads-last, one head is a fraction of a token's memory, and an image that
// no cache holds is read again by every owner of its tokens: at 448x448 with two heads of 32, an owner for each head took
// 1.6 times as long as one for both. Heads-first tensors (unfused ops) are an image for each head.
template <class T> inline int64_t heads_that_share_pages(const Problem& p) {
  constexpr int64_t kSpan = 1024;
  const int64_t token = p.head_dim * int64_t(sizeof(T)), image = p.kv_shape[0] * p.kv_shape[1] * p.kv_shape[2] * p.heads_kv * token;
  int64_t together = 1;
  if (p.key.head > p.key.token[2]) return together;
  for (int64_t n = 2; n <= p.heads_kv && image > kCached && n * token <= kSpan; ++n)
    if (p.heads_kv % n == 0) together = n;
  return together;
}

// Slots of a part, at most: the scores of four rows of a vector then take 64 KB. A plateau: half
// and twice as many move python -m bench.run in_parts --threads 1 by 2 to 5 %.
constexpr int64_t kPartSlots = 256;

// Tiles of parts of the windows: the outermost axis is cut first, so that runs along the innermost stay long.
template <class Pass, class T> inline Tiling fit_parts(const Problem& p, TilingOptions options, int64_t limit) {
  const int64_t sizes[][3] = {{64, kRows, 32}, {32, kRows, 32}, {16, kRows, 32}, {16, 2, 32}, {16, 1, 1}};  // and fewest slots
  options.heads_together = 1;
  Tiling t;
  for (const auto& size : sizes) {
    options.strip = size[0];
    options.rows = p.axis[1].stride > 1 ? 1 : size[1];  // parts of strided windows lie apart
    for (int a = 0; a < kAxes; ++a) options.part[a] = p.axis[a].kernel;
    for (int a = 0; a < kAxes;) {
      int64_t* const part = options.part;
      const int64_t slots = part[0] * part[1] * part[2];
      if (slots <= kPartSlots) {
        t = make_tiling<Accumulate<T>>(p, options);
        if (Pass(p, t, nullptr).bytes <= limit) return t;
      }
      if (slots <= size[2]) break;
      while (a < kAxes && part[a] == 1) ++a;
      if (a < kAxes) part[a] = ceil_div(p.axis[a].kernel, ceil_div(p.axis[a].kernel, ceil_div(part[a], 2)));  // even parts
    }
  }
  return t;
}

// The largest tiles whose scratch stays within `limit`; if none, and the pass can, tiles of parts of the windows; or the
// smallest ones.
template <class Pass, class T> inline Tiling fit_tiling(const Problem& p, TilingOptions options, int64_t limit) {
  const int64_t most = heads_that_share_pages<T>(p);
  const int64_t sizes[][3] = {{most > 1 ? 64 : options.strip, kRows, most}, {64, kRows, 1}, {32, kRows, 1}, {16, kRows, 1}, {16, 2, 1}, {16, 1, 1}};
  if (p.tiling[0]) return make_tiling<Accumulate<T>>(p, {p.tiling[0], p.tiling[1], p.tiling[2], p.tiling[3], options.owners, options.exclusive});
  Tiling t;
  for (const auto& size : sizes) {
    options.strip = size[0], options.rows = size[1], options.heads_together = size[2];
    t = make_tiling<Accumulate<T>>(p, options);
    if (Pass(p, t, nullptr).bytes <= limit) return t;
  }
  if constexpr (Pass::kParts)  // a bias table would be read in parts too, and is not
    if (!p.whole && !p.rpb.data) return fit_parts<Pass, T>(p, options, limit);
  return t;
}

}  // namespace
}  // namespace natten
