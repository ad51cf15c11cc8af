// Shared by the kernels: number conversion, and 16-byte chunks of a row.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/common.h"
#include "cuda/ptx.cuh"

namespace lsk {

// Block shape of all kernels that stream weights, and of the norms, which must add in the same order.
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kTokens = 16;  // rows of x that one block takes at once

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, float>) return x;
}

template <class T>
__device__ __forceinline__ float round_to(float x) {
  return to_float(from_float<T>(x));
}

// Two numbers, rounded to a 16-bit T, in one word.
template <class T>
__device__ __forceinline__ uint32_t to_pair(float first, float second) {
  const T pair[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t bits;
  memcpy(&bits, pair, 4);
  return bits;
}

// A row is read in chunks of 16 bytes. The four lanes of a quad (4 g ... 4 g + 3) read four chunks, 64 bytes, and the
// eight warps read 512 bytes of each row per step of the thread block.
template <class T>
constexpr int kChunk = 16 / sizeof(T);
template <class T>
constexpr int kQuadColumns = 4 * kChunk<T>;

// Words, not numbers: the compiler would unpack an array of 16-bit numbers right after the load, and so wait for it.
template <class T>
struct alignas(16) Chunk {
  uint32_t words[4];

  __device__ __forceinline__ T at(int e) const {
    T number;
    if constexpr (sizeof(T) == 4) {
      memcpy(&number, &words[e], 4);
    } else {
      static_assert(sizeof(T) == 2);
      const uint16_t half = static_cast<uint16_t>(words[e / 2] >> e % 2 * 16);
      memcpy(&number, &half, 2);
    }
    return number;
  }
};

// Steps of this warp along a row: in step i it reads columns from (i * kWarps + warp) * kQuadColumns on.
template <class T>
__device__ __forceinline__ int own_steps(int width, int warp) {
  const int blocks = (width + kQuadColumns<T> - 1) / kQuadColumns<T>;
  return (blocks - warp + kWarps - 1) / kWarps;
}

template <class T>
__device__ __forceinline__ int own_column(int i, int warp, int t) {
  return (i * kWarps + warp) * kQuadColumns<T> + t * kChunk<T>;
}

// The chunk of `row` at `column`, zero from `width` on. Aligned: row and width are multiples of 16 bytes, and one load
// suffices. Otherwise a loop shifts in one element at a time: slow but compact, since such rows are rare.
template <bool Aligned, class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* row, int column, int width) {
  Chunk<T> chunk{};
  if constexpr (Aligned) {
    if (column < width) chunk = *reinterpret_cast<const Chunk<T>*>(row + column);
  } else {
    uint32_t (&words)[4] = chunk.words;
#pragma unroll 1
    for (int e = 0; e < kChunk<T>; ++e) {
      const T element = column + e < width ? row[column + e] : T{};
      uint32_t next = 0;
      memcpy(&next, &element, sizeof element);
      if constexpr (sizeof(T) == 4) {
        words[0] = words[1], words[1] = words[2], words[2] = words[3], words[3] = next;
      } else {
        constexpr int kBits = 8 * sizeof(T);
        words[0] = __funnelshift_r(words[0], words[1], kBits), words[1] = __funnelshift_r(words[1], words[2], kBits);
        words[2] = __funnelshift_r(words[2], words[3], kBits), words[3] = __funnelshift_r(words[3], next, kBits);
      }
    }
  }
  return chunk;
}

// The same into shared memory; asynchronous if aligned.
template <bool Aligned, class T>
__device__ __forceinline__ void copy_chunk(Chunk<T>* shared, const T* row, int column, int width) {
  if constexpr (Aligned) {
    const bool inside = column < width;
    ptx::cp_async<16>(shared, row + (inside ? column : 0), inside ? 16 : 0);
  } else {
    *shared = load_chunk<false>(row, column, width);
  }
}

// Run-time choice. Do not use it in a loop of loads: the branch would keep them from overlapping.
template <class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* row, int column, int width, bool aligned) {
  return aligned ? load_chunk<true>(row, column, width) : load_chunk<false>(row, column, width);
}

template <class T>
__device__ __forceinline__ void copy_chunk(Chunk<T>* shared, const T* row, int column, int width, bool aligned) {
  aligned ? copy_chunk<true>(shared, row, column, width) : copy_chunk<false>(shared, row, column, width);
}

template <class T>
__device__ __forceinline__ void store_chunk(T* row, int column, int width, bool aligned, const Chunk<T>& chunk) {
  if (aligned) {
    if (column < width) *reinterpret_cast<Chunk<T>*>(row + column) = chunk;
  } else {
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e)
      if (column + e < width) row[column + e] = chunk.at(e);
  }
}

}  // namespace lsk
