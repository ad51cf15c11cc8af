// Queried by `_extension.py` before the library is used: compiled architectures, and the versions of the toolkit and
// the driver (1000 major + 10 minor).
#include <cuda_runtime.h>
#include <dlfcn.h>

#define LSK_EXPORT extern "C" __attribute__((visibility("default")))

LSK_EXPORT const char* layerskip_cuda_archs() { return LSK_CUDA_ARCHS; }

LSK_EXPORT int layerskip_cuda_toolkit() { return CUDART_VERSION; }

// 0 without a driver. Called at import, so do not use cudaDriverGetVersion: it calls cuInit, after which a forked child
// cannot use CUDA and CUDA_VISIBLE_DEVICES has no effect.
LSK_EXPORT int layerskip_cuda_driver() {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  if (driver == nullptr) return 0;
  const auto get = reinterpret_cast<int (*)(int*)>(dlsym(driver, "cuDriverGetVersion"));
  int version = 0;
  return get != nullptr && get(&version) == 0 ? version : 0;
}
