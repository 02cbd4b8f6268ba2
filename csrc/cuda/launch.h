// SPDX-License-Identifier: MIT
// How kernels are started: a warp an item, as many launches as the limit of a grid makes necessary.
#pragma once
#include <initializer_list>

#include "kernels.h"
#include "ptx.h"

#if defined(NATTEN_EMULATE)
namespace emu {  // set by the tests
inline Config& config() { static Config the; return the; }
inline Device& device() { static Device the; return the; }
}
#endif

namespace natten::cuda {
namespace {

#if defined(NATTEN_MAX_BLOCKS)
constexpr int64_t kMaxBlocks = NATTEN_MAX_BLOCKS;  // tests lower it
#else
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;  // of the first axis of a grid
#endif
constexpr int kWarps = 4, kThreads = 32 * kWarps;  // of a block

// What a kernel is given. Item i of a launch is item first + i of the pass.
struct Work {
  Problem p;
  int64_t first, items;
  bool wide;  // rows lie so that threads can load 16 bytes of them at once
};

// One launch; `shared` bytes of shared memory a block.
template <class Kernel, class Given>
const char* start(Kernel kernel, int64_t blocks, int threads, int shared, const Given& given, [[maybe_unused]] Stream stream) {
#if defined(NATTEN_EMULATE)
  if (!emu::device().error.empty()) return emu::device().error.c_str();
  emu::launch({int(blocks), 1, 1}, threads, uint32_t(shared), emu::config(), [&] { kernel(given); });
  return nullptr;
#else
  constexpr int kFree = 48 << 10;  // more must be asked for
  if (shared > kFree) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
    if (error != cudaSuccess) {
      cudaGetLastError();  // or the next launch would report it
      return cudaGetErrorString(error);
    }
  }
  kernel<<<unsigned(blocks), unsigned(threads), size_t(shared), static_cast<cudaStream_t>(stream)>>>(given);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
#endif
}

// Body::run(work, item) by a warp for every item.
template <class Body> __global__ void __launch_bounds__(kThreads, 3) each_warp(const __grid_constant__ Work work) {
  const int64_t item = work.first + int64_t(ptx::block_index(0)) * kWarps + ptx::thread_index() / 32;
  if (item < work.items) Body::run(work, item);
}

template <class Body> const char* run(Work work, int64_t items, Stream stream) {
  work.items = items;
  for (work.first = 0; work.first < items; work.first += kMaxBlocks * kWarps)
    if (const char* error = start(each_warp<Body>, smaller(ceil_div(items - work.first, kWarps), kMaxBlocks), kThreads, 0, work, stream)) return error;
  return nullptr;
}

// Whether a thread may load 16 bytes of any of these rows at once.
template <class T> bool loads_wide(std::initializer_list<const Rows*> all) {
  for (const Rows* rows : all)
    if (rows->data && !lies_in_pieces(*rows, sizeof(T))) return false;
  return true;
}

template <class Make> const char* with_element(Dtype dtype, const Make& make) {
  switch (dtype) {
    case Dtype::float64: return make(double());
    case Dtype::float32: return make(float());
    case Dtype::float16: return make(ptx::f16());
    default: return make(ptx::bf16());
  }
}

// Numbers of a row that a lane has: 1, 2 or 4. Longer rows are summed 128 numbers at a time, the weights computed anew.
template <int kCount> struct Registers { static constexpr int value = kCount; };
template <class Make> const char* with_registers(int64_t dims, const Make& make) {
  if (dims <= 32) return make(Registers<1>());
  if (dims <= 64) return make(Registers<2>());
  return make(Registers<4>());
}

}  // namespace
}  // namespace natten::cuda
