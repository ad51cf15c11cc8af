// linear and swiglu: products of a few rows with a matrix whose rows are streamed once for every 16 of them.
#pragma once

#include "cuda/linear.h"
#include "cuda/linear_tile.cuh"

namespace lsk {

template <class T>
struct LinearEnd {
  const T* bias;           // [d_out] or null
  Rows<const T> residual;  // [R, d_out] or null
  Rows<T> out;             // [R, d_out]
};

// out = x weight^T + bias + residual of 16 weight rows and up to 16 rows of x.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    linear_kernel(Input<T> in, const T* weight, int d_out, LinearEnd<T> end) {
  auto& memory = *ptx::dynamic_shared<TileMemory<T, 1>>();
  const TileWork work(in.rows);
  const int begin = work.tile * kTileRows;
  ptx::dependents_trigger();
  TileStream<T, 1> stream(in, work.first, work.tokens, memory);
#pragma unroll
  for (int half = 0; half < 2; ++half)
    stream.weight[half] = weight_row(weight, begin + stream.g + 8 * half, d_out, in.d_in);
  stream.prefetch();
  const int row = threadIdx.x % kTileRows, token = threadIdx.x / kTileRows, n = begin + row;
  const bool inside = token < work.tokens && n < d_out;
  const float bias = inside && end.bias ? to_float(end.bias[n]) : 0.0f;
  ptx::dependency_wait();
  const bool adds = inside && end.residual.data;
  const float residual = adds ? to_float(end.residual.row(work.first + token)[n]) : 0.0f;
  stream.run();
  if (inside) end.out.row(work.first + token)[n] = from_float<T>(finish(memory.total(0, row, token), bias, residual));
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// out = silu(x gate^T) * (x up^T) of 16 rows of both and up to 16 rows of x.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    swiglu_kernel(Input<T> in, const T* gate, const T* up, int intermediate_size, Rows<T> out) {
  auto& memory = *ptx::dynamic_shared<TileMemory<T, 2>>();
  const TileWork work(in.rows);
  const int begin = work.tile * kTileRows;
  ptx::dependents_trigger();
  TileStream<T, 2> stream(in, work.first, work.tokens, memory);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    stream.weight[half] = weight_row(gate, begin + stream.g + 8 * half, intermediate_size, in.d_in);
    stream.weight[2 + half] = weight_row(up, begin + stream.g + 8 * half, intermediate_size, in.d_in);
  }
  stream.prefetch();
  ptx::dependency_wait();
  stream.run();
  const int row = threadIdx.x % kTileRows, token = threadIdx.x / kTileRows, n = begin + row;
  if (token >= work.tokens || n >= intermediate_size) return;
  const float value = silu(memory.total(0, row, token)) * memory.total(1, row, token);
  out.row(work.first + token)[n] = from_float<T>(value);
}

template <class T>
cudaError_t linear(Chain& chain, Rows<const T> x, const T* weight, const T* bias, Rows<const T> residual, int64_t rows,
                   int64_t d_in, int64_t d_out, Rows<T> out) {
  return launch(
      chain.next(TileWork::grid(rows, divide_up<int64_t>(d_out, kTileRows)), kThreads, sizeof(TileMemory<T, 1>)),
      linear_kernel<T>, input<T>(x, nullptr, 0.0f, rows, d_in, {weight}), weight, static_cast<int>(d_out),
      LinearEnd<T>{bias, residual, out});
}

template <class T>
cudaError_t swiglu(Chain& chain, Rows<const T> x, const T* norm, float eps, const T* gate, const T* up, int64_t rows,
                   int64_t d_in, int64_t intermediate_size, Rows<T> out) {
  return launch(chain.next(TileWork::grid(rows, divide_up<int64_t>(intermediate_size, kTileRows)), kThreads,
                           sizeof(TileMemory<T, 2>)),
                swiglu_kernel<T>, input<T>(x, norm, eps, rows, d_in, {gate, up}), gate, up,
                static_cast<int>(intermediate_size), out);
}

}  // namespace lsk
