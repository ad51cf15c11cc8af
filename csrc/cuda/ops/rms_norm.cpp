// rms_norm on CUDA tensors.
#include "cuda/rms_norm.h"
#include "cuda/ops/tensors.h"

namespace lsk {
namespace {

Tensor rms_norm_op(const Tensor& x_in, const Tensor& weight, double eps) {
  const DeviceScope scope(x_in, {&weight});
  const Tensor x = contiguous(x_in);
  LSK_REQUIRE(x.dim() >= 1 && eps >= 0, "x needs a dimension, and eps must not be negative");
  const int64_t width = x.size(x.dim() - 1), rows = width == 0 ? 0 : x.numel() / width;
  check_sizes({width});
  Tensor out = torch::stable::empty_like(x);
  with_device_type(x.scalar_type(), [&]<class T>(T*) {
    Chain chain(scope.stream());
    check_launch("rms_norm",
                 rms_norm<T>(chain, {static_cast<const T*>(x.data_ptr()), width}, data<T>(weight, "weight", {width}),
                             static_cast<float>(eps), rows, width, {static_cast<T*>(out.data_ptr()), width}));
  });
  return out;
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CUDA, m) { m.impl("rms_norm", TORCH_BOX(&lsk::rms_norm_op)); }
