// SPDX-License-Identifier: MIT
// The ops on CUDA tensors, compiled by the C++ compiler: nvcc never sees a header of torch, and nothing links libtorch_cuda.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "fronts.h"

namespace natten::cuda {
namespace {

struct Device {
  struct Guard {
    torch::stable::accelerator::DeviceGuard device;
    explicit Guard(const Tensor& tensor) : device(tensor.get_device_index()) {}
  };

  // torch::stable has this for every device from 2.13 on; until then it is a shim of libtorch_cuda.so, which is loaded
  // wherever there are CUDA tensors.
  static Stream stream(const Tensor& tensor) {
    using Shim = AOTITorchError (*)(int32_t, void**);
    static const Shim shim = [] {
      void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      return library ? reinterpret_cast<Shim>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    void* stream = nullptr;
    STD_TORCH_CHECK(shim && shim(tensor.get_device_index(), &stream) == TORCH_SUCCESS, "natten: torch told no current CUDA stream");
    return stream;
  }

  static void expose(const Problem&, Dtype, int64_t) {}
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(natten, CUDA, m) { register_kernels<Device>(m); }

}  // namespace natten::cuda
