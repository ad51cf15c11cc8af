// ArgmaxLse: running arg-max and log-sum-exp.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cmath>
#include <cstdint>

#include "cuda/exit_head.h"

namespace lsk {

constexpr unsigned kWarpMask = 0xffffffffu;

// x, or 0 if it is infinite: the shift of exponentials.
__device__ __forceinline__ float finite_or_zero(float x) { return fabsf(x) == INFINITY ? 0.0f : x; }

__device__ __forceinline__ ArgmaxLse empty_argmax_lse() { return {-INFINITY, -INFINITY, INT_MAX, -INFINITY, 0.0f}; }

__device__ __forceinline__ ArgmaxLse make_argmax_lse(float logit, float noise, int row) {
  return {logit + noise, logit, row, logit, expf(logit - finite_or_zero(logit))};
}

__device__ __forceinline__ void merge(ArgmaxLse& own, const ArgmaxLse& other) {
  if (other.key > own.key || (other.key == own.key && other.row < own.row)) {
    own.key = other.key;
    own.value = other.value;
    own.row = other.row;
  }
  const float peak = fmaxf(own.peak, other.peak), shift = finite_or_zero(peak);
  own.sum = __fmaf_rn(own.sum, expf(own.peak - shift), __fmul_rn(other.sum, expf(other.peak - shift)));
  own.peak = peak;
}

// Merges with the lane whose number differs in the bits of `mask`.
__device__ __forceinline__ void merge_lane(ArgmaxLse& own, int mask) {
  ArgmaxLse other;
  other.key = __shfl_xor_sync(kWarpMask, own.key, mask);
  other.value = __shfl_xor_sync(kWarpMask, own.value, mask);
  other.row = __shfl_xor_sync(kWarpMask, own.row, mask);
  other.peak = __shfl_xor_sync(kWarpMask, own.peak, mask);
  other.sum = __shfl_xor_sync(kWarpMask, own.sum, mask);
  merge(own, other);
}

// Merges every blockDim.x-th of `count` partial results. Issues four loads together; past the end the last one is
// loaded again and not merged.
__device__ __forceinline__ ArgmaxLse merge_strided(const ArgmaxLse* partials, int64_t count) {
  constexpr int kBatch = 4;
  ArgmaxLse own = empty_argmax_lse();
  for (int64_t begin = threadIdx.x; begin < count; begin += kBatch * blockDim.x) {
    ArgmaxLse batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) batch[k] = partials[min(begin + k * blockDim.x, count - 1)];
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (begin + k * blockDim.x < count) merge(own, batch[k]);
  }
  return own;
}

// Merges the results of all threads of a block in a fixed order; every thread gets the result. `shared` holds one
// result per warp; call __syncthreads() before reusing it.
__device__ __forceinline__ ArgmaxLse block_merge(ArgmaxLse own, ArgmaxLse* shared) {
  for (int mask = 16; mask > 0; mask /= 2) merge_lane(own, mask);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  ArgmaxLse all = shared[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) merge(all, shared[warp]);
  return all;
}

__device__ __forceinline__ float log_sum_exp(const ArgmaxLse& all) { return finite_or_zero(all.peak) + logf(all.sum); }

// The arg-max token; -1 if a logit is NaN or +inf, or all are -inf.
__device__ __forceinline__ int64_t chosen_token(const ArgmaxLse& all, const int64_t* token_map) {
  if (!(fabsf(log_sum_exp(all)) < INFINITY)) return -1;
  return token_map != nullptr ? token_map[all.row] : all.row;
}

}  // namespace lsk
