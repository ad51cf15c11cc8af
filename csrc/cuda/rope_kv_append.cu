// rope_kv_append: RoPE on halves, (a, b) -> (a cos - b sin, b cos + a sin); writes keys and values to the cache.
#include "cuda/rms_norm.cuh"
#include "cuda/layer_ops.h"
#include "cuda/rope.cuh"

namespace lsk {

// One head of one row by a warp, after its norm; out may be x.
template <class T>
__device__ __forceinline__ void rotate_head(const T* x, const T* norm, float eps, const Place<T>& place,
                                            const Angles& angles, int head_dim, T* out) {
  const int half = head_dim / 2;
  const float inverse = norm ? head_inverse_rms(x, head_dim, eps) : 1.0f;
  if (norm) __syncwarp();  // if out is x, all lanes must have read it
  const auto value = [&](int c) {
    const float raw = to_float(x[c]);
    return norm ? round_to<T>(normed(raw, inverse, to_float(norm[c]))) : raw;
  };
  for (int i = threadIdx.x % 32; i < half; i += 32) {
    const Pair rotated = place.rope({value(i), value(half + i)}, angles, half, i);
    out[i] = from_float<T>(rotated.a);
    out[half + i] = from_float<T>(rotated.b);
  }
}

// One warp per row and head: H heads of q, G of k, G of v.
template <class T>
__global__ void __launch_bounds__(kThreads) rope_kv_append_kernel(RopeArgs<T> a, Cache<T> cache, int64_t vectors) {
  const int64_t vector = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  ptx::dependents_trigger();
  ptx::dependency_wait();
  if (vector >= vectors) return;
  const int of_row = a.num_heads + cache.num_kv_heads * (a.v.data ? 2 : 1), head = static_cast<int>(vector % of_row);
  const int64_t r = vector / of_row;
  const Place<T> place(cache, r);
  if (head < a.num_heads) {
    const int at = head * cache.head_dim;
    rotate_head(a.q.row(r) + at, a.q_norm, a.eps, place, a.angles, cache.head_dim, a.q_out.row(r) + at);
  } else if (place.inside) {
    const int kv_head = (head - a.num_heads) % cache.num_kv_heads, at = kv_head * cache.head_dim;
    const int64_t target = place.at(cache, kv_head);
    if (head < a.num_heads + cache.num_kv_heads) {
      rotate_head(a.k.row(r) + at, a.k_norm, a.eps, place, a.angles, cache.head_dim, cache.k + target);
    } else {
      for (int c = threadIdx.x % 32; c < cache.head_dim; c += 32) cache.v[target + c] = a.v.row(r)[at + c];
    }
  }
}

template <class T>
cudaError_t rope_kv_append(Chain& chain, const RopeArgs<T>& args, const Cache<T>& cache) {
  const int64_t of_row = args.num_heads + cache.num_kv_heads * (args.v.data ? 2 : 1);
  const int64_t vectors = static_cast<int64_t>(cache.batch) * cache.rows * of_row;
  const dim3 grid(static_cast<unsigned>(divide_up<int64_t>(vectors, kWarps)));
  return launch(chain.next(grid, kThreads), rope_kv_append_kernel<T>, args, cache, vectors);
}

#define LSK_INSTANTIATE(T) template cudaError_t rope_kv_append(Chain&, const RopeArgs<T>&, const Cache<T>&);
LSK_FOR_ALL_DTYPES(LSK_INSTANTIATE)
#undef LSK_INSTANTIATE

}  // namespace lsk
