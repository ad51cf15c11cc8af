// The kernels compiled for one instruction set. Everything from outside is included before the target is set, so that
// no shared inline function is compiled for a machine that may not run it.

#include "cpu/kernels.h"

#define LSK_MAX_BLOCK 2

namespace lsk::portable {

#include "cpu/simd_portable.h"
#include "cpu/impl_dot.h"
#include "cpu/impl_rows.h"
#include "cpu/impl_noise.h"
#include "cpu/impl_head.h"
#include "cpu/impl_accept.h"
#include "cpu/impl_attention.h"
#include "cpu/impl_loss.h"
#include "cpu/impl_table.h"

}  // namespace lsk::portable

namespace lsk {

extern const Kernels<float> k_portable_float = portable::kTable<float>;
extern const Kernels<bf16> k_portable_bf16 = portable::kTable<bf16>;
extern const Kernels<f16> k_portable_f16 = portable::kTable<f16>;

}  // namespace lsk
