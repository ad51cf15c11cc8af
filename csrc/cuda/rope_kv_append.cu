// The kernels of rope_kv_append, for every dtype.
#include "cuda/rope_kv_append.cuh"

namespace lsk {

template cudaError_t rope_kv_append(Chain&, const RopeArgs<float>&, const Cache<float>&);
template cudaError_t rope_kv_append(Chain&, const RopeArgs<__nv_bfloat16>&, const Cache<__nv_bfloat16>&);
template cudaError_t rope_kv_append(Chain&, const RopeArgs<__half>&, const Cache<__half>&);

}  // namespace lsk
