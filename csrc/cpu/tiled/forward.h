// SPDX-License-Identifier: MIT
// Forward of the tiled path: scores of a chunk of queries (lanes are queries), softmax down the slots, weighted sums of
// values (lanes are the head dim).
//
// Lab notebook (AMD Zen 5; rows to try a change on: python -m bench.run headline large --ours --threads 1)
// * Arrays of pointers moved by an offset (columns, slots) were stored one by one and loaded as vectors, waiting for stores,
//   most of all at 448x448. Base pointers and an index instead.
// * 448x448, 2 heads: prefetching the next row while packing, and the output to write, gains a little; both heads in one
//   owner gains half as much again as the whole had (heads_that_share_pages; bench.tune_cpu tilings tries both).
// * A tile's scores are recomputed by the backward instead of read: no lse, no rounding of it.
// * 14x14, 2 heads (bench.run calls): of a call of 55 us the kernel takes 28 on one thread, 14 on two, torch's dispatcher 8 to 12,
//   our checks and records the rest, which a second thread does not shorten; 0.30 of sgemm at two threads would be 40 us.
// * bench.tune_cpu random: one problem in a hundred takes 1.1 to 1.15 times as long as on the general path, all below 100 us with
//   rows of 4 to 7 tokens and head dims of 80, whose lanes are half empty. A rule that sent them there lost 4 % of training.
// * Eight times the compiled gather at 2 threads would be 1.17 of sgemm: Inductor's gather gains from AVX-512 as we do.
// * Not tried: rows narrower than a vector (7x7 in AVX-512 wastes 9 of 16 lanes), loads shared by neighbouring vectors of
//   queries in one dimension, GEMM tiles for blocked attention, AVX512-BF16 and AMX.
#pragma once
#include "parts.h"

namespace natten {
namespace {

// How tokens come in and outputs go out where the problem's tensors do not say: generated code computes the queries, keys or
// values of a few tokens, and goes on with outputs or log-sum-exps, while they are hot.
// hook(batch, head, token, inner, places, count, numbers, pitch): tokens in the caller's axes, of which `inner` takes the
// `places` and the others are token's; a row of numbers for each, `pitch` apart.
struct Nothing {};
template <class Query, class Key, class Value, class Out, class Lse> struct Hooks {
  static constexpr bool computes_query = !std::is_same_v<Query, Nothing>, computes_key = !std::is_same_v<Key, Nothing>,
                        computes_value = !std::is_same_v<Value, Nothing>, takes_out = !std::is_same_v<Out, Nothing>,
                        takes_lse = !std::is_same_v<Lse, Nothing>;
  static constexpr bool computes = computes_query || computes_key || computes_value;
  const Query* query = nullptr;
  const Key* key = nullptr;
  const Value* value = nullptr;
  const Out* out = nullptr;
  const Lse* lse = nullptr;
};
template <class... Functions> Hooks<Functions...> make_hooks(const Functions&... functions) { return {&functions...}; }
using NoHooks = Hooks<Nothing, Nothing, Nothing, Nothing, Nothing>;

template <class T, class G = Anything, class H = NoHooks> struct Forward {
  using Element = T;
  using A = Accumulate<T>;
  static constexpr int W = kLanes<A>;
  static constexpr bool kParts = std::is_same_v<G, Anything>;  // generated code is made for whole windows
  const Problem& p;
  Tiling t;
  PackedKeys<T> keys;
  Strip<A> strip;
  BiasTables<A> bias;
  Gathered<A> gathered;
  int most;             // outputs of a group
  int additional_here;  // tokens that are attended to here: all with the first part of a window
  A *queries, *scores, *sums;
  A *inverse, *earlier;  // of each query: 1 / total; or the factors of this part's sums (0: nothing seen) and of earlier ones
  A* computed;        // tokens that are to be packed, dense: queries of a row of a chunk, or a vector of keys or values
  int64_t* counting;  // 0, 1, 2, ..
  Visit<A>* visits;  // of each row of a block
  int listed[kRows];
  int64_t bytes;
  H hooks;

  static int64_t scratch_bytes(const Problem& p, const Tiling& t) { return Forward(p, t, nullptr).bytes; }
  static Tiling tiling(const Problem& p) { return fit_tiling<Forward, T>(p, {128, 0, 0, 48 << 10, 8, false}, kMaxTiledBytes); }

  Forward(const Problem& problem, const Tiling& tiling, void* memory, const H& given = {}) : p(problem), t(tiling), keys(problem, t), hooks(given) {
    keys.key.transposed = keys.value.dense = true;
    keys.key.dense = keys.value.transposed = false;
    Carver c{static_cast<char*>(memory)};
    keys.carve(c);
    strip.carve(c, t, false);
    bias.carve(c, p, t);
    queries = c.take<A>(t.rows * t.chunk * keys.score_dim * W);
    scores = c.take<A>(t.rows * t.chunk * t.slots * W);
    sums = c.take<A>(kMaxOutputs * keys.value.pitch);
    inverse = c.take<A>(t.rows * t.chunk * W);
    earlier = t.whole ? nullptr : c.take<A>(t.rows * t.chunk * W);
    gathered.carve(c, t, keys.value.pitch);
    computed = H::computes ? c.take<A>(larger(t.chunk * W * p.head_dim, W * p.value_dim)) : nullptr;
    counting = H::computes ? c.take<int64_t>(t.chunk * W) : nullptr;
    visits = c.take<Visit<A>>(t.rows * visits_per_row());
    bytes = c.used;
    most = outputs_per_group(int(keys.value.pitch / W), int(t.part[2]));
    additional_here = int(p.additional);
    if (!memory) return;
    keys.clear();
    for (int64_t i = 0; counting && i < t.chunk * W; ++i) counting[i] = i;
  }
  int64_t visits_per_row() const { return t.part[0] * t.part[1]; }

  void run(const Owner& owner) {
    bias.template fill<T>(p, owner.head);
    for (int64_t begin = owner.query_begin; begin < owner.query_end; begin += t.strip) {
      const int64_t end = smaller(begin + t.strip, owner.query_end);
      strip.fill(t, begin, end, most);
      keys.start(owner);
      if constexpr (kParts) {
        if (!t.whole) {
          for_blocks(p, t, owner, [&](const BlockRow* rows, int count) { attend_in_parts(owner, begin, end, rows, count); });
          continue;
        }
      }
      for_blocks(p, t, owner, [&](const BlockRow* rows, int count) { attend_block(owner, rows, count); });
    }
  }
  void attend_block(const Owner& owner, const BlockRow* rows, int count) {
    const int64_t group = p.heads / p.heads_kv;
    keys.bring(owner, strip, rows, count, *this);
    for (int64_t n = 0; n < t.heads_together; ++n) {
      list_block(n, rows, count);
      for (int64_t h = 0; h < group; ++h) attend(owner, n, (owner.head + n) * group + h, rows, count);
    }
  }

  void list_block(int64_t n, const BlockRow* rows, int count) {
    const A* const values = keys.ring_of(keys.value, 1, n);
    for (int r = 0; r < count; ++r)
      listed[r] = list_rows(keys.ring, values, keys.value.size[1], rows[r], t.part[2], visits + r * visits_per_row());
  }

  // One head of queries, of one block; its keys are those of the owner's n-th head.
  void attend(const Owner& owner, int64_t n, int64_t head, const BlockRow* rows, int count) {
    for (int chunk = 0, from = 0; from < strip.vectors; ++chunk, from += int(t.chunk)) {
      const int to = int(smaller(from + t.chunk, strip.vectors));
      const int tokens = int(smaller(to * W, strip.queries)) - from * W;
      for (int r = 0; !H::takes_out && r < count; ++r)
        prefetch_to_write(row_of<T>(p.out, owner.batch, head, rows[r].z, rows[r].y), strip.query_token + from * W, tokens, p.out.token[2], p.value_dim);
      pack(owner, head, rows, count, from, to);
      const Products<A> products{queries, keys.ring_of(keys.key, 0, n), keys.score_dim, keys.key.size[0], scores};
      score_chunk<A, G>(products, t, keys.ring, strip, rows, count, from, to);
      if (additional_here)
        score_additional<A, G>(products, t, keys.additional_of(keys.key, 0, n), keys.additional_pitch(), additional_here, rows, count, from, to);
      for (int r = 0; r < count; ++r)
        for (int v = from; v < to; ++v) finish_softmax(owner, head, rows[r], r, v, from);
      for (int g = strip.group_begin[chunk]; g < strip.group_begin[chunk + 1]; ++g)  // rows innermost: they share values
        for (int r = 0; r < count; ++r) sum_values(owner, n, head, rows[r], r, strip.groups[g], from);
    }
  }
  void pack(const Owner& owner, int64_t head, const BlockRow* rows, int count, int from, int to) const {
    if constexpr (H::computes_query) {
      const int tokens = int(smaller(to * W, strip.queries)) - from * W;
      for (int r = 0; r < count; ++r) {
        call(*hooks.query, owner, head, rows[r].z, rows[r].y, strip.query_token + from * W, tokens, computed, p.head_dim);
        pack_query_row(TokenRow<A>{computed, counting, p.head_dim, 1, 0}, tokens, p.head_dim, keys.score_dim, queries + r * t.chunk * keys.score_dim * W);
      }
    } else {
      pack_queries<T>(p, p.query, owner, head, rows, count, strip, t, from, to, p.head_dim, keys.score_dim, queries);
    }
  }
  // What bring() asks of the source of keys (0) and values (1).
  template <int I> static constexpr bool computes = I ? H::computes_value : H::computes_key;
  template <int I> TokenRow<A> compute(const Owner& owner, int64_t head, int64_t z, int64_t y, const int64_t* places, int count) const {
    const int64_t dim = I ? p.value_dim : p.head_dim;
    if constexpr (I) call(*hooks.value, owner, head, z, y, places, count, computed, dim);
    else call(*hooks.key, owner, head, z, y, places, count, computed, dim);
    return {computed, counting, dim, 1, 0};
  }
  template <class Hook>
  void call(const Hook& hook, const Owner& owner, int64_t head, int64_t z, int64_t y, const int64_t* places, int count, A* numbers, int64_t pitch) const {
    int64_t token[kAxes];
    token[p.order[0]] = z, token[p.order[1]] = y, token[p.order[2]] = 0;
    hook(owner.batch, head, token, p.order[2], places, count, numbers, pitch);
  }
  void finish_softmax(const Owner& owner, int64_t head, const BlockRow& row, int r, int v, int from) {
    const int64_t at = r * t.chunk + v - from;
    Statistics<A> s = weigh_vector(scores + at * t.slots * W, p, t, strip, bias, head, row, v, additional_here);
    forget_hidden(keys, strip, row, v, scores + at * t.slots * W, s);
    if constexpr (kParts) {
      if (!t.whole) {
        const auto factors = gathered.join(r, v, s, Vector<A>{});
        store(inverse + at * W, s.total == 0 ? Vector<A>{} : factors.here);
        store(earlier + at * W, factors.earlier);
        return;
      }
    }
    store(inverse + at * W, s.total == 0 ? Vector<A>{} : 1 / s.total);
    if (H::takes_lse || p.lse.data) write_lse(owner, head, row, v, s);
  }
  void write_lse(const Owner& owner, int64_t head, const BlockRow& row, int v, const Statistics<A>& s) const {
    const Vector<A> lse = s.maximum + log_of_sum(s.total);
    const int lanes = int(smaller(W, strip.queries - v * W));
    if constexpr (H::takes_lse) {
      A numbers[W];
      store(numbers, lse);
      call(*hooks.lse, owner, head, row.z, row.y, strip.query_token + v * W, lanes, numbers, 1);
    } else {
      A* const out = row_of<A>(p.lse, owner.batch, head, row.z, row.y);
      for (int l = 0; l < lanes; ++l) out[strip.query_token[v * W + l] * p.lse.token[2]] = lse[l];
    }
  }
  void sum_values(const Owner& owner, int64_t head_kv, int64_t head, const BlockRow& row, int r, const Group& group, int from) {
    A factor[kMaxOutputs];
    for (int n = 0; n < group.count; ++n) factor[n] = inverse[r * t.chunk * W + group.first + n - from * W];
    sum_group<T, G>(keys, keys.value, head_kv, strip, group, scores + r * t.chunk * t.slots * W, visits + r * visits_per_row(), listed[r],
                    window_slots(row, t), additional_here, factor, sums);
    for (int n = 0; n < group.count; ++n)
      if (factor[n] == 0) std::memset(sums + n * keys.value.pitch, 0, size_t(keys.value.pitch) * sizeof(A));  // 0 * NaN of a value that nobody attends to
    if constexpr (kParts) {
      if (!t.whole) return gather(group, r, from);
    }
    write_rows(owner, head, row, group.first, group.count, sums);
  }
  void write_rows(const Owner& owner, int64_t head, const BlockRow& row, int first, int count, A* rows) const {
    const int64_t* const places = strip.query_token + first;
    if constexpr (H::takes_out) {
      call(*hooks.out, owner, head, row.z, row.y, places, count, rows, keys.value.pitch);
    } else {
      T* const to = row_of<T>(p.out, owner.batch, head, row.z, row.y);
      for (int n = 0; n < count; ++n) write_row<T>(rows + n * keys.value.pitch, to + places[n] * p.out.token[2], p.value_dim);
    }
  }

  // The same for windows in parts: one head of queries after the other, because each gathers rows of its own.
  void attend_in_parts(const Owner& owner, int64_t begin, int64_t end, const BlockRow* rows, int count) {
    const int64_t group = p.heads / p.heads_kv;
    for (int64_t h = 0; h < group; ++h) {
      const int64_t head = owner.head * group + h;
      gathered.clear(count);
      for_parts(keys, strip, owner, begin, end, most, rows, count, [&](const BlockRow* part, bool first) {
        additional_here = first ? int(p.additional) : 0;
        list_block(0, part, count);
        attend(owner, 0, head, part, count);
      });
      for (int r = 0; r < count; ++r) write_gathered(owner, head, rows[r], r);
    }
  }
  // A group's sums of one part, after those of earlier parts.
  void gather(const Group& group, int r, int from) const {
    for (int n = 0; n < group.count; ++n) {
      const int q = group.first + n;
      A* const to = gathered.row(r, q);
      const Vector<A> kept = splat(earlier[r * t.chunk * W + q - from * W]);
      for (int64_t d = 0; d < gathered.pitch; d += W) store(to + d, load(to + d) * kept + load(sums + n * gathered.pitch + d));
    }
  }
  void write_gathered(const Owner& owner, int64_t head, const BlockRow& row, int r) const {
    for (int v = 0; v < strip.vectors; ++v) {
      const Statistics<A> s{load(gathered.number(r, v, 0)), load(gathered.number(r, v, 1))};
      const Vector<A> factor = s.total == 0 ? Vector<A>{} : 1 / s.total;
      const int lanes = int(smaller(W, strip.queries - v * W));
      for (int l = 0; l < lanes; ++l)
        for (int64_t d = 0; d < gathered.pitch; d += W) {
          A* const at = gathered.row(r, v * W + l) + d;
          store(at, load(at) * factor[l]);
        }
      write_rows(owner, head, row, v * W, lanes, gathered.row(r, v * W));
      if (H::takes_lse || p.lse.data) write_lse(owner, head, row, v, s);
    }
  }
};

}  // namespace
}  // namespace natten
