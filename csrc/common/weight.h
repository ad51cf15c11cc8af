// Storage types, and the weight of a matmul: plain or packed (layout in layerskip_kernels/formats.py). Does not include
// torch.
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

// kRows: int8 rows of a draft head; a separate tensor has one scale per row.
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

constexpr int64_t kPackedBlock = 32;  // values of a packed block
constexpr int64_t kPanelRows = 16;    // rows of a panel

// Layout of a group in a packed row: scale (fp16; fp32 for fp8), minimum (fp16, if kHasZero), then the values.
template <int kBits_, int kSize_, bool kHasScale_ = true, bool kHasZero_ = false, bool kIsFloat_ = false>
struct Group {
  static constexpr int kBits = kBits_, kSize = kSize_;
  static constexpr bool kHasScale = kHasScale_, kHasZero = kHasZero_, kIsFloat = kIsFloat_;
  static constexpr int kHeader = kIsFloat ? 4 : 2 * (kHasScale + kHasZero), kBytes = kHeader + kSize * kBits / 8;
  static constexpr int kBlocks = kSize / kPackedBlock, kBlockBytes = kPackedBlock * kBits / 8;

  static constexpr int64_t row_bytes(int64_t width) { return width / kSize * kBytes; }
  static constexpr bool divides(int64_t width) { return width % kSize == 0; }
};

// Calls f with a value of the format's Group type.
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

// Formats that are recognized by the bytes of a row.
constexpr Format kPackedFormats[] = {Format::kInt8,     Format::kInt8Of128,     Format::kInt4, Format::kInt4Of128,
                                     Format::kInt4Zero, Format::kInt4ZeroOf128, Format::kFp8,  Format::kFp8Of128};

struct Weight {
  const uint8_t* data = nullptr;
  int64_t pitch = 0;  // bytes of a row
  Format format = Format::kPlain;
  bool panels = false;  // groups of sixteen rows are interleaved, see layerskip_kernels/formats.py

  // In panels, only rows that are multiples of 16: the start of the panel.
  const uint8_t* row(int64_t n) const { return data + n * pitch; }
};

}  // namespace lsk
