// Storage types of the kernels: half-width floats are their bits.
#pragma once

#include <cstdint>

namespace lsk {

struct bf16 {
  uint16_t bits;
};

struct f16 {
  uint16_t bits;
};

}  // namespace lsk
