// The kernels of verify_attention, for every dtype.
#include "cuda/verify_attention.cuh"

namespace lsk {

#define LSK_INSTANTIATE(T)                                                                                      \
  template cudaError_t verify_attention(Chain&, Rows<const T>, const Cache<T>&, const AttentionScratch&, void*, \
                                        Rows<T>);
LSK_INSTANTIATE(float)
LSK_INSTANTIATE(__nv_bfloat16)
LSK_INSTANTIATE(__half)
#undef LSK_INSTANTIATE

}  // namespace lsk
