// accept_greedy on CPU tensors.
#include "cpu/common.h"
#include "cpu/ops.h"

namespace lsk {

std::tuple<Tensor, Tensor> accept_greedy(const Tensor& draft_in, const Tensor& target_in, const Tensor& seq_lens) {
  const Tensor draft = contiguous(draft_in), target = contiguous(target_in);
  const int64_t batch = draft.size(0), drafted = draft.size(1);
  Tensor accepted = torch::stable::empty_like(seq_lens), next_token = torch::stable::empty_like(seq_lens);
  const int64_t* drafts = data<int64_t>(draft, "draft", {batch, drafted});
  const int64_t* targets = data<int64_t>(target, "target", {batch, drafted + 1});
  int64_t* lengths = data<int64_t>(seq_lens, "seq_lens", {batch});
  int64_t* counts = static_cast<int64_t*>(accepted.data_ptr());
  int64_t* next = static_cast<int64_t*>(next_token.data_ptr());
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t *own = drafts + b * drafted, *wanted = targets + b * (drafted + 1);
    int64_t count = 0;
    while (count < drafted && own[count] >= 0 && own[count] == wanted[count]) ++count;
    counts[b] = count;
    next[b] = wanted[count];
    lengths[b] += count + 1;
  }
  return {accepted, next_token};
}

}  // namespace lsk

LSK_LIBRARY(CPU, m) { m.impl("accept_greedy", TORCH_BOX(&lsk::accept_greedy)); }
