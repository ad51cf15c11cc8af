// Stands in for the CUDA toolkit's header of this name.
#pragma once

#include <cuda_runtime.h>

#include "cuda_emulation/halves.h"

struct __nv_bfloat16 {
  uint16_t bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) : bits(emu::bf16_bits(x)) {}
  operator float() const { return emu::bf16_value(bits); }
};

EMU_HALVES(__nv_bfloat16, __nv_bfloat162, bfloat16, bfloat162, emu::bf16_value, emu::bf16_bits)
inline float __bfloat162float(__nv_bfloat16 x) { return emu::bf16_value(x.bits); }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {__bfloat162float(x.x), __bfloat162float(x.y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 x) { return {x.x, x.y}; }
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
