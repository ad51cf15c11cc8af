#include "cuda_emulation/sample.cuh"

#include "cuda_emulation/entry.h"

using namespace lsk;

EMULATED(row_sum)(const void* x, float* out, int64_t rows, int64_t width, int64_t dtype) {
  return emu::with_float_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return sample::row_sum<T>(static_cast<const T*>(x), out, rows, width, nullptr);
  });
}

EMULATED(reverse)(const float* x, float* out, int64_t n) { return sample::reverse(x, out, n, nullptr); }

EMULATED(product)(const void* a, const void* b, float* d, int64_t dtype) {
  if (dtype == 1) {
    return sample::product(static_cast<const __nv_bfloat16*>(a), static_cast<const __nv_bfloat16*>(b), d, nullptr);
  }
  return sample::product(static_cast<const __half*>(a), static_cast<const __half*>(b), d, nullptr);
}

EMULATED(chain)(const float* x, float* y, float* out, int64_t n, int64_t hasty) {
  return sample::chain(x, y, out, n, hasty != 0, nullptr);
}

EMULATED(transpose)(const uint16_t* x, uint16_t* out) { return sample::transpose(x, out, nullptr); }

EMULATED(to_float)(const void* x, float* out, int64_t n, int64_t dtype) {
  return emu::with_float_type(dtype, [&](auto* type) {
    return sample::convert(static_cast<const std::remove_pointer_t<decltype(type)>*>(x), out, n, nullptr);
  });
}

EMULATED(from_float)(const float* x, void* out, int64_t n, int64_t dtype) {
  return emu::with_float_type(dtype, [&](auto* type) {
    return sample::convert(x, static_cast<std::remove_pointer_t<decltype(type)>*>(out), n, nullptr);
  });
}

EMULATED(joined_sum)
(const float* x, void* parts, void* counter, float* out, int64_t blocks, int64_t width, int64_t mistake) {
  return sample::joined_sum(x, static_cast<__half*>(parts), static_cast<unsigned*>(counter), out, blocks, width,
                            static_cast<sample::Mistake>(mistake), nullptr);
}

EMULATED(shift)(float* x, int64_t blocks) { return sample::shift(x, blocks, nullptr); }

EMULATED(turns)(void* counter, void* out, int64_t blocks) {
  return sample::turns(static_cast<unsigned*>(counter), static_cast<unsigned*>(out), blocks, nullptr);
}
