// SPDX-License-Identifier: MIT
// What the choice of kernels asks of the current device.
#include "launch.h"

namespace natten::cuda {

#if defined(NATTEN_EMULATE)
DeviceFacts current_device() { return {emu::device().capability, emu::device().shared_bytes}; }
#else
DeviceFacts current_device() {
  int device = 0, major = 0, minor = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaGetLastError();  // what failed left zeros, which no tensor-core kernel takes; the next launch must not report it
  return {10 * major + minor, bytes};
}
#endif

}  // namespace natten::cuda
