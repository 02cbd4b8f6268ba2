// SPDX-License-Identifier: MIT
// Tensor-core path: one block's work, for all three passes. A block holds the operands of its rows in shared memory, walks the
// column boxes that they see, two of them in memory at a time where they fit, and keeps the sums in registers.
//
//   pass           rows: first, second operand    columns: first, second      sums
//   forward        query                          key, value                  P . value
//   query gradient query, grad_out                key, value                  dS . key
//   key gradient   key, value                     query, grad_out             dS^T . query, P^T . grad_out
//
// S = scale * first . first^T + bias, in base 2; P = 2^(S - lse); dS = P * (second . second^T - delta). A score is written for
// (row, column), so the key gradient's are the transposes of the formulas' names.
//
// A weight of 0 times NaN is NaN: a NaN in a key, value or gradient may spread to all rows of the tiles that meet it, not only to
// those that see it. What a key mask hides is never read.
#pragma once
#include "tile.h"

namespace natten::cuda::tiles {
namespace {

// What a pass of a head dim takes: rows and threads of a block, columns of a box, numbers of a row that a block sums, boxes in memory.
template <class T, int kDim_, Pass kPass_, bool kExtras_> struct Shape {
  static constexpr int kDim = kDim_, kRows = 64, kThreads = 32 * (kRows / kWarpRows);
  static constexpr Pass kPass = kPass_;
  static constexpr bool kExtras = kExtras_;  // a bias table, a key mask or additional tokens
  static constexpr bool kKeyRows = kPass == Pass::kKeyGradient, kBackward = kPass != Pass::kForward;
  using Element = Operand<T, kDim>;
  static constexpr int kRowBytes = Element::kRowBytes;
  static constexpr int kColumns = kRowBytes > 256 || (kBackward && kRowBytes > 128) ? 32 : 64;
  static constexpr int kOut = !kBackward || kRowBytes <= 256 ? kDim : kKeyRows ? 64 : 128;  // more spills registers
  static constexpr int kStages = kRowBytes > 256 ? 1 : 2;
  static constexpr int kRowsBytes = kRowBytes * kRows, kBoxBytes = kRowBytes * kColumns;
  static constexpr int kScalars = 8 * kColumns;  // two numbers a column
  static constexpr int kStageBytes = 2 * kBoxBytes + kScalars;
  static constexpr int kBytes = (kBackward ? 2 : 1) * kRowsBytes + kStages * kStageBytes + table_bytes(kRows, kColumns);
};

template <class T, class S> struct Block {
  static constexpr int kDim = S::kDim, kRows = S::kRows, kThreads = S::kThreads, kColumns = S::kColumns, kOut = S::kOut;
  static constexpr bool kKeyRows = S::kKeyRows, kBackward = S::kBackward, kExtras = S::kExtras;
  using Element = typename S::Element;
  static constexpr int kOfChunk = Element::kOfChunk;

  const TileWork& work;
  const Problem& p;
  const int first_out;  // first number of the sums
  const uint32_t row_operands, stages;
  const Tables tables;
  const Tile<kKeyRows> tile;

  DEVICE Block(const TileWork& w, int64_t item, uint32_t base)
      : work(w), p(w.p), first_out(int(item % (kDim / kOut)) * kOut), row_operands(base),
        stages(row_operands + (kBackward ? 2 : 1) * S::kRowsBytes), tables(stages + S::kStages * S::kStageBytes, kRows, kColumns),
        tile(w, item / (kDim / kOut), tables) {}

  // ---- options; constants in kernels without them
  DEVICE bool has_bias() const { return kExtras && p.rpb.data; }
  DEVICE bool has_mask() const { return kExtras && p.key_mask.data; }
  DEVICE int additional() const { return kExtras ? int(p.additional) : 0; }

  // ---- what the block needs to know of its rows ------------------------------------------------------------------------
  // By all threads of the block; false if the tile has no rows.
  DEVICE bool prepare() const {
    ptx::sync_threads();  // the facts of the tile
    if (tile.is_empty(tables)) return false;
    fill_tables();
    ptx::sync_threads();
    find_range(work, tables);
    ptx::sync_threads();
    return true;
  }
  DEVICE void fill_tables() const {
    const int thread = ptx::thread_index();
    for (int slot = thread; slot < kRows; slot += kThreads) {
      const uint32_t word = coordinates_of(slot, work.plan.rows);
      int64_t token[kAxes];
      row_token(word, token);
      ptx::store_shared(tables.row_word + 4 * slot, word);
      for (int i = 0; i < (kBackward ? 2 : 1); ++i) ptx::store_shared(tables.row_offset(i, slot), offset(row_operand(i), token));
    }
    for (int slot = thread; slot < kColumns; slot += kThreads) {
      const uint32_t word = coordinates_of(slot, work.plan.columns);
      int bias = 0;
      int64_t steps[kAxes] = {};  // from the first token of a box
      for (int a = 0; a < kAxes && word != kNowhere; ++a) {
        bias += (field(word, a) - 1) * int(p.rpb.token[a]);
        steps[a] = (field(word, a) - 1) * p.axis[a].dilation;
      }
      ptx::store_shared(tables.column_word + 4 * slot, word);
      ptx::store_shared(tables.column_bias + 4 * slot, kKeyRows ? -bias : bias);
      for (int i = 0; i < 2; ++i) ptx::store_shared(tables.column_offset(i, slot), offset(column_operand(i), steps));
    }
    for (int a = 0; a < kAxes; ++a)
      for (int i = thread; i < tables.fact(kCount, a); i += kThreads) {
        const Span span = tile.span_of(p, a, tables.fact(kGroup, a), tables.fact(kBase, a) + i);
        const uint32_t at = tables.span(tables.fact(kSpanAt, a) + i);
        ptx::store_shared(at, int(span.first));
        ptx::store_shared(at + 4, int(span.end));
      }
  }
  DEVICE const Rows& row_operand(int i) const { return i ? (kKeyRows ? p.value : p.grad_out) : (kKeyRows ? p.key : p.query); }
  DEVICE const Rows& column_operand(int i) const { return i ? (kKeyRows ? p.grad_out : p.value) : (kKeyRows ? p.query : p.key); }

  // Index of a row's token in its tensor; false if the tile has no such row.
  DEVICE bool row_token(uint32_t word, int64_t* token) const {
    bool there = true;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      const int i = field(word, a) - 1;
      there = there && i < tables.fact(kCount, a);
      token[a] = tables.fact(kGroup, a) + p.axis[a].dilation * (tables.fact(kBase, a) + i) - tile.row_origin(p)[a];
    }
    return there;
  }
  // The same of a column's token; false if it lies outside of the tensor.
  DEVICE bool column_token(const Box& box, uint32_t word, int64_t* token) const {
    bool there = word != kNowhere;
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      token[a] = tables.fact(kGroup, a) + p.axis[a].dilation * (box.start[a] + field(word, a) - 1) - tile.column_origin(p)[a];
      there = there && token[a] >= 0 && token[a] < tile.column_shape(p)[a];
    }
    return there;
  }
  DEVICE bool is_masked(const int64_t* key) const {
    return has_mask() && !ptx::load_global(static_cast<const uint8_t*>(p.key_mask.data) + tile.b * p.key_mask.batch + offset(p.key_mask, key));
  }
  static DEVICE int64_t offset(const Rows& rows, const int64_t* token) {
    return token[0] * rows.token[0] + token[1] * rows.token[1] + token[2] * rows.token[2];
  }
  template <class E> DEVICE E* head_of(const Rows& rows, int head) const {
    return static_cast<E*>(rows.data) + tile.b * rows.batch + head * rows.head;
  }

  // ---- copies -------------------------------------------------------------------------------------------------------------
  // kSlots rows of `dims` numbers; find(slot, &at) says whether there is one, and where behind `from`. What is not there becomes
  // zeros, masked keys too: whatever they hold, a weight of 0 makes 0 of it. A thread copies one chunk of each of its rows.
  template <int kSlots, class Find> DEVICE void copy(uint32_t to, const T* from, int64_t dims, const Find& find) const {
    constexpr int kChunks = Element::kChunks, kStep = kThreads / kChunks;  // rows that all threads copy at once
    static_assert(kSlots % kStep == 0, "every thread copies as many");
    const int chunk = ptx::thread_index() % kChunks, first = ptx::thread_index() / kChunks;
    const bool inside = chunk * kOfChunk < dims;
#pragma unroll(kBackward && kDim > 64 ? 1 : 2)
    for (int i = 0; i < kSlots / kStep; ++i) {  // more of them at a time take registers that the sums need
      const int slot = first + i * kStep;
      int64_t at = 0;
      const bool there = find(slot, &at) && inside;
      ptx::cp_async_16(to + Element::at(slot, chunk), from + (there ? at + chunk * kOfChunk : 0), there);
    }
  }
  DEVICE void copy_rows() const {
#pragma unroll
    for (int i = 0; i < (kBackward ? 2 : 1); ++i)
      copy<kRows>(row_operands + i * S::kRowsBytes, head_of<const T>(row_operand(i), tile.head), i ? p.value_dim : p.head_dim, [&](int slot, int64_t* at) {
        int64_t token[kAxes];
        *at = ptx::load_shared<int64_t>(tables.row_offset(i, slot));
        return row_token(ptx::load_shared<uint32_t>(tables.row_word + 4 * slot), token) && !(kKeyRows && is_masked(token));
      });
  }
  DEVICE void copy_columns(uint32_t to, const Box& box) const {
    if (kExtras && box.token >= 0) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const Rows& rows = i ? p.additional_values : p.additional_keys;
        copy<kColumns>(to + i * S::kBoxBytes, head_of<const T>(rows, box.head), i ? p.value_dim : p.head_dim, [&](int slot, int64_t* at) {
          *at = (box.token + slot) * rows.token[kAxes - 1];
          return slot < box.count;
        });
      }
      return;
    }
    int64_t start[kAxes];
    uint32_t last = 0;  // of the columns that the tensor holds
#pragma unroll
    for (int a = 0; a < kAxes; ++a) {
      start[a] = tables.fact(kGroup, a) + p.axis[a].dilation * box.start[a] - tile.column_origin(p)[a];
      last = last << 9 | uint32_t(clamped(tables.fact(kColumnEnd, a) - box.start[a]));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
      copy<kColumns>(to + i * S::kBoxBytes, head_of<const T>(column_operand(i), box.head) + offset(column_operand(i), start), i ? p.value_dim : p.head_dim, [&](int slot, int64_t* at) {
        const uint32_t word = ptx::load_shared<uint32_t>(tables.column_word + 4 * slot);
        *at = ptx::load_shared<int64_t>(tables.column_offset(i, slot));
        if (!is_within(word, packed(1, 1, 1) - kGuards, last + kGuards)) return false;
        if (kKeyRows || !has_mask()) return true;
        int64_t token[kAxes];
        column_token(box, word, token);
        return !is_masked(token);
      });
    copy_scalars(to + 2 * S::kBoxBytes, box);
  }
  // Of each column: lse and delta of a query, or for a masked key -inf.
  DEVICE void copy_scalars(uint32_t to, const Box& box) const {
    if (!kKeyRows && (!has_mask() || box.token >= 0)) return;
    for (int slot = ptx::thread_index(); slot < kColumns; slot += kThreads) {
      int64_t token[kAxes];
      const bool there = column_token(box, ptx::load_shared<uint32_t>(tables.column_word + 4 * slot), token);
      if (kKeyRows) {
        const int64_t at = there ? offset(p.row_lse, token) : 0;  // delta lies alike
        ptx::cp_async_4(to + 8 * slot, head_of<const float>(p.row_lse, box.head) + at, there);
        ptx::cp_async_4(to + 8 * slot + 4, head_of<const float>(p.delta, box.head) + at, there);
      } else {
        ptx::store_shared(to + 8 * slot, there && is_masked(token) ? -ptx::infinity() : 0.f);
      }
    }
  }

  // ---- scores ---------------------------------------------------------------------------------------------------------------
  // Row of this thread's accumulators, i = 0 or 1.
  static DEVICE int row_slot(int i) { return ptx::thread_index() / 32 * kWarpRows + ptx::lane_index() / 4 + 8 * i; }
  static DEVICE int column_slot(int n, int e) { return n * 8 + ptx::lane_index() % 4 * 2 + e; }

  // Products to -inf where a row does not see a column, and to logits where something is added to them. Returns the factor,
  // positive, that makes logits in base 2 of the result.
  DEVICE float to_logits(float (&s)[kColumns / 8][4], const Box& box, uint32_t scalars) const {
    const float scale = work.scale_log2;
    const bool additional = kExtras && box.token >= 0;
    if (box.full || additional) {
      if (box.count == kColumns) return scale;
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (column_slot(n, j % 2) >= box.count) s[n][j] = -ptx::infinity();
      }
      return scale;
    }
    uint32_t first[2] = {}, last[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t row = ptx::load_shared<uint32_t>(tables.row_word + 4 * row_slot(i));
#pragma unroll
      for (int a = 0; a < kAxes; ++a) {
        const int at = field(row, a) - 1;
        const bool there = at < tables.fact(kCount, a);
        const uint32_t span = tables.span(tables.fact(kSpanAt, a) + (there ? at : 0));
        first[i] = first[i] << 9 | uint32_t(clamped(ptx::load_shared<int>(span) - box.start[a] + 1));
        last[i] = last[i] << 9 | uint32_t(there ? clamped(ptx::load_shared<int>(span + 4) - box.start[a]) : 0);
      }
      first[i] -= kGuards, last[i] += kGuards;
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const uint32_t word = ptx::load_shared<uint32_t>(tables.column_word + 4 * column_slot(n, e));
#pragma unroll
        for (int i = 0; i < 2; ++i)
          if (!is_within(word, first[i], last[i])) s[n][2 * i + e] = -ptx::infinity();
      }
    }
    if (!kKeyRows && has_mask()) hide_masked(s, scalars);
    if (!has_bias()) return scale;
    add_bias(s, box, scale);
    return 1.f;
  }
  // Each visible score times scale plus its entry of the bias table; that of an invisible one may not exist.
  DEVICE void add_bias(float (&s)[kColumns / 8][4], const Box& box, float scale) const {
    const int64_t head = (kKeyRows ? box.head : tile.head) * p.rpb.head;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t row = ptx::load_shared<uint32_t>(tables.row_word + 4 * row_slot(i));
      int64_t at = head;  // of the box's first column
#pragma unroll
      for (int a = 0; a < kAxes; ++a) {
        const int distance = box.start[a] - (tables.fact(kBase, a) + field(row, a) - 1);
        at += (int(p.axis[a].kernel) - 1 + (kKeyRows ? -distance : distance)) * int(p.rpb.token[a]);
      }
#pragma unroll
      for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = s[n][2 * i + e];
          if (score == -ptx::infinity()) continue;
          const int64_t entry = at + ptx::load_shared<int>(tables.column_bias + 4 * column_slot(n, e));
          score = score * scale + kLog2e * (p.rpb_wide ? ptx::load_global(static_cast<const float*>(p.rpb.data) + entry)
                                                       : ptx::widen(ptx::load_global(static_cast<const T*>(p.rpb.data) + entry)));
        }
      }
    }
    ptx::sync_warp();  // lanes took different ways; the products that follow need them together
  }
  DEVICE void hide_masked(float (&s)[kColumns / 8][4], uint32_t scalars) const {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float hidden = ptx::load_shared<float>(scalars + 8 * column_slot(n, e));  // 0 or -inf
        s[n][e] += hidden, s[n][2 + e] += hidden;
      }
    }
  }

  // ---- results -----------------------------------------------------------------------------------------------------------------
  // sums * factor[i] to the rows of a tensor, through the warp's part of the first row operand, whose numbers are used up.
  DEVICE void store_rows(const float (&sums)[kOut / 8][4], const float (&factor)[2], const Rows& rows, int64_t dims) const {
    const int lane = ptx::lane_index(), warp = ptx::thread_index() / 32;
    ptx::sync_warp();
#pragma unroll
    for (int n = 0; n < kOut / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float low = sums[n][2 * i] * factor[i], high = sums[n][2 * i + 1] * factor[i];
        const uint32_t to = row_operands + Element::at_number(row_slot(i), n * 8 + lane % 4 * 2);
        if constexpr (sizeof(T) == 2) ptx::store_shared(to, ptx::pack<T>(low, high));
        else ptx::store_shared(to, low), ptx::store_shared(to + 4, high);
      }
    }
    ptx::sync_warp();
    constexpr int kChunks = kOut / kOfChunk;
    for (int i = lane; i < kWarpRows * kChunks; i += 32) {
      const int slot = warp * kWarpRows + i / kChunks, chunk = i % kChunks, number = first_out + chunk * kOfChunk;
      int64_t token[kAxes];
      if (!row_token(ptx::load_shared<uint32_t>(tables.row_word + 4 * slot), token) || number >= dims) continue;
      ptx::Sixteen<uint32_t> numbers;
#pragma unroll
      for (int word = 0; word < 4; ++word) numbers.value[word] = ptx::load_shared<uint32_t>(row_operands + Element::at(slot, chunk) + 4 * word);
      T* to = head_of<T>(rows, tile.head) + offset(rows, token) + number;
      ptx::store_global(reinterpret_cast<ptx::Sixteen<uint32_t>*>(to), numbers);
    }
  }

  // ---- the walk ------------------------------------------------------------------------------------------------------------------
  // Calls visit(box, stage) for every box of columns, its operands in memory.
  template <class Visit> DEVICE void for_boxes(const Visit& visit) const {
    const bool plain = !has_bias() && !has_mask();
    const int group = int(p.heads / p.heads_kv);
    const int total = count_boxes(work, tables) * (kKeyRows ? group : 1) + (kKeyRows ? 0 : (additional() + kColumns - 1) / kColumns);
    Box next = Box::first(work, tables, kKeyRows ? tile.head * group : tile.head / group, plain), box = next;
    const auto fetch = [&](int index) {
      if (index > 0) next.template advance<kKeyRows, kExtras>(work, tables, kColumns, plain);
      if (index < total) copy_columns(stages + index % S::kStages * S::kStageBytes, next);
      ptx::cp_async_commit();
    };
    copy_rows();
    if (S::kStages == 2) fetch(0);
    for (int i = 0; i < total; ++i) {
      if (S::kStages == 1) fetch(i);
      ptx::cp_async_wait<0>();
      ptx::sync_threads();  // everybody's copies of this box have landed, and everybody is done with the box before
      box = next;
      if (S::kStages == 2) fetch(i + 1);
      visit(box, stages + i % S::kStages * S::kStageBytes);
      if (S::kStages == 1) ptx::sync_threads();  // the next copies overwrite it
    }
    ptx::cp_async_wait<0>();
    ptx::sync_threads();
  }
};

// ---- passes -------------------------------------------------------------------------------------------------------------------------
// The softmax has one form, online. Where the window fits one box it rescales zeros once: a multiplication an output and an exponential
// a row more than a form for one box alone, none a score, and no second kernel.
template <class T, class S_> struct Softmax {
  using S = S_;
  float out[S::kOut / 8][4] = {}, largest[2] = {-ptx::infinity(), -ptx::infinity()}, total[2] = {};

  // Scores times scale become weights; sums of earlier boxes are brought to the same shift.
  DEVICE void weigh(float (&s)[S::kColumns / 8][4], float scale) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = -ptx::infinity();
#pragma unroll
      for (int n = 0; n < S::kColumns / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      top = fmaxf(top, ptx::shfl_xor(top, 1));
      top = fmaxf(largest[i], scale * fmaxf(top, ptx::shfl_xor(top, 2)));
      const float shift = top == -ptx::infinity() ? 0.f : top;  // nothing visible so far: no 2^(-inf + inf)
      const float rescale = ptx::ex2(largest[i] - shift);
      largest[i] = top;
      total[i] *= rescale;
#pragma unroll
      for (int n = 0; n < S::kColumns / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) total[i] += s[n][2 * i + e] = ptx::ex2(s[n][2 * i + e] * scale - shift);
      }
#pragma unroll
      for (int n = 0; n < S::kOut / 8; ++n) out[n][2 * i] *= rescale, out[n][2 * i + 1] *= rescale;
    }
  }

  DEVICE void finish(const Block<T, S>& block) {
    const Problem& p = block.p;
    float factor[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      total[i] += ptx::shfl_xor(total[i], 1);
      total[i] += ptx::shfl_xor(total[i], 2);
      const bool dead = total[i] == 0.f;
      factor[i] = dead ? 0.f : 1.f / total[i];
      int64_t token[kAxes];
      const bool there = block.row_token(ptx::load_shared<uint32_t>(block.tables.row_word + 4 * block.row_slot(i)), token);
      if (there && ptx::lane_index() % 4 == 0)
        ptx::store_global(block.template head_of<float>(p.lse, block.tile.head) + block.offset(p.lse, token),
                          dead ? -ptx::infinity() : (largest[i] + ptx::lg2(total[i])) * kLn2);
    }
    block.store_rows(out, factor, p.out, p.value_dim);
  }
};

template <class T, int kDim, bool kExtras> struct Forward : Softmax<T, Shape<T, kDim, Pass::kForward, kExtras>> {
  using S = Shape<T, kDim, Pass::kForward, kExtras>;

  DEVICE void visit(const Block<T, S>& block, const Box& box, uint32_t stage) {
    float s[S::kColumns / 8][4];
    multiply<T, kDim, S::kColumns>(s, block.row_operands, stage);
    this->weigh(s, block.to_logits(s, box, stage + 2 * S::kBoxBytes));
    add_product<T, kDim, S::kOut, S::kColumns>(this->out, s, stage + S::kBoxBytes, 0);
  }
};

template <class T, int kDim, bool kExtras> struct QueryGradient {
  using S = Shape<T, kDim, Pass::kQueryGradient, kExtras>;
  float sums[S::kOut / 8][4] = {}, lse[2] = {}, delta[2] = {};

  DEVICE void begin(const Block<T, S>& block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int64_t token[kAxes];
      if (!block.row_token(ptx::load_shared<uint32_t>(block.tables.row_word + 4 * block.row_slot(i)), token)) continue;
      lse[i] = kLog2e * ptx::load_global(block.template head_of<const float>(block.p.row_lse, block.tile.head) + block.offset(block.p.row_lse, token));
      delta[i] = ptx::load_global(block.template head_of<const float>(block.p.delta, block.tile.head) + block.offset(block.p.delta, token));
    }
  }
  DEVICE void visit(const Block<T, S>& block, const Box& box, uint32_t stage) {
    float s[S::kColumns / 8][4], slopes[S::kColumns / 8][4];
    multiply<T, kDim, S::kColumns>(s, block.row_operands, stage);
    const float scale = block.to_logits(s, box, stage + 2 * S::kBoxBytes);
    multiply<T, kDim, S::kColumns>(slopes, block.row_operands + S::kRowsBytes, stage + S::kBoxBytes);
#pragma unroll
    for (int n = 0; n < S::kColumns / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) s[n][j] = ptx::ex2(s[n][j] * scale - lse[j / 2]) * (slopes[n][j] - delta[j / 2]);
    }
    add_product<T, kDim, S::kOut, S::kColumns>(sums, s, stage, block.first_out);
  }
  DEVICE void finish(const Block<T, S>& block) {
    const float factor[2] = {float(block.p.scale), float(block.p.scale)};
    block.store_rows(sums, factor, block.p.grad_query, block.p.head_dim);
  }
};

template <class T, int kDim, bool kExtras> struct KeyGradient {
  using S = Shape<T, kDim, Pass::kKeyGradient, kExtras>;
  float keys[S::kOut / 8][4] = {}, values[S::kOut / 8][4] = {};
  bool masked[2] = {};

  DEVICE void begin(const Block<T, S>& block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int64_t token[kAxes];
      const bool there = block.row_token(ptx::load_shared<uint32_t>(block.tables.row_word + 4 * block.row_slot(i)), token);
      masked[i] = there && block.is_masked(token);
    }
  }
  DEVICE void visit(const Block<T, S>& block, const Box& box, uint32_t stage) {
    float s[S::kColumns / 8][4], slopes[S::kColumns / 8][4];
    const uint32_t scalars = stage + 2 * S::kBoxBytes;
    multiply<T, kDim, S::kColumns>(s, block.row_operands, stage);
    const float scale = block.to_logits(s, box, scalars);
#pragma unroll
    for (int n = 0; n < S::kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float lse = kLog2e * ptx::load_shared<float>(scalars + 8 * block.column_slot(n, e));
        s[n][e] = masked[0] ? 0.f : ptx::ex2(s[n][e] * scale - lse);
        s[n][2 + e] = masked[1] ? 0.f : ptx::ex2(s[n][2 + e] * scale - lse);
      }
    }
    add_product<T, kDim, S::kOut, S::kColumns>(values, s, stage + S::kBoxBytes, block.first_out);
    multiply<T, kDim, S::kColumns>(slopes, block.row_operands + S::kRowsBytes, stage + S::kBoxBytes);
#pragma unroll
    for (int n = 0; n < S::kColumns / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float delta = ptx::load_shared<float>(scalars + 8 * block.column_slot(n, e) + 4);
        s[n][e] *= slopes[n][e] - delta;
        s[n][2 + e] *= slopes[n][2 + e] - delta;
      }
    }
    add_product<T, kDim, S::kOut, S::kColumns>(keys, s, stage, block.first_out);
  }
  DEVICE void finish(const Block<T, S>& block) {
    const Problem& p = block.p;
    const float scale[2] = {float(p.scale), float(p.scale)}, one[2] = {1.f, 1.f};
    if (p.grad_key.data) block.store_rows(keys, scale, p.grad_key, p.head_dim);
    if (p.grad_value.data) block.store_rows(values, one, p.grad_value, p.value_dim);
  }
};

template <class T, class Work> __global__ void __launch_bounds__(Work::S::kThreads, 2) attend(const __grid_constant__ TileWork work) {
  const Block<T, typename Work::S> block(work, work.first + ptx::block_index(0), ptx::shared_base());
  if (!block.prepare()) return;
  Work sums;
  if constexpr (Work::S::kBackward) sums.begin(block);
  block.for_boxes([&](const Box& box, uint32_t stage) { sums.visit(block, box, stage); });
  sums.finish(block);
}

}  // namespace
}  // namespace natten::cuda::tiles
