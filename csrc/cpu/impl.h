// The kernels of one instruction set, which the macros of isa_kernels.cpp describe. No include guard: included once for
// each. All headers below are included inside its namespace.

#define LSK_STRING(text) #text
#define LSK_PRAGMA(text) _Pragma(LSK_STRING(text))
#define LSK_JOINED(a, b, c) a##b##c
#define LSK_JOIN(a, b, c) LSK_JOINED(a, b, c)

#if defined(LSK_FEATURES) && defined(__clang__)
LSK_PRAGMA(clang attribute push(__attribute__((target(LSK_FEATURES))), apply_to = function))
#elif defined(LSK_FEATURES)
#pragma GCC push_options
LSK_PRAGMA(GCC target(LSK_FEATURES))
#endif

namespace lsk {
namespace LSK_ISA {

#include LSK_SIMD
#include "cpu/impl_dot.h"
#include "cpu/impl_rows.h"
#include "cpu/impl_noise.h"
#include "cpu/impl_head.h"
#include "cpu/impl_attention.h"
#include "cpu/impl_loss.h"

template <class T>
constexpr Kernels<T> kTable = {
    tile<T>,        expand_row<T>, rms_norm<T>,  linear<T>, swiglu<T>,   head<T>,    rope<T>,       attend<T>,
    attend_rows<T>, combine<T>,    softmax_part, softmax,   sample_part, uniform_of, loss_terms<T>, loss_slopes<T>,
};

}  // namespace LSK_ISA

extern const Kernels<bf16> LSK_JOIN(k_, LSK_ISA, _bf16) = LSK_ISA::kTable<bf16>;
#ifndef LSK_TILES
extern const Kernels<float> LSK_JOIN(k_, LSK_ISA, _float) = LSK_ISA::kTable<float>;
extern const Kernels<f16> LSK_JOIN(k_, LSK_ISA, _f16) = LSK_ISA::kTable<f16>;
#endif

}  // namespace lsk

#if defined(LSK_FEATURES) && defined(__clang__)
#pragma clang attribute pop
#elif defined(LSK_FEATURES)
#pragma GCC pop_options
#endif

#undef LSK_STRING
#undef LSK_PRAGMA
#undef LSK_JOINED
#undef LSK_JOIN
#undef LSK_ISA
#undef LSK_FEATURES
#undef LSK_SIMD
#undef LSK_MAX_BLOCK
#undef LSK_INT16
#undef LSK_PANELS
#undef LSK_TILES
#undef LSK_WIDENS
#undef LSK_BF16_DOT
#undef LSK_BFDOT
