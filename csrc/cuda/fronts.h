// SPDX-License-Identifier: MIT
// The kernels (kernels.h) behind the fronts that all devices share. A System is what differs between a GPU and the emulator:
//   Guard                               made of a tensor: its device is the current one while memory is asked for
//   stream(tensor)                      on which kernels are to run
//   expose(problem, dtype, partials)    called before kernels run: all that they may touch
#pragma once
#include "../fused.h"
#include "../unfused.h"
#include "kernels.h"

namespace natten::cuda {

inline const char* name_of(Dtype dtype) {
  constexpr const char* kNames[] = {"float64", "float32", "float16", "bfloat16"};  // in the order of Dtype
  return kNames[int(dtype)];
}

// Everything that chooses a kernel and its grid: a launch that the driver refuses may be refused for any of it.
inline void require(const char* error, const Problem& p, Dtype dtype) {
  const Axis(&axis)[kAxes] = p.axis;
  STD_TORCH_CHECK(!error, "natten: CUDA reports an error at a kernel for ", p.batch, " x ", p.q_shape[0], " x ", p.q_shape[1], " x ", p.q_shape[2],
                  " ", name_of(dtype), " queries, ", p.heads, " heads of ", p.head_dim, " and ", p.value_dim, ", kernel size ", axis[0].kernel, " x ",
                  axis[1].kernel, " x ", axis[2].kernel, ", dilation ", axis[0].dilation, " x ", axis[1].dilation, " x ", axis[2].dilation, ": ",
                  error ? error : "");
}

template <class System> struct Gpu {
  using Guard = typename System::Guard;

  static void check_backend(int64_t backend) {
    STD_TORCH_CHECK(backend == kChoose || backend == kPreferTf32 || (backend >= kCudaGeneral && backend <= kCudaWgmma), "natten: backend=", backend,
                    " cannot run on CUDA tensors; use 0 (choose), 3 (cuda-general), 4 (cuda-mma), 5 (cuda-mma-tf32) or 6 (cuda-wgmma)");
  }

  // Gradients come as they come: expanded after a sum, transposed after a permutation. Tensor cores read whole pieces of 16 bytes.
  static Tensor gradient(const Tensor& tensor) {
    if (lies_in_pieces(rows_of(tensor, true, tensor.dim() - 3, true, true), tensor.element_size())) return tensor;
    Tensor copy = torch::stable::new_empty(tensor, sizes_of(tensor));
    return torch::stable::copy_(copy, tensor);
  }

  static void forward(const Problem& p, const Tensor& query, int64_t backend) {
    const Dtype dtype = dtype_of(query);
    System::expose(p, dtype, 0);
    const auto pass = takes_boxes(p, dtype, backend) ? hopper::forward : takes_tiles(p, dtype, false, backend) ? tiles::forward : general::forward;
    require(pass(p, dtype, System::stream(query)), p, dtype);
  }

  // Of cuda-wgmma, which is a forward, cuda-mma has the gradients.
  static void backward(Problem& p, const Tensor& lse, std::vector<Tensor>& gradients, int64_t rank, int64_t backend) {
    if (backend == kCudaWgmma) backend = kCudaMma;
    const Dtype dtype = dtype_of(gradients[kQuery]);
    const Tensor delta = torch::stable::new_empty(lse, sizes_of(lse)), row_lse = torch::stable::new_empty(lse, sizes_of(lse));
    p.delta = rows_of(delta, true, rank, true, false);
    p.row_lse = rows_of(row_lse, true, rank, true, false);
    run_with_partials(p, dtype, lse, takes_tiles(p, dtype, true, backend) ? tiles::backward : general::backward);
  }

  static void unfused(Problem& p, const Tensor& tokens, Tensor*) {
    run_with_partials(p, dtype_of(tokens), tokens, general::unfused);
  }

 private:
  // Only where it is named: no GPU has run it yet.
  static bool takes_boxes(const Problem& p, Dtype dtype, int64_t backend) {
    if (backend != kCudaWgmma) return false;
    const char* reason = hopper::why_not(p, dtype, current_device());
    STD_TORCH_CHECK(!reason, "natten: backend=", backend, " (cuda-wgmma) cannot run this problem: it ", reason ? reason : "",
                    "; use 0 (choose) or 4 (cuda-mma)");
    return true;
  }

  // Float32 goes to tensor cores, as tf32, only where that backend is named or preferred. The gradient of the log-sum-exp alone has
  // no product of two matrices: it is the general path's, whatever was named.
  static bool takes_tiles(const Problem& p, Dtype dtype, bool backward, int64_t backend) {
    const bool wide = dtype == Dtype::float32, as_tf32 = backend == kCudaMmaTf32 || backend == kPreferTf32;
    const bool named = backend == kCudaMma || backend == kCudaMmaTf32;
    if (backend == kCudaGeneral || (wide && backend == kChoose) || (backward && !p.grad_out.data)) return false;
    const char* reason = named && as_tf32 != wide ? (as_tf32 ? "takes float32" : "takes float16 and bfloat16")
                                                  : tiles::why_not(p, dtype, backward, current_device());
    STD_TORCH_CHECK(!reason || !named, "natten: backend=", backend, as_tf32 ? " (cuda-mma-tf32)" : " (cuda-mma)",
                    " cannot run this problem: it ", reason ? reason : "", "; use 0 (choose) or 3 (cuda-general)");
    return !reason;
  }

  static void run_with_partials(Problem& p, Dtype dtype, const Tensor& like, const char* (*pass)(const Problem&, Dtype, Stream)) {
    const int64_t size = general::partial_size(p);
    const Tensor partials = torch::stable::new_empty(like, Integers{size}, lse_dtype(like));
    p.partials = partials.data_ptr();
    System::expose(p, dtype, size);
    require(pass(p, dtype, System::stream(like)), p, dtype);
  }
};

template <class System> void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("neighborhood_attention_lse", TORCH_BOX(&fused_forward<Gpu<System>>));
  m.impl("neighborhood_attention_lse_backward", TORCH_BOX(&fused_backward<Gpu<System>>));
  m.impl("na_qk", TORCH_BOX(&unfused_qk<Gpu<System>>));
  m.impl("na_av", TORCH_BOX(&unfused_av<Gpu<System>>));
  m.impl("na_qk_backward", TORCH_BOX(&unfused_qk_backward<Gpu<System>>));
  m.impl("na_av_backward", TORCH_BOX(&unfused_av_backward<Gpu<System>>));
}

}  // namespace natten::cuda
