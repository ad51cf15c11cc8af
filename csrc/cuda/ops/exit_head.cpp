// exit_head on CUDA tensors.
#include <tuple>

#include "cuda/ops/heads.h"

namespace lsk {
namespace {

std::tuple<Tensor, Tensor, Tensor> exit_head_op(const Tensor& hidden_in, const Tensor& norm_weight,
                                                const Tensor& head_weight, double eps,
                                                const std::optional<Tensor>& token_map,
                                                const std::optional<Tensor>& scale,
                                                const std::optional<Tensor>& temperature,
                                                const std::optional<Tensor>& seed, const std::optional<Tensor>& offset,
                                                const std::optional<Tensor>& logits) {
  const DeviceScope scope(hidden_in, {&norm_weight, &head_weight});
  check_device(hidden_in, {&token_map, &scale, &temperature, &seed, &offset, &logits});
  LSK_REQUIRE(hidden_in.dim() == 2 && head_weight.dim() == 2, "hidden and head_weight must have rank 2");
  LSK_REQUIRE(!temperature.has_value() || (seed.has_value() && offset.has_value()),
              "temperature needs seed and offset");
  const Tensor hidden = contiguous(hidden_in);
  const int64_t rows = hidden.size(0), hidden_size = hidden.size(1), vocab_size = head_weight.size(0);
  check_sizes({rows});
  Tensor token = torch::stable::new_empty(hidden, {rows}, ScalarType::Long);
  Tensor logit = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  Tensor logsumexp = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  const Tensor memory = partial_argmax_lse(hidden, rows, vocab_size);
  const HeadSampling sampling{data<float>(temperature, "temperature", {rows}), data<int64_t>(seed, "seed", {rows}),
                              data<int64_t>(offset, "offset", {rows})};
  const HeadLogits written{logits_data(logits, "logits", {rows, vocab_size}),
                           logits.has_value() ? logits->stride(0) : 0};
  ArgmaxLse* partial = static_cast<ArgmaxLse*>(memory.data_ptr());
  with_device_type(hidden.scalar_type(), [&]<class T>(T*) {
    const Head<T> head = head_of<T>(norm_weight, head_weight, hidden_size, eps, token_map, scale);
    const Rows<const T> states{static_cast<const T*>(hidden.data_ptr()), hidden_size};
    Chain chain(scope.stream());
    check_launch("exit_head", exit_head_tiles(chain, head, states, rows, sampling, written, partial));
    check_launch(
        "exit_head",
        exit_head_merge(chain, partial, rows, vocab_size, head.token_map, static_cast<int64_t*>(token.data_ptr()),
                        static_cast<float*>(logit.data_ptr()), static_cast<float*>(logsumexp.data_ptr())));
  });
  return {token, logit, logsumexp};
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CUDA, m) { m.impl("exit_head", TORCH_BOX(&lsk::exit_head_op)); }
