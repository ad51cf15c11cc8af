// rms_norm on rows; the reductions are in rms_norm.cuh.
#include "cuda/layer_ops.h"
#include "cuda/rms_norm.cuh"

namespace lsk {

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    rms_norm_kernel(Rows<const T> x, const T* weight, float eps, int64_t rows, int width, bool aligned, Rows<T> out) {
  __shared__ float scratch[kWarps * kTokens];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokens;
  const int count = static_cast<int>(min(rows - first, static_cast<int64_t>(kTokens)));
  ptx::dependents_trigger();
  ptx::dependency_wait();
  x.data += first * x.pitch;
  out.data += first * out.pitch;
  float inverse[2];
  inverse_rms(x, count, width, eps, aligned, scratch, inverse);
  for (int i = 0; i < own_steps<T>(width, warp); ++i) {
    const int column = own_column<T>(i, warp, t);
    const Chunk<T> factors = load_chunk(weight, column, width, aligned);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = g + 8 * half;
      if (row >= count) continue;
      const Chunk<T> chunk = normed(load_chunk(x.row(row), column, width, aligned), inverse[half], factors);
      store_chunk(out.row(row), column, width, aligned, chunk);
    }
  }
}

template <class T>
cudaError_t rms_norm(Chain& chain, Rows<const T> x, const T* weight, float eps, int64_t rows, int64_t width,
                     Rows<T> out) {
  if (width == 0) return cudaSuccess;
  const bool aligned = x.aligned() && out.aligned() && is_aligned(weight, width);
  const dim3 grid(static_cast<unsigned>(divide_up<int64_t>(rows, kTokens)));
  return launch(chain.next(grid, kThreads), rms_norm_kernel<T>, x, weight, eps, rows, static_cast<int>(width), aligned,
                out);
}

#define LSK_INSTANTIATE(T) \
  template cudaError_t rms_norm(Chain&, Rows<const T>, const T*, float, int64_t, int64_t, Rows<T>);
LSK_FOR_ALL_DTYPES(LSK_INSTANTIATE)
#undef LSK_INSTANTIATE

}  // namespace lsk
