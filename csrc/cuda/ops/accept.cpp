// accept_greedy and accept_sampled on CUDA tensors.
#include <tuple>

#include "cuda/ops/accept.h"

namespace lsk {
namespace {

std::tuple<Tensor, Tensor> accept_greedy_op(const Tensor& draft_in, const Tensor& target_in, const Tensor& seq_lens) {
  const DeviceScope scope(draft_in, {&target_in, &seq_lens});
  LSK_REQUIRE(draft_in.dim() == 2, "draft must have rank 2");
  const Tensor draft = contiguous(draft_in), target = contiguous(target_in);
  const int64_t batch = draft.size(0), num_speculations = draft.size(1);
  check_sizes({batch, num_speculations});
  int64_t* lengths = data<int64_t>(seq_lens, "seq_lens", {batch});
  Tensor accepted = torch::stable::empty_like(seq_lens), next_token = torch::stable::empty_like(seq_lens);
  Chain chain(scope.stream());
  check_launch("accept_greedy", accept_greedy(chain, data<int64_t>(draft, "draft", {batch, num_speculations}),
                                              data<int64_t>(target, "target", {batch, num_speculations + 1}), lengths,
                                              static_cast<int64_t*>(accepted.data_ptr()),
                                              static_cast<int64_t*>(next_token.data_ptr()), batch, num_speculations));
  return {accepted, next_token};
}

std::tuple<Tensor, Tensor> accept_sampled_op(const Tensor& draft_in, const Tensor& draft_logits_in,
                                             const Tensor& target_logits_in, const Tensor& seq_lens,
                                             const Tensor& temperature, const Tensor& seed,
                                             const std::optional<Tensor>& token_map) {
  const DeviceScope scope(draft_in, {&draft_logits_in, &target_logits_in, &seq_lens, &temperature, &seed});
  check_device(draft_in, {&token_map});
  LSK_REQUIRE(draft_in.dim() == 2 && draft_logits_in.dim() == 3 && target_logits_in.dim() == 3,
              "draft must have rank 2, the logits 3");
  const Tensor draft = contiguous(draft_in), draft_logits = contiguous(draft_logits_in);
  const Tensor target_logits = contiguous(target_logits_in);
  Tensor accepted = torch::stable::empty_like(seq_lens), next_token = torch::stable::empty_like(seq_lens);
  const AcceptSampledScratch scratch(draft, draft_logits.size(2), target_logits.size(2), token_map.has_value());
  const AcceptSampledArgs args =
      scratch.args(draft, draft_logits, target_logits, seq_lens, temperature, seed, token_map, accepted, next_token);
  Chain chain(scope.stream());
  check_launch("accept_sampled", accept_sampled(chain, args));
  return {accepted, next_token};
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CUDA, m) {
  m.impl("accept_greedy", TORCH_BOX(&lsk::accept_greedy_op));
  m.impl("accept_sampled", TORCH_BOX(&lsk::accept_sampled_op));
}
