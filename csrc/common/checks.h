// Argument checks and typed access to a tensor's memory. Python (`_checks.py`) raises most messages that users see;
// these checks also hold when a native op is called directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <climits>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/library.h"
#include "common/weight.h"

namespace lsk {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws an error whose prefix makes dispatch.py raise a ValueError.
template <class... Words>
[[noreturn]] void refuse(const Words&... words) {
  std::ostringstream message;
  message << "layerskip: ";
  (message << ... << words);
  throw std::runtime_error(message.str());
}

// Throws an error with this message if the condition is false.
#define LSK_REQUIRE(condition, ...) \
  do {                              \
    if (!(condition)) [[unlikely]]  \
      lsk::refuse(__VA_ARGS__);     \
  } while (false)

template <class T>
constexpr ScalarType scalar_type() = delete;
template <>
constexpr ScalarType scalar_type<float>() {
  return ScalarType::Float;
}
template <>
constexpr ScalarType scalar_type<bf16>() {
  return ScalarType::BFloat16;
}
template <>
constexpr ScalarType scalar_type<f16>() {
  return ScalarType::Half;
}
template <>
constexpr ScalarType scalar_type<int8_t>() {
  return ScalarType::Char;
}
template <>
constexpr ScalarType scalar_type<int64_t>() {
  return ScalarType::Long;
}

// Product of sizes. Refuses one that no memory holds, so that sums of a few products do not overflow either.
template <class... Sizes>
int64_t product(Sizes... sizes) {
  constexpr int64_t kMax = int64_t{1} << 48;
  int64_t out = 1;
  const bool fits = (!__builtin_mul_overflow(out, static_cast<int64_t>(sizes), &out) && ...);
  LSK_REQUIRE(fits && 0 <= out && out <= kMax, "an intermediate result of sizes",
              (std::string() + ... + (" " + std::to_string(sizes))), " does not fit the memory");
  return out;
}

inline void check_num_speculations(int64_t num_speculations) {
  LSK_REQUIRE(num_speculations >= 0, "num_speculations must not be negative, got ", num_speculations);
  LSK_REQUIRE(num_speculations < INT_MAX, "num_speculations must be below ", INT_MAX, ", got ", num_speculations);
}

inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  LSK_REQUIRE(tensor.dim() == static_cast<int64_t>(shape.size()), name, " has rank ", tensor.dim(), ", expected ",
              shape.size());
  const auto sizes = tensor.sizes();
  size_t dim = 0;
  for (int64_t size : shape) {
    LSK_REQUIRE(sizes[dim] == size, name, " has size ", sizes[dim], " in dimension ", dim, ", expected ", size);
    ++dim;
  }
}

// Memory of a contiguous tensor; checks dtype and shape.
template <class T>
T* data(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  LSK_REQUIRE(tensor.scalar_type() == scalar_type<T>(), name, " has an unexpected dtype");
  LSK_REQUIRE(tensor.is_contiguous(), name, " must be contiguous");
  check_shape(tensor, name, shape);
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) {
  return tensor.has_value() ? data<T>(*tensor, name, shape) : nullptr;
}

// fp32 logits, of which only the last dimension must be contiguous.
inline float* logits_data(const Tensor& tensor, const char* name, std::initializer_list<int64_t> shape) {
  LSK_REQUIRE(tensor.scalar_type() == ScalarType::Float, name, " has an unexpected dtype");
  check_shape(tensor, name, shape);
  const int64_t last = tensor.dim() - 1;
  LSK_REQUIRE(tensor.size(last) <= 1 || tensor.stride(last) == 1, "the rows of ", name, " must be contiguous");
  return static_cast<float*>(tensor.data_ptr());
}
inline float* logits_data(const std::optional<Tensor>& tensor, const char* name, std::initializer_list<int64_t> shape) {
  return tensor.has_value() ? logits_data(*tensor, name, shape) : nullptr;
}

inline void check_head_dim(int64_t size) {
  LSK_REQUIRE(size % 8 == 0 && 8 <= size && size <= 256, "head_dim must be a multiple of 8 up to 256, got ", size);
}

inline void check_num_heads(int64_t num_heads, int64_t num_kv_heads) {
  LSK_REQUIRE(num_kv_heads > 0 && num_heads % num_kv_heads == 0, num_heads, " query heads are not a multiple of ",
              num_kv_heads, " key/value heads");
}

// Calls f with a null pointer of the storage type that `dtype` names.
template <class F>
auto with_float_type(ScalarType dtype, F f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(static_cast<float*>(nullptr));
    case ScalarType::BFloat16:
      return f(static_cast<bf16*>(nullptr));
    default:
      LSK_REQUIRE(dtype == ScalarType::Half, "expected float32, bfloat16 or float16");
      return f(static_cast<f16*>(nullptr));
  }
}

// A weight [rows, width] in T, or packed; the bytes per row determine the format. Packed rows are bytes, or 16-bit
// words if they are interleaved.
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

// Weights that share the tiled activations must be all plain, all integers, or all fp8, and all or none in panels.
inline void check_alike(const Weight& first, const Weight& other, const char* names) {
  const auto kind = [](const Weight& weight) {
    return weight.format == Format::kPlain ? 0 : is_integer(weight.format) ? 1 + 2 * weight.panels : 2;
  };
  LSK_REQUIRE(kind(first) == kind(other), names,
              " must be all plain, all of integers, or all of fp8, and all or none interleaved");
}

}  // namespace lsk
