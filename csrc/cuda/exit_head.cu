// The kernels of exit_head, for every dtype of states and weights.
#include "cuda/exit_head.cuh"

namespace lsk {

#define LSK_INSTANTIATE(T, W)                                                                                  \
  template cudaError_t exit_head_tiles(Chain&, const Head<T, W>&, Rows<const T>, int64_t, const HeadSampling&, \
                                       HeadLogits, Choice*);
LSK_INSTANTIATE(float, float)
LSK_INSTANTIATE(float, int8_t)
LSK_INSTANTIATE(__nv_bfloat16, __nv_bfloat16)
LSK_INSTANTIATE(__nv_bfloat16, int8_t)
LSK_INSTANTIATE(__half, __half)
LSK_INSTANTIATE(__half, int8_t)
#undef LSK_INSTANTIATE

}  // namespace lsk
