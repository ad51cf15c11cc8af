// The weight of a matmul as the kernels take it, out of a tensor.
#pragma once

#include "common/checks.h"
#include "common/weight.h"

namespace lsk {

// A weight [rows, width] in the activations' T, or packed in the format that has as many bytes for that width: as rows
// of bytes, or of 16-bit words where they are interleaved.
template <class T>
Weight matrix(const Tensor& tensor, const char* name, std::initializer_list<int64_t> sizes) {
  const int64_t rows = *sizes.begin(), width = *(sizes.begin() + 1);
  const bool panels = tensor.scalar_type() == ScalarType::Short;
  if (tensor.scalar_type() != ScalarType::Byte && !panels) {
    const T* plain = data<T>(tensor, name, sizes);
    return {reinterpret_cast<const uint8_t*>(plain), width * static_cast<int64_t>(sizeof(T)), Format::kPlain};
  }
  LSK_REQUIRE(tensor.is_contiguous(), name, " must be contiguous");
  LSK_REQUIRE(width > 0, name, ": 0 bytes a row are no format of width 0");
  LSK_REQUIRE(tensor.dim() == 2 && tensor.size(0) == rows, name, " must have ", rows, " rows of packed weights");
  LSK_REQUIRE(!panels || rows % kPanelRows == 0, name, " has ", rows, " rows, panels have ", kPanelRows, " each");
  const int64_t bytes = tensor.size(1) * (panels ? 2 : 1);
  for (const Format format : kPackedFormats) {
    if (panels && !is_integer(format)) continue;
    const bool fits =
        with_group(format, [&](auto group) { return group.divides(width) && group.row_bytes(width) == bytes; });
    if (fits) return {static_cast<const uint8_t*>(tensor.data_ptr()), bytes, format, panels};
  }
  refuse(name, ": ", bytes, " bytes a row are no format of width ", width);
}

// Weights that one packing of the activations serves are all plain, all of integers, or all of fp8, and all or none
// are panels.
inline void check_alike(const Weight& first, const Weight& other, const char* names) {
  const auto kind = [](const Weight& weight) {
    return weight.format == Format::kPlain ? 0 : is_integer(weight.format) ? 1 + 2 * weight.panels : 2;
  };
  LSK_REQUIRE(kind(first) == kind(other), names,
              " must be all plain, all of integers, or all of fp8, and all or none interleaved");
}

}  // namespace lsk
