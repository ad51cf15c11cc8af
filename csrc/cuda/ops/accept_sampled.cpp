// accept_sampled on CUDA tensors.
#include <tuple>

#include "cuda/ops/heads.h"
#include "cuda/ops/sampled.h"

namespace lsk {
namespace {

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
  const SampledScratch scratch(draft, draft_logits.size(2), target_logits.size(2), token_map.has_value());
  const SampledArgs args =
      scratch.args(draft, draft_logits, target_logits, seq_lens, temperature, seed, token_map, accepted, next_token);
  Chain chain(scope.stream());
  check_launch("accept_sampled", accept_sampled(chain, args));
  return {accepted, next_token};
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CUDA, m) { m.impl("accept_sampled", TORCH_BOX(&lsk::accept_sampled_op)); }
