// For the files in ops/: a C function that a test calls by name.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define EMULATED(name) extern "C" [[gnu::visibility("default")]] cudaError_t emulated_##name

namespace emu {

// Calls f with a null pointer of the type that this library is compiled for, if that is the code's (see __init__.py).
template <class F>
cudaError_t with_float_type(int64_t code, F f) {
  return code == EMU_CODE ? f(static_cast<EMU_TYPE*>(nullptr)) : cudaErrorInvalidValue;
}

}  // namespace emu
