// The kernels of linear and swiglu, for every dtype.
#include "cuda/linear.cuh"

namespace lsk {

#define LSK_INSTANTIATE(T)                                                                                            \
  template cudaError_t linear(Chain&, Rows<const T>, const Weight&, const T*, Rows<const T>, int64_t, int64_t,        \
                              int64_t, Rows<T>);                                                                      \
  template cudaError_t swiglu(Chain&, Rows<const T>, const T*, float, const Weight&, const Weight&, int64_t, int64_t, \
                              int64_t, Rows<T>);
LSK_INSTANTIATE(float)
LSK_INSTANTIATE(__nv_bfloat16)
LSK_INSTANTIATE(__half)
#undef LSK_INSTANTIATE

}  // namespace lsk
