// SPDX-License-Identifier: MIT
// What the emulator must find: small kernels, each with one mistake and without it. Every one runs in the orders that the
// tests of real kernels use.
// Prints a line "kernel | broken or right | finding" for each finding; a right kernel must have none.
#include "ptx.h"

namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kSharedBytes = 4 * kThreads;

// Global memory of a kernel: a number a thread, and what it leaves.
struct Memory {
  alignas(16) float in[kThreads];
  float out[kThreads];
};

uint32_t slot(int index) { return ptx::shared_base() + 4 * index; }

// ---- shared memory ---------------------------------------------------------------------------------------------------
// Warp 1 reads what warp 0 wrote.
void race(bool broken, Memory& m) {
  const int thread = ptx::thread_index(), lane = ptx::lane_index();
  ptx::store_shared(slot(thread), 0.f);
  ptx::sync_threads();
  if (thread < 32) ptx::store_shared(slot(thread), m.in[thread]);
  if (!broken) ptx::sync_threads();
  if (thread / 32 == 1) ptx::store_global(&m.out[lane], ptx::load_shared<float>(slot(lane)));
}

// Warp 0 writes anew what warp 1 still has to read.
void reuse(bool broken, Memory& m) {
  const int thread = ptx::thread_index(), lane = ptx::lane_index();
  if (thread < 32) ptx::store_shared(slot(thread), m.in[thread]);
  ptx::sync_threads();
  if (thread / 32 == 1) ptx::store_global(&m.out[lane], ptx::load_shared<float>(slot(lane)));
  if (!broken) ptx::sync_threads();
  if (thread < 32) ptx::store_shared(slot(thread), 0.f);
}

// The last lane of a warp reads past what was written.
void unwritten(bool broken, Memory& m) {
  const int thread = ptx::thread_index();
  if (thread >= 32) return;
  ptx::store_shared(slot(thread), m.in[thread]);
  ptx::sync_warp();
  ptx::store_global(&m.out[thread], ptx::load_shared<float>(slot(broken ? thread + 1 : (thread + 1) % 32)));
}

// The last thread writes past the end of shared memory.
void shared_bounds(bool broken, Memory&) {
  ptx::store_shared(slot(ptx::thread_index() + (broken ? 1 : 0)), 1.f);
}

// Lanes exchange numbers within a warp, without saying so.
void lanes(bool broken, Memory& m) {
  const int thread = ptx::thread_index();
  if (thread >= 32) return;
  ptx::store_shared(slot(thread), 0.f);
  ptx::sync_warp();
  ptx::store_shared(slot(thread), m.in[thread]);
  if (!broken) ptx::sync_warp();
  ptx::store_global(&m.out[thread], ptx::load_shared<float>(slot(thread ^ 1)));
}

// Eight rows of a matrix whose first 16 bytes lie in the same banks.
void banks(bool broken, Memory& m) {
  const int thread = ptx::thread_index();
  for (int i = 0; i < 8; i++) ptx::store_shared(slot(8 * thread + i), 0u);
  ptx::sync_threads();
  uint32_t matrix[4];
  if (thread < 32) ptx::ldmatrix_x4(matrix, slot((broken ? 32 : 4) * (thread % 8)));
  if (thread < 32) ptx::store_global(&m.out[thread], float(matrix[0]));
}

// ---- asynchronous copies ---------------------------------------------------------------------------------------------
// Reads the 16 bytes that it copied, without waiting for them.
void copy(bool broken, Memory& m) {
  const int thread = ptx::thread_index();
  if (thread >= 32) return;
  ptx::cp_async_16(slot(4 * thread), &m.in[4 * thread], true);
  ptx::cp_async_commit();
  if (!broken) ptx::cp_async_wait<0>();
  ptx::store_global(&m.out[thread], ptx::load_shared<float>(slot(4 * thread)));
}

// Waits for the older of two groups of copies and reads the younger.
void copy_group(bool broken, Memory& m) {
  const int thread = ptx::thread_index();
  if (thread >= 16) return;
  for (int group = 0; group < 2; group++) {
    ptx::cp_async_16(slot(4 * (2 * thread + group)), &m.in[4 * (2 * thread + group)], true);
    ptx::cp_async_commit();
  }
  if (broken) ptx::cp_async_wait<1>();
  else ptx::cp_async_wait<0>();
  ptx::store_global(&m.out[thread], ptx::load_shared<float>(slot(4 * (2 * thread + 1))));
}

// ---- warps and barriers ----------------------------------------------------------------------------------------------
// Half a warp shuffles on one line, the other half on another.
void divergent(bool broken, Memory& m) {
  const int thread = ptx::thread_index();
  float number = m.in[thread];
  if (broken && ptx::lane_index() < 16) {
    number += ptx::shfl_xor(number, 1);
  } else {
    number += ptx::shfl_xor(number, 1);
  }
  ptx::store_global(&m.out[thread], number);
}

// Some lanes do not come to a shuffle at all.
void absent_lanes(bool broken, Memory& m) {
  const int thread = ptx::thread_index();
  if (broken && ptx::lane_index() == 5) return;
  ptx::store_global(&m.out[thread], ptx::shfl(m.in[thread], 0));
}

// Two warps are to meet, one comes.
void barrier(bool broken, Memory&) {
  const int warp = ptx::thread_index() / 32;
  if (warp == 0 || (warp == 1 && !broken)) ptx::named_barrier_sync(1, 64);
}

// Waits for a phase that nobody completes.
void phase(bool broken, Memory&) {
  if (ptx::thread_index() == 0) ptx::mbarrier_init(ptx::shared_base(), broken ? 2 : 1);
  ptx::sync_threads();
  if (ptx::thread_index() == 0) ptx::mbarrier_arrive(ptx::shared_base());
  ptx::mbarrier_wait(ptx::shared_base(), 0);
}

// ---- global memory ---------------------------------------------------------------------------------------------------
void load_bounds(bool broken, Memory& m) {
  const int thread = ptx::thread_index();
  ptx::store_global(&m.out[thread], ptx::load_global(&m.in[thread] - (broken ? 1 : 0)));
}

void store_bounds(bool broken, Memory& m) {
  const int thread = ptx::thread_index();
  ptx::store_global(&m.out[thread] + (broken ? 1 : 0), 1.f);
}

// Sixteen bytes from an address of which only four are sure.
void alignment(bool broken, Memory& m) {
  const int thread = ptx::thread_index();
  if (thread >= 8) return;
  const auto four = ptx::load_global(reinterpret_cast<const ptx::Sixteen<float>*>(&m.in[4 * thread + (broken ? 1 : 0)]));
  ptx::store_global(&m.out[thread], four.value[0]);
}

// Warps add to one number as they come. Sums of floats depend on their order.
void order(bool broken, Memory& m) {
  const int thread = ptx::thread_index();
  const float numbers[kWarps] = {1e8f, 1.f, -1e8f, 1.f};
  if (broken && thread % 32 == 0) ptx::store_global(m.out, ptx::load_global(m.out) + numbers[thread / 32]);
  if (broken || thread > 0) return;
  for (float number : numbers) ptx::store_global(m.out, ptx::load_global(m.out) + number);
}

struct Case {
  const char* name;
  void (*kernel)(bool broken, Memory& m);
  int shared_bytes;
};

const Case kCases[] = {
    {"race", race, kSharedBytes},
    {"reuse", reuse, kSharedBytes},
    {"unwritten", unwritten, kSharedBytes},
    {"shared_bounds", shared_bounds, kSharedBytes},
    {"lanes", lanes, kSharedBytes},
    {"banks", banks, 8 * kSharedBytes},
    {"copy", copy, kSharedBytes},
    {"copy_group", copy_group, kSharedBytes},
    {"divergent", divergent, 0},
    {"absent_lanes", absent_lanes, 0},
    {"barrier", barrier, 0},
    {"phase", phase, 8},
    {"load_bounds", load_bounds, 0},
    {"store_bounds", store_bounds, 0},
    {"alignment", alignment, 0},
    {"order", order, 0},
};

void check(const Case& c, bool broken) {
  static Memory memory;
  Memory first;
  bool same = true;
  emu::findings().clear();
  const emu::Config configs[] = {{emu::Order::kFixed, emu::Async::kLate, 1, true},
                                 {emu::Order::kReversed, emu::Async::kEarly, 1, true},
                                 {emu::Order::kRandom, emu::Async::kRandom, 7, true}};
  for (const emu::Config& config : configs) {
    for (int i = 0; i < kThreads; i++) {
      memory.in[i] = float(i + 1);
      memory.out[i] = 0;
    }
    emu::buffers().clear();
    emu::register_global(memory.in, sizeof memory.in);
    emu::register_global(memory.out, sizeof memory.out);
    emu::launch({1, 1, 1}, kThreads, c.shared_bytes, config, [&] { c.kernel(broken, memory); });
    if (&config == configs) first = memory;
    same = same && memcmp(&first, &memory, sizeof memory) == 0;
  }
  const char* variant = broken ? "broken" : "right";
  for (const auto& [text, count] : emu::findings()) printf("%s | %s | %s (%d times)\n", c.name, variant, text.c_str(), count);
  if (!same) printf("%s | %s | bits depend on the order\n", c.name, variant);
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    check(c, true);
    check(c, false);
  }
}
