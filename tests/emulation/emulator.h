// SPDX-License-Identifier: MIT
// Runs CUDA-style kernels on the CPU. One thread block at a time, one fiber per thread, one OS thread.
//   * a scheduler runs warps in fixed, reversed or random order: results must be bit-identical;
//   * asynchronous work (cp.async, TMA, wgmma) lands as late as legal, at once, or at random moments;
//   * shared memory is bounds-checked, poisoned, and shadowed by a happens-before race detector.
// The kernels see only the functions of ptx.h; their emulated versions are in emulated_ptx.h.
#pragma once
#include <sys/mman.h>
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emu {
enum class Order { kFixed, kReversed, kRandom };
enum class Async { kLate, kEarly, kRandom };
struct Config { Order order = Order::kFixed; Async async = Async::kLate; uint64_t seed = 1; bool races = true; };
// The device that kernels are chosen for.
struct Device {
  int capability = 90; int64_t shared_bytes = 227 << 10;
  std::string error;  // what every launch returns instead of running; empty: it runs
};

// ---- findings: one line per (kind, source line); a clean run has none --------------------------------------
inline std::map<std::string, int>& findings() { static std::map<std::string, int> all; return all; }
inline void report(int line, const char* format, ...) {
  char text[256]; va_list args; va_start(args, format); vsnprintf(text, sizeof text, format, args); va_end(args);
  findings()["line " + std::to_string(line) + ": " + text]++;
}

// ---- vector clocks -------------------------------------------------------------------------------------------
// An agent is whoever touches shared memory at its own pace: a warp, the cp.async / wgmma / bulk-store engine as
// used by one warp, or the TMA loads that signal one mbarrier. Epochs: a warp's own counter; the index of the
// commit group; the phase of the mbarrier. So "has waited for it" is one comparison, whatever "it" is.
constexpr int kMaxWarps = 16, kMaxBarriers = 32, kKinds = 4, kMaxAgents = kKinds * kMaxWarps + kMaxBarriers;
enum Kind { kWarp, kCopy, kWgmma, kStore };
struct Clock {
  uint32_t known[kMaxAgents] = {};   // what happens before now
  uint32_t fenced[kMaxAgents] = {};  // ... and is visible to the async proxy (TMA, wgmma)
  void join(const Clock& o) {
    for (int i = 0; i < kMaxAgents; i++) { known[i] = std::max(known[i], o.known[i]); fenced[i] = std::max(fenced[i], o.fenced[i]); }
  }
};
struct Cell { uint32_t epoch = 0, reads[kKinds * kMaxWarps] = {}; int16_t agent = -1; };  // 4 bytes of shared memory

// ---- threads ---------------------------------------------------------------------------------------------------
enum class State : uint8_t { kReady, kBlocked, kDone };
struct Fiber { void* sp; State state; int thread, lane, warp, line; const char* op; };
struct AsyncOp {                     // `prev` keeps the order of a warp's wgmmas
  std::function<void()> land; std::shared_ptr<AsyncOp> prev; bool done = false;
  void run() { if (done) return; if (prev) { prev->run(); prev.reset(); } done = true; land(); }
};
using Op = std::shared_ptr<AsyncOp>;
struct Groups { std::vector<std::vector<Op>> group{1}; size_t landed = 0;           // the last group is the open one
  uint32_t open_epoch() const { return uint32_t(group.size()); } };
struct Rendezvous { int arrived = 0, line = 0; const char* op = nullptr; void* slot[128]; };
struct Accumulator { int in_flight = 0; std::vector<float> value; std::vector<float*> lane; };
struct Warp { Rendezvous meet; Clock clock; int ready = 0; bool wgmma_fenced = false; Groups wgmma; Op last_wgmma; std::map<float*, Accumulator> acc; };
struct NamedBarrier { int arrived = 0, count = 0; Clock clock; std::vector<int> waiting; };
struct MBarrier { int agent = 0, count = 0, pending = 0; int64_t tx = 0; uint32_t phase = 0; Clock arriving, completed; };

struct Block {
  Config config; int index[3]; uint32_t base, size; uint64_t random;
  std::vector<uint8_t> memory; std::vector<Cell> shadow;
  std::vector<Fiber> fiber; std::vector<Warp> warp; std::vector<Rendezvous> warpgroup;
  std::vector<Groups> copies, stores;                                  // per thread
  NamedBarrier named[16]; std::map<uint32_t, MBarrier> mbarrier;
  std::vector<Op> in_flight; std::vector<Op> loads;                    // loads: TMA only, they need no waiting thread
  Fiber* self = nullptr; void* scheduler_sp = nullptr; std::function<void()> body;
  uint32_t next_random(uint32_t n) { random ^= random << 13; random ^= random >> 7; random ^= random << 17; return uint32_t(random >> 33) % n; }
  Warp& my_warp() { return warp[self->warp]; }
};
inline Block* block = nullptr;

// Context switch: callee-saved registers on the stack, nothing else (x86-64 System V).
#if !defined(__x86_64__)
#error "write the six-register switch for this machine"
#endif
extern "C" void natten_emu_switch(void** save, void* load);
asm(R"(.text
.weak natten_emu_switch
natten_emu_switch: pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi); movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret
)");
inline void to_scheduler() { natten_emu_switch(&block->self->sp, block->scheduler_sp); }
inline void wait_here(const char* op, int line) {
  Fiber& f = *block->self; f.state = State::kBlocked; f.op = op; f.line = line; block->my_warp().ready--; to_scheduler();
}
inline void wake(int thread) { Fiber& f = block->fiber[thread]; if (f.state == State::kBlocked) { f.state = State::kReady; block->warp[f.warp].ready++; } }
inline void maybe_yield() { if (block->config.order == Order::kRandom && block->next_random(16) == 0) to_scheduler(); }
inline void fiber_main() { block->body(); Fiber& f = *block->self; f.state = State::kDone; block->my_warp().ready--; to_scheduler(); abort(); }

// All threads of a warp (32) or warpgroup (128) must come to the same operation; the last one performs it.
template <class Run> void meet(Rendezvous& r, int first_thread, int threads, const char* op, int line, void* args, Run run) {
  if (r.arrived && (strcmp(r.op, op) || r.line != line)) report(line, "divergent: %s here, but other threads are at %s of line %d", op, r.op, r.line);
  r.op = op; r.line = line; r.slot[block->self->thread - first_thread] = args;
  if (++r.arrived < threads) { wait_here(op, line); return; }
  r.arrived = 0; run(r.slot);
  for (int i = 0; i < threads; i++) wake(first_thread + i);
  maybe_yield();
}
template <class Run> void meet_warp(const char* op, int line, void* args, Run run) { meet(block->my_warp().meet, block->self->warp * 32, 32, op, line, args, run); }

// ---- asynchronous operations -----------------------------------------------------------------------------------
inline Op start(std::function<void()> land, Op prev = nullptr) {
  auto op = std::make_shared<AsyncOp>(); op->land = std::move(land); op->prev = std::move(prev);
  if (block->config.async == Async::kEarly) op->run(); else if (block->config.async == Async::kRandom) block->in_flight.push_back(op);
  return op;
}
inline bool land_one(std::vector<Op>& list) {                     // any order is legal
  while (!list.empty()) {
    size_t i = block->next_random(uint32_t(list.size())); Op op = list[i]; list[i] = list.back(); list.pop_back();
    if (!op->done) { op->run(); return true; }
  }
  return false;
}
inline uint32_t finish_groups(Groups& g, size_t allowed) {        // returns the epoch up to which groups are complete
  size_t closed = g.group.size() - 1, until = closed > allowed ? closed - allowed : 0;
  for (; g.landed < until; g.landed++) { for (Op& op : g.group[g.landed]) op->run(); g.group[g.landed].clear(); }
  return uint32_t(g.landed);
}

// ---- shared memory ---------------------------------------------------------------------------------------------
inline uint8_t* shared_at(uint32_t address, uint32_t bytes, uint32_t alignment, int line) {
  static uint8_t nowhere[256];
  if (address % alignment) report(line, "shared address not aligned to %u", alignment);
  if (address < block->base || address + bytes > block->base + block->size) { report(line, "shared access out of bounds"); memset(nowhere, 0xFF, sizeof nowhere); return nowhere; }
  return &block->memory[address - block->base];
}
inline const char* agent_name(int a) {
  static const char* names[] = {"a thread of another warp", "cp.async", "wgmma", "a TMA store"};
  return a < kKinds * kMaxWarps ? names[a / kMaxWarps] : "a TMA load";
}
// `kind` is the engine that touches memory on behalf of the calling warp; the async proxy sees generic writes only after a fence.
inline void on_read(uint32_t address, uint32_t bytes, Kind kind, uint32_t epoch, int line) {
  if (!block->config.races) return;
  Warp& w = block->my_warp(); int reader = kind * kMaxWarps + block->self->warp;
  for (uint32_t c = (address - block->base) / 4; c < (address - block->base + bytes + 3) / 4 && c < block->shadow.size(); c++) {
    Cell& cell = block->shadow[c];
    if (cell.agent < 0) report(line, "read of shared memory that was never written");
    else if (w.clock.known[cell.agent] < cell.epoch) report(line, "race: reads what %s wrote, nothing orders the two", agent_name(cell.agent));
    else if (kind >= kWgmma && cell.agent < kWgmma * kMaxWarps && w.clock.fenced[cell.agent] < cell.epoch) report(line, "async proxy reads a generic write without fence.proxy.async");
    cell.reads[reader] = epoch;
  }
}
inline void on_write(uint32_t address, uint32_t bytes, int agent, uint32_t epoch, int line) {
  if (!block->config.races) return;
  Warp& w = block->my_warp();
  for (uint32_t c = (address - block->base) / 4; c < (address - block->base + bytes + 3) / 4 && c < block->shadow.size(); c++) {
    Cell& cell = block->shadow[c];
    if (cell.agent >= 0 && cell.agent != agent && w.clock.known[cell.agent] < cell.epoch) report(line, "race: overwrites what %s wrote, nothing orders the two", agent_name(cell.agent));
    bool early = false;                                            // one vector comparison; the loop below only names the culprit
    for (int r = 0; r < kKinds * kMaxWarps; r++) early |= w.clock.known[r] < cell.reads[r];
    for (int r = 0; early && r < kKinds * kMaxWarps; r++)
      if (w.clock.known[r] < cell.reads[r]) report(line, "race: overwrites what %s still reads", agent_name(r));
    cell.agent = int16_t(agent); cell.epoch = epoch;
  }
}
inline uint32_t tick(Warp& w) { return ++w.clock.known[block->self->warp]; }      // after every release: later writes are not covered by it
inline uint32_t now() { return block->my_warp().clock.known[block->self->warp]; }
inline void fence_async() { Warp& w = block->my_warp(); memcpy(w.clock.fenced, w.clock.known, sizeof w.clock.known); tick(w); }

// ---- global memory: only registered buffers may be touched -------------------------------------------------------
inline std::map<uintptr_t, uintptr_t>& buffers() { static std::map<uintptr_t, uintptr_t> all; return all; }
inline void register_global(const void* p, size_t bytes) { buffers()[uintptr_t(p)] = uintptr_t(p) + bytes; }
inline bool global_ok(const void* p, size_t bytes, int line) {
  auto it = buffers().upper_bound(uintptr_t(p));
  bool ok = it != buffers().begin() && uintptr_t(p) + bytes <= std::prev(it)->second && uintptr_t(p) % bytes == 0;
  if (!ok) report(line, "global access out of bounds or misaligned");
  return ok;
}

// ---- launch ------------------------------------------------------------------------------------------------------
inline void* stack_top(int thread) {                               // 64 KiB per thread, with a guard page below
  static std::vector<char*> stacks; constexpr size_t bytes = 1 << 16;
  while (int(stacks.size()) <= thread) {
    char* p = (char*)mmap(nullptr, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(p, 4096, PROT_NONE); stacks.push_back(p);
  }
  return stacks[thread] + bytes + 4096;
}
inline void run_block(Block& b) {
  block = &b;
  for (size_t t = 0; t < b.fiber.size(); t++) {
    void** sp = (void**)stack_top(int(t)) - 2; *sp = (void*)fiber_main; sp -= 6;
    b.fiber[t] = {sp, State::kReady, int(t), int(t % 32), int(t / 32), 0, "start"};
    b.warp[t / 32].ready++; b.warp[t / 32].clock.known[t / 32] = 1;
  }
  for (std::vector<int> ready;;) {
    if (b.config.async == Async::kRandom && b.next_random(2) == 0) land_one(b.next_random(2) ? b.loads : b.in_flight);
    ready.clear();
    for (size_t w = 0; w < b.warp.size(); w++) if (b.warp[w].ready) ready.push_back(int(w));
    if (ready.empty() && std::all_of(b.fiber.begin(), b.fiber.end(), [](const Fiber& f) { return f.state == State::kDone; })) break;
    if (ready.empty()) {                                           // TMA moves at the latest when everybody waits
      if (land_one(b.loads)) continue;
      std::map<std::string, int> where;
      for (auto& f : b.fiber) if (f.state == State::kBlocked) where[std::string(f.op) + " at line " + std::to_string(f.line)]++;
      for (auto& [text, n] : where) report(0, "deadlock: %d threads in %s", n, text.c_str());
      if (where.empty()) report(0, "emulator error: threads that can run are not scheduled");
      return;
    }
    // Fixed and reversed are strict priorities: one warp runs as far ahead of the others as it can.
    Order o = b.config.order;
    Warp& w = b.warp[o == Order::kFixed ? ready.front() : o == Order::kReversed ? ready.back() : ready[b.next_random(uint32_t(ready.size()))]];
    int first = int(&w - &b.warp[0]) * 32, turn = o == Order::kRandom ? int(b.next_random(32)) : 0, flip = o == Order::kReversed ? 31 : 0;
    for (int i = 0; i < 32; i++) {
      Fiber& f = b.fiber[first + (((i + turn) & 31) ^ flip)];
      if (f.state == State::kReady) { b.self = &f; natten_emu_switch(&b.scheduler_sp, f.sp); }
    }
  }
  for (auto& [a, m] : b.mbarrier) if (m.tx) report(0, "block ended with %lld bytes outstanding on an mbarrier", (long long)m.tx);
  if (std::any_of(b.loads.begin(), b.loads.end(), [](Op& o) { return !o->done; })) report(0, "block ended with TMA loads in flight");
  for (auto& w : b.warp) if (w.wgmma.landed + 1 < w.wgmma.group.size() || !w.wgmma.group.back().empty()) report(0, "block ended with wgmma in flight");
  for (auto& g : b.stores) if (g.landed + 1 < g.group.size() || !g.group.back().empty()) report(0, "block ended with TMA stores in flight");
}
struct Dim { int x = 1, y = 1, z = 1; };
template <class Body> void launch(Dim grid, int threads, uint32_t shared_bytes, Config config, Body body) {
  for (int z = 0; z < grid.z; z++) for (int y = 0; y < grid.y; y++) for (int x = 0; x < grid.x; x++) {
    Block b; b.config = config; b.index[0] = x; b.index[1] = y; b.index[2] = z; b.body = body;
    b.random = (config.seed * 0x9E3779B97F4A7C15ull + ((z * 131 + y) * 137 + x + 1) * 0xD1B54A32D192ED03ull) | 1;
    b.base = 0x410; b.size = shared_bytes;                         // aligned to 16 bytes only: all that the hardware promises
    b.memory.assign(shared_bytes, 0xFF); b.shadow.resize((shared_bytes + 3) / 4);   // 0xFF..: NaN in fp16, bf16, fp32
    b.fiber.resize(threads); b.warp.resize(threads / 32); b.warpgroup.resize((threads + 127) / 128); b.copies.resize(threads); b.stores.resize(threads);
    run_block(b);
  }
}
}  // namespace emu
