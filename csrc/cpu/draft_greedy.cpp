// draft_greedy on CPU tensors: the draft loop without a word of Python between its steps.
#include <cstring>
#include <tuple>

#include "cpu/forward.h"
#include "cpu/head.h"

namespace lsk {
namespace {

template <class T>
struct Draft {
  const T* embedding;  // [V, D]
  int64_t vocabulary, batch, width, steps, rows;
  int64_t* tokens;  // [B, K]
  T* states;        // [B, rows, D]

  void embed(const int64_t* current, T* hidden) const {
    for (int64_t b = 0; b < batch; ++b) {
      STD_TORCH_CHECK(current[b] < vocabulary, "token ", current[b], " is outside the vocabulary of ", vocabulary);
      // A head that named no token said so in its output; its row is void, but must not index.
      const int64_t row = current[b] < 0 ? 0 : current[b];
      std::memcpy(hidden + b * width, embedding + row * width, width * sizeof(T));
    }
  }

  void run(Forward<T>& forward, const std::vector<Layer<T>>& layers, const ExitHead<T>& head, int64_t* current,
           int64_t* lengths) const {
    std::vector<T> hidden(batch * width);
    std::vector<float> scores(2 * batch);
    for (int64_t row = 0; row < rows; ++row) {
      embed(current, hidden.data());
      forward.run(layers, lengths, hidden.data());
      for (int64_t b = 0; b < batch; ++b) {
        std::memcpy(states + (b * rows + row) * width, hidden.data() + b * width, width * sizeof(T));
        ++lengths[b];
      }
      if (row == steps) return;
      head.run(hidden.data(), batch, {current, scores.data(), scores.data() + batch});
      for (int64_t b = 0; b < batch; ++b) tokens[b * steps + row] = current[b];
    }
  }
};

std::tuple<Tensor, Tensor> draft_greedy(const Tensor& token_in, const Tensor& embedding,
                                        const std::vector<Tensor>& weights, const Tensor& k_cache,
                                        const Tensor& v_cache, const Tensor& cos, const Tensor& sin,
                                        const Tensor& seq_lens, int64_t end, const Tensor& norm_weight,
                                        const Tensor& head_weight, double eps, int64_t steps, bool extend,
                                        const std::optional<Tensor>& token_map, const std::optional<Tensor>& scale) {
  const Tensor token = contiguous(token_in);
  const int64_t batch = token.size(0), vocabulary = embedding.size(0), width = embedding.size(1);
  const int64_t rows = steps + (extend ? 1 : 0);
  STD_TORCH_CHECK(steps >= 0 && end >= 1, "steps must not be negative, and end at least 1; got ", steps, ", ", end);
  Tensor tokens = torch::stable::new_empty(token, {batch, steps});
  Tensor states = torch::stable::new_empty(embedding, {batch, rows, width});
  if (batch == 0 || rows == 0) return {tokens, states};
  const LayerStack stack{weights, k_cache, v_cache, cos, sin, seq_lens, 0, end, eps};
  const Shape shape = stack.shape(batch, 1, width);
  const int64_t *first = data<int64_t>(token, "token", {batch}),
                *lengths = data<int64_t>(seq_lens, "seq_lens", {batch});
  check_capacity(lengths, batch, rows, shape.capacity);
  for (int64_t b = 0; b < batch; ++b)
    STD_TORCH_CHECK(first[b] >= 0, "token ", first[b], " is outside the vocabulary of ", vocabulary);
  std::vector<int64_t> current(first, first + batch), advanced(lengths, lengths + batch);
  with_float_type(embedding.scalar_type(), [&]<class T>(T*) {
    const Draft<T> draft{data<T>(embedding, "embedding", {vocabulary, width}),
                         vocabulary,
                         batch,
                         width,
                         steps,
                         rows,
                         static_cast<int64_t*>(tokens.data_ptr()),
                         static_cast<T*>(states.data_ptr())};
    Forward<T> forward(shape, cos, sin, eps);
    draft.run(forward, stack.layers<T>(shape), ExitHead<T>(norm_weight, head_weight, width, eps, token_map, scale),
              current.data(), advanced.data());
  });
  return {tokens, states};
}

}  // namespace
}  // namespace lsk

STABLE_TORCH_LIBRARY_IMPL(layerskip_native, CPU, m) { m.impl("draft_greedy", TORCH_BOX(&lsk::draft_greedy)); }
