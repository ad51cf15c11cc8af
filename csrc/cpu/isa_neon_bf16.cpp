// The kernels compiled for one instruction set. Everything from outside is included before the target is set, so that
// no shared inline function is compiled for a machine that may not run it.
#include "cpu/target.h"

#if defined(LSK_NEON_BF16)
#include <arm_neon.h>

#include "cpu/kernels.h"

#define LSK_MAX_BLOCK 1
#define LSK_FIXED "cpu/fixed_neon.h"
#define LSK_BFDOT

LSK_TARGET("arch=armv8.2-a+bf16")

namespace lsk::neon_bf16 {

#include "cpu/simd_neon.h"
#include "cpu/impl_dot.h"
#include "cpu/impl_rows.h"
#include "cpu/impl_noise.h"
#include "cpu/impl_head.h"
#include "cpu/impl_accept.h"
#include "cpu/impl_attention.h"
#include "cpu/impl_loss.h"
#include "cpu/impl_table.h"

}  // namespace lsk::neon_bf16

namespace lsk {

extern const Kernels<float> k_neon_bf16_float = neon_bf16::kTable<float>;
extern const Kernels<bf16> k_neon_bf16_bf16 = neon_bf16::kTable<bf16>;
extern const Kernels<f16> k_neon_bf16_f16 = neon_bf16::kTable<f16>;

}  // namespace lsk

LSK_TARGET_END
#endif
