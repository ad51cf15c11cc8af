// A Choice is a running arg-max with its log-sum-exp; how to make, merge and read it.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cmath>
#include <cstdint>

#include "cuda/choice.h"

namespace lsk {

constexpr unsigned kWarpMask = 0xffffffffu;

// x, with 0 in the place of an infinity: what exponentials are taken relative to.
__device__ __forceinline__ float finite_or_zero(float x) { return fabsf(x) == INFINITY ? 0.0f : x; }

__device__ __forceinline__ Choice no_choice() { return {-INFINITY, -INFINITY, INT_MAX, -INFINITY, 0.0f}; }

__device__ __forceinline__ Choice choice_of(float logit, float noise, int row) {
  return {logit + noise, logit, row, logit, expf(logit - finite_or_zero(logit))};
}

__device__ __forceinline__ void merge(Choice& own, const Choice& other) {
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
__device__ __forceinline__ void merge_lane(Choice& own, int mask) {
  Choice other;
  other.key = __shfl_xor_sync(kWarpMask, own.key, mask);
  other.value = __shfl_xor_sync(kWarpMask, own.value, mask);
  other.row = __shfl_xor_sync(kWarpMask, own.row, mask);
  other.peak = __shfl_xor_sync(kWarpMask, own.peak, mask);
  other.sum = __shfl_xor_sync(kWarpMask, own.sum, mask);
  merge(own, other);
}

// This thread's part of the merge of `count` choices: every blockDim.x-th. Four are on their way together; in the place
// of those past the end comes the last one again, which is not merged.
__device__ __forceinline__ Choice merge_strided(const Choice* choices, int64_t count) {
  constexpr int kBatch = 4;
  Choice own = no_choice();
  for (int64_t begin = threadIdx.x; begin < count; begin += kBatch * blockDim.x) {
    Choice batch[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) batch[k] = choices[min(begin + k * blockDim.x, count - 1)];
#pragma unroll
    for (int k = 0; k < kBatch; ++k)
      if (begin + k * blockDim.x < count) merge(own, batch[k]);
  }
  return own;
}

// The merge of every thread's choice, in the same order whatever the values, for every thread of a block of whole
// warps. `shared` holds one choice a warp; a __syncthreads() must come before it is used again.
__device__ __forceinline__ Choice block_choice(Choice own, Choice* shared) {
  for (int mask = 16; mask > 0; mask /= 2) merge_lane(own, mask);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  Choice all = shared[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) merge(all, shared[warp]);
  return all;
}

__device__ __forceinline__ float log_sum_exp(const Choice& all) { return finite_or_zero(all.peak) + logf(all.sum); }

// The chosen token; -1 where a logit is NaN or +inf, or all are -inf.
__device__ __forceinline__ int64_t chosen_token(const Choice& all, const int64_t* token_map) {
  if (!(fabsf(log_sum_exp(all)) < INFINITY)) return -1;
  return token_map != nullptr ? token_map[all.row] : all.row;
}

}  // namespace lsk
