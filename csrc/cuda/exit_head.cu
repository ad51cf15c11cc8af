// The kernels of exit_head, for every dtype of states.
#include "cuda/exit_head.cuh"

namespace lsk {

#define LSK_INSTANTIATE(T)                                                                                  \
  template cudaError_t exit_head_tiles(Chain&, const Head<T>&, Rows<const T>, int64_t, const HeadSampling&, \
                                       HeadLogits, Choice*);
LSK_INSTANTIATE(float)
LSK_INSTANTIATE(__nv_bfloat16)
LSK_INSTANTIATE(__half)
#undef LSK_INSTANTIATE

}  // namespace lsk
