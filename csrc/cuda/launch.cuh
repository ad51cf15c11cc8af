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
#include <map>
#include <mutex>
#include <utility>

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

// Lets `kernel` have as much shared memory as there is, and asks for the same split between shared memory and L1
// whatever the kernel: an SM changes its split only when it is idle, so that a change between two launches keeps them
// apart. `dependent` becomes whether the device has programmatic dependent launch.
inline cudaError_t prepare(const void* kernel, int device, bool& dependent) {
  constexpr int kStatic = 2048;  // no kernel has more static shared memory
  int major = 0, most = 0;
  LSK_LAUNCH(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  LSK_LAUNCH(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  dependent = major >= 9;
  // One limit for all calls: what another thread or a graph launches of this kernel may need more than this call.
  LSK_LAUNCH(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - kStatic));
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// The same before the first launch of a kernel on a device only, for each of these calls of the driver takes time that
// a launch has not. Threads may call it at once; after an error it is tried again.
inline cudaError_t prepare_once(const void* kernel, bool& dependent) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> prepared;
  int device = 0;
  LSK_LAUNCH(cudaGetDevice(&device));
  const std::pair<const void*, int> key(kernel, device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = prepared.find(key);
  if (known != prepared.end()) {
    dependent = known->second;
    return cudaSuccess;
  }
  LSK_LAUNCH(prepare(kernel, device, dependent));
  prepared[key] = dependent;
  return cudaSuccess;
}

// Launches `kernel`; an empty grid is no launch and no error.
template <class... Params, class... Args>
cudaError_t launch(const Launch& where, void (*kernel)(Params...), Args... args) {
  if (where.grid.x == 0 || where.grid.y == 0 || where.grid.z == 0) return cudaSuccess;
  bool dependent = false;
  LSK_LAUNCH(prepare_once(reinterpret_cast<const void*>(kernel), dependent));
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = where.grid;
  config.blockDim = where.block;
  config.dynamicSmemBytes = where.shared;
  config.stream = where.stream;
  config.attrs = &attribute;
  config.numAttrs = where.dependent && dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
}

}  // namespace lsk
