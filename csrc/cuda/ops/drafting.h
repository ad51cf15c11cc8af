// Outputs and scratch of a draft as tensors: for the op and for speculative_round.
#pragma once

#include <utility>
#include <vector>

#include "cuda/draft.h"
#include "cuda/ops/heads.h"
#include "cuda/ops/layer_stack.h"

namespace lsk {

struct DraftTensors {
  const Tensor &token, &embedding, &norm_weight;  // [B], [Ve, D], [D]
  int64_t num_speculations;
  bool extend;
  float draft_threshold;
  Tensor tokens, states, probability, hidden;  // [B, K], [B, K + extend, D], [B, K], [B, D]

  DraftTensors(const Tensor& token, const Tensor& embedding, const Tensor& norm_weight, int64_t num_speculations,
               bool extend, double draft_threshold)
      : token(token),
        embedding(embedding),
        norm_weight(norm_weight),
        num_speculations(checked(token, embedding, norm_weight, num_speculations)),
        extend(extend),
        draft_threshold(static_cast<float>(draft_threshold)),
        tokens(torch::stable::new_empty(token, {token.size(0), num_speculations})),
        states(torch::stable::new_empty(norm_weight, {token.size(0), rows(), norm_weight.size(0)})),
        probability(torch::stable::new_empty(token, {token.size(0), num_speculations}, ScalarType::Float)),
        hidden(torch::stable::new_empty(norm_weight, {token.size(0), norm_weight.size(0)})) {}

  int64_t rows() const { return num_speculations + (extend ? 1 : 0); }
  bool empty() const { return token.size(0) == 0 || rows() == 0; }

  // Shape of a draft step: one row of each sequence.
  ForwardShape shape(const LayerStack& stack) const {
    const ForwardShape out = forward_shape(stack, token.size(0), 1, norm_weight.size(0));
    LSK_REQUIRE(rows() <= out.capacity, rows(), " rows do not fit a cache of capacity ", out.capacity);
    return out;
  }

  template <class T>
  DraftArgs<T> args(const Tensor& partial) const {
    const int64_t batch = token.size(0), vocab_size = embedding.size(0), hidden_size = norm_weight.size(0);
    LSK_REQUIRE(vocab_size > 0, "embedding has no rows");
    return {data<int64_t>(token, "token", {batch}),
            device_matrix<T>(embedding, "embedding", {vocab_size, hidden_size}),
            batch,
            vocab_size,
            hidden_size,
            num_speculations,
            extend,
            draft_threshold,
            static_cast<int64_t*>(tokens.data_ptr()),
            static_cast<T*>(states.data_ptr()),
            static_cast<float*>(probability.data_ptr()),
            static_cast<T*>(hidden.data_ptr()),
            static_cast<ArgmaxLse*>(partial.data_ptr())};
  }

 private:
  static int64_t checked(const Tensor& token, const Tensor& embedding, const Tensor& norm_weight,
                         int64_t num_speculations) {
    LSK_REQUIRE(token.dim() == 1 && embedding.dim() == 2 && norm_weight.dim() == 1,
                "token and norm_weight must have rank 1, embedding 2");
    check_num_speculations(num_speculations);
    return num_speculations;
  }
};

// Splits `weights` into the layers of a stack and its draft layers, on the same scratch.
template <class T>
std::pair<Layers<T>, Layers<T>> split_layers(const LayerStack& stack, const std::vector<LayerWeights<T>>& weights,
                                             const ForwardShape& shape, const Tensor& memory) {
  const int64_t count = static_cast<int64_t>(weights.size()) - stack.num_draft_layers;
  const Layers<T> layers{weights.data(), count, forward_args<T>(stack, shape),
                         ForwardScratch<T>(shape, memory.data_ptr())};
  Layers<T> draft_layers = layers;
  draft_layers.weights += count;
  draft_layers.num_layers = stack.num_draft_layers;
  return {layers, draft_layers};
}

}  // namespace lsk
