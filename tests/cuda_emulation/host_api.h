// The host functions of the CUDA runtime that launchers use.
#pragma once

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
};
using cudaStream_t = struct CUstream_st*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeProgrammaticStreamSerialization };

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  emu::LaunchConfig launch{config->gridDim, config->blockDim, config->dynamicSmemBytes, false};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    launch.dependent |= config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization &&
                        config->attrs[i].val.programmaticStreamSerializationAllowed != 0;
  }
  // Every thread gets its own copy of the parameters, as on the device.
  const auto body = [kernel, ... values = static_cast<Params>(args)] { kernel(values...); };
  return static_cast<cudaError_t>(emu::launch(launch, reinterpret_cast<const void*>(kernel), body));
}

template <class F>
cudaError_t cudaFuncSetAttribute(F* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout)
    return static_cast<cudaError_t>(emu::set_carveout(reinterpret_cast<const void*>(kernel), value));
  return static_cast<cudaError_t>(emu::set_shared_limit(reinterpret_cast<const void*>(kernel), value));
}

// Device 0 is an sm_90, device 1 an sm_80; which one is current is the test's choice.
inline cudaError_t cudaGetDevice(int* device) {
  *device = emu::compute_major() >= 9 ? 0 : 1;
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;  // few, so that grid-stride loops take several turns
    case cudaDevAttrComputeCapabilityMajor:
      *value = emu::compute_major();
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = 0;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = (emu::compute_major() >= 9 ? 227 : 163) * 1024;
      break;
  }
  return cudaSuccess;
}

template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t = nullptr) {
  return static_cast<cudaError_t>(emu::memset_async(pointer, value, bytes));
}

enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t = nullptr) {
  return static_cast<cudaError_t>(emu::memcpy_async(to, from, bytes));
}

inline const char* cudaGetErrorString(cudaError_t) { return "emulated CUDA error"; }
