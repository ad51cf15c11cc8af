// rms_norm on CPU tensors.
#include "cpu/common.h"

namespace lsk {
namespace {

Tensor rms_norm(const Tensor& x_in, const Tensor& weight, double eps) {
  const Tensor x = contiguous(x_in);
  LSK_REQUIRE(x.dim() >= 1 && eps >= 0, "x needs a dimension, and eps must not be negative");
  const int64_t width = x.size(x.dim() - 1), rows = width == 0 ? 0 : x.numel() / width;
  Tensor out = torch::stable::empty_like(x);
  with_float_type(x.scalar_type(), [&]<class T>(T*) {
    const T* from = static_cast<const T*>(x.data_ptr());
    const T* norm = data<T>(weight, "weight", {width});
    T* to = static_cast<T*>(out.data_ptr());
    const Kernels<T>& table = kernels<T>();
    const bool small = rows * width < (1 << 15);  // a team costs more than such a norm
    run_team(small ? 1 : num_threads(), [&](const Member& member) {
      const Range share = member.share(rows);
      for (int64_t r = share.begin; r < share.end; ++r)
        table.rms_norm(from + r * width, norm, static_cast<float>(eps), width, to + r * width);
    });
  });
  return out;
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CPU, m) { m.impl("rms_norm", TORCH_BOX(&lsk::rms_norm)); }
