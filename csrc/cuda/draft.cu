// The kernels of draft, for every dtype.
#include "cuda/draft.cuh"

namespace lsk {

#define LSK_INSTANTIATE(T, W)                                                                                    \
  template cudaError_t draft(Chain&, const DraftArgs<T>&, const Layers<T>&, const Layers<T>&, const Head<T, W>&, \
                             HeadSampling, HeadLogits, int64_t);
LSK_INSTANTIATE(float, float)
LSK_INSTANTIATE(float, int8_t)
LSK_INSTANTIATE(__nv_bfloat16, __nv_bfloat16)
LSK_INSTANTIATE(__nv_bfloat16, int8_t)
LSK_INSTANTIATE(__half, __half)
LSK_INSTANTIATE(__half, int8_t)
#undef LSK_INSTANTIATE

}  // namespace lsk
