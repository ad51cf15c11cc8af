// RoPE on halves, (a, b) -> (a cos - b sin, b cos + a sin), and the position of a row in the cache.
#pragma once

#include "cuda/common.cuh"
#include "cuda/layer_ops.h"

namespace lsk {

struct Pair {
  float a, b;
};

// Explicit fma, so that the bits do not depend on the compiler's contraction.
__device__ __forceinline__ Pair rotate(Pair x, float cos, float sin) {
  return {__fmaf_rn(x.a, cos, -__fmul_rn(x.b, sin)), __fmaf_rn(x.b, cos, __fmul_rn(x.a, sin))};
}

// Position of row r in the cache. Outside of the cache nothing is written, and queries become NaN, so that the head
// returns token -1, never a wrong token.
template <class T>
struct Place {
  int64_t slot, position;
  bool inside;

  __device__ __forceinline__ Place(const Cache<T>& cache, int64_t r) {
    const int b = static_cast<int>(r / cache.rows);
    slot = cache.slot(b);
    position = cache.position(b) + r % cache.rows;
    inside = slot >= 0 && position >= 0 && position < cache.capacity;
  }

  // Offset of key/value head g at this position in k and v.
  __device__ __forceinline__ int64_t at(const Cache<T>& cache, int g) const {
    return cache.plane(slot, g) + position * cache.head_dim;
  }

  __device__ __forceinline__ Pair rope(Pair x, const Angles& angles, int half, int i) const {
    const float none = nanf("");
    const int64_t at = position * half + i;
    return rotate(x, inside ? angles.cos[at] : none, inside ? angles.sin[at] : none);
  }
};

}  // namespace lsk
