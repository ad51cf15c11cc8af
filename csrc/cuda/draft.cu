// The kernels of draft, for every dtype.
#include "cuda/draft.cuh"

namespace lsk {

#define LSK_INSTANTIATE(T)                                                                                    \
  template cudaError_t draft(Chain&, const DraftArgs<T>&, const Layers<T>&, const Layers<T>&, const Head<T>&, \
                             HeadSampling, HeadLogits, int64_t);
LSK_INSTANTIATE(float)
LSK_INSTANTIATE(__nv_bfloat16)
LSK_INSTANTIATE(__half)
#undef LSK_INSTANTIATE

}  // namespace lsk
