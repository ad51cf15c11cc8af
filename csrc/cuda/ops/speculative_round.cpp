// speculative_round on CUDA tensors: all launches of a round from one call.
#include <algorithm>
#include <memory>
#include <tuple>

#include "cuda/ops/drafting.h"
#include "cuda/ops/sampled.h"
#include "cuda/speculative_round.h"

namespace lsk {
namespace {

struct Heads {
  const Tensor &norm_weight, &full, &small;
  const std::optional<Tensor>&map, &scale;  // of `small`
  double eps;

  int64_t draft_vocab_size() const { return small.size(0); }
  int64_t vocab_size() const { return full.size(0); }
};

// Logits of a round with a temperature, [B, K, Vd] and [B, K + 1, V], and the scratch of their acceptance.
struct Logits {
  Tensor draft, target;
  SampledScratch scratch;

  Logits(const Drafting& drafting, const Heads& heads)
      : draft(room(drafting, drafting.num_speculations, heads.draft_vocab_size())),
        target(room(drafting, drafting.rows(), heads.vocab_size())),
        scratch(drafting.tokens, heads.draft_vocab_size(), heads.vocab_size(), heads.map.has_value()) {}

  static Tensor room(const Drafting& drafting, int64_t rows, int64_t vocab_size) {
    return torch::stable::new_empty(drafting.token, {drafting.token.size(0), rows, vocab_size}, ScalarType::Float);
  }
};

// What a round writes besides its draft.
struct Verified {
  Tensor partial, target, scores, accepted, next_token;
  std::unique_ptr<Logits> logits;  // null: greedy

  Verified(const Drafting& drafting, const Heads& heads, const Tensor& seq_lens, bool sampled)
      : partial(
            partial_choices(drafting.token, rows(drafting), std::max(heads.draft_vocab_size(), heads.vocab_size()))),
        target(torch::stable::new_empty(drafting.token, {rows(drafting)})),
        scores(torch::stable::new_empty(drafting.token, {2, rows(drafting)}, ScalarType::Float)),
        accepted(torch::stable::empty_like(seq_lens)),
        next_token(torch::stable::empty_like(seq_lens)) {
    if (sampled) logits = std::make_unique<Logits>(drafting, heads);
  }

  static int64_t rows(const Drafting& drafting) { return drafting.token.size(0) * drafting.rows(); }
};

// Layers [0, E) and [E, L), which may be none, on the rows that each of them takes.
struct Depths {
  LayerStack shallow, deep;
  ForwardShape one, all;

  Depths(const Drafting& drafting, const LayerStack& shallow, const LayerStack& deep)
      : shallow(shallow), deep(deep), one(drafting.shape(shallow)), all(one) {
    all.rows = drafting.rows();
    if (deep.start < deep.end) all = forward_shape(deep, one.batch, all.rows, one.hidden_size);
  }
};

template <class T, class W>
void run(const DeviceScope& scope, const Drafting& drafting, const Depths& depths, const Heads& heads,
         const Verified& verified, const SampledArgs& sampled) {
  const auto below = depths.shallow.layers<T>(depths.one);
  std::vector<LayerWeights<T>> above;
  if (depths.deep.start < depths.deep.end) above = depths.deep.layers<T>(depths.all);
  const Tensor memory = scratch_bytes(drafting.token, ForwardScratch<T>::bytes(depths.one));
  const Tensor wide_memory = scratch_bytes(drafting.token, ForwardScratch<T>::bytes(depths.all));
  const RoundArgs<T, W> args{
      drafting.args<T>(verified.partial),
      layers_of<T>(depths.shallow, below, depths.one, memory),
      layers_of<T>(depths.shallow, above, depths.all, wide_memory),
      head_of<T, W>(heads.norm_weight, heads.small, depths.one.hidden_size, heads.eps, heads.map, heads.scale),
      head_of<T, T>(heads.norm_weight, heads.full, depths.one.hidden_size, heads.eps, {}, {}),
      static_cast<Choice*>(verified.partial.data_ptr()),
      static_cast<int64_t*>(verified.target.data_ptr()),
      static_cast<float*>(verified.scores.data_ptr()),
      data<int64_t>(depths.shallow.seq_lens, "seq_lens", {depths.one.batch}),
      static_cast<int64_t*>(verified.accepted.data_ptr()),
      static_cast<int64_t*>(verified.next_token.data_ptr()),
      sampled};
  Chain chain(scope.stream());
  check_head_launch("speculative_round", depths.one.hidden_size, speculative_round(chain, args));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> speculative_round_op(
    const Tensor& token_in, const Tensor& embedding, const std::vector<Tensor>& weights, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& cos, const Tensor& sin, const Tensor& seq_lens, int64_t exit_layer,
    const Tensor& norm_weight, const Tensor& head_weight, double eps, int64_t num_speculations,
    const std::optional<Tensor>& draft_head_weight, const std::optional<Tensor>& draft_token_map,
    const std::optional<Tensor>& draft_head_scale, const std::optional<Tensor>& slots, double draft_threshold,
    const std::optional<Tensor>& temperature, const std::optional<Tensor>& seed) {
  const DeviceScope scope(token_in,
                          {&embedding, &k_cache, &v_cache, &cos, &sin, &seq_lens, &norm_weight, &head_weight});
  check_device(token_in, {&draft_head_weight, &draft_token_map, &draft_head_scale, &slots, &temperature, &seed});
  const int64_t num_layers = k_cache.size(0),
                each = num_layers > 0 ? static_cast<int64_t>(weights.size()) / num_layers : 0;
  LSK_REQUIRE(1 <= exit_layer && exit_layer <= num_layers, "exit_layer ", exit_layer, " of ", num_layers, " layers");
  LSK_REQUIRE(!temperature.has_value() || seed.has_value(), "temperature needs seed");
  const Tensor token = contiguous(token_in);
  const Heads heads{norm_weight,     head_weight,      draft_head_weight ? *draft_head_weight : head_weight,
                    draft_token_map, draft_head_scale, eps};
  const Drafting drafting(token, embedding, num_speculations, true, draft_threshold);
  Verified out(drafting, heads, seq_lens, temperature.has_value());
  if (token.size(0) == 0) return {drafting.tokens, out.accepted, out.next_token, drafting.probability};
  const auto middle = weights.begin() + each * exit_layer;
  const std::vector<Tensor> below(weights.begin(), middle), above(middle, weights.end());
  const Depths depths(drafting, {below, k_cache, v_cache, cos, sin, seq_lens, slots, 0, exit_layer, eps},
                      {above, k_cache, v_cache, cos, sin, seq_lens, slots, exit_layer, num_layers, eps});
  SampledArgs sampled{};
  if (out.logits != nullptr) {
    sampled = out.logits->scratch.args(drafting.tokens, out.logits->draft, out.logits->target, seq_lens, *temperature,
                                       *seed, draft_token_map, out.accepted, out.next_token);
  }
  with_head_types(embedding.scalar_type(), draft_head_scale.has_value(),
                  [&]<class T, class W>(T*, W*) { run<T, W>(scope, drafting, depths, heads, out, sampled); });
  return {drafting.tokens, out.accepted, out.next_token, drafting.probability};
}

}  // namespace
}  // namespace lsk

STABLE_TORCH_LIBRARY_IMPL(layerskip_native, CUDA, m) {
  m.impl("speculative_round", TORCH_BOX(&lsk::speculative_round_op));
}
