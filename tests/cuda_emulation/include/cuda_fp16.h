// Stands in for the CUDA toolkit's header of this name.
#pragma once

#include <cuda_runtime.h>

#include "cuda_emulation/halves.h"

struct __half {
  uint16_t bits;
  __half() = default;
  __half(float x) : bits(emu::f16_bits(x)) {}
  operator float() const { return emu::f16_value(bits); }
};

EMU_HALVES(__half, __half2, half, half2, emu::f16_value, emu::f16_bits)
inline float __half2float(__half x) { return emu::f16_value(x.bits); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __float22half2_rn(float2 x) { return {x.x, x.y}; }
using half = __half;
using half2 = __half2;
