// SPDX-License-Identifier: MIT
// The functions of ptx.h, on the emulator. Written from the PTX ISA, not from the kernels: fragments, descriptors and
// swizzles are decoded as the hardware would. WHERE is the source line of the call, for the reports.
#pragma once
#include "emulator.h"

namespace ptx {
using namespace emu;
#define WHERE int line = __builtin_LINE()
// 65,536 entries: g++ converts _Float16 in software unless told the machine.
inline const std::vector<float> half_value = [] {
  std::vector<float> t(65536);
  for (int b = 0; b < 65536; b++) {
    int exponent = b >> 10 & 31, fraction = b & 1023;
    float m = exponent == 31 ? (fraction ? NAN : INFINITY) : exponent ? std::ldexp(float(1024 + fraction), exponent - 25) : std::ldexp(float(fraction), -24);
    t[b] = b >> 15 ? -m : m;
  }
  return t;
}();
template <class T> inline float to_float(uint16_t bits) {
  if constexpr (std::is_same_v<T, f16>) return half_value[bits];
  else { uint32_t w = uint32_t(bits) << 16; float f; memcpy(&f, &w, 4); return f; }
}
template <class T> inline uint16_t from_float(float x) {
  if constexpr (std::is_same_v<T, f16>) { _Float16 h = _Float16(x); uint16_t b; memcpy(&b, &h, 2); return b; }
  else { uint32_t w; memcpy(&w, &x, 4); return std::isnan(x) ? 0x7FFF : uint16_t((w + 0x7FFF + ((w >> 16) & 1)) >> 16); }
}
template <class T> inline uint32_t pack(float low, float high) { return from_float<T>(low) | uint32_t(from_float<T>(high)) << 16; }
inline int thread_index() { return block->self->thread; }
inline int lane_index() { return block->self->lane; }
inline int block_index(int axis) { return block->index[axis]; }
inline uint32_t shared_base() { return block->base; }
inline float ex2(float x) { return exp2f(x); }
inline float lg2(float x) { return log2f(x); }
template <int N> inline void setmaxnreg_inc() {}
template <int N> inline void setmaxnreg_dec() {}

// ---- plain memory
template <class T> inline T load_shared(uint32_t a, WHERE) { T v; memcpy(&v, shared_at(a, sizeof v, sizeof v, line), sizeof v); on_read(a, sizeof v, kWarp, now(), line); return v; }
template <class T> inline void store_shared(uint32_t a, T v, WHERE) { memcpy(shared_at(a, sizeof v, sizeof v, line), &v, sizeof v); on_write(a, sizeof v, block->self->warp, now(), line); maybe_yield(); }
template <class T> inline T load_global(const T* p, WHERE) { T v; memset(&v, 0xFF, sizeof v); if (global_ok(p, sizeof(T), line)) v = *p; return v; }
template <class T> inline void store_global(T* p, T v, WHERE) { if (global_ok(p, sizeof(T), line)) *p = v; }

// ---- numbers
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(f16 x) { return to_float<f16>(x.bits); }
inline float widen(bf16 x) { return to_float<bf16>(x.bits); }
template <class T, class A> inline T narrow(A x) { if constexpr (sizeof(T) == 2) return T{from_float<T>(float(x))}; else return T(x); }
inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }
inline float logarithm(float x) { return std::log(x); }
inline double logarithm(double x) { return std::log(x); }
inline float infinity() { return INFINITY; }

// ---- barriers
inline void join_named(int id, int count, bool wait, const char* op, int line) {
  NamedBarrier& n = block->named[id]; Warp& w = block->my_warp();
  if (count % 32) report(line, "barrier count %d is not a multiple of 32", count);
  if (n.arrived && n.count != count) report(line, "barrier %d: counts %d and %d", id, n.count, count);
  n.count = count; n.clock.join(w.clock); tick(w);
  if (wait) n.waiting.push_back(block->self->thread);
  if (++n.arrived < count) { if (wait) wait_here(op, line); return; }
  for (int t : n.waiting) { block->warp[t / 32].clock.join(n.clock); wake(t); }
  n.arrived = 0; n.waiting.clear(); n.clock = Clock(); maybe_yield();
}
inline void sync_threads(WHERE) { join_named(0, int(block->fiber.size()), true, "sync_threads", line); }
inline void named_barrier_sync(int id, int count, WHERE) { join_named(id, count, true, "named_barrier_sync", line); }
inline void named_barrier_arrive(int id, int count, WHERE) { join_named(id, count, false, "named_barrier_arrive", line); }
inline void sync_warp(WHERE) { meet_warp("sync_warp", line, nullptr, [](void**) {}); }

// ---- warp collectives
template <class T, class Source> inline T shuffle(const char* op, T v, Source source, int line) {
  T out; T* args[2] = {&v, &out};
  meet_warp(op, line, args, [&](void** slot) { for (int i = 0; i < 32; i++) *((T**)slot[i])[1] = *((T**)slot[source(i) & 31])[0]; });
  return out;
}
template <class T> inline T shfl_xor(T v, int mask, WHERE) { return shuffle("shfl_xor", v, [=](int i) { return i ^ mask; }, line); }
template <class T> inline T shfl(T v, int lane, WHERE) { return shuffle("shfl", v, [=](int) { return lane; }, line); }
template <class T> inline T shfl_down(T v, int delta, WHERE) { return shuffle("shfl_down", v, [=](int i) { return i + delta < 32 ? i + delta : i; }, line); }
inline void load_matrices(uint32_t (&r)[4], uint32_t address, bool transpose, int line) {
  struct { uint32_t* r; uint32_t address; } args{r, address};
  using Args = decltype(args);
  meet_warp(transpose ? "ldmatrix.trans" : "ldmatrix", line, &args, [=](void** slot) {
    uint16_t m[4][8][8];
    for (int i = 0; i < 32; i++) { uint32_t a = ((Args*)slot[i])->address; memcpy(m[i / 8][i % 8], shared_at(a, 16, 16, line), 16); on_read(a, 16, kWarp, now(), line); }
    for (int j = 0; j < 4; j++) {                                  // each 8 rows are one pass over the 32 banks
      int banks = 0; for (int i = 0; i < 8; i++) banks |= 1 << (((Args*)slot[8 * j + i])->address >> 4 & 7);
      if (banks != 255) report(line, "ldmatrix with bank conflicts");
    }
    for (int i = 0; i < 32; i++) for (int j = 0; j < 4; j++) {
      int major = i / 4, minor = i % 4 * 2;
      uint16_t low = transpose ? m[j][minor][major] : m[j][major][minor], high = transpose ? m[j][minor + 1][major] : m[j][major][minor + 1];
      ((Args*)slot[i])->r[j] = low | uint32_t(high) << 16;
    }
  });
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t a, WHERE) { load_matrices(r, a, false, line); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a, WHERE) { load_matrices(r, a, true, line); }
// Fragment of a 16 x 16 A operand: register j of lane i holds row i/4 + 8*(j&1), columns 2*(i%4) + 8*(j>>1) and the next.
template <class T> inline void unpack_a(float (*a)[16], int lane, const uint32_t* r) {
  for (int j = 0; j < 4; j++) for (int e = 0; e < 2; e++) a[lane / 4 + 8 * (j & 1)][lane % 4 * 2 + 8 * (j >> 1) + e] = to_float<T>(uint16_t(r[j] >> 16 * e));
}
template <class T> inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, WHERE) {
  struct { float* d; const uint32_t* a; uint32_t b[2]; } args{d, a, {b0, b1}};
  using Args = decltype(args);
  meet_warp("mma", line, &args, [](void** slot) {
    float A[16][16], B[16][8];
    for (int i = 0; i < 32; i++) {
      Args& s = *(Args*)slot[i]; unpack_a<T>(A, i, s.a);
      for (int j = 0; j < 2; j++) for (int e = 0; e < 2; e++) B[i % 4 * 2 + 8 * j + e][i / 4] = to_float<T>(uint16_t(s.b[j] >> 16 * e));
    }
    for (int i = 0; i < 32; i++) for (int j = 0; j < 4; j++) {
      float sum = 0; int row = i / 4 + 8 * (j >> 1), column = i % 4 * 2 + (j & 1);
      for (int k = 0; k < 16; k++) sum += A[row][k] * B[k][column];
      ((Args*)slot[i])->d[j] += sum;
    }
  });
}

inline float as_float(uint32_t bits) { float f; memcpy(&f, &bits, 4); return f; }
inline uint32_t to_tf32(float x) { uint32_t b; memcpy(&b, &x, 4); return std::isnan(x) ? 0x7FFFE000 : (b + 0x1000) & ~0x1FFFu; }
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, WHERE) {
  struct { float* d; const uint32_t* a; uint32_t b[2]; } args{d, a, {b0, b1}};
  using Args = decltype(args);
  meet_warp("mma", line, &args, [=](void** slot) {
    float A[16][8], B[8][8];
    bool rounded = true;
    for (int i = 0; i < 32; i++) {
      Args& s = *(Args*)slot[i];
      for (int j = 0; j < 4; j++) A[i / 4 + 8 * (j & 1)][i % 4 + 4 * (j >> 1)] = as_float(s.a[j]), rounded &= !(s.a[j] & 0x1FFF);
      for (int j = 0; j < 2; j++) B[i % 4 + 4 * j][i / 4] = as_float(s.b[j]), rounded &= !(s.b[j] & 0x1FFF);
    }
    if (!rounded) report(line, "operand of a tf32 product was not rounded");
    for (int i = 0; i < 32; i++) for (int j = 0; j < 4; j++) {
      float sum = 0; int row = i / 4 + 8 * (j >> 1), column = i % 4 * 2 + (j & 1);
      for (int k = 0; k < 8; k++) sum += A[row][k] * B[k][column];
      ((Args*)slot[i])->d[j] += sum;
    }
  });
}

// ---- cp.async: lands at the wait, at once, or in between
template <int kBytes> inline void copy_async(uint32_t to, const void* from, bool valid, int line) {
  uint8_t* d = shared_at(to, kBytes, kBytes, line); int t = block->self->thread, agent = kCopy * kMaxWarps + block->self->warp;
  if (valid && !global_ok(from, kBytes, line)) valid = false;
  on_write(to, kBytes, agent, block->copies[t].open_epoch(), line);
  block->copies[t].group.back().push_back(start([=] { if (valid) memcpy(d, from, kBytes); else memset(d, 0, kBytes); }));
  maybe_yield();
}
inline void cp_async_16(uint32_t to, const void* from, bool valid, WHERE) { copy_async<16>(to, from, valid, line); }
inline void cp_async_4(uint32_t to, const void* from, bool valid, WHERE) { copy_async<4>(to, from, valid, line); }
inline void cp_async_commit() { block->copies[block->self->thread].group.emplace_back(); }
template <int N> inline void cp_async_wait() {
  uint32_t& known = block->my_warp().clock.known[kCopy * kMaxWarps + block->self->warp];
  known = std::max(known, finish_groups(block->copies[block->self->thread], N));
}

// ---- mbarrier
inline MBarrier& barrier_at(uint32_t a, int line) {
  on_read(a, 8, kWarp, now(), line);
  if (!block->mbarrier.count(a)) report(line, "mbarrier used before it was initialised");
  return block->mbarrier[a];
}
inline void try_complete(MBarrier& m) {
  if (m.pending || m.tx) return;
  m.phase++; m.pending = m.count; m.arriving.known[m.agent] = m.phase; m.completed = m.arriving;
  for (auto& f : block->fiber) if (f.state == State::kBlocked && !strcmp(f.op, "mbarrier_wait")) wake(f.thread);
}
inline void mbarrier_init(uint32_t a, int count, WHERE) {
  shared_at(a, 8, 8, line); on_write(a, 8, block->self->warp, now(), line);
  int agent = kKinds * kMaxWarps + int(block->mbarrier.size());
  MBarrier m; m.agent = agent; m.count = m.pending = count; block->mbarrier[a] = m;
}
inline void mbarrier_arrive_tx(uint32_t a, int bytes, int line) {
  maybe_yield(); MBarrier& m = barrier_at(a, line); Warp& w = block->my_warp();
  m.tx += bytes; m.arriving.join(w.clock); tick(w);
  if (--m.pending < 0) report(line, "more arrivals than the mbarrier expects in this phase");
  try_complete(m);
}
inline void mbarrier_arrive(uint32_t a, WHERE) { mbarrier_arrive_tx(a, 0, line); }
inline void mbarrier_arrive_expect_tx(uint32_t a, int bytes, WHERE) { mbarrier_arrive_tx(a, bytes, line); }
inline void mbarrier_wait(uint32_t a, uint32_t parity, WHERE) {     // returns when the phase of this parity is complete
  MBarrier& m = barrier_at(a, line);
  while ((m.phase & 1) == parity) wait_here("mbarrier_wait", line);
  block->my_warp().clock.join(m.completed); maybe_yield();
}
inline void fence_barrier_init() { fence_async(); }
inline void fence_proxy_async() { fence_async(); }

// ---- TMA. Coordinates and boxes innermost first; out-of-bounds elements are zero on load and dropped on store.
struct TensorMap { uint8_t* base; int rank; int64_t dim[5], stride[5]; int box[5], step[5]; };
template <class Encode> inline bool make_tensor_map(TensorMap* map, Encode /*the driver's*/, void* base, int rank, const int64_t* dim, const int64_t* stride_bytes, const int* box, const int* step, bool /*is_bf16*/) {
  TensorMap m{(uint8_t*)base, rank, {}, {}, {}, {}};
  if (uintptr_t(base) % 16) report(0, "tensor map: base not aligned to 16 bytes");
  for (int i = 0; i < rank; i++) {
    m.dim[i] = dim[i]; m.stride[i] = i ? stride_bytes[i - 1] : 2; m.step[i] = step[i]; m.box[i] = (box[i] + step[i] - 1) / step[i];
    if (box[i] < 1 || box[i] > 256 || step[i] < 1 || step[i] > 8 || (i && m.stride[i] % 16)) report(0, "tensor map: illegal box, step or stride on axis %d", i);
    if (dim[i] < 1 || dim[i] > int64_t(1) << 32) report(0, "tensor map: axis %d has no number of elements from 1 to 2^32", i);
    if (i && (m.stride[i] < dim[0] * 2 || m.stride[i] >= int64_t(1) << 40)) report(0, "tensor map: stride of axis %d is less than a row, or 2^40 and more", i);
  }
  if (m.box[0] * 2 != 128) report(0, "tensor map: the emulator knows inner boxes of 128 bytes only");
  *map = m;
  return true;
}
inline uint32_t swizzle_address(uint32_t a, int bits) { return a ^ ((a >> 7 & ((1u << bits) - 1)) << 4); }  // on absolute shared addresses
template <class Move> inline void for_box_rows(const TensorMap& m, const int* coordinate, uint32_t shared, Move move) {
  int rows = 1; for (int i = 1; i < m.rank; i++) rows *= m.box[i];
  for (int r = 0; r < rows; r++) {
    bool inside = true; int64_t offset = 0;
    for (int i = 1, rest = r; i < m.rank; rest /= m.box[i], i++) {
      int64_t c = coordinate[i] + int64_t(rest % m.box[i]) * m.step[i];
      inside &= c >= 0 && c < m.dim[i]; offset += c * m.stride[i];
    }
    for (int e = 0; e < 64; e++) {
      int64_t c = coordinate[0] + int64_t(e) * m.step[0];
      move(swizzle_address(shared + r * 128 + e * 2, 3), inside && c >= 0 && c < m.dim[0] ? (uint16_t*)(m.base + offset + c * 2) : nullptr);
    }
  }
}
inline uint32_t box_bytes(const TensorMap& m) { uint32_t n = 2; for (int i = 0; i < m.rank; i++) n *= m.box[i]; return n; }
template <int R> inline void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, const int (&c)[R], WHERE) {
  MBarrier& m = barrier_at(barrier, line); uint32_t bytes = box_bytes(*map); const TensorMap tm = *map;
  const Cell& cell = block->shadow[(barrier - block->base) / 4];
  if (tm.rank != R) report(line, "TMA of rank %d with a map of rank %d", R, tm.rank);
  if (block->my_warp().clock.fenced[cell.agent] < cell.epoch) report(line, "mbarrier init not fenced for the async proxy");
  shared_at(to, bytes, 128, line); on_write(to, bytes, m.agent, m.phase + 1, line);
  std::vector<int> at_coordinate(c, c + R);
  Op op = start([=, &m] {
    for_box_rows(tm, at_coordinate.data(), to, [&](uint32_t a, uint16_t* p) { uint16_t v = p && global_ok(p, 2, line) ? *p : 0; memcpy(shared_at(a, 2, 2, line), &v, 2); });
    m.tx -= bytes; try_complete(m);
  });
  block->loads.push_back(op); maybe_yield();
}
template <int R> inline void tma_store(const TensorMap* map, uint32_t from, const int (&c)[R], WHERE) {
  const TensorMap tm = *map; Groups& g = block->stores[block->self->thread]; shared_at(from, box_bytes(tm), 128, line);
  on_read(from, box_bytes(tm), kStore, g.open_epoch(), line);
  std::vector<int> at_coordinate(c, c + R);
  g.group.back().push_back(start([=] { for_box_rows(tm, at_coordinate.data(), from, [&](uint32_t a, uint16_t* p) { if (p && global_ok(p, 2, line)) memcpy(p, shared_at(a, 2, 2, line), 2); }); }));
}
inline void tma_store_commit() { block->stores[block->self->thread].group.emplace_back(); }
template <int N> inline void tma_store_wait_read() { block->my_warp().clock.known[kStore * kMaxWarps + block->self->warp] = finish_groups(block->stores[block->self->thread], N); }

// ---- wgmma. Decodes the 64-bit descriptor as the ISA defines it; returns the address of element (mn, k) of the operand.
inline uint32_t wgmma_element(uint64_t descriptor, bool mn_major, int mn, int k) {
  uint32_t start = (descriptor & 0x3FFF) << 4, lbo = (descriptor >> 16 & 0x3FFF) << 4, sbo = (descriptor >> 32 & 0x3FFF) << 4;
  int mode = int(descriptor >> 62), bits = mode == 0 ? 0 : 4 - mode;                  // none, 128, 64, 32 bytes
  int span = 16 << bits, per_span = span / 2, offset;                                   // bytes and elements of a swizzle span
  if (!mn_major) offset = mn % 8 * span + mn / 8 * sbo + (mode ? k * 2 : k / 8 * lbo + k % 8 * 2);
  else if (mode) offset = mn % per_span * 2 + mn / per_span * lbo + k % 8 * span + k / 8 * sbo;
  else offset = mn % 8 * 2 + mn / 8 * sbo + k % 8 * 16 + k / 8 * lbo;
  return swizzle_address(start + offset, bits);
}
struct WgmmaArgs { float* c; const uint32_t* a; uint64_t desc_a, desc_b; bool accumulate; };
template <class Registers> inline void wgmma_registers(Registers&) {}  // of a compiler's business alone
inline void wgmma_fence(WHERE) { meet_warp("wgmma_fence", line, nullptr, [](void**) { block->my_warp().wgmma_fenced = true; }); }
inline void wgmma_commit(WHERE) { meet_warp("wgmma_commit", line, nullptr, [](void**) { block->my_warp().wgmma.group.emplace_back(); }); }
template <int N> inline void wgmma_wait(WHERE) {
  meet_warp("wgmma_wait", line, nullptr, [](void**) { Warp& w = block->my_warp();
    w.clock.known[kWgmma * kMaxWarps + block->self->warp] = finish_groups(w.wgmma, N); w.wgmma_fenced = false; });
}
template <class T, int N> inline void land_wgmma(Warp& w, int quarter, const std::vector<WgmmaArgs>& lanes, const std::vector<uint32_t>& a_copy, bool mn_major, int line) {
  float A[16][16], B[16][N]; const WgmmaArgs& u = lanes[0];
  auto element = [&](uint64_t d, bool major, int mn, int k) { uint16_t v; memcpy(&v, shared_at(wgmma_element(d, major, mn, k), 2, 2, line), 2); return to_float<T>(v); };
  for (int i = 0; i < 32 && u.a; i++) {
    if (memcmp(lanes[i].a, &a_copy[4 * i], 16)) report(line, "registers of A changed while wgmma was in flight");
    unpack_a<T>(A, i, lanes[i].a);
  }
  if (!u.a) for (int m = 0; m < 16; m++) for (int k = 0; k < 16; k++) A[m][k] = element(u.desc_a, false, 16 * quarter + m, k);
  for (int k = 0; k < 16; k++) for (int n = 0; n < N; n++) B[k][n] = element(u.desc_b, mn_major, n, k);
  Accumulator& acc = w.acc[u.c]; float row[N];
  for (int m = 0; m < 16; m++) {
    std::fill(row, row + N, 0.f);
    for (int k = 0; k < 16; k++) for (int n = 0; n < N; n++) row[n] += A[m][k] * B[k][n];
    for (int n = 0; n < N; n++) {                                  // register of row m, column n
      float& c = acc.value[(m % 8 * 4 + n % 8 / 2) * (N / 2) + n / 8 * 4 + m / 8 * 2 + n % 2]; c = row[n] + (u.accumulate ? c : 0.f);
    }
  }
  if (--acc.in_flight == 0) { for (int i = 0; i < 32; i++) memcpy(acc.lane[i], &acc.value[i * (N / 2)], N * 2); w.acc.erase(u.c); }
}
template <class T, int N, bool kMnMajorB> inline void start_wgmma(WgmmaArgs args, const char* op, int line) {
  int group = block->self->thread / 128;
  meet(block->warpgroup[group], group * 128, 128, op, line, &args, [=](void** slot) {
    Fiber* last = block->self;
    for (int q = 0; q < 4; q++) {                                  // each warp at its own pace from here on: the strictest reading
      Warp& w = block->warp[group * 4 + q]; block->self = &block->fiber[group * 128 + q * 32];
      std::vector<WgmmaArgs> lanes; std::vector<uint32_t> a_copy;
      for (int i = 0; i < 32; i++) {
        lanes.push_back(*(WgmmaArgs*)slot[q * 32 + i]); const WgmmaArgs &l = lanes.back(), &u = *(WgmmaArgs*)slot[0];
        if (l.desc_a != u.desc_a || l.desc_b != u.desc_b || l.accumulate != u.accumulate) report(line, "wgmma operands differ within the warpgroup");
        if (l.a) a_copy.insert(a_copy.end(), l.a, l.a + 4);
      }
      if (!w.wgmma_fenced) report(line, "wgmma without wgmma_fence since the last wait");
      uint32_t epoch = w.wgmma.open_epoch();
      for (int k = 0; k < 16; k++) for (int n = 0; n < N; n++) if ((kMnMajorB ? n : k) % 8 == 0) on_read(wgmma_element(args.desc_b, kMnMajorB, n, k), 16, kWgmma, epoch, line);
      for (int m = 0; m < 64 && !args.a; m++) for (int k = 0; k < 16; k += 8) on_read(wgmma_element(args.desc_a, false, m, k), 16, kWgmma, epoch, line);
      Accumulator& acc = w.acc[lanes[0].c];
      if (acc.in_flight++ == 0) for (auto& l : lanes) {            // until the wait the registers hold nothing a program may use
        acc.lane.push_back(l.c); acc.value.insert(acc.value.end(), l.c, l.c + N / 2); memset(l.c, 0xFF, N * 2);
      }
      w.last_wgmma = start([=, &w] { land_wgmma<T, N>(w, q, lanes, a_copy, kMnMajorB, line); }, w.last_wgmma);
      w.wgmma.group.back().push_back(w.last_wgmma);
    }
    block->self = last;
  });
}
template <class T, int N, bool kMnMajorB> inline void wgmma_ss(float (&c)[N / 2], uint64_t a, uint64_t b, bool accumulate, WHERE) { start_wgmma<T, N, kMnMajorB>({c, nullptr, a, b, accumulate}, "wgmma_ss", line); }
template <class T, int N, bool kMnMajorB> inline void wgmma_rs(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate, WHERE) { start_wgmma<T, N, kMnMajorB>({c, a, 0, b, accumulate}, "wgmma_rs", line); }
#undef WHERE
}  // namespace ptx
