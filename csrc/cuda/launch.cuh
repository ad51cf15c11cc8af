// Kernel launches from host code that knows pointers and sizes only. nvcc and tests/cuda_emulation compile the same
// functions:
//
//   // sample.cuh: a __global__ kernel, and the host function that launches it
//   cudaError_t row_sum(const T* x, float* out, int64_t rows, int64_t width, cudaStream_t stream) {
//     const Launch where{.grid = dim3(rows), .block = dim3(128), .stream = stream};
//     return launch(where, row_sum_kernel<T>, x, out, width);
//   }
//
// The ops take a Chain (common.h) instead of a stream; it fills in `stream` and `dependent` of each launch.
//
// `dependent`: programmatic dependent launch. On sm_90 and newer the kernel may start before the previous one in the
// stream has ended, so it must call ptx::dependency_wait() before it reads memory that an earlier kernel writes, or
// writes memory that one reads. At least one thread of every block must call it, or the next kernel could overtake the
// previous one.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <map>
#include <mutex>
#include <utility>

// Returns the error of a CUDA call or launch from the calling function, if there is one.
#define LSK_RETURN_IF_ERROR(call)                     \
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

// Sets the shared memory limit of `kernel` to the maximum, and the same split between shared memory and L1 for every
// kernel: an SM changes its split only when idle, so a change would serialize two launches. Sets `dependent` to whether
// the device supports programmatic dependent launch.
inline cudaError_t prepare(const void* kernel, int device, bool& dependent) {
  constexpr int kStatic = 2048;  // upper bound of the kernels' static shared memory
  int major = 0, max_shared = 0;
  LSK_RETURN_IF_ERROR(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  LSK_RETURN_IF_ERROR(cudaDeviceGetAttribute(&max_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  dependent = major >= 9;
  // One limit for all calls: another thread or a graph may need more for this kernel than this call.
  LSK_RETURN_IF_ERROR(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared - kStatic));
  return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
}

// Does this before the first launch of a kernel on a device only, because each of these driver calls is slow compared
// to a launch. Thread-safe; retries after an error.
inline cudaError_t prepare_once(const void* kernel, bool& dependent) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, bool> prepared;
  int device = 0;
  LSK_RETURN_IF_ERROR(cudaGetDevice(&device));
  const std::pair<const void*, int> key(kernel, device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto known = prepared.find(key);
  if (known != prepared.end()) {
    dependent = known->second;
    return cudaSuccess;
  }
  LSK_RETURN_IF_ERROR(prepare(kernel, device, dependent));
  prepared[key] = dependent;
  return cudaSuccess;
}

// Launches `kernel`. An empty grid is not an error.
template <class... Params, class... Args>
cudaError_t launch(const Launch& where, void (*kernel)(Params...), Args... args) {
  if (where.grid.x == 0 || where.grid.y == 0 || where.grid.z == 0) return cudaSuccess;
  bool dependent = false;
  LSK_RETURN_IF_ERROR(prepare_once(reinterpret_cast<const void*>(kernel), dependent));
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
