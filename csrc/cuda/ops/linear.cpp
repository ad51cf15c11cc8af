// linear and swiglu on CUDA tensors.
#include "cuda/linear.h"
#include "cuda/ops/tensors.h"

namespace lsk {
namespace {

using torch::stable::new_empty;

Tensor linear_op(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual_in) {
  const DeviceScope scope(x_in, {&weight, bias ? &*bias : &x_in, residual_in ? &*residual_in : &x_in});
  LSK_REQUIRE(x_in.dim() == 2 && weight.dim() == 2, "x and weight must have rank 2");
  const Tensor x = rows_for(x_in, is_packed(weight));
  const int64_t rows = x.size(0), d_in = x.size(1), d_out = weight.size(0);
  check_sizes({d_in, d_out});
  Tensor out = new_empty(x, {rows, d_out});
  std::optional<Tensor> residual;
  if (residual_in.has_value()) residual = contiguous(*residual_in);
  with_device_type(x.scalar_type(), [&]<class T>(T*) {
    Chain chain(scope.stream());
    check_launch("linear", linear<T>(chain, {data<T>(x, "x", {rows, d_in}), d_in},
                                     card_matrix<T>(weight, "weight", {d_out, d_in}), data<T>(bias, "bias", {d_out}),
                                     {data<T>(residual, "residual", {rows, d_out}), d_out}, rows, d_in, d_out,
                                     {static_cast<T*>(out.data_ptr()), d_out}));
  });
  return out;
}

Tensor swiglu_op(const Tensor& x_in, const Tensor& gate, const Tensor& up) {
  const DeviceScope scope(x_in, {&gate, &up});
  LSK_REQUIRE(x_in.dim() == 2 && gate.dim() == 2, "x and gate must have rank 2");
  const Tensor x = rows_for(x_in, is_packed(gate));
  const int64_t rows = x.size(0), d_in = x.size(1), intermediate_size = gate.size(0);
  check_sizes({d_in, intermediate_size});
  Tensor out = new_empty(x, {rows, intermediate_size});
  with_device_type(x.scalar_type(), [&]<class T>(T*) {
    const Weight first = card_matrix<T>(gate, "gate", {intermediate_size, d_in});
    const Weight second = card_matrix<T>(up, "up", {intermediate_size, d_in});
    LSK_REQUIRE(first.format == second.format, "gate and up must have one format");
    Chain chain(scope.stream());
    check_launch("swiglu", swiglu<T>(chain, {data<T>(x, "x", {rows, d_in}), d_in}, nullptr, 0.0f, first, second, rows,
                                     d_in, intermediate_size, {static_cast<T*>(out.data_ptr()), intermediate_size}));
  });
  return out;
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CUDA, m) {
  m.impl("linear", TORCH_BOX(&lsk::linear_op));
  m.impl("swiglu", TORCH_BOX(&lsk::swiglu_op));
}
