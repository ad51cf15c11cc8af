// rope_kv_append: what launches it, compiled in rope_kv_append.cu.
#pragma once

#include "cuda/common.h"

namespace lsk {

// cos and sin [>= T, C/2].
struct Angles {
  const float *cos, *sin;
};

// A row of q, k or v holds its heads side by side. A null norm is left out. A null v is already in the cache.
template <class T>
struct RopeArgs {
  Rows<const T> q, k, v;     // [R, H C], [R, G C] twice
  const T *q_norm, *k_norm;  // [C]
  float eps;
  Angles angles;
  Rows<T> q_out;  // [R, H C], may be q
  int num_heads;
};

// Rotates q and k, and writes k and v to their places in the cache.
template <class T>
cudaError_t rope_kv_append(Chain& chain, const RopeArgs<T>& args, const Cache<T>& cache);

}  // namespace lsk
