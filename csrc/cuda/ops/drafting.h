// A draft's outputs and scratch as tensors: for the op and for speculative_round.
#pragma once

#include "cuda/draft.h"
#include "cuda/ops/heads.h"
#include "cuda/ops/layer_stack.h"

namespace lsk {

struct Drafting {
  const Tensor &token, &embedding;  // [B], [Ve, D]
  int64_t steps;
  bool extend;
  float min_probability;
  Tensor tokens, states, probability, hidden;  // [B, K], [B, K + extend, D], [B, K], [B, D]

  Drafting(const Tensor& token, const Tensor& embedding, int64_t steps, bool extend, double min_probability)
      : token(token),
        embedding(embedding),
        steps(checked(token, embedding, steps)),
        extend(extend),
        min_probability(static_cast<float>(min_probability)),
        tokens(torch::stable::new_empty(token, {token.size(0), steps})),
        states(torch::stable::new_empty(embedding, {token.size(0), rows(), embedding.size(1)})),
        probability(torch::stable::new_empty(token, {token.size(0), steps}, ScalarType::Float)),
        hidden(torch::stable::new_empty(embedding, {token.size(0), embedding.size(1)})) {}

  int64_t rows() const { return steps + (extend ? 1 : 0); }
  bool empty() const { return token.size(0) == 0 || rows() == 0; }

  // Of the layers that run on one row of each sequence at a time.
  ForwardShape shape(const LayerStack& stack) const {
    const ForwardShape out = stack.shape(token.size(0), 1, embedding.size(1));
    STD_TORCH_CHECK(rows() <= out.capacity, rows(), " rows do not fit a cache of capacity ", out.capacity);
    return out;
  }

  template <class T>
  DraftArgs<T> args(const Tensor& partial) const {
    const int64_t batch = token.size(0), vocabulary = embedding.size(0), width = embedding.size(1);
    STD_TORCH_CHECK(vocabulary > 0, "embedding has no rows");
    return {data<int64_t>(token, "token", {batch}),
            data<T>(embedding, "embedding", {vocabulary, width}),
            batch,
            vocabulary,
            width,
            steps,
            extend,
            min_probability,
            static_cast<int64_t*>(tokens.data_ptr()),
            static_cast<T*>(states.data_ptr()),
            static_cast<float*>(probability.data_ptr()),
            static_cast<T*>(hidden.data_ptr()),
            static_cast<Choice*>(partial.data_ptr())};
  }

 private:
  static int64_t checked(const Tensor& token, const Tensor& embedding, int64_t steps) {
    STD_TORCH_CHECK(token.dim() == 1 && embedding.dim() == 2, "token must have rank 1, embedding 2");
    STD_TORCH_CHECK(steps >= 0, "steps must not be negative, got ", steps);
    return steps;
  }
};

template <class T>
Layers<T> layers_of(const LayerStack& stack, const std::vector<LayerWeights<T>>& layers, const ForwardShape& shape,
                    const Tensor& memory) {
  return {layers.data(), static_cast<int64_t>(layers.size()), stack.args<T>(shape),
          ForwardScratch<T>(shape, memory.data_ptr())};
}

}  // namespace lsk
