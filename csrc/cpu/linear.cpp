// linear and swiglu on CPU tensors.
#include "cpu/common.h"

namespace lsk {
namespace {

using torch::stable::new_empty;

// Packs x once per team and shares [0, N) among its members.
template <class T, class F>
void share_rows(const T* x, int64_t rows, int64_t width, int64_t N, F step) {
  const int threads = num_threads();
  Workspace workspace(Workspace::bytes<float>(packed_size(rows, width)));
  float* memory = workspace.take<float>(packed_size(rows, width));
  kernels<T>().pack(x, nullptr, 0.0f, rows, width, memory);
  run_team(threads, [&](const Member& member) {
    const Range share = member.share(N, kUnit);
    step(Packed{memory, rows, width}, share.begin, share.end);
  });
}

Tensor linear(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual_in) {
  const Tensor x = contiguous(x_in);
  const int64_t rows = x.size(0), width = x.size(1), N = weight.size(0);
  Tensor out = new_empty(x, {rows, N});
  std::optional<Tensor> residual;
  if (residual_in.has_value()) residual = contiguous(*residual_in);
  with_float_type(x.scalar_type(), [&]<class T>(T*) {
    LinearArgs<T> args{{},
                       data<T>(weight, "weight", {N, width}),
                       data<T>(bias, "bias", {N}),
                       data<T>(residual, "residual", {rows, N}),
                       static_cast<T*>(out.data_ptr()),
                       N,
                       nullptr};
    share_rows(data<T>(x, "x", {rows, width}), rows, width, N, [&](Packed packed, int64_t begin, int64_t end) {
      LinearArgs<T> own = args;
      own.x = packed;
      kernels<T>().linear(own, begin, end);
    });
  });
  return out;
}

Tensor swiglu(const Tensor& x_in, const Tensor& gate, const Tensor& up) {
  const Tensor x = contiguous(x_in);
  const int64_t rows = x.size(0), width = x.size(1), N = gate.size(0);
  Tensor out = new_empty(x, {rows, N});
  with_float_type(x.scalar_type(), [&]<class T>(T*) {
    const T* gates = data<T>(gate, "gate", {N, width});
    const T* ups = data<T>(up, "up", {N, width});
    T* to = static_cast<T*>(out.data_ptr());
    share_rows(data<T>(x, "x", {rows, width}), rows, width, N, [&](Packed packed, int64_t begin, int64_t end) {
      kernels<T>().swiglu({packed, gates, ups, to, N, nullptr}, begin, end);
    });
  });
  return out;
}

}  // namespace
}  // namespace lsk

STABLE_TORCH_LIBRARY_IMPL(layerskip_native, CPU, m) {
  m.impl("linear", TORCH_BOX(&lsk::linear));
  m.impl("swiglu", TORCH_BOX(&lsk::swiglu));
}
