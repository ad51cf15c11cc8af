// Compiles the kernels once per instruction set of this processor. setup.py compiles this file several times in
// parallel, each with -DLSK_ISA_<name>=1 for one instruction set; without such a define, one object has all of them.
//
// The target is set by a pragma around the kernels alone, and all other headers are included before it. A compiler flag
// such as -mavx2 would also apply to shared inline functions, and the linker could keep a copy that this processor
// cannot run.
#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !(LSK_ISA_amx || LSK_ISA_amx_emulated || LSK_ISA_avx512_bf16 || LSK_ISA_avx512 || LSK_ISA_avx2 || \
      LSK_ISA_neon_bf16 || LSK_ISA_neon || LSK_ISA_portable)
#define LSK_ALL_ISAS 1
#endif

// Macros of each section:
//   LSK_ISA        name of the instruction set and of its namespace
//   LSK_FEATURES   target features of the compiler
//   LSK_SIMD       header with the registers
//   LSK_MAX_BLOCK  activation rows multiplied at once
//   LSK_INT16      LSK_SIMD has 16-bit integers: packed integer weights times bf16 activations
//   LSK_PANELS     header of the kernels for interleaved integer weights
//   LSK_TILES      header with the tile registers: plain bf16 weights times bf16 activations; other types are those of
//                  another instruction set
//   LSK_WIDENS     convert weights to fp32 once for many activation rows
//   LSK_BF16_DOT, LSK_BFDOT  dot products of bf16 pairs: AVX-512, Arm

#if defined(LSK_AMX) && (LSK_ALL_ISAS || LSK_ISA_amx)
#define LSK_ISA amx
#define LSK_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c,amx-tile,amx-bf16"
#define LSK_SIMD "cpu/simd_avx512.h"
#define LSK_MAX_BLOCK 6
#define LSK_INT16
#define LSK_PANELS "cpu/panels_avx512.h"
#define LSK_TILES "cpu/tiles_amx.h"
#define LSK_BF16_DOT
#include "cpu/impl.h"
#endif

#if defined(__x86_64__) && (LSK_ALL_ISAS || LSK_ISA_avx512_bf16)
#define LSK_ISA avx512_bf16
#define LSK_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,avx2,fma,f16c"
#define LSK_SIMD "cpu/simd_avx512.h"
#define LSK_MAX_BLOCK 6
#define LSK_INT16
#define LSK_PANELS "cpu/panels_avx512.h"
#define LSK_BF16_DOT
#include "cpu/impl.h"
#endif

#if defined(__x86_64__) && (LSK_ALL_ISAS || LSK_ISA_avx512)
#define LSK_ISA avx512
#define LSK_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#define LSK_SIMD "cpu/simd_avx512.h"
#define LSK_MAX_BLOCK 6
#define LSK_INT16
#include "cpu/impl.h"
#endif

#if defined(__x86_64__) && (LSK_ALL_ISAS || LSK_ISA_avx2)
#define LSK_ISA avx2
#define LSK_FEATURES "avx2,fma,f16c"
#define LSK_SIMD "cpu/simd_avx2.h"
#define LSK_MAX_BLOCK 2
#define LSK_INT16
#define LSK_WIDENS
#include "cpu/impl.h"
#endif

#if defined(LSK_NEON_BF16) && (LSK_ALL_ISAS || LSK_ISA_neon_bf16)
#define LSK_ISA neon_bf16
#define LSK_FEATURES "arch=armv8.2-a+bf16"
#define LSK_SIMD "cpu/simd_neon.h"
#define LSK_MAX_BLOCK 1
#define LSK_INT16
#define LSK_BFDOT
#include "cpu/impl.h"
#endif

#if defined(__aarch64__) && (LSK_ALL_ISAS || LSK_ISA_neon)
#define LSK_ISA neon
#define LSK_SIMD "cpu/simd_neon.h"
#define LSK_MAX_BLOCK 1
#define LSK_INT16
#include "cpu/impl.h"
#endif

#if LSK_ALL_ISAS || LSK_ISA_portable
#define LSK_ISA portable
#define LSK_SIMD "cpu/simd_portable.h"
#define LSK_MAX_BLOCK 2
#include "cpu/impl.h"
#endif

#if LSK_ALL_ISAS || LSK_ISA_amx_emulated
#define LSK_ISA amx_emulated
#define LSK_SIMD "cpu/simd_portable.h"
#define LSK_MAX_BLOCK 2
#define LSK_TILES "cpu/tiles_emulated.h"
#include "cpu/impl.h"
#endif
