// What `_extension.py` asks of the library before it is used: the architectures that it was compiled for, and the
// versions of the toolkit and the driver (as 1000 major + 10 minor).
#include <cuda_runtime.h>

#define LSK_EXPORT extern "C" __attribute__((visibility("default")))

LSK_EXPORT const char* layerskip_cuda_archs() { return LSK_CUDA_ARCHS; }

LSK_EXPORT int layerskip_cuda_toolkit() { return CUDART_VERSION; }

// 0 without a driver.
LSK_EXPORT int layerskip_cuda_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}
