// SPDX-License-Identifier: MIT
// Tensor-core path, the forward on Hopper (sm_90a): rows, boxes, masks and softmax of attend.h around another main loop.
//
// One warp has TMA copy boxes of keys and values into a ring of stages; warpgroups of 64 rows each multiply them with wgmma, whose
// accumulators lie in registers as those of mma do. Two warpgroups share every copy, and each passes over boxes that none of its
// rows sees. A stage's keys and its values have a barrier each for "they are here" and for "everybody is done with them": the next
// keys come while values are still multiplied. A box of columns is one box of a tensor map, 64 numbers of each row at a time; what
// lies outside of the tensor becomes zeros.
//
// The warpgroups of a multiprocessor hide each other's softmax: two of a block where rows have 128 numbers; those of three blocks
// where they have 64, since two blocks of two take more registers than there are. The next step is that a warpgroup hides its own:
// the products of a box under way while it weighs the scores of the one before.
#pragma once
#include "attend.h"

namespace natten::cuda::hopper {
namespace {
using namespace tiles;

constexpr int kGroupRows = 64, kGroupThreads = 128;  // of a warpgroup
constexpr int kPart = 64, kLine = 128;  // numbers of a row that one copy brings: 128 bytes, what one swizzle spans
constexpr int kSwizzleRows = 8, kAlignment = kSwizzleRows * kLine;  // it repeats after eight rows, counted from address 0
constexpr int kStep = 16, kStepBytes = 2 * kStep;  // numbers, or columns, that one wgmma multiplies
constexpr int kReach = 256;  // of a box of a tensor map, on an axis
constexpr int64_t kMostDilation = 8;  // that a tensor map can step over

// An operand is kDim / 64 parts, each a stack of rows of 128 bytes.
template <class T, int kDim, int kRows> struct Parts {
  static constexpr int kOfChunk = 16 / sizeof(T), kChunks = kDim / kOfChunk;
  using Part = Operand<T, kPart>;
  static DEVICE uint32_t at(int row, int chunk) {
    return uint32_t(chunk / Part::kChunks * (kRows * kLine)) + Part::at(row, chunk % Part::kChunks);
  }
  static DEVICE uint32_t at_number(int row, int d) { return at(row, d / kOfChunk) + d % kOfChunk * int(sizeof(T)); }
};

template <class T, int kDim_> struct RingShape {
  static constexpr int kDim = kDim_, kOut = kDim_, kColumns = 64, kParts = kDim / kPart;
  static constexpr int kGroups = kDim == 64 ? 1 : 2, kBlocks = kDim == 64 ? 3 : 1;  // of a block; of a multiprocessor
  static constexpr int kRows = kGroups * kGroupRows, kThreads = kGroups * kGroupThreads, kAllThreads = kThreads + 32;  // with the copying warp
  static constexpr bool kKeyRows = false, kBackward = false, kExtras = false;
  using Element = Parts<T, kDim, kRows>;
  static constexpr int kStages = kDim == 64 ? 3 : 4;
  static constexpr int kRowsBytes = kParts * kRows * kLine, kBoxBytes = kParts * kColumns * kLine, kStageBytes = 2 * kBoxBytes;
  static constexpr int kBarriers = kRowsBytes + kStages * kStageBytes + table_bytes(kRows, kColumns);
  static constexpr int kBytes = kBarriers + 4 * kStages * 8 + kAlignment;
  static_assert(kBarriers % 8 == 0 && kRowsBytes % kAlignment == 0 && kBoxBytes % kAlignment == 0, "barriers and operands are aligned");
};

// A tensor of columns as TMA reads it. Its heads lie in a token's stride, or are further samples.
struct TensorBoxes {
  ptx::TensorMap map;  // numbers, last axis, .., first axis, sample
  int number_of_head;  // first number of head 1
  int sample_of_batch, sample_of_head;
};
struct BoxWork : TileWork {
  TensorBoxes columns[2];  // keys, values
};

template <class T, int kDim> struct Ring {
  using S = RingShape<T, kDim>;
  using B = Block<T, S>;
  enum Event { kArrived, kFree };

  const BoxWork& work;
  const B block;
  const uint32_t base;

  DEVICE Ring(const BoxWork& w, uint32_t address) : work(w), block(w, w.first + ptx::block_index(0), address), base(address) {}

  // Of the keys (operand 0) or the values of a stage.
  DEVICE uint32_t barrier(Event event, int operand, int stage) const {
    return base + S::kBarriers + 8 * ((2 * event + operand) * S::kStages + stage);
  }
  DEVICE uint32_t stage_operand(int operand, int stage) const { return block.stages + stage * S::kStageBytes + operand * S::kBoxBytes; }

  // By all threads: barriers, and zeros in the slots that boxes leave free, since a weight of 0 makes 0 of numbers only.
  DEVICE void begin() const {
    if (ptx::thread_index() == 0) {
#pragma unroll
      for (int i = 0; i < 2 * S::kStages; ++i) {
        ptx::mbarrier_init(barrier(kArrived, 0, i), 1);
        ptx::mbarrier_init(barrier(kFree, 0, i), S::kThreads / 32);
      }
    }
    const int used = work.plan.columns[0] * work.plan.columns[1] * work.plan.columns[2], words = (S::kColumns - used) * (kLine / 8);
    for (int i = ptx::thread_index(); i < words * (S::kStages * 2 * S::kParts); i += S::kAllThreads)
      ptx::store_shared(block.stages + i / words * (S::kColumns * kLine) + used * kLine + i % words * 8, uint64_t(0));
    ptx::fence_proxy_async();  // TMA sees the barriers, wgmma the zeros
  }

  // Calls visit(box, stage, parity) for every box, parity that of the stage's turn.
  template <class Visit> DEVICE void for_boxes(const Visit& visit) const {
    const int head = block.tile.head / int(work.p.heads / work.p.heads_kv);
    Box box = Box::first(work, block.tables, head, true);
    int stage = 0, parity = 0;
    for (int left = count_boxes(work, block.tables); left > 0; --left) {
      visit(box, stage, parity);
      box.template advance<false, false>(work, block.tables, S::kColumns, true);
      if (++stage == S::kStages) stage = 0, parity ^= 1;
    }
  }

  // ---- the copying warp, one thread of it
  DEVICE void produce() const {
    for_boxes([&](const Box& box, int stage, int parity) {
      copy(box, 0, stage, parity);
      copy(box, 1, stage, parity);
    });
  }
  DEVICE void copy(const Box& box, int operand, int stage, int parity) const {
    const TensorBoxes& columns = work.columns[operand];
    const uint32_t arrived = barrier(kArrived, operand, stage);
    ptx::mbarrier_wait(barrier(kFree, operand, stage), parity ^ 1);  // a fresh barrier counts as one whose last turn is over
    ptx::mbarrier_arrive_expect_tx(arrived, box.count * (kLine * S::kParts));
    int at[kAxes];
#pragma unroll
    for (int a = 0; a < kAxes; ++a)
      at[a] = int(block.tables.fact(kGroup, a) + work.p.axis[a].dilation * box.start[a] - work.p.kv_origin[a]);
    const int number = box.head * columns.number_of_head;
    const int sample = block.tile.b * columns.sample_of_batch + box.head * columns.sample_of_head;
#pragma unroll
    for (int part = 0; part < S::kParts; ++part)
      ptx::tma_load<5>(stage_operand(operand, stage) + part * (S::kColumns * kLine), &columns.map, arrived,
                       {number + part * kPart, at[2], at[1], at[0], sample});
  }

  // ---- the multiplying warps
  static DEVICE int group() { return S::kGroups == 1 ? 0 : ptx::thread_index() / kGroupThreads; }
  // Descriptor of 64 rows of an operand whose parts have kOfPart; they are rows or columns of the product.
  template <int kOfPart> static DEVICE uint64_t numbers_along(uint32_t operand, int step) {
    constexpr int kSteps = kPart / kStep;
    return ptx::wgmma_descriptor(operand + step / kSteps * (kOfPart * kLine) + step % kSteps * kStepBytes, 16, kAlignment);
  }
  // scores = rows . columns^T.
  DEVICE void multiply(float (&scores)[S::kColumns / 8][4], uint32_t rows, uint32_t columns) const {
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / kStep; ++step)
      ptx::wgmma_ss<T, S::kColumns, false>(flat(scores), numbers_along<S::kRows>(rows, step),
                                           numbers_along<S::kColumns>(columns, step), step > 0);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_registers(flat(scores));
  }
  // sums += weights . columns.
  DEVICE void add_product(float (&sums)[kDim / 8][4], const float (&weights)[S::kColumns / 8][4], uint32_t columns) const {
    uint32_t left[S::kColumns / kStep][4];
#pragma unroll
    for (int n = 0; n < S::kColumns / kStep; ++n) pack_weights<T>(left[n], weights[2 * n], weights[2 * n + 1]);
    ptx::wgmma_registers(left), ptx::wgmma_registers(flat(sums));
    ptx::wgmma_fence();
#pragma unroll
    for (int n = 0; n < S::kColumns / kStep; ++n)
      ptx::wgmma_rs<T, kDim, true>(flat(sums), left[n],
                                   ptx::wgmma_descriptor(columns + n * (kStep * kLine), S::kColumns * kLine, kAlignment), true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_registers(flat(sums)), ptx::wgmma_registers(left);
  }
  template <int kCount> static DEVICE float (&flat(float (&accumulators)[kCount][4]))[4 * kCount] {
    return reinterpret_cast<float(&)[4 * kCount]>(accumulators);
  }
  // Each warp waits for its own wgmmas.
  DEVICE void release(int operand, int stage) const {
    if (ptx::lane_index() == 0) ptx::mbarrier_arrive(barrier(kFree, operand, stage));
  }

  // The positions that the rows of a warpgroup see on the axis on which the tile is halved.
  struct Half {
    int axis, begin, end;
  };
  DEVICE Half find_half() const {
    const int* rows = work.plan.rows;
    const int a = rows[0] > 1 ? 0 : rows[1] > 1 ? 1 : 2, half = rows[a] / 2;
    const int first = group() * half, behind = int(smaller(first + half, block.tables.fact(kCount, a)));
    if (first >= behind) return {a, 0, 0};
    const uint32_t spans = block.tables.span(block.tables.fact(kSpanAt, a));
    return {a, ptx::load_shared<int>(spans + 8 * first), ptx::load_shared<int>(spans + 8 * (behind - 1) + 4)};
  }
  DEVICE bool is_seen(const Box& box, const Half& half) const {
    if (S::kGroups == 1) return true;
    int start = box.start[0];
    if (half.axis == 1) start = box.start[1];
    if (half.axis == 2) start = box.start[2];
    return start < half.end && start + work.plan.columns[half.axis] > half.begin;
  }

  DEVICE void consume() const {
    block.copy_rows();
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1, S::kThreads);  // wgmma reads the rows of all warps
    Softmax<T, S> sums;
    const uint32_t rows = block.row_operands + group() * (kGroupRows * kLine);
    const Half half = find_half();
    for_boxes([&](const Box& box, int stage, int parity) {
      const bool seen = is_seen(box, half);
      ptx::mbarrier_wait(barrier(kArrived, 0, stage), parity);
      float s[S::kColumns / 8][4];
      if (seen) multiply(s, rows, stage_operand(0, stage));
      release(0, stage);
      if (seen) sums.weigh(s, block.to_logits(s, box, 0));
      ptx::mbarrier_wait(barrier(kArrived, 1, stage), parity);
      if (seen) add_product(sums.out, s, stage_operand(1, stage));
      release(1, stage);
    });
    ptx::named_barrier_sync(1, S::kThreads);  // results overwrite the rows
    sums.finish(block);
  }
};

template <class T, int kDim>
__global__ void __launch_bounds__(RingShape<T, kDim>::kAllThreads, RingShape<T, kDim>::kBlocks)
    attend_boxes(const __grid_constant__ BoxWork work) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(NATTEN_EMULATE)  // why_not() keeps it from other devices
  const Ring<T, kDim> ring(work, (ptx::shared_base() + kAlignment - 1) & ~uint32_t(kAlignment - 1));
  ring.begin();
  if (!ring.block.prepare()) return;
  constexpr int kThreads = RingShape<T, kDim>::kThreads;
  if (ptx::thread_index() < kThreads) ring.consume();
  else if (ptx::thread_index() == kThreads) ring.produce();
#elif defined(__CUDA_ARCH__)
  __trap();  // rather than results that nobody wrote, where a driver was told to take other code than this device's
#endif
}

}  // namespace
}  // namespace natten::cuda::hopper
