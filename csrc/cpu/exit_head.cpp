// exit_head on CPU tensors.
#include "cpu/head.h"
#include "cpu/ops.h"

namespace lsk {

std::tuple<Tensor, Tensor, Tensor> exit_head(const Tensor& hidden_in, const Tensor& norm_weight,
                                             const Tensor& head_weight, double eps,
                                             const std::optional<Tensor>& token_map, const std::optional<Tensor>& scale,
                                             const std::optional<Tensor>& temperature,
                                             const std::optional<Tensor>& seed, const std::optional<Tensor>& offset,
                                             const std::optional<Tensor>& logits) {
  const Tensor hidden = contiguous(hidden_in);
  const int64_t rows = hidden.size(0), hidden_size = hidden.size(1);
  const Sampling sampling(temperature, seed, rows);
  LSK_REQUIRE(seed.has_value() == offset.has_value(), "seed and offset come together");
  Tensor token = torch::stable::new_empty(hidden, {rows}, ScalarType::Long);
  Tensor logit = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  Tensor logsumexp = torch::stable::new_empty(hidden, {rows}, ScalarType::Float);
  HeadOptions options = head_options(sampling, logits, {rows, head_weight.size(0)});
  options.offset = data<int64_t>(offset, "offset", {rows});
  with_float_type(hidden.scalar_type(), [&]<class T>(T*) {
    ExitHead<T>(norm_weight, head_weight, hidden_size, eps, token_map, scale)
        .run(data<T>(hidden, "hidden", {rows, hidden_size}), rows,
             {static_cast<int64_t*>(token.data_ptr()), static_cast<float*>(logit.data_ptr()),
              static_cast<float*>(logsumexp.data_ptr())},
             options);
  });
  return {token, logit, logsumexp};
}

}  // namespace lsk

LSK_LIBRARY(CPU, m) { m.impl("exit_head", TORCH_BOX(&lsk::exit_head)); }
