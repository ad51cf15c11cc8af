// draft on CUDA tensors.
#include <tuple>

#include "cuda/ops/drafting.h"

namespace lsk {
namespace {

std::tuple<Tensor, Tensor, Tensor> draft_op(
    const Tensor& token_in, const Tensor& embedding, const std::vector<Tensor>& weights, const Tensor& k_cache,
    const Tensor& v_cache, const Tensor& cos, const Tensor& sin, const Tensor& seq_lens, int64_t exit_layer,
    const Tensor& norm_weight, const Tensor& head_weight, double eps, int64_t num_speculations, bool extend,
    const std::optional<Tensor>& token_map, const std::optional<Tensor>& scale, const std::optional<Tensor>& slots,
    double draft_threshold, const std::optional<Tensor>& temperature, const std::optional<Tensor>& seed,
    const std::optional<Tensor>& logits, int64_t num_draft_layers) {
  const DeviceScope scope(token_in,
                          {&embedding, &k_cache, &v_cache, &cos, &sin, &seq_lens, &norm_weight, &head_weight});
  check_device(token_in, {&token_map, &scale, &slots, &temperature, &seed, &logits});
  const Tensor token = contiguous(token_in);
  const int64_t batch = token.size(0), vocab_size = head_weight.size(0);
  const DraftTensors drafting(token, embedding, norm_weight, num_speculations, extend, draft_threshold);
  if (drafting.empty()) return {drafting.tokens, drafting.states, drafting.probability};
  const LayerStack stack{weights, k_cache, v_cache, cos, sin, seq_lens, slots, 0, exit_layer, eps, num_draft_layers};
  const ForwardShape shape = drafting.shape(stack);
  const Tensor partial = partial_argmax_lse(token, batch, vocab_size);
  const HeadSampling sampling{data<float>(temperature, "temperature", {batch}), data<int64_t>(seed, "seed", {batch})};
  LSK_REQUIRE(!sampling.temperature || sampling.seed, "temperature needs seed");
  const HeadLogits written{logits_data(logits, "logits", {batch, num_speculations, vocab_size}),
                           logits.has_value() ? logits->stride(0) : 0};
  with_device_type(norm_weight.scalar_type(), [&]<class T>(T*) {
    const Head<T> head = head_of<T>(norm_weight, head_weight, shape.hidden_size, eps, token_map, scale);
    const auto layers = device_layers<T>(stack, shape);
    const Tensor memory = scratch_bytes(token, ForwardScratch<T>::bytes(shape));
    const auto [shallow, draft_layers] = split_layers<T>(stack, layers, shape, memory);
    Chain chain(scope.stream());
    check_launch("draft", clear_tickets(chain, shallow.scratch.attention, memory.data_ptr()));
    check_launch("draft", draft(chain, drafting.args<T>(partial), shallow, draft_layers, head, sampling, written,
                                logits.has_value() ? logits->stride(1) : 0));
  });
  return {drafting.tokens, drafting.states, drafting.probability};
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CUDA, m) { m.impl("draft", TORCH_BOX(&lsk::draft_op)); }
