// accept_greedy on CUDA tensors.
#include "cuda/accept_greedy.h"

#include <tuple>

#include "cuda/ops/tensors.h"

namespace lsk {
namespace {

std::tuple<Tensor, Tensor> accept_greedy_op(const Tensor& draft_in, const Tensor& target_in, const Tensor& seq_lens) {
  const DeviceScope scope(draft_in, {&target_in, &seq_lens});
  LSK_REQUIRE(draft_in.dim() == 2, "draft must have rank 2");
  const Tensor draft = contiguous(draft_in), target = contiguous(target_in);
  const int64_t batch = draft.size(0), drafted = draft.size(1);
  int64_t* lengths = data<int64_t>(seq_lens, "seq_lens", {batch});
  Tensor accepted = torch::stable::empty_like(seq_lens), next_token = torch::stable::empty_like(seq_lens);
  Chain chain(scope.stream());
  check_launch("accept_greedy", accept_greedy(chain, data<int64_t>(draft, "draft", {batch, drafted}),
                                              data<int64_t>(target, "target", {batch, drafted + 1}), lengths,
                                              static_cast<int64_t*>(accepted.data_ptr()),
                                              static_cast<int64_t*>(next_token.data_ptr()), batch, drafted));
  return {accepted, next_token};
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CUDA, m) { m.impl("accept_greedy", TORCH_BOX(&lsk::accept_greedy_op)); }
