// SPDX-License-Identifier: MIT
// Tensor-core path, forward on Hopper: tensor maps, and which problems it takes.
#include "hopper.h"
#include "run.h"

#include <type_traits>

namespace natten::cuda::hopper {
namespace {

// For other architectures the kernels have no body (CMakeLists.txt defines NATTEN_SM90A).
#if defined(NATTEN_SM90A) || defined(NATTEN_EMULATE)
constexpr bool kBuilt = true;
#else
constexpr bool kBuilt = false;
#endif

#if defined(NATTEN_EMULATE)
std::nullptr_t find_encode() { return nullptr; }
#else
// The driver's function that makes tensor maps; null where the driver is too old for it.
decltype(&cuTensorMapEncodeTiled) find_encode() {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    if (error != cudaSuccess) cudaGetLastError();  // or the next launch would report it
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(error == cudaSuccess && result == cudaDriverEntryPointSuccess ? found : nullptr);
  }();
  return encode;
}
#endif

constexpr int kRank = kAxes + 2;
constexpr int64_t kMostStride = int64_t(1) << 39;  // of a tensor map, in numbers of two bytes
constexpr int64_t kMostCoordinate = (int64_t(1) << 31) - 1;

// How the heads of keys or values lie for TMA, whose tensors have five dimensions.
struct HeadsOf {
  int64_t row;     // numbers of the innermost dimension, no more than any stride
  bool merged;     // heads are further samples
  int64_t sample;  // stride of samples
};

// Whether every stride that is in use holds `row` numbers.
bool strides_hold(const Problem& p, const Rows& rows, int64_t row, int64_t samples, int64_t sample) {
  bool holds = samples == 1 || (sample >= row && sample < kMostStride);
  for (int a = 0; a < kAxes; ++a) holds = holds && (p.kv_shape[a] == 1 || (rows.token[a] >= row && rows.token[a] < kMostStride));
  return holds;
}

// False if they lie in no way that a tensor map can say.
bool place_heads(const Problem& p, const Rows& rows, int64_t dim, HeadsOf* heads) {
  const int64_t row = (p.heads_kv - 1) * rows.head + dim, samples = p.batch * p.heads_kv;
  *heads = {row, false, rows.batch};
  if (row < kMostCoordinate && strides_hold(p, rows, row, p.batch, rows.batch)) return true;
  *heads = {dim, true, rows.head};
  const bool uniform = p.batch == 1 || rows.batch == p.heads_kv * rows.head;
  return uniform && samples < kMostCoordinate && strides_hold(p, rows, dim, samples, rows.head);
}

// Null, or what is wrong.
const char* map_columns(const Problem& p, const Plan& plan, const Rows& rows, int64_t dim, bool is_bf16, TensorBoxes* columns) {
  HeadsOf heads{};
  place_heads(p, rows, dim, &heads);
  // Innermost first: the numbers of a token, its axes from the last to the first, samples.
  const int64_t size[] = {heads.row, p.kv_shape[2], p.kv_shape[1], p.kv_shape[0], p.batch * (heads.merged ? p.heads_kv : 1)};
  int64_t stride[] = {rows.token[2] * 2, rows.token[1] * 2, rows.token[0] * 2, heads.sample * 2};
  const auto step_of = [&](int a) { return plan.columns[a] == 1 ? 1 : int(p.axis[a].dilation); };  // a grid may have fewer tokens
  const int step[] = {1, step_of(2), step_of(1), step_of(0), 1};
  const int box[] = {kPart, plan.columns[2] * step[1], plan.columns[1] * step[2], plan.columns[0] * step[3], 1};
  int64_t span = heads.row * 2;
  for (int i = 0; i + 1 < kRank; ++i) {
    if (size[i + 1] == 1) stride[i] = span;  // it may be anything, where a tensor map wants what the axes before span
    span = stride[i] * size[i + 1];
  }
  columns->number_of_head = heads.merged || p.heads_kv == 1 ? 0 : int(rows.head);
  columns->sample_of_batch = heads.merged ? int(p.heads_kv) : 1, columns->sample_of_head = heads.merged ? 1 : 0;
  const auto encode = find_encode();
#if !defined(NATTEN_EMULATE)
  if (!encode) return "the driver has no cuTensorMapEncodeTiled: install one for CUDA 12 or newer";
  int device = 0;
  cudaGetDevice(&device), cudaSetDevice(device);  // the driver wants a context, which a thread has from its first launch only
#endif
  return ptx::make_tensor_map(&columns->map, encode, rows.data, kRank, size, stride, box, step, is_bf16)
             ? nullptr : "the driver refuses the tensor map of keys or values (cuTensorMapEncodeTiled)";
}

template <class T, int kDim> const char* run(const Problem& p, Stream stream) {
  using S = RingShape<T, kDim>;
  BoxWork work{make_work<S>(p, kReach), {}};
  constexpr bool is_bf16 = std::is_same_v<T, ptx::bf16>;
  const char* error = map_columns(p, work.plan, p.key, p.head_dim, is_bf16, &work.columns[0]);
  if (!error) error = map_columns(p, work.plan, p.value, p.value_dim, is_bf16, &work.columns[1]);
  return error ? error : start_blocks<S>(attend_boxes<T, kDim>, S::kAllThreads, work, stream);
}

}  // namespace

const char* why_not(const Problem& p, Dtype dtype, const DeviceFacts& device) {
  if (!kBuilt) return "is in libraries that were built for 90a: name it in NATTEN_OPS_CUDA_ARCHS";
  if (device.capability != 90) return "takes devices of compute capability 9.0";
  if (dtype != Dtype::float16 && dtype != Dtype::bfloat16) return "takes float16 and bfloat16";
  if (const char* reason = tiles::why_not(p, dtype, false, device)) return reason;
  if (p.head_dim != p.value_dim || (p.head_dim != 64 && p.head_dim != 128)) return "takes head dims of 64 or 128 that keys and values share";
  if (p.rpb.data || p.key_mask.data || p.additional) return "takes no bias table, key mask or additional tokens";
  for (int a = 0; a < kAxes; ++a)
    if (p.axis[a].dilation > kMostDilation) return "takes dilations up to 8, what a tensor map can step over";
  HeadsOf heads{};
  if (!place_heads(p, p.key, p.head_dim, &heads) || !place_heads(p, p.value, p.value_dim, &heads))
    return "takes keys and values whose heads lie within a token's stride, or as further samples: call contiguous()";
  constexpr int64_t kMost = larger(RingShape<ptx::f16, 64>::kBytes, RingShape<ptx::f16, 128>::kBytes);
  return device.shared_bytes < kMost ? "takes more shared memory than a block of this device has" : nullptr;
}

const char* forward(const Problem& p, Dtype dtype, Stream stream) {
  if (dtype == Dtype::float16) return p.head_dim == 64 ? run<ptx::f16, 64>(p, stream) : run<ptx::f16, 128>(p, stream);
  return p.head_dim == 64 ? run<ptx::bf16, 64>(p, stream) : run<ptx::bf16, 128>(p, stream);
}

}  // namespace natten::cuda::hopper
