// The kernels of rms_norm, for every dtype.
#include "cuda/rms_norm.cuh"

namespace lsk {

template cudaError_t rms_norm(Chain&, Rows<const float>, const float*, float, int64_t, int64_t, Rows<float>);
template cudaError_t rms_norm(Chain&, Rows<const __nv_bfloat16>, const __nv_bfloat16*, float, int64_t, int64_t,
                              Rows<__nv_bfloat16>);
template cudaError_t rms_norm(Chain&, Rows<const __half>, const __half*, float, int64_t, int64_t, Rows<__half>);

}  // namespace lsk
