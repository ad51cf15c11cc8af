// For the files in ops/: a C function that a test calls by name.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EMULATED(name) extern "C" [[gnu::visibility("default")]] cudaError_t emulated_##name

namespace emu {

// Calls f with a null pointer of the type that a torch.dtype's code names (see __init__.py).
template <class F>
cudaError_t with_float_type(int64_t code, F f) {
  switch (code) {
    case 0:
      return f(static_cast<float*>(nullptr));
    case 1:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case 2:
      return f(static_cast<__half*>(nullptr));
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace emu
