// linear and swiglu: matmuls with few rows of x. The weights are streamed once per 64 rows of x (16 in fp32). W is T,
// or the packed format.
#include "cuda/layer_ops.h"
#include "cuda/packed_tile.cuh"

namespace lsk {

template <class T>
struct LinearEnd {
  const T* bias;           // [d_out] or null
  Rows<const T> residual;  // [R, d_out] or null
  Rows<T> out;             // [R, d_out]
};

// out = x weight^T + bias + residual for 16 weight rows and up to 16 GROUPS rows of x. Past the end, the last weight
// row is loaded again and its sums are ignored.
template <class T, class W, int GROUPS>
__global__ void __launch_bounds__(kThreads, kResident<T, W, 1, GROUPS>)
    linear_kernel(Input<T> in, MatrixOf<T, W> weight, int d_out, LinearEnd<T> end) {
  auto& memory = *ptx::dynamic_shared<typename Stream<T, W, 1, GROUPS>::Memory>();
  const TileWork work(in.rows, GROUPS * kTokens);
  const int begin = work.tile * kTileRows;
  ptx::dependents_trigger();
  Stream<T, W, 1, GROUPS> stream(in, weight, work.first, work.tokens, memory);
#pragma unroll
  for (int half = 0; half < 2; ++half) stream.take(half, weight, min(begin + stream.g + 8 * half, d_out - 1));
  stream.prefetch();
  static_assert(kThreads == kTileRows * kTokens);
  const int row = threadIdx.x % kTileRows, first = threadIdx.x / kTileRows, n = begin + row;
  const float bias = n < d_out && end.bias ? to_float(end.bias[n]) : 0.0f;
  ptx::dependency_wait();
  float residual[GROUPS];
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    const int token = group * kTokens + first;
    const bool adds = token < work.tokens && n < d_out && end.residual.data;
    residual[group] = adds ? to_float(end.residual.row(work.first + token)[n]) : 0.0f;
  }
  stream.run();
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    const int token = group * kTokens + first;
    if (token >= work.tokens || n >= d_out) continue;
    const float sum = finish(memory.total(0, row, token), bias, residual[group]);
    end.out.row(work.first + token)[n] = from_float<T>(sum);
  }
}

__device__ __forceinline__ float silu(float x) { return x / (1.0f + expf(-x)); }

// out = silu(x gate^T) * (x up^T) for 16 rows of both weights and up to 16 GROUPS rows of x.
template <class T, class W, int GROUPS>
__global__ void __launch_bounds__(kThreads, kResident<T, W, 2, GROUPS>)
    swiglu_kernel(Input<T> in, MatrixOf<T, W> gate, MatrixOf<T, W> up, int intermediate_size, Rows<T> out) {
  auto& memory = *ptx::dynamic_shared<typename Stream<T, W, 2, GROUPS>::Memory>();
  const TileWork work(in.rows, GROUPS * kTokens);
  const int begin = work.tile * kTileRows;
  ptx::dependents_trigger();
  Stream<T, W, 2, GROUPS> stream(in, gate, work.first, work.tokens, memory);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int n = min(begin + stream.g + 8 * half, intermediate_size - 1);
    stream.take(half, gate, n);
    stream.take(2 + half, up, n);
  }
  stream.prefetch();
  ptx::dependency_wait();
  stream.run();
  const int row = threadIdx.x % kTileRows, n = begin + row;
  if (n >= intermediate_size) return;
  for (int token = threadIdx.x / kTileRows; token < work.tokens; token += kTokens) {
    const float value = silu(memory.total(0, row, token)) * memory.total(1, row, token);
    out.row(work.first + token)[n] = from_float<T>(value);
  }
}

template <class T>
cudaError_t linear(Chain& chain, Rows<const T> x, const Weight& weight, const T* bias, Rows<const T> residual,
                   int64_t rows, int64_t d_in, int64_t d_out, Rows<T> out) {
  const Input<T> in = input<T>(x, nullptr, 0.0f, rows, d_in, {weight});
  LSK_RETURN_IF_ERROR(check_weights(in, {weight}));
  const int64_t tiles = divide_up<int64_t>(d_out, kTileRows);
  return with_stream<T>(weight.format, rows, [&]<class W>(W*, auto groups) {
    constexpr int kGroups = groups.value;
    const dim3 grid = TileWork::grid(rows, kGroups * kTokens, tiles);
    return launch(chain.next(grid, kThreads, sizeof(typename Stream<T, W, 1, kGroups>::Memory)),
                  linear_kernel<T, W, kGroups>, in, matrix_of<T, W>(weight, d_out), static_cast<int>(d_out),
                  LinearEnd<T>{bias, residual, out});
  });
}

template <class T>
cudaError_t swiglu(Chain& chain, Rows<const T> x, const T* norm, float eps, const Weight& gate, const Weight& up,
                   int64_t rows, int64_t d_in, int64_t intermediate_size, Rows<T> out) {
  const Input<T> in = input<T>(x, norm, eps, rows, d_in, {gate, up});
  LSK_RETURN_IF_ERROR(check_weights(in, {gate, up}));
  const int64_t tiles = divide_up<int64_t>(intermediate_size, kTileRows);
  return with_stream<T>(gate.format, rows, [&]<class W>(W*, auto groups) {
    constexpr int kGroups = groups.value;
    const dim3 grid = TileWork::grid(rows, kGroups * kTokens, tiles);
    return launch(chain.next(grid, kThreads, sizeof(typename Stream<T, W, 2, kGroups>::Memory)),
                  swiglu_kernel<T, W, kGroups>, in, matrix_of<T, W>(gate, intermediate_size),
                  matrix_of<T, W>(up, intermediate_size), static_cast<int>(intermediate_size), out);
  });
}

#define LSK_INSTANTIATE(T)                                                                                            \
  template cudaError_t linear(Chain&, Rows<const T>, const Weight&, const T*, Rows<const T>, int64_t, int64_t,        \
                              int64_t, Rows<T>);                                                                      \
  template cudaError_t swiglu(Chain&, Rows<const T>, const T*, float, const Weight&, const Weight&, int64_t, int64_t, \
                              int64_t, Rows<T>);
LSK_FOR_ALL_DTYPES(LSK_INSTANTIATE)
#undef LSK_INSTANTIATE

}  // namespace lsk
