// draft on CPU tensors: the loop of speculative.py in layerskip_kernels, without Python between the steps.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <tuple>

#include "cpu/forward.h"
#include "cpu/head.h"
#include "cpu/ops.h"

namespace lsk {
namespace {

template <class T>
struct Draft {
  Weight embedding;  // [V, D]
  int64_t vocab_size, batch, hidden_size, num_speculations, rows, num_draft_layers;
  float draft_threshold;
  int64_t* tokens;      // [B, K]
  T* states;            // [B, rows, D]
  float* probability;   // [B, K]
  HeadOptions options;  // temperature and seed [B]; the logits of row 0
  int64_t next_logits;  // stride from one row's logits to the next

  // Head options for draft `row`, whose tokens are at `positions`.
  HeadOptions options_of(int64_t row, const int64_t* positions) const {
    HeadOptions own = options;
    own.offset = positions;
    if (own.logits) own.logits += row * next_logits;
    return own;
  }

  void embed(const int64_t* current, T* hidden) const {
    for (int64_t b = 0; b < batch; ++b) {
      LSK_REQUIRE(current[b] < vocab_size, "token ", current[b], " is outside the vocabulary of ", vocab_size);
      // -1 means that no token was drafted; later rows of this sequence are ignored, so any embedding serves.
      const int64_t row = current[b] < 0 ? 0 : current[b];
      T* to = hidden + b * hidden_size;
      if (embedding.format == Format::kPlain)
        std::memcpy(to, embedding.row(row), embedding.pitch);
      else
        kernels<T>().expand_row(embedding, row, hidden_size, to);
    }
  }

  // Clears the rows from `first_row` on, after drafting has ended.
  void clear(int64_t first_row) const {
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = first_row; i < num_speculations; ++i) {
        tokens[b * num_speculations + i] = -1;
        probability[b * num_speculations + i] = 0.0f;
      }
      if (first_row < rows)
        std::memset(states + (b * rows + first_row) * hidden_size, 0, (rows - first_row) * hidden_size * sizeof(T));
    }
  }

  // Writes the probability and token of `row`, and the next tokens to `current`; true if any sequence continues.
  bool record(int64_t row, int64_t* current, const float* logit, const float* logsumexp, bool* alive) const {
    bool any = false;
    for (int64_t b = 0; b < batch; ++b) {
      const float chance = std::exp(logit[b] - logsumexp[b]);
      probability[b * num_speculations + row] = alive[b] ? chance : 0.0f;
      if (draft_threshold > 0) {
        alive[b] = alive[b] && chance >= draft_threshold;  // also false for NaN
        if (!alive[b]) current[b] = -1;
      }
      tokens[b * num_speculations + row] = current[b];
      any = any || alive[b];
    }
    return any;
  }

  void run(Forward<T>& forward, const std::vector<Layer<T>>& layers, const ExitHead<T>& head, const int64_t* slots,
           int64_t* current, int64_t* lengths) const {
    std::vector<T> hidden(batch * hidden_size), kept(num_draft_layers > 0 ? hidden.size() : 0);
    const T* state = num_draft_layers > 0 ? kept.data() : hidden.data();
    std::vector<float> scores(2 * batch);
    const std::unique_ptr<bool[]> alive(new bool[batch]);
    std::fill_n(alive.get(), batch, true);
    for (int64_t row = 0; row < rows; ++row) {
      embed(current, hidden.data());
      forward.run(layers, lengths, slots, hidden.data(), num_draft_layers, kept.data());
      for (int64_t b = 0; b < batch; ++b) {
        T* to = states + (b * rows + row) * hidden_size;
        if (alive[b]) {
          std::memcpy(to, state + b * hidden_size, hidden_size * sizeof(T));
        } else {
          std::memset(to, 0, hidden_size * sizeof(T));
        }
      }
      if (row == num_speculations) return;
      head.run(hidden.data(), batch, {current, scores.data(), scores.data() + batch}, options_of(row, lengths));
      for (int64_t b = 0; b < batch; ++b) ++lengths[b];
      if (!record(row, current, scores.data(), scores.data() + batch, alive.get())) return clear(row + 1);
    }
  }
};

void check_drafting(int64_t num_speculations, int64_t exit_layer, double draft_threshold) {
  check_num_speculations(num_speculations);
  LSK_REQUIRE(exit_layer >= 1, "exit_layer must be at least 1, got ", exit_layer);
  LSK_REQUIRE(draft_threshold >= 0 && draft_threshold <= 1, "draft_threshold must lie in [0, 1], got ",
              draft_threshold);
}

std::vector<int64_t> first_tokens(const Tensor& token, int64_t batch, int64_t vocab_size) {
  const int64_t* first = data<int64_t>(token, "token", {batch});
  for (int64_t b = 0; b < batch; ++b)
    LSK_REQUIRE(first[b] >= 0, "token ", first[b], " is outside the vocabulary of ", vocab_size);
  return {first, first + batch};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> draft(const Tensor& token_in, const Tensor& embedding,
                                         const std::vector<Tensor>& weights, const Tensor& k_cache,
                                         const Tensor& v_cache, const Tensor& cos, const Tensor& sin,
                                         const Tensor& seq_lens, int64_t exit_layer, const Tensor& norm_weight,
                                         const Tensor& head_weight, double eps, int64_t num_speculations, bool extend,
                                         const std::optional<Tensor>& token_map, const std::optional<Tensor>& scale,
                                         const std::optional<Tensor>& slots, double draft_threshold,
                                         const std::optional<Tensor>& temperature, const std::optional<Tensor>& seed,
                                         const std::optional<Tensor>& logits, int64_t num_draft_layers) {
  const Tensor token = contiguous(token_in);
  const int64_t batch = token.size(0), vocab_size = embedding.size(0), hidden_size = norm_weight.size(0);
  check_drafting(num_speculations, exit_layer, draft_threshold);
  const int64_t rows = num_speculations + (extend ? 1 : 0);
  const HeadOptions options =
      head_options(Sampling(temperature, seed, batch), logits, {batch, num_speculations, head_weight.size(0)});
  Tensor tokens = torch::stable::new_empty(token, {batch, num_speculations});
  Tensor states = torch::stable::new_empty(norm_weight, {batch, rows, hidden_size});
  Tensor probability = torch::stable::new_empty(token, {batch, num_speculations}, ScalarType::Float);
  if (batch == 0 || rows == 0) return {tokens, states, probability};
  const LayerStack stack{weights, k_cache, v_cache, cos, sin, seq_lens, slots, 0, exit_layer, eps, num_draft_layers};
  const CheckedShape place(stack, batch, 1, hidden_size);
  const int64_t* lengths = data<int64_t>(seq_lens, "seq_lens", {batch});
  check_capacity(lengths, batch, rows, place.shape.capacity);
  std::vector<int64_t> current = first_tokens(token, batch, vocab_size), advanced(lengths, lengths + batch);
  with_float_type(norm_weight.scalar_type(), [&]<class T>(T*) {
    const Draft<T> draft{matrix<T>(embedding, "embedding", {vocab_size, hidden_size}),
                         vocab_size,
                         batch,
                         hidden_size,
                         num_speculations,
                         rows,
                         num_draft_layers,
                         static_cast<float>(draft_threshold),
                         static_cast<int64_t*>(tokens.data_ptr()),
                         static_cast<T*>(states.data_ptr()),
                         static_cast<float*>(probability.data_ptr()),
                         options,
                         logits.has_value() ? logits->stride(1) : 0};
    Forward<T> forward(place.shape, cos, sin, eps);
    draft.run(forward, layers_of<T>(stack, place.shape),
              ExitHead<T>(norm_weight, head_weight, hidden_size, eps, token_map, scale), place.slots, current.data(),
              advanced.data());
  });
  return {tokens, states, probability};
}

}  // namespace lsk

LSK_LIBRARY(CPU, m) { m.impl("draft", TORCH_BOX(&lsk::draft)); }
