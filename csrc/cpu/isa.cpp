// Run-time selection of the instruction set.
#include <atomic>
#include <cstring>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#ifndef HWCAP2_BF16  // in the headers since Linux 5.7
#define HWCAP2_BF16 (1 << 14)
#endif
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "cpu/kernels.h"

#if defined(LSK_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lsk {

#define LSK_DECLARE(isa)                       \
  extern const Kernels<float> k_##isa##_float; \
  extern const Kernels<bf16> k_##isa##_bf16;   \
  extern const Kernels<f16> k_##isa##_f16;

#if defined(__x86_64__)
LSK_DECLARE(avx512_bf16)
LSK_DECLARE(avx512)
LSK_DECLARE(avx2)
#elif defined(__aarch64__)
#if defined(LSK_NEON_BF16)
LSK_DECLARE(neon_bf16)
#endif
LSK_DECLARE(neon)
#endif
LSK_DECLARE(portable)
#if defined(LSK_AMX)
extern const Kernels<bf16> k_amx_bf16;
#endif
extern const Kernels<bf16> k_amx_emulated_bf16;

namespace {

struct Isa {
  const char* name;
  bool (*available)();
  const Kernels<float>& f32;
  const Kernels<bf16>& b16;
  const Kernels<f16>& h16;
};

#if defined(LSK_NEON_BF16)
bool has_bf16() {
#if defined(__linux__)
  return getauxval(AT_HWCAP2) & HWCAP2_BF16;
#elif defined(__APPLE__)
  int found = 0;
  size_t size = sizeof(found);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0 && found;
#else
  return false;
#endif
}
#endif

#if defined(LSK_AMX)
// Whether the processor has bf16 tiles, and Linux permits this process to use them. A process must request permission.
bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // cpuid leaf 7, edx
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kBf16) || !(d & kTile)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#define LSK_ISA(isa, available) \
  {#isa, []() -> bool { return available; }, k_##isa##_float, k_##isa##_bf16, k_##isa##_f16}

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
#define LSK_AVX2 (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
#define LSK_AVX512                                                                        \
  (LSK_AVX2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && \
   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
#define LSK_AVX512_BF16 (LSK_AVX512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni"))
#if defined(LSK_AMX)
    {"amx", []() -> bool { return LSK_AVX512_BF16 && has_amx(); }, k_avx512_bf16_float, k_amx_bf16, k_avx512_bf16_f16},
#endif
    LSK_ISA(avx512_bf16, LSK_AVX512_BF16),
    LSK_ISA(avx512, LSK_AVX512),
    LSK_ISA(avx2, LSK_AVX2),
#elif defined(__aarch64__)
#if defined(LSK_NEON_BF16)
    LSK_ISA(neon_bf16, has_bf16()),
#endif
    LSK_ISA(neon, true),
#endif
    LSK_ISA(portable, true),
    {"amx_emulated", []() -> bool { return true; }, k_portable_float, k_amx_emulated_bf16, k_portable_f16},
};

const Isa* best() {
  for (const Isa& isa : kIsas)
    if (isa.available()) return &isa;
  return nullptr;  // unreachable: portable is always available
}

std::atomic<const Isa*> current{best()};

}  // namespace

const char* isa_name() { return current.load()->name; }

bool set_isa(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) == 0 && isa.available()) {
      current.store(&isa);
      return true;
    }
  }
  return false;
}

template <>
const Kernels<float>& kernels<float>() {
  return current.load()->f32;
}
template <>
const Kernels<bf16>& kernels<bf16>() {
  return current.load()->b16;
}
template <>
const Kernels<f16>& kernels<f16>() {
  return current.load()->h16;
}

}  // namespace lsk
