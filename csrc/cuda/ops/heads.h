// Arguments of exit heads from tensors: shared by exit_head, draft and speculative_round.
#pragma once

#include "cuda/exit_head.h"
#include "cuda/ops/tensors.h"

namespace lsk {

// With `scale` the weight has int8 rows; otherwise it is plain or packed.
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
          scale.has_value() ? int8_rows() : device_matrix<T>(head_weight, "head_weight", {vocab_size, hidden_size}),
          data<float>(scale, "scale", {vocab_size}),
          data<int64_t>(token_map, "token_map", {vocab_size}),
          vocab_size,
          hidden_size,
          static_cast<float>(eps)};
}

// Scratch for the partial results of all tiles of a head, for `rows` states.
inline Tensor partial_argmax_lse(const Tensor& like, int64_t rows, int64_t vocab_size) {
  check_sizes({rows, vocab_size});
  return scratch_bytes(like, product(rows, head_tiles(vocab_size), sizeof(ArgmaxLse)));
}

}  // namespace lsk
