// Small kernels that use what the stand-in offers, for its own tests.
#pragma once

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

namespace lsk::sample {

// out[r] = sum of x[r, :]: per-thread sums, a shuffle, shared memory, a barrier.
template <class T>
__global__ void __launch_bounds__(128) row_sum_kernel(const T* x, float* out, int64_t width) {
  __shared__ float partial[4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < width; i += blockDim.x) sum += static_cast<float>(x[blockIdx.x * width + i]);
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
  if (lane == 0) partial[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
}

template <class T>
cudaError_t row_sum(const T* x, float* out, int64_t rows, int64_t width, cudaStream_t stream) {
  const Launch where{.grid = dim3(static_cast<unsigned>(rows)), .block = dim3(128), .stream = stream};
  return launch(where, row_sum_kernel<T>, x, out, width);
}

// out[i] = x[n - 1 - i] by way of shared memory, filled by cp.async 16 bytes at a time; n is a multiple of 128.
__global__ void reverse_kernel(const float* x, float* out, int64_t n) {
  float* tile = ptx::dynamic_shared<float>();
  const int64_t begin = blockIdx.x * int64_t{128};
  ptx::cp_async<16>(tile + 4 * threadIdx.x, x + begin + 4 * threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < 128; i += 32) out[n - 1 - begin - i] = tile[i];
}

inline cudaError_t reverse(const float* x, float* out, int64_t n, cudaStream_t stream) {
  const Launch where{.grid = dim3(static_cast<unsigned>(n / 128)), .block = dim3(32), .shared = 512, .stream = stream};
  return launch(where, reverse_kernel, x, out, n);
}

// d[16, 8] = a[16, 16] b[8, 16]^T by one warp.
template <class T>
__global__ void product_kernel(const T* a, const T* b, float* d) {
  __shared__ __align__(16) T left[16 * 16];
  __shared__ __align__(16) T right[8 * 16];
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) left[i] = a[i];
  for (int i = lane; i < 128; i += 32) right[i] = b[i];
  __syncwarp();
  uint32_t rows[4], columns[2];
  ptx::ldmatrix(rows, left + lane % 16 * 16 + lane / 16 * 8);
  ptx::ldmatrix(columns, right + lane % 8 * 16 + lane / 8 % 2 * 8);
  float sums[4] = {};
  ptx::mma<T>(sums, rows, columns);
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

template <class T>
cudaError_t product(const T* a, const T* b, float* d, cudaStream_t stream) {
  return launch({.grid = dim3(1), .block = dim3(32), .stream = stream}, product_kernel<T>, a, b, d);
}

// out[8, 8] = x[8, 8]^T
__global__ void transpose_kernel(const uint16_t* x, uint16_t* out) {
  __shared__ __align__(16) uint16_t tile[64];
  for (int i = threadIdx.x; i < 64; i += 32) tile[i] = x[i];
  __syncwarp();
  uint32_t pair[1];
  ptx::ldmatrix_trans(pair, tile + threadIdx.x % 8 * 8);
  reinterpret_cast<uint32_t*>(out)[threadIdx.x] = pair[0];
}

inline cudaError_t transpose(const uint16_t* x, uint16_t* out, cudaStream_t stream) {
  return launch({.grid = dim3(1), .block = dim3(32), .stream = stream}, transpose_kernel, x, out);
}

template <class To, class From>
__global__ void convert_kernel(const From* x, To* out, int64_t n) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    out[i] = static_cast<To>(x[i]);
}

template <class To, class From>
cudaError_t convert(const From* x, To* out, int64_t n, cudaStream_t stream) {
  return launch({.grid = dim3(4), .block = dim3(64), .stream = stream}, convert_kernel<To, From>, x, out, n);
}

// out = 2 x + 1 by two launches, the second dependent on the first.
__global__ void double_kernel(const float* x, float* y) { y[threadIdx.x] = 2.0f * x[threadIdx.x]; }

__global__ void increment_kernel(const float* y, float* out) {
  ptx::dependency_wait();
  out[threadIdx.x] = y[threadIdx.x] + 1.0f;
}

// The mistake of reading before the wait.
__global__ void hasty_kernel(const float* y, float* out) {
  const float value = y[threadIdx.x];
  ptx::dependency_wait();
  out[threadIdx.x] = value + 1.0f;
}

inline cudaError_t chain(const float* x, float* y, float* out, int64_t n, bool hasty, cudaStream_t stream) {
  const dim3 block(static_cast<unsigned>(n));
  LSK_RETURN_IF_ERROR(launch({.grid = dim3(1), .block = block, .stream = stream}, double_kernel, x, y));
  const Launch second{.grid = dim3(1), .block = block, .stream = stream, .dependent = true};
  return launch(second, hasty ? hasty_kernel : increment_kernel, y, out);
}

// What a test has the blocks of `joined_sum` do wrong.
enum class Mistake { none, early_ticket, relaxed_ticket, first_joins, all_clear, shared_parts, two_barriers };

// out = sum of x [blocks, width]: each block leaves its part, and the last one that takes a ticket joins them.
__global__ void joined_sum_kernel(const float* x, __half* parts, unsigned* counter, float* out, int width,
                                  Mistake own) {
  __shared__ bool last;
  if (own == Mistake::early_ticket && threadIdx.x == 0) last = ptx::ticket(counter) == gridDim.x - 1;
  if (threadIdx.x == 0) {
    float sum = 0.0f;
    for (int i = 0; i < width; ++i) sum += x[blockIdx.x * width + i];
    parts[own == Mistake::shared_parts ? blockIdx.x / 2 : blockIdx.x] = sum;
  }
  if (own == Mistake::two_barriers && threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  if (own != Mistake::early_ticket && threadIdx.x == 0) {
    const unsigned before = own == Mistake::relaxed_ticket ? atomicAdd(counter, 1u) : ptx::ticket(counter);
    last = before == (own == Mistake::first_joins ? 0 : gridDim.x - 1);
  }
  __syncthreads();
  if (threadIdx.x == 0 && (last || own == Mistake::all_clear)) *counter = 0;
  if (threadIdx.x != 32 || !last) return;
  float sum = 0.0f;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += static_cast<float>(parts[i]);
  *out = sum;
}

inline cudaError_t joined_sum(const float* x, __half* parts, unsigned* counter, float* out, int64_t blocks,
                              int64_t width, Mistake own, cudaStream_t stream) {
  const Launch where{.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(64), .stream = stream};
  return launch(where, joined_sum_kernel, x, parts, counter, out, static_cast<int>(width), own);
}

// x[i] = x[i + 1] in place, which one block can do and several cannot.
__global__ void shift_kernel(float* x) {
  float* own = x + blockIdx.x * blockDim.x + threadIdx.x;
  const float next = own[1];
  __syncthreads();
  *own = next;
}

inline cudaError_t shift(float* x, int64_t blocks, cudaStream_t stream) {
  return launch({.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(64), .stream = stream}, shift_kernel, x);
}

// out[block] = how often other threads count between two counts of its own, a barrier apart.
__global__ void turns_kernel(unsigned* counter, unsigned* out) {
  const unsigned before = atomicAdd(counter, 1u);
  __syncthreads();
  const unsigned after = atomicAdd(counter, 1u);
  if (threadIdx.x == 0) out[blockIdx.x] = after - before - 1;
}

inline cudaError_t turns(unsigned* counter, unsigned* out, int64_t blocks, cudaStream_t stream) {
  return launch({.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(1), .stream = stream}, turns_kernel,
                counter, out);
}

}  // namespace lsk::sample
