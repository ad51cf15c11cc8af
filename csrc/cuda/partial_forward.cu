// The kernels of partial_forward, for every dtype.
#include "cuda/partial_forward.cuh"

namespace lsk {

#define LSK_INSTANTIATE(T)                                                                     \
  template cudaError_t forward(Chain&, const ForwardArgs<T>&, const LayerWeights<T>*, int64_t, \
                               const ForwardScratch<T>&);
LSK_INSTANTIATE(float)
LSK_INSTANTIATE(__nv_bfloat16)
LSK_INSTANTIATE(__half)
#undef LSK_INSTANTIATE

}  // namespace lsk
