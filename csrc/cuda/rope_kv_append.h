// rope_kv_append: what launches it, compiled in rope_kv_append.cu.
#pragma once

#include "cuda/common.h"

namespace lsk {

// cos and sin [>= T, C/2].
struct Angles {
  const float *cos, *sin;
};

// Heads of q, k and v side by side in rows; a null norm is none; v null: already in the cache.
template <class T>
struct RopeArgs {
  Rows<const T> q, k, v;     // [R, H C], [R, G C] twice
  const T *q_norm, *k_norm;  // [C]
  float eps;
  Angles angles;
  Rows<T> q_out;  // [R, H C], may be q
  int num_heads;
};

// Turns q and k, writes k and v at the rows' places in the cache.
template <class T>
cudaError_t rope_kv_append(Chain& chain, const RopeArgs<T>& args, const Cache<T>& cache);

}  // namespace lsk
