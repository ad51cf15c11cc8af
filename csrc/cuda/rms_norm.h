// rms_norm: what launches it, compiled in rms_norm.cu.
#pragma once

#include "cuda/common.h"

namespace lsk {

// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight, rows of `width`.
template <class T>
cudaError_t rms_norm(Chain& chain, Rows<const T> x, const T* weight, float eps, int64_t rows, int64_t width,
                     Rows<T> out);

}  // namespace lsk
