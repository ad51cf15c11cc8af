// speculative_round on CPU tensors: draft, verify, accept.
#include <algorithm>

#include "common/layer_stack.h"
#include "cpu/ops.h"

namespace lsk {
namespace {

using torch::stable::narrow;
using torch::stable::new_empty;
using torch::stable::reshape;

// Length of the longest draft: the rows that verification needs, minus one.
int64_t longest_draft(const Tensor& tokens) {
  const int64_t batch = tokens.size(0), num_speculations = tokens.size(1);
  const int64_t* all = data<int64_t>(tokens, "tokens", {batch, num_speculations});
  int64_t out = 0;
  for (int64_t b = 0; b < batch; ++b)
    out = std::max<int64_t>(out, num_drafts(all + b * num_speculations, num_speculations));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> speculative_round(
    const Tensor& token, const Tensor& embedding, const std::vector<Tensor>& weights, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& cos, const Tensor& sin, const Tensor& seq_lens, int64_t exit_layer,
    const Tensor& norm_weight, const Tensor& head_weight, double eps, int64_t num_speculations,
    const std::optional<Tensor>& draft_head_weight, const std::optional<Tensor>& draft_token_map,
    const std::optional<Tensor>& draft_head_scale, const std::optional<Tensor>& slots, double draft_threshold,
    const std::optional<Tensor>& temperature, const std::optional<Tensor>& seed,
    const std::optional<Tensor>& draft_norm_weight, int64_t num_draft_layers) {
  const int64_t batch = token.size(0), vocab_size = head_weight.size(0);
  const RoundWeights parts(weights, k_cache, exit_layer, num_draft_layers);
  LSK_REQUIRE(draft_head_weight.has_value() || (!draft_token_map.has_value() && !draft_head_scale.has_value()),
              "draft_token_map and draft_head_scale need a draft_head_weight");
  LSK_REQUIRE(draft_threshold == 0 || !temperature.has_value(), "draft_threshold is ", draft_threshold,
              " with a temperature: dropping what was drawn because it is improbable would change the distribution");
  const Tensor& draft_norm = draft_norm_weight.has_value() ? *draft_norm_weight : norm_weight;
  const Tensor& draft_head = draft_head_weight.has_value() ? *draft_head_weight : head_weight;
  const bool samples = temperature.has_value();
  std::optional<Tensor> draft_logits, target_logits;
  if (samples) draft_logits = new_empty(token, {batch, num_speculations, draft_head.size(0)}, ScalarType::Float);
  auto [tokens, states, probability] =
      draft(token, embedding, parts.drafting, k_cache, v_cache, cos, sin, seq_lens, exit_layer, draft_norm, draft_head,
            eps, num_speculations, true, draft_token_map, draft_head_scale, slots, draft_threshold, temperature, seed,
            draft_logits, num_draft_layers);
  const int64_t longest = longest_draft(tokens), rows = batch * (longest + 1);
  const Tensor hidden = partial_forward(narrow(states, 1, 0, longest + 1), parts.deep, k_cache, v_cache, cos, sin,
                                        seq_lens, exit_layer, parts.num_layers, eps, slots);
  if (samples) target_logits = new_empty(token, {rows, vocab_size}, ScalarType::Float);
  const Tensor target = std::get<0>(exit_head(reshape(hidden, {rows, hidden.size(2)}), norm_weight, head_weight, eps,
                                              {}, {}, {}, {}, {}, target_logits));
  const Tensor proposed = narrow(tokens, 1, 0, longest);
  const auto [accepted, next_token] = samples
                                          ? accept_sampled(proposed, narrow(*draft_logits, 1, 0, longest),
                                                           reshape(*target_logits, {batch, longest + 1, vocab_size}),
                                                           seq_lens, *temperature, *seed, draft_token_map)
                                          : accept_greedy(proposed, reshape(target, {batch, longest + 1}), seq_lens);
  return {tokens, accepted, next_token, probability};
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CPU, m) { m.impl("speculative_round", TORCH_BOX(&lsk::speculative_round)); }
