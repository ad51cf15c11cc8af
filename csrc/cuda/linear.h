// linear and swiglu: what launches them, compiled in linear.cu.
#pragma once

#include "cuda/common.h"

namespace lsk {

// out [R, N] = x weight^T + bias + residual; weight [N, D_in], bias [N] and residual [R, N] may be null.
template <class T>
cudaError_t linear(Chain& chain, Rows<const T> x, const T* weight, const T* bias, Rows<const T> residual, int64_t rows,
                   int64_t depth, int64_t outputs, Rows<T> out);

// out [R, F] = silu(y gate^T) * (y up^T); y is x [R, D], or rms_norm(x) where there is a norm [D].
template <class T>
cudaError_t swiglu(Chain& chain, Rows<const T> x, const T* norm, float eps, const T* gate, const T* up, int64_t rows,
                   int64_t depth, int64_t intermediate_size, Rows<T> out);

}  // namespace lsk
