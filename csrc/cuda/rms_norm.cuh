// rms_norm: x / sqrt(mean(x^2) + eps) * weight, statistics in fp32, one rounding.
//
// All kernels with a norm use inverse_rms (or head_inverse_rms for the heads of q and k). The width alone determines
// the order of additions: eight columns of a lane, four lanes of a quad, eight warps. So a norm fused into a matmul has
// the bits of the op. A block takes 16 rows, as in the matmuls: quad g has rows g and g + 8.
#pragma once

#include "cuda/common.cuh"

namespace lsk {

template <class T>
__device__ __forceinline__ float add_squares(const Chunk<T>& chunk, float sum) {
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e) {
    const float x = to_float(chunk.at(e));
    sum = __fmaf_rn(x, x, sum);
  }
  return sum;
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// This lane's part of the sum of squares of a row, with eight loads in flight. Loads past the end are not masked, which
// would take a predicate each: they read the row's last chunk, which is not added.
template <bool Aligned, class T>
__device__ __forceinline__ float own_squares(const T* row, int width) {
  constexpr int kBatch = 8;
  const int warp = threadIdx.x / 32, t = threadIdx.x % 4, own = own_steps<T>(width, warp);
  float sum = 0.0f;
  for (int begin = 0; begin < own; begin += kBatch) {
    Chunk<T> chunks[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int column = own_column<T>(begin + i, warp, t);
      if constexpr (Aligned) {
        chunks[i] = *reinterpret_cast<const Chunk<T>*>(row + min(column, width - kChunk<T>));
      } else {
        chunks[i] = load_chunk<false>(row, column, width);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float added = add_squares(chunks[i], sum);
      sum = own_column<T>(begin + i, warp, t) < width ? added : sum;
    }
  }
  return sum;
}

// 1 / sqrt(mean(x^2) + eps) of the rows g and g + 8 (g = lane / 4) of `count` rows, for every thread of the block.
// scratch: kWarps * kTokens floats of shared memory, free until the next __syncthreads().
template <class T>
__device__ __forceinline__ void inverse_rms(const Rows<const T>& x, int count, int width, float eps, bool aligned,
                                            float* scratch, float (&inverse)[2]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  float sums[2] = {0.0f, 0.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (8 * half >= count) break;
    const T* row = x.row(min(g + 8 * half, count - 1));
    sums[half] = aligned ? own_squares<true>(row, width) : own_squares<false>(row, width);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float sum = quad_sum(sums[half]);
    if (t == 0) scratch[warp * kTokens + g + 8 * half] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += scratch[w * kTokens + g + 8 * half];
    inverse[half] = 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
  }
}

// The same for one row of at most 256 elements by one warp: lane 4 w + t computes the part of lane t of warp w (fp32,
// with half as many elements per chunk, takes up to two steps).
template <class T>
__device__ __forceinline__ float head_inverse_rms(const T* x, int width, float eps) {
  const int lane = threadIdx.x % 32;
  float own = 0.0f;
  for (int column = lane * kChunk<T>; column < width; column += 32 * kChunk<T>)
    own = add_squares(load_chunk(x, column, width, false), own);
  own = quad_sum(own);
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += __shfl_sync(~0u, own, 4 * w);
  return 1.0f / sqrtf(sum / static_cast<float>(width) + eps);
}

__device__ __forceinline__ float normed(float x, float inverse, float weight) {
  return __fmul_rn(__fmul_rn(x, inverse), weight);
}

template <class T>
__device__ __forceinline__ Chunk<T> normed(const Chunk<T>& x, float inverse, const Chunk<T>& weight) {
  T out[kChunk<T>];
#pragma unroll
  for (int e = 0; e < kChunk<T>; ++e)
    out[e] = from_float<T>(normed(to_float(x.at(e)), inverse, to_float(weight.at(e))));
  Chunk<T> chunk;
  memcpy(&chunk, out, sizeof chunk);
  return chunk;
}

}  // namespace lsk
