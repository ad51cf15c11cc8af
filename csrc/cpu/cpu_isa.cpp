// cpu_isa: selects the instruction set.
#include <torch/headeronly/util/Exception.h>

#include <string>

#include "common/library.h"
#include "cpu/kernels.h"

namespace lsk {
namespace {

#if defined(__aarch64__)
constexpr char kNames[] = "neon_bf16, neon, portable, amx_emulated";
#else
constexpr char kNames[] = "amx, avx512_bf16, avx512, avx2, portable, amx_emulated";
#endif

std::string cpu_isa(const std::string& name) {
  STD_TORCH_CHECK(name.empty() || set_isa(name.c_str()), "the instruction set '", name, "' is not one of ", kNames,
                  " that this machine has");
  return isa_name();
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&lsk::cpu_isa)); }
