// speculative_round on CUDA tensors: one call launches the whole round.
#include <algorithm>
#include <memory>
#include <tuple>

#include "cuda/ops/drafting.h"
#include "cuda/ops/accept.h"
#include "cuda/speculative_round.h"

namespace lsk {
namespace {

struct Heads {
  const Tensor &norm_weight, &head_weight, &draft_norm_weight, &draft_head_weight;
  const std::optional<Tensor>&token_map, &scale;  // of the draft head
  double eps;

  int64_t draft_vocab_size() const { return draft_head_weight.size(0); }
  int64_t vocab_size() const { return head_weight.size(0); }
};

// Logits of a sampled round, [B, K, Vd] and [B, K + 1, V], and the scratch of accept_sampled.
struct RoundLogits {
  Tensor draft, target;
  AcceptSampledScratch scratch;

  RoundLogits(const DraftTensors& drafting, const Heads& heads)
      : draft(room(drafting, drafting.num_speculations, heads.draft_vocab_size())),
        target(room(drafting, drafting.rows(), heads.vocab_size())),
        scratch(drafting.tokens, heads.draft_vocab_size(), heads.vocab_size(), heads.token_map.has_value()) {}

  static Tensor room(const DraftTensors& drafting, int64_t rows, int64_t vocab_size) {
    return torch::stable::new_empty(drafting.token, {drafting.token.size(0), rows, vocab_size}, ScalarType::Float);
  }
};

// Outputs and scratch of verification.
struct VerifyTensors {
  Tensor partial, target, scores, accepted, next_token;
  std::unique_ptr<RoundLogits> logits;  // null: greedy

  VerifyTensors(const DraftTensors& drafting, const Heads& heads, const Tensor& seq_lens, bool sampled)
      : partial(
            partial_argmax_lse(drafting.token, rows(drafting), std::max(heads.draft_vocab_size(), heads.vocab_size()))),
        target(torch::stable::new_empty(drafting.token, {rows(drafting)})),
        scores(torch::stable::new_empty(drafting.token, {2, rows(drafting)}, ScalarType::Float)),
        accepted(torch::stable::empty_like(seq_lens)),
        next_token(torch::stable::empty_like(seq_lens)) {
    if (sampled) logits = std::make_unique<RoundLogits>(drafting, heads);
  }

  static int64_t rows(const DraftTensors& drafting) { return product(drafting.token.size(0), drafting.rows()); }
};

// Layers [0, E) with the draft layers, and layers [E, L), which may be empty, with the shapes that they run on.
struct RoundLayers {
  LayerStack shallow, deep;
  ForwardShape draft_shape, verify_shape;

  RoundLayers(const DraftTensors& drafting, const LayerStack& shallow, const LayerStack& deep)
      : shallow(shallow), deep(deep), draft_shape(drafting.shape(shallow)), verify_shape(draft_shape) {
    verify_shape.rows = drafting.rows();
    if (deep.start < deep.end)
      verify_shape = forward_shape(deep, draft_shape.batch, verify_shape.rows, draft_shape.hidden_size);
  }
};

template <class T>
void run(const DeviceScope& scope, const DraftTensors& drafting, const RoundLayers& layers, const Heads& heads,
         const VerifyTensors& verified, const AcceptSampledArgs& sampled) {
  const auto shallow = device_layers<T>(layers.shallow, layers.draft_shape);
  std::vector<LayerWeights<T>> deep;
  if (layers.deep.start < layers.deep.end) deep = device_layers<T>(layers.deep, layers.verify_shape);
  const Tensor draft_memory = scratch_bytes(drafting.token, ForwardScratch<T>::bytes(layers.draft_shape));
  const Tensor verify_memory = scratch_bytes(drafting.token, ForwardScratch<T>::bytes(layers.verify_shape));
  const auto [first, draft_layers] = split_layers<T>(layers.shallow, shallow, layers.draft_shape, draft_memory);
  const RoundArgs<T> args{
      drafting.args<T>(verified.partial),
      first,
      draft_layers,
      split_layers<T>(layers.deep, deep, layers.verify_shape, verify_memory).first,
      head_of<T>(heads.draft_norm_weight, heads.draft_head_weight, layers.draft_shape.hidden_size, heads.eps,
                 heads.token_map, heads.scale),
      head_of<T>(heads.norm_weight, heads.head_weight, layers.draft_shape.hidden_size, heads.eps, {}, {}),
      static_cast<ArgmaxLse*>(verified.partial.data_ptr()),
      static_cast<int64_t*>(verified.target.data_ptr()),
      static_cast<float*>(verified.scores.data_ptr()),
      data<int64_t>(layers.shallow.seq_lens, "seq_lens", {layers.draft_shape.batch}),
      static_cast<int64_t*>(verified.accepted.data_ptr()),
      static_cast<int64_t*>(verified.next_token.data_ptr()),
      sampled};
  Chain chain(scope.stream());
  check_launch("speculative_round", speculative_round(chain, args));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> speculative_round_op(
    const Tensor& token_in, const Tensor& embedding, const std::vector<Tensor>& weights, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& cos, const Tensor& sin, const Tensor& seq_lens, int64_t exit_layer,
    const Tensor& norm_weight, const Tensor& head_weight, double eps, int64_t num_speculations,
    const std::optional<Tensor>& draft_head_weight, const std::optional<Tensor>& draft_token_map,
    const std::optional<Tensor>& draft_head_scale, const std::optional<Tensor>& slots, double draft_threshold,
    const std::optional<Tensor>& temperature, const std::optional<Tensor>& seed,
    const std::optional<Tensor>& draft_norm_weight, int64_t num_draft_layers) {
  const DeviceScope scope(token_in,
                          {&embedding, &k_cache, &v_cache, &cos, &sin, &seq_lens, &norm_weight, &head_weight});
  check_device(token_in, {&draft_head_weight, &draft_token_map, &draft_head_scale, &slots, &temperature, &seed,
                          &draft_norm_weight});
  const RoundWeights round_weights(weights, k_cache, exit_layer, num_draft_layers);
  LSK_REQUIRE(!temperature.has_value() || seed.has_value(), "temperature needs seed");
  const Tensor token = contiguous(token_in);
  const Heads heads{norm_weight,
                    head_weight,
                    draft_norm_weight ? *draft_norm_weight : norm_weight,
                    draft_head_weight ? *draft_head_weight : head_weight,
                    draft_token_map,
                    draft_head_scale,
                    eps};
  const DraftTensors drafting(token, embedding, norm_weight, num_speculations, true, draft_threshold);
  VerifyTensors out(drafting, heads, seq_lens, temperature.has_value());
  if (token.size(0) == 0) return {drafting.tokens, out.accepted, out.next_token, drafting.probability};
  const RoundLayers layers(
      drafting,
      {round_weights.drafting, k_cache, v_cache, cos, sin, seq_lens, slots, 0, exit_layer, eps, num_draft_layers},
      {round_weights.deep, k_cache, v_cache, cos, sin, seq_lens, slots, exit_layer, round_weights.num_layers, eps});
  AcceptSampledArgs sampled{};
  if (out.logits != nullptr) {
    sampled = out.logits->scratch.args(drafting.tokens, out.logits->draft, out.logits->target, seq_lens, *temperature,
                                       *seed, draft_token_map, out.accepted, out.next_token);
  }
  with_device_type(norm_weight.scalar_type(),
                   [&]<class T>(T*) { run<T>(scope, drafting, layers, heads, out, sampled); });
  return {drafting.tokens, out.accepted, out.next_token, drafting.probability};
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CUDA, m) { m.impl("speculative_round", TORCH_BOX(&lsk::speculative_round_op)); }
