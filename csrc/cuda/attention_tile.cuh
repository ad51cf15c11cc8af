// Attention of 16 queries over one split of 128 positions, by four warps: 16-bit types use mma, fp32 uses FMA.
//
// weight_p = exp(score_p - largest score), peaks = (largest score, sum of weights), values = sum of weight_p v_p.
#pragma once

#include <algorithm>
#include <cmath>

#include "cuda/common.cuh"
#include "cuda/layer_ops.h"

namespace lsk {

constexpr int kAttentionWarps = 4, kAttentionThreads = 32 * kAttentionWarps;
constexpr int kWarpSplit = kSplit / kAttentionWarps;  // positions of a warp, in 16 bit
constexpr int kColumns = 64;                          // columns of the values at once

// exp of a difference of raw scores; the factor includes 1 / sqrt(C) and, in 16 bit, log2(e).
template <class T>
__device__ __forceinline__ float weigh(float difference, float factor) {
  if constexpr (std::is_same_v<T, float>) return expf(difference * factor);
  return ptx::exp2_approx(difference * factor);
}

template <class T>
float weight_factor(int head_dim) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  return std::is_same_v<T, float> ? scale : scale * 1.44269504f;
}

// Keys and values of a split.
template <class T>
struct SplitWork {
  const T *k, *v;  // [count, C]
  int head_dim, count;
  bool aligned;
  float factor;
};

template <class T>
struct AttentionMemory {
  static constexpr int kPitch = kColumns + 8;  // spreads a warp's sums over the banks
  float peaks[kAttentionWarps][kPairs], masses[kAttentionWarps][kPairs];
  float sums[kAttentionWarps][kPairs * kPitch];

  // Values [128, C], with rows padded by 16 bytes: eight rows of a column are then in different banks.
  __device__ __forceinline__ T* values() { return reinterpret_cast<T*>(this + 1); }
  __host__ __device__ static int pitch(int head_dim) { return head_dim + 8; }
  static size_t bytes(int head_dim) { return sizeof(AttentionMemory) + sizeof(T) * kSplit * pitch(head_dim); }
};

template <>
struct AttentionMemory<float> {
  float scores[kPairs][kSplit];
  float queries[kPairs][256];
  static size_t bytes(int) { return sizeof(AttentionMemory); }
};

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// scores[j][i]: positions 8 j + 2 t + i % 2 of the warp, pairs g (i < 2) and g + 8.
template <bool Aligned, class T, class Query>
__device__ __forceinline__ void score(const SplitWork<T>& w, int pairs, Query query, int begin, float (&scores)[4][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const T* queries[2] = {query(min(g, pairs - 1)), query(min(g + 8, pairs - 1))};
#pragma unroll 2
  for (int block = 0; block < w.head_dim; block += kQuadColumns<T>) {
    const int column = block + t * kChunk<T>;
    uint32_t q[2][4];
    Chunk<T> keys[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Chunk<T> chunk = load_chunk<Aligned>(queries[half], column, w.head_dim);
      memcpy(q[half], &chunk, 16);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int at = begin + 8 * j + g;
      const T* row = w.k + (at < w.count ? static_cast<int64_t>(at) * w.head_dim : 0);
      keys[j] = load_chunk<Aligned>(row, column, at < w.count ? w.head_dim : 0);
    }
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t a[4] = {q[0][2 * k], q[1][2 * k], q[0][2 * k + 1], q[1][2 * k + 1]};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t b[2][2];
        memcpy(b, &keys[j], 16);
        ptx::mma<T>(scores[j], a, b[k]);
      }
    }
  }
}

// Softmax of the scores in place, unnormalized; `seen` masks positions. Writes the peaks and masses (sums of weights)
// of the whole split per pair to `memory`.
template <class T, class Seen>
__device__ __forceinline__ void softmax(const SplitWork<T>& w, Seen seen, int begin, AttentionMemory<T>& memory,
                                        float (&scores)[4][4]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, warp = threadIdx.x / 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int sees = seen(g + 8 * half);
    float peak = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float& one = scores[j / 2][2 * half + j % 2];
      if (begin + j / 2 * 8 + 2 * t + j % 2 >= sees) one = -INFINITY;
      peak = fmaxf(peak, one);
    }
    peak = quad_max(peak);
    if (t == 0) memory.peaks[warp][g + 8 * half] = peak;
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float peak = memory.peaks[0][g + 8 * half], mass = 0.0f;
#pragma unroll
    for (int i = 1; i < kAttentionWarps; ++i) peak = fmaxf(peak, memory.peaks[i][g + 8 * half]);
    const float base = peak == -INFINITY ? 0.0f : peak;  // a pair that sees no position here has weight 0
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float& one = scores[j / 2][2 * half + j % 2];
      one = weigh<T>(one - base, w.factor);
      mass += one;
    }
    mass += __shfl_xor_sync(~0u, mass, 1);
    mass += __shfl_xor_sync(~0u, mass, 2);
    if (t == 0) memory.masses[warp][g + 8 * half] = mass;
  }
}

// Copies the warp's 32 rows of values to its part of shared memory, asynchronously.
template <class T>
__device__ __forceinline__ void stage_values(const SplitWork<T>& w, int begin, T* staged) {
  const int per_row = w.head_dim / kChunk<T>, rows = 32 / per_row, rest = 32 % per_row;  // per step of the warp
  int at = threadIdx.x % 32 / per_row, chunk = threadIdx.x % 32 % per_row;
  while (at < kWarpSplit) {
    const int column = chunk * kChunk<T>;
    const bool inside = begin + at < w.count;
    const T* row = w.v + (inside ? static_cast<int64_t>(begin + at) * w.head_dim : 0);
    T* place = staged + at * AttentionMemory<T>::pitch(w.head_dim) + column;
    copy_chunk(reinterpret_cast<Chunk<T>*>(place), row, column, inside ? w.head_dim : 0, w.aligned);
    at += rows, chunk += rest;
    if (chunk >= per_row) chunk -= per_row, ++at;
  }
  ptx::cp_async_commit();
}

__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) < INFINITY; }

// A position that not every pair sees may hold a rejected draft token with values that are not finite, and 0 * inf is
// NaN. Replaces such values of the warp at [from, count) by 0; returns whether there were any.
template <class T>
__device__ __forceinline__ bool mask_nonfinite(const SplitWork<T>& w, int begin, int from, T* staged) {
  bool any = false;
  for (int at = max(from, begin); at < min(w.count, begin + kWarpSplit); ++at) {
    T* row = staged + (at - begin) * AttentionMemory<T>::pitch(w.head_dim);
    for (int c = threadIdx.x % 32; c < w.head_dim; c += 32) {
      if (is_finite(to_float(row[c]))) continue;
      row[c] = from_float<T>(0.0f);
      any = true;
    }
  }
  __syncwarp();
  return __any_sync(~0u, any);
}

// Adds the values that `mask_nonfinite` replaced to the sums of the pairs that see them; in any order, since no such
// result is finite.
template <class T, class Seen>
__device__ __forceinline__ void add_nonfinite(const SplitWork<T>& w, int pairs, Seen seen, int begin, int from,
                                              int first, float* sums) {
  __syncwarp();
  for (int c = threadIdx.x % 32; c < min(kColumns, w.head_dim - first); c += 32)
    for (int at = max(from, begin); at < min(w.count, begin + kWarpSplit); ++at) {
      const float value = to_float(w.v[static_cast<int64_t>(at) * w.head_dim + first + c]);
      for (int pair = 0; pair < pairs && !is_finite(value); ++pair)
        if (at < seen(pair)) sums[pair * AttentionMemory<T>::kPitch + c] += value;
    }
}

// Multiplies the weights with columns [first, first + 64) of the warp's values, into `sums`: eight columns at a time,
// whose 32 rows are the operands of two mma.
template <class T>
__device__ __forceinline__ void weigh_values(const float (&weights)[4][4], const T* staged, int head_dim, int first,
                                             float* sums) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  constexpr int kPitch = AttentionMemory<T>::kPitch;
#pragma unroll
  for (int j = 0; j < kColumns / 8; ++j) {
    if (first + 8 * j >= head_dim) break;
    uint32_t values[4];
    ptx::ldmatrix_trans(values, staged + lane * AttentionMemory<T>::pitch(head_dim) + first + 8 * j);
    float d[4] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const float (&low)[4] = weights[2 * k], (&high)[4] = weights[2 * k + 1];
      const uint32_t a[4] = {to_pair<T>(low[0], low[1]), to_pair<T>(low[2], low[3]), to_pair<T>(high[0], high[1]),
                             to_pair<T>(high[2], high[3])};
      const uint32_t b[2] = {values[2 * k], values[2 * k + 1]};
      ptx::mma<T>(d, a, b);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[(g + i / 2 * 8) * kPitch + 8 * j + 2 * t + i % 2] = d[i];
  }
}

// query(pair) is a pointer to C numbers, seen(pair) the number of visible positions of the split (none below 1).
// `peaks` and `values` begin with the tile's first pair.
template <class T, class Query, class Seen>
__device__ __forceinline__ void attend_split(const SplitWork<T>& w, int pairs, Query query, Seen seen, float2* peaks,
                                             float* values, AttentionMemory<T>& memory) {
  constexpr int kPitch = AttentionMemory<T>::kPitch;
  const int warp = threadIdx.x / 32, begin = warp * kWarpSplit;
  T* staged = memory.values() + begin * AttentionMemory<T>::pitch(w.head_dim);
  stage_values(w, begin, staged);
  float scores[4][4] = {};
  w.aligned ? score<true>(w, pairs, query, begin, scores) : score<false>(w, pairs, query, begin, scores);
  softmax(w, seen, begin, memory, scores);
  ptx::cp_async_wait<0>();
  __syncwarp();
  const int common = max(0, seen(0));  // positions that every pair sees: the tile's rows are consecutive
  const bool nonfinite = common < min(w.count, begin + kWarpSplit) && mask_nonfinite(w, begin, common, staged);
  for (int first = 0; first < w.head_dim; first += kColumns) {
    weigh_values(scores, staged, w.head_dim, first, memory.sums[warp]);
    if (nonfinite) add_nonfinite(w, pairs, seen, begin, common, first, memory.sums[warp]);
    __syncthreads();
    const int columns = min(kColumns, w.head_dim - first);
    for (int i = threadIdx.x; i < pairs * kColumns; i += kAttentionThreads) {
      const int pair = i / kColumns, c = i % kColumns;
      if (c >= columns) continue;
      float sum = 0.0f;
#pragma unroll
      for (int v = 0; v < kAttentionWarps; ++v) sum += memory.sums[v][pair * kPitch + c];
      values[static_cast<int64_t>(pair) * w.head_dim + first + c] = sum;
    }
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) >= pairs) return;
  float peak = -INFINITY, mass = 0.0f;
#pragma unroll
  for (int v = 0; v < kAttentionWarps; ++v) {
    peak = fmaxf(peak, memory.peaks[v][threadIdx.x]);
    mass += memory.masses[v][threadIdx.x];
  }
  peaks[threadIdx.x] = make_float2(peak, mass);
}

// fp32, step 1: each thread computes the scores of one position for all pairs.
template <class Query, class Seen>
__device__ __forceinline__ void score_rows(const SplitWork<float>& w, int pairs, Query query, Seen seen,
                                           AttentionMemory<float>& memory) {
  const int at = threadIdx.x;
  for (int i = threadIdx.x; i < pairs * w.head_dim; i += kAttentionThreads)
    memory.queries[i / w.head_dim][i % w.head_dim] = query(i / w.head_dim)[i % w.head_dim];
  __syncthreads();
  float sums[kPairs] = {};
  for (int c = 0; c < w.head_dim && at < w.count; c += 4) {
    const Chunk<float> key = load_chunk(w.k + static_cast<int64_t>(at) * w.head_dim, c, w.head_dim, w.aligned);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      if (pair >= pairs) break;
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[pair] = __fmaf_rn(key.at(e), memory.queries[pair][c + e], sums[pair]);
    }
  }
#pragma unroll
  for (int pair = 0; pair < kPairs; ++pair)
    if (pair < pairs) memory.scores[pair][at] = at < seen(pair) ? sums[pair] : -INFINITY;
  __syncthreads();
}

// Step 2: each warp computes the softmax of every fourth pair.
__device__ __forceinline__ void softmax_rows(const SplitWork<float>& w, int pairs, float2* peaks,
                                             AttentionMemory<float>& memory) {
  const int lane = threadIdx.x % 32;
  for (int pair = threadIdx.x / 32; pair < pairs; pair += kAttentionWarps) {
    float* scores = memory.scores[pair];
    float peak = fmaxf(fmaxf(scores[lane], scores[lane + 32]), fmaxf(scores[lane + 64], scores[lane + 96])), mass = 0;
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, apart));
    const float base = peak == -INFINITY ? 0.0f : peak;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float weight = weigh<float>(scores[lane + 32 * i] - base, w.factor);
      scores[lane + 32 * i] = weight;
      mass += weight;
    }
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) mass += __shfl_xor_sync(~0u, mass, apart);
    if (lane == 0) peaks[pair] = make_float2(peak, mass);
  }
  __syncthreads();
}

// Step 3: each thread sums one value column for all pairs.
template <class Query, class Seen>
__device__ __forceinline__ void attend_split(const SplitWork<float>& w, int pairs, Query query, Seen seen,
                                             float2* peaks, float* values, AttentionMemory<float>& memory) {
  score_rows(w, pairs, query, seen, memory);
  softmax_rows(w, pairs, peaks, memory);
  for (int c = threadIdx.x; c < w.head_dim; c += kAttentionThreads) {
    float sums[kPairs] = {};
    const int common = max(0, min(seen(0), w.count));  // positions that every pair sees
    for (int at = 0; at < common; ++at) {
      const float value = w.v[static_cast<int64_t>(at) * w.head_dim + c];
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair)
        if (pair < pairs) sums[pair] = __fmaf_rn(memory.scores[pair][at], value, sums[pair]);
    }
    for (int at = common; at < w.count; ++at) {  // an unseen value may be infinite, and 0 * inf is NaN
      const float value = w.v[static_cast<int64_t>(at) * w.head_dim + c];
      for (int pair = 0; pair < pairs; ++pair)
        if (at < seen(pair)) sums[pair] = __fmaf_rn(memory.scores[pair][at], value, sums[pair]);
    }
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair)
      if (pair < pairs) values[static_cast<int64_t>(pair) * w.head_dim + c] = sums[pair];
  }
}

}  // namespace lsk
