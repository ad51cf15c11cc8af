// The ops that speculative_round calls, and the length of a draft.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "common/checks.h"

namespace lsk {

// Number of draft tokens of a sequence, of up to `num_speculations`; -1 marks the end.
inline int64_t num_drafts(const int64_t* tokens, int64_t num_speculations) {
  return std::find_if(tokens, tokens + num_speculations, [](int64_t token) { return token < 0; }) - tokens;
}

std::tuple<Tensor, Tensor, Tensor> exit_head(const Tensor& hidden, const Tensor& norm_weight, const Tensor& head_weight,
                                             double eps, const std::optional<Tensor>& token_map,
                                             const std::optional<Tensor>& scale,
                                             const std::optional<Tensor>& temperature,
                                             const std::optional<Tensor>& seed, const std::optional<Tensor>& offset,
                                             const std::optional<Tensor>& logits);

Tensor partial_forward(const Tensor& hidden, const std::vector<Tensor>& weights, const Tensor& k_cache,
                       const Tensor& v_cache, const Tensor& cos, const Tensor& sin, const Tensor& seq_lens,
                       int64_t start, int64_t end, double eps, const std::optional<Tensor>& slots);

std::tuple<Tensor, Tensor, Tensor> draft(const Tensor& token, const Tensor& embedding,
                                         const std::vector<Tensor>& weights, const Tensor& k_cache,
                                         const Tensor& v_cache, const Tensor& cos, const Tensor& sin,
                                         const Tensor& seq_lens, int64_t exit_layer, const Tensor& norm_weight,
                                         const Tensor& head_weight, double eps, int64_t num_speculations, bool extend,
                                         const std::optional<Tensor>& token_map, const std::optional<Tensor>& scale,
                                         const std::optional<Tensor>& slots, double draft_threshold,
                                         const std::optional<Tensor>& temperature, const std::optional<Tensor>& seed,
                                         const std::optional<Tensor>& logits, int64_t num_draft_layers);

std::tuple<Tensor, Tensor> accept_greedy(const Tensor& draft, const Tensor& target, const Tensor& seq_lens);

std::tuple<Tensor, Tensor> accept_sampled(const Tensor& draft, const Tensor& draft_logits, const Tensor& target_logits,
                                          const Tensor& seq_lens, const Tensor& temperature, const Tensor& seed,
                                          const std::optional<Tensor>& token_map);

}  // namespace lsk
