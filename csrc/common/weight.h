// The weight of a matmul, plain or packed: see layerskip_kernels/formats.py for what a packed one holds. Without torch.
#pragma once

#include <cstdint>

namespace lsk {

// Storage types of the CPU kernels: 16-bit floats as their bits.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// kRows is the int8 of a draft head, whose scales, one a row, are kept beside it.
enum class Format : uint8_t {
  kPlain,
  kRows,
  kInt8,
  kInt8Of128,
  kInt4,
  kInt4Of128,
  kInt4Zero,
  kInt4ZeroOf128,
  kFp8,
  kFp8Of128
};

constexpr int64_t kPackedBlock = 32;  // values that int4 packs together
constexpr int64_t kPanelRows = 16;    // rows of a panel

// How a group of a packed row is written: its scale, in fp16 or, of fp8, in fp32, its least value, if any, in fp16,
// then the values.
template <int kBits_, int kSize_, bool kHasScale_ = true, bool kHasZero_ = false, bool kIsFloat_ = false>
struct Group {
  static constexpr int kBits = kBits_, kSize = kSize_;
  static constexpr bool kHasScale = kHasScale_, kHasZero = kHasZero_, kIsFloat = kIsFloat_;
  static constexpr int kHeader = kIsFloat ? 4 : 2 * (kHasScale + kHasZero), kBytes = kHeader + kSize * kBits / 8;
  static constexpr int kBlocks = kSize / kPackedBlock, kBlockBytes = kPackedBlock * kBits / 8;

  static constexpr int64_t row_bytes(int64_t width) { return width / kSize * kBytes; }
  static constexpr bool divides(int64_t width) { return width % kSize == 0; }
};

// Calls f with a value of the Group that a packed format is.
template <class F>
auto with_group(Format format, F f) {
  switch (format) {
    case Format::kRows:
      return f(Group<8, 32, false>{});
    case Format::kInt8:
      return f(Group<8, 32>{});
    case Format::kInt8Of128:
      return f(Group<8, 128>{});
    case Format::kInt4:
      return f(Group<4, 32>{});
    case Format::kInt4Of128:
      return f(Group<4, 128>{});
    case Format::kInt4Zero:
      return f(Group<4, 32, true, true>{});
    case Format::kInt4ZeroOf128:
      return f(Group<4, 128, true, true>{});
    case Format::kFp8:
      return f(Group<8, 32, true, false, true>{});
    default:
      return f(Group<8, 128, true, false, true>{});
  }
}

constexpr bool is_integer(Format format) { return Format::kRows <= format && format < Format::kFp8; }

// Those that a row's bytes tell apart.
constexpr Format kPackedFormats[] = {Format::kInt8,     Format::kInt8Of128,     Format::kInt4, Format::kInt4Of128,
                                     Format::kInt4Zero, Format::kInt4ZeroOf128, Format::kFp8,  Format::kFp8Of128};

struct Weight {
  const uint8_t* data = nullptr;
  int64_t pitch = 0;  // bytes of a row
  Format format = Format::kPlain;
  bool panels = false;  // sixteen rows each are interleaved by group, as layerskip_kernels/formats.py says

  // Of panels, the panel of every sixteenth row.
  const uint8_t* row(int64_t n) const { return data + n * pitch; }
};

}  // namespace lsk
