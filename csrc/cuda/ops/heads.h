// Exit heads as tensors: what exit_head, draft and speculative_round share.
#pragma once

#include "cuda/exit_head.h"
#include "cuda/ops/tensors.h"

namespace lsk {

// Of tensors that may be absent: those that are there must lie on the device of `first`.
inline void check_device(const Tensor& first, std::initializer_list<const std::optional<Tensor>*> others) {
  for (const std::optional<Tensor>* other : others) {
    LSK_REQUIRE(
        !other->has_value() || ((*other)->is_cuda() && (*other)->get_device_index() == first.get_device_index()),
        "expected all tensors on cuda:", first.get_device_index());
  }
}

// `scale`: of int8 rows; without it the weight is in T, or packed.
template <class T>
Head<T> head_of(const Tensor& norm_weight, const Tensor& head_weight, int64_t hidden_size, double eps,
                const std::optional<Tensor>& token_map, const std::optional<Tensor>& scale) {
  const int64_t vocab_size = head_weight.size(0);
  LSK_REQUIRE(vocab_size > 0, "head_weight has no rows");
  LSK_REQUIRE(eps >= 0, "eps must not be negative, got ", eps);
  check_sizes({vocab_size, hidden_size});
  const auto int8_rows = [&] {
    const int8_t* rows = data<int8_t>(head_weight, "head_weight", {vocab_size, hidden_size});
    return Weight{reinterpret_cast<const uint8_t*>(rows), hidden_size, Format::kRows};
  };
  return {data<T>(norm_weight, "norm_weight", {hidden_size}),
          scale.has_value() ? int8_rows() : card_matrix<T>(head_weight, "head_weight", {vocab_size, hidden_size}),
          data<float>(scale, "scale", {vocab_size}),
          data<int64_t>(token_map, "token_map", {vocab_size}),
          vocab_size,
          hidden_size,
          static_cast<float>(eps)};
}

// Where logits are written: their rows are contiguous, but may lie apart.
inline float* writable_logits(const std::optional<Tensor>& logits, std::initializer_list<int64_t> shape) {
  if (!logits.has_value()) return nullptr;
  LSK_REQUIRE(logits->scalar_type() == ScalarType::Float, "logits has an unexpected dtype");
  LSK_REQUIRE(logits->dim() == static_cast<int64_t>(shape.size()), "logits has rank ", logits->dim(), ", expected ",
              shape.size());
  int64_t dim = 0;
  for (int64_t size : shape) {
    LSK_REQUIRE(logits->size(dim) == size, "logits has size ", logits->size(dim), " in dimension ", dim, ", expected ",
                size);
    ++dim;
  }
  LSK_REQUIRE(logits->size(dim - 1) <= 1 || logits->stride(dim - 1) == 1, "the rows of logits must be contiguous");
  return static_cast<float*>(logits->data_ptr());
}

// Room for what the tiles of a head leave of `rows` states.
inline Tensor partial_choices(const Tensor& like, int64_t rows, int64_t vocab_size) {
  return scratch_bytes(like, rows * head_tiles(vocab_size) * static_cast<int64_t>(sizeof(Choice)));
}

}  // namespace lsk
