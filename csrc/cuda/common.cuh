// What the kernels share: numbers, 16-byte chunks of a row, where a row lies in the cache, chains of launches.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace lsk {

// All kernels that stream weights, and the norms, whose order of additions they must share, have blocks of this shape.
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

// A row is read in chunks of 16 bytes. The four lanes of a quad (4 g ... 4 g + 3) take four chunks, one block of 64
// bytes, and the eight warps eight blocks, so that a step of the thread block reads 512 bytes of each row.
template <class T>
constexpr int kChunk = 16 / sizeof(T);
template <class T>
constexpr int kBlock = 4 * kChunk<T>;

template <class T>
struct alignas(16) Chunk {
  T at[kChunk<T>];
};

// How many blocks of a row this warp takes: the i-th is block i * kWarps + warp.
template <class T>
__device__ __forceinline__ int own_blocks(int width, int warp) {
  const int blocks = (width + kBlock<T> - 1) / kBlock<T>;
  return (blocks - warp + kWarps - 1) / kWarps;
}

template <class T>
__device__ __forceinline__ int own_column(int i, int warp, int t) {
  return (i * kWarps + warp) * kBlock<T> + t * kChunk<T>;
}

// Elements of `row` from `column` on, zero from `width` on. With `aligned`, row and width are multiples of 16 bytes.
template <class T>
__device__ __forceinline__ Chunk<T> load_chunk(const T* row, int column, int width, bool aligned) {
  Chunk<T> chunk{};
  if (aligned) {
    if (column < width) chunk = *reinterpret_cast<const Chunk<T>*>(row + column);
  } else {
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e)
      if (column + e < width) chunk.at[e] = row[column + e];
  }
  return chunk;
}

// The same into shared memory, asynchronously where 16 bytes can be copied at once; a null row is zero.
template <class T>
__device__ __forceinline__ void copy_chunk(Chunk<T>* shared, const T* row, int column, int width, bool aligned) {
  if (aligned && row != nullptr && column < width) {
    ptx::cp_async<16>(shared, row + column);
  } else {
    *shared = load_chunk(row, column, row == nullptr ? 0 : width, false);
  }
}

template <class T>
__device__ __forceinline__ void store_chunk(T* row, int column, int width, bool aligned, const Chunk<T>& chunk) {
  if (aligned) {
    if (column < width) *reinterpret_cast<Chunk<T>*>(row + column) = chunk;
  } else {
#pragma unroll
    for (int e = 0; e < kChunk<T>; ++e)
      if (column + e < width) row[column + e] = chunk.at[e];
  }
}

// Rows of `width` elements, `pitch` elements apart.
template <class T>
struct Rows {
  T* data = nullptr;
  int64_t pitch = 0;

  __host__ __device__ T* row(int64_t r) const { return data + r * pitch; }
  __host__ __device__ bool aligned() const {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && pitch * sizeof(T) % 16 == 0;
  }
};

template <class T>
bool is_aligned(const T* pointer, int64_t width) {
  return Rows<const T>{pointer, width}.aligned();
}

// The cache of one layer and the rows of a step in it: row r = b M + m sits at `seq_lens[b] + ahead + m`.
template <class T>
struct Cache {
  T *k = nullptr, *v = nullptr;       // [S, G, T, C]
  const int64_t* seq_lens = nullptr;  // [B]
  const int64_t* slots = nullptr;     // [B], null: sequence b has slot b
  int64_t ahead = 0;                  // positions written since seq_lens was, by earlier steps of a draft
  int batch = 0, rows = 0;            // B, M
  int groups = 0, capacity = 0, size = 0;
  int64_t slot_count = 0;  // S

  // Of row 0 of sequence b.
  __device__ int64_t position(int b) const { return seq_lens[b] + ahead; }

  // The slot of sequence b; -1 when it has none in the cache.
  __device__ int64_t slot(int b) const {
    const int64_t slot = slots == nullptr ? b : slots[b];
    return slot >= 0 && slot < slot_count ? slot : -1;
  }

  // Where group g of a slot starts in k and v.
  __device__ int64_t plane(int64_t slot, int g) const { return (slot * groups + g) * capacity * size; }
};

// Launches of one stream, one after the other. All but the first start early (programmatic dependent launch): what came
// before the chain, weights that were just written among it, is complete when its first kernel runs.
class Chain {
 public:
  explicit Chain(cudaStream_t stream) : stream_(stream) {}

  Launch next(dim3 grid, int threads, size_t shared = 0) {
    const Launch where{grid, dim3(threads), shared, stream_, started_};
    started_ = started_ || grid.x * grid.y * grid.z > 0;
    return where;
  }

 private:
  cudaStream_t stream_;
  bool started_ = false;
};

template <class I>
__host__ __device__ constexpr I divide_up(I a, I b) {
  return (a + b - 1) / b;
}

}  // namespace lsk
