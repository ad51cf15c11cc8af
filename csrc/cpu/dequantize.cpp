// What a packed weight stands for, in fp32, bf16 or fp16: for torch's own matmuls on many rows.
#include "common/matrix.h"
#include "cpu/common.h"

namespace lsk {
namespace {

void dequantize(const Tensor& weight, const Tensor& out) {
  const bool packed = weight.scalar_type() == ScalarType::Byte || weight.scalar_type() == ScalarType::Short;
  LSK_REQUIRE(packed && out.dim() == 2, "dequantize takes packed weights, and rank 2");
  const int64_t rows = out.size(0), width = out.size(1);
  with_float_type(out.scalar_type(), [&]<class T>(T*) {
    const Weight from = matrix<T>(weight, "weight", {rows, width});
    T* to = data<T>(out, "out", {rows, width});
    run_team(num_threads(), [&](const Member& member) {
      const Range share = member.share(rows, kUnit);
      for (int64_t n = share.begin; n < share.end; ++n) kernels<T>().expand_row(from, n, width, to + n * width);
    });
  });
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CPU, m) { m.impl("dequantize", TORCH_BOX(&lsk::dequantize)); }
