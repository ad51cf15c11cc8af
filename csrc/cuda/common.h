// Shared by kernels and their launchers: rows, the KV cache of a layer, chains of launches. Also compiles with a host
// compiler.
#pragma once

#include <cstdint>

#include "cuda/launch.cuh"

// Instantiates launchers for the dtypes of activations. The tests compile less: the emulation what it calls,
// tools/sass.py bf16 alone.
#if defined(LSK_CUDA_EMULATION)
#define LSK_FOR_ALL_DTYPES(instantiate)
#elif defined(LSK_ONLY_BF16)
#define LSK_FOR_ALL_DTYPES(instantiate) instantiate(__nv_bfloat16)
#else
#define LSK_FOR_ALL_DTYPES(instantiate) instantiate(float) instantiate(__nv_bfloat16) instantiate(__half)
#endif

namespace lsk {

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
  int64_t ahead = 0;                  // positions written by earlier steps of a draft, not yet in seq_lens
  int batch = 0, rows = 0;            // B, M
  int num_kv_heads = 0, capacity = 0, head_dim = 0;
  int64_t num_slots = 0;  // S

  // Position of row 0 of sequence b; far below 0 if its length is outside of [0, T], so that no row is in the cache.
  __device__ int64_t position(int b) const {
    const int64_t length = seq_lens[b];
    return 0 <= length && length <= capacity ? length + ahead : -(int64_t{1} << 40);
  }

  // Slot of sequence b; -1 if it is outside of the cache.
  __device__ int64_t slot(int b) const {
    const int64_t slot = slots == nullptr ? b : slots[b];
    return slot >= 0 && slot < num_slots ? slot : -1;
  }

  // Offset of key/value head g of a slot in k and v.
  __device__ int64_t plane(int64_t slot, int g) const { return (slot * num_kv_heads + g) * capacity * head_dim; }
};

// Consecutive launches on one stream. All but the first use programmatic dependent launch; the first waits for all
// earlier work on the stream, such as weight updates.
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
