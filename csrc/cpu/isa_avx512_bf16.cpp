// The kernels compiled for one instruction set. Everything from outside is included before the target is set, so that
// no shared inline function is compiled for a machine that may not run it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/kernels.h"
#include "cpu/target.h"

#define LSK_MAX_BLOCK 6
#define LSK_FIXED "cpu/fixed_avx512.h"
#define LSK_PANELS "cpu/panels_avx512.h"
#define LSK_BF16_DOT

LSK_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c")

namespace lsk::avx512_bf16 {

#include "cpu/simd_avx512.h"
#include "cpu/impl_dot.h"
#include "cpu/impl_rows.h"
#include "cpu/impl_noise.h"
#include "cpu/impl_head.h"
#include "cpu/impl_accept.h"
#include "cpu/impl_attention.h"
#include "cpu/impl_loss.h"
#include "cpu/impl_table.h"

}  // namespace lsk::avx512_bf16

namespace lsk {

extern const Kernels<float> k_avx512_bf16_float = avx512_bf16::kTable<float>;
extern const Kernels<bf16> k_avx512_bf16_bf16 = avx512_bf16::kTable<bf16>;
extern const Kernels<f16> k_avx512_bf16_f16 = avx512_bf16::kTable<f16>;

}  // namespace lsk

LSK_TARGET_END
#endif
