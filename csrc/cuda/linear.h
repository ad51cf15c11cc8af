// linear and swiglu: what launches them, compiled in linear.cu.
#pragma once

#include "common/weight.h"
#include "cuda/common.h"

namespace lsk {

// out [R, d_out] = x weight^T + bias + residual; weight [d_out, d_in], bias [d_out] and residual [R, d_out] may be
// null.
template <class T>
cudaError_t linear(Chain& chain, Rows<const T> x, const Weight& weight, const T* bias, Rows<const T> residual,
                   int64_t rows, int64_t d_in, int64_t d_out, Rows<T> out);

// out [R, F] = silu(y gate^T) * (y up^T), both of one format; y is x [R, D], or rms_norm(x) where there is a norm [D].
template <class T>
cudaError_t swiglu(Chain& chain, Rows<const T> x, const T* norm, float eps, const Weight& gate, const Weight& up,
                   int64_t rows, int64_t d_in, int64_t intermediate_size, Rows<T> out);

}  // namespace lsk
