// How a kernel is launched, from host code that knows pointers and sizes only. A `.cu` file and tests/cuda_emulation
// compile the same functions:
//
//   // sample.cuh: a __global__ kernel, and the host function that launches it
//   cudaError_t row_sum(const T* x, float* out, int64_t rows, int64_t width, cudaStream_t stream) {
//     const Launch where{.grid = dim3(rows), .block = dim3(128), .stream = stream};
//     return launch(where, row_sum_kernel<T>, x, out, width);
//   }
//
// The ops take a Chain (common.h) instead of a stream; it fills in `stream` and `dependent` of each launch.
//
// `dependent`: programmatic dependent launch. On sm_90 and newer the kernel may start before the one ahead of it in the
// stream has ended, so it must call ptx::dependency_wait() before it touches what an earlier kernel wrote, or writes
// what one reads; at least one thread of every block must call it, or the kernel after it could overtake the one
// before.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

// Returns from the calling function with the error, if there is one.
#define LSK_LAUNCH(call)                              \
  do {                                                \
    const cudaError_t lsk_status = (call);            \
    if (lsk_status != cudaSuccess) return lsk_status; \
  } while (0)

namespace lsk {

struct Launch {
  dim3 grid, block;
  size_t shared = 0;  // bytes of dynamic shared memory
  cudaStream_t stream = nullptr;
  bool dependent = false;
};

// Whether the current device has programmatic dependent launch; asked of the driver once a device.
inline bool has_dependent_launch() {
  constexpr int kDevices = 64;
  static signed char known[kDevices] = {};  // 0 unknown, 1 no, 2 yes; a race writes the same value twice
  int device = 0, major = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return false;
  if (known[device] == 0) {
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess) return false;
    known[device] = major >= 9 ? 2 : 1;
  }
  return known[device] == 2;
}

// Asks for as much shared memory as `kernel` needs, and for the same split between shared memory and L1 whatever the
// kernel: an SM changes its split only when it is idle, so that a change between two launches keeps them apart.
inline cudaError_t set_memory(const void* kernel, size_t shared) {
  constexpr size_t kDefaultShared = 48 * 1024;
  if (shared > kDefaultShared) {
    // One limit for all calls: what another thread or a graph launches of this kernel may need more than this call.
    constexpr int kStatic = 2048;  // no kernel has more static shared memory
    int device = 0, most = 0;
    LSK_LAUNCH(cudaGetDevice(&device));
    LSK_LAUNCH(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    const int wanted = static_cast<int>(shared), limit = wanted > most - kStatic ? wanted : most - kStatic;
    LSK_LAUNCH(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
  }
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// Launches `kernel`; an empty grid is no launch and no error.
template <class... Params, class... Args>
cudaError_t launch(const Launch& where, void (*kernel)(Params...), Args... args) {
  if (where.grid.x == 0 || where.grid.y == 0 || where.grid.z == 0) return cudaSuccess;
  LSK_LAUNCH(set_memory(reinterpret_cast<const void*>(kernel), where.shared));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = where.grid;
  config.blockDim = where.block;
  config.dynamicSmemBytes = where.shared;
  config.stream = where.stream;
  config.attrs = &attribute;
  config.numAttrs = where.dependent && has_dependent_launch() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace lsk
