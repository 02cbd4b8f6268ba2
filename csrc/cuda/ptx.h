// SPDX-License-Identifier: MIT
// The only device functions our kernels call. With nvcc: CUDA and inline PTX. With -DNATTEN_EMULATE: plain C++ on the CPU
// (tests/emulation/emulated_ptx.h), which finds races, stray accesses and deadlocks.
// Shared memory is a 32-bit address everywhere (what PTX wants, and what the emulator can check).
#pragma once
#include <cstdint>

namespace ptx {
// 16-bit numbers as they lie in memory.
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };
// What one load of a thread brings at most.
template <class T> struct alignas(16) Sixteen { T value[16 / sizeof(T)]; };

// Descriptor of a wgmma operand in shared memory, 128-byte swizzle. K-major: `leading` unused, `stride` = bytes between
// groups of 8 rows. MN-major: `leading` = bytes between 128-byte columns of the operand, `stride` = between groups of 8 k.
constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
}  // namespace ptx

#ifdef NATTEN_EMULATE
#include "emulated_ptx.h"
#else
#include <cuda.h>
#include <cuda_runtime.h>
#define PTX __device__ __forceinline__
namespace ptx {
// ---- indices, arithmetic, plain memory
PTX int thread_index() { return threadIdx.x; }
PTX int lane_index() { return threadIdx.x % 32; }
PTX int block_index(int axis) { return axis == 0 ? blockIdx.x : axis == 1 ? blockIdx.y : blockIdx.z; }
PTX uint32_t shared_base() { extern __shared__ __align__(1024) uint8_t dynamic_shared[]; return uint32_t(__cvta_generic_to_shared(dynamic_shared)); }
PTX float ex2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
PTX float lg2(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
template <class T> PTX uint32_t pack(float low, float high);
template <> PTX uint32_t pack<f16>(float low, float high) { uint32_t r; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
template <> PTX uint32_t pack<bf16>(float low, float high) { uint32_t r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
// Of one register, or of two.
template <class T> PTX T load_shared(uint32_t a) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "one register or two");
  if constexpr (sizeof(T) == 4) {
    uint32_t v; asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(a) : "memory"); return *reinterpret_cast<T*>(&v);
  } else {
    uint64_t v; asm volatile("ld.shared.b64 %0, [%1];" : "=l"(v) : "r"(a) : "memory"); return *reinterpret_cast<T*>(&v);
  }
}
template <class T> PTX void store_shared(uint32_t a, T v) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "one register or two");
  if constexpr (sizeof(T) == 4) asm volatile("st.shared.b32 [%0], %1;" ::"r"(a), "r"(*reinterpret_cast<uint32_t*>(&v)) : "memory");
  else asm volatile("st.shared.b64 [%0], %1;" ::"r"(a), "l"(*reinterpret_cast<uint64_t*>(&v)) : "memory");
}
template <class T> PTX T load_global(const T* p) { return *p; }
template <class T> PTX void store_global(T* p, T v) { *p = v; }

// ---- numbers: widen is exact, narrow rounds to nearest even
PTX float widen(float x) { return x; }
PTX double widen(double x) { return x; }
PTX float widen(f16 x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)); return y; }
PTX float widen(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
template <class T, class A> PTX T narrow(A x) { return T(x); }
template <> PTX f16 narrow<f16, float>(float x) { f16 y; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); return y; }
template <> PTX bf16 narrow<bf16, float>(float x) {  // cvt.rn.bf16 needs sm_80
  const uint32_t bits = __float_as_uint(x);
  return {x != x ? uint16_t(0x7FFF) : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
PTX float exponential(float x) { return expf(x); }
PTX double exponential(double x) { return exp(x); }
PTX float logarithm(float x) { return logf(x); }
PTX double logarithm(double x) { return log(x); }
PTX float infinity() { return __int_as_float(0x7f800000); }

// ---- barriers and warp collectives
PTX void sync_threads() { __syncthreads(); }
PTX void sync_warp() { __syncwarp(); }
PTX void named_barrier_sync(int id, int count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }
PTX void named_barrier_arrive(int id, int count) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory"); }
template <class T> PTX T shfl_xor(T v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
template <class T> PTX T shfl(T v, int lane) { return __shfl_sync(~0u, v, lane); }
template <class T> PTX const T* shfl(const T* p, int lane) { return reinterpret_cast<const T*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(p), lane)); }
template <class T> PTX T shfl_down(T v, int delta) { return __shfl_down_sync(~0u, v, delta); }
PTX void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
PTX void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(a) : "memory");
}
#define MMA(TYPE) asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
  : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
template <class T> PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <> PTX void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { MMA("f16"); }
template <> PTX void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { MMA("bf16"); }
#undef MMA

// tf32: float32 with ten bits behind the point, rounded to nearest. The operands of m16n8k8 are a0 (row lane / 4, number
// lane % 4), a1 (row + 8), a2 (number + 4), a3 (both); b0 (number lane % 4, column lane / 4), b1 (number + 4).
PTX uint32_t to_tf32(float x) { uint32_t y; asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x)); return y; }
PTX void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
PTX float as_float(uint32_t bits) { return __uint_as_float(bits); }

// ---- cp.async: 16 or 4 bytes, or as many zero bytes when not valid
PTX void cp_async_16(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0) : "memory");
}
PTX void cp_async_4(uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(__cvta_generic_to_global(from)), "r"(valid ? 4 : 0) : "memory");
}
PTX void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> PTX void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- mbarrier
PTX void mbarrier_init(uint32_t a, int count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(a), "r"(count) : "memory"); }
PTX void mbarrier_arrive(uint32_t a) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(a) : "memory"); }
PTX void mbarrier_arrive_expect_tx(uint32_t a, int bytes) { asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(a), "r"(bytes) : "memory"); }
PTX void mbarrier_wait(uint32_t a, uint32_t parity) {
  asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;\n}" ::"r"(a), "r"(parity) : "memory");
}
PTX void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PTX void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
template <int N> PTX void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> PTX void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

// ---- TMA: coordinates innermost first
using TensorMap = CUtensorMap;
#define LOAD(R, LIST, ...) asm volatile("cp.async.bulk.tensor." R ".shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {" LIST "}], [%2];" \
  ::"r"(to), "l"(map), "r"(barrier), __VA_ARGS__ : "memory")
#define STORE(R, LIST, ...) asm volatile("cp.async.bulk.tensor." R ".global.shared::cta.bulk_group [%0, {" LIST "}], [%1];" ::"l"(map), "r"(from), __VA_ARGS__ : "memory")
template <int R> PTX void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, const int (&c)[R]) {
  static_assert(R >= 3 && R <= 5, "rank");
  if constexpr (R == 3) LOAD("3d", "%3,%4,%5", "r"(c[0]), "r"(c[1]), "r"(c[2]));
  if constexpr (R == 4) LOAD("4d", "%3,%4,%5,%6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  if constexpr (R == 5) LOAD("5d", "%3,%4,%5,%6,%7", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]));
}
template <int R> PTX void tma_store(const TensorMap* map, uint32_t from, const int (&c)[R]) {
  static_assert(R >= 3 && R <= 5, "rank");
  if constexpr (R == 3) STORE("3d", "%2,%3,%4", "r"(c[0]), "r"(c[1]), "r"(c[2]));
  if constexpr (R == 4) STORE("4d", "%2,%3,%4,%5", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
  if constexpr (R == 5) STORE("5d", "%2,%3,%4,%5,%6", "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4]));
}
#undef LOAD
#undef STORE
PTX void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N> PTX void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory"); }
// Host. `encode` is cuTensorMapEncodeTiled, fetched through cudaGetDriverEntryPoint so that nothing links libcuda.
inline bool make_tensor_map(TensorMap* map, decltype(&cuTensorMapEncodeTiled) encode, void* base, int rank, const int64_t* dim, const int64_t* stride_bytes,
                            const int* box, const int* step, bool is_bf16) {
  cuuint64_t d[5], s[5]; cuuint32_t b[5], e[5];
  for (int i = 0; i < rank; i++) { d[i] = dim[i]; b[i] = box[i]; e[i] = step[i]; if (i) s[i - 1] = stride_bytes[i - 1]; }
  return encode(map, is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, rank, base, d, s, b, e, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// ---- wgmma, m64 nN k16, fp32 accumulators; A K-major from shared memory (ss) or registers (rs); B K-major or MN-major
// The compiler does not see that a wgmma which is under way reads and writes registers: their numbers are used before the fence that
// opens it, and after the wait that ends it, as if they were changed here.
template <int N> PTX void wgmma_registers(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; i++) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N> PTX void wgmma_registers(uint32_t (&r)[N][4]) {
#pragma unroll
  for (int i = 0; i < 4 * N; i++) asm volatile("" : "+r"(r[i / 4][i % 4])::"memory");
}
PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> PTX void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
#define C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define C16(i) C4(i), C4(i + 4), C4(i + 8), C4(i + 12)
#define R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define R64 R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// Operand numbers follow the N/2 accumulators.
#define SS(N, TYPE, REGS, A, B, P, T, ...) asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
  " {" REGS "}, " A ", " B ", p, 1, 1, 0, " T ";\n}" : __VA_ARGS__ : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(kMnMajorB)))
#define RS(N, TYPE, REGS, A, B, P, T, ...) asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P ", 0;\nwgmma.mma_async.sync.aligned.m64n" N "k16.f32." TYPE "." TYPE \
  " {" REGS "}, {" A "}, " B ", p, 1, 1, " T ";\n}" : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(kMnMajorB)))
template <class T> constexpr bool is_f16 = false;
template <> constexpr bool is_f16<f16> = true;
template <class T, int N, bool kMnMajorB> PTX void wgmma_ss(float (&c)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128, "add the line");
  if constexpr (N == 64 && is_f16<T>) SS("64", "f16", R32, "%32", "%33", "%34", "%35", C16(0), C16(16));
  if constexpr (N == 64 && !is_f16<T>) SS("64", "bf16", R32, "%32", "%33", "%34", "%35", C16(0), C16(16));
  if constexpr (N == 128 && is_f16<T>) SS("128", "f16", R64, "%64", "%65", "%66", "%67", C16(0), C16(16), C16(32), C16(48));
  if constexpr (N == 128 && !is_f16<T>) SS("128", "bf16", R64, "%64", "%65", "%66", "%67", C16(0), C16(16), C16(32), C16(48));
}
template <class T, int N, bool kMnMajorB> PTX void wgmma_rs(float (&c)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(N == 64 || N == 128, "add the line");
  if constexpr (N == 64 && is_f16<T>) RS("64", "f16", R32, "%32,%33,%34,%35", "%36", "%37", "%38", C16(0), C16(16));
  if constexpr (N == 64 && !is_f16<T>) RS("64", "bf16", R32, "%32,%33,%34,%35", "%36", "%37", "%38", C16(0), C16(16));
  if constexpr (N == 128 && is_f16<T>) RS("128", "f16", R64, "%64,%65,%66,%67", "%68", "%69", "%70", C16(0), C16(16), C16(32), C16(48));
  if constexpr (N == 128 && !is_f16<T>) RS("128", "bf16", R64, "%64,%65,%66,%67", "%68", "%69", "%70", C16(0), C16(16), C16(32), C16(48));
}
}  // namespace ptx
#endif

namespace ptx {
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | kSwizzle128;
}
}  // namespace ptx
