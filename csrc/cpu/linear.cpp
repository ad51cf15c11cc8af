// linear and swiglu on CPU tensors.
#include "common/matrix.h"
#include "cpu/common.h"

namespace lsk {
namespace {

using torch::stable::new_empty;

// Packs x once per team and shares [0, d_out) among its members.
template <class T, class F>
void share_rows(const T* x, int64_t rows, int64_t d_in, int64_t d_out, const Weight& weight, F step) {
  const int threads = num_threads();
  Workspace workspace(Workspace::bytes<float>(packed_size(rows, d_in)));
  float* memory = workspace.take<float>(packed_size(rows, d_in));
  kernels<T>().pack(x, nullptr, 0.0f, 0, rows, d_in, weight, memory);
  run_team(threads, [&](const Member& member) {
    const Range share = member.share(d_out, kUnit);
    step(Packed{memory, rows, d_in}, share.begin, share.end);
  });
}

Tensor linear(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& residual_in) {
  const Tensor x = contiguous(x_in);
  const int64_t rows = x.size(0), d_in = x.size(1), d_out = weight.size(0);
  Tensor out = new_empty(x, {rows, d_out});
  std::optional<Tensor> residual;
  if (residual_in.has_value()) residual = contiguous(*residual_in);
  with_float_type(x.scalar_type(), [&]<class T>(T*) {
    LinearArgs<T> args{{},
                       matrix<T>(weight, "weight", {d_out, d_in}),
                       data<T>(bias, "bias", {d_out}),
                       data<T>(residual, "residual", {rows, d_out}),
                       static_cast<T*>(out.data_ptr()),
                       d_out,
                       nullptr};
    const T* from = data<T>(x, "x", {rows, d_in});
    share_rows(from, rows, d_in, d_out, args.weight, [&](Packed packed, int64_t begin, int64_t end) {
      LinearArgs<T> own = args;
      own.x = packed;
      kernels<T>().linear(own, begin, end);
    });
  });
  return out;
}

Tensor swiglu(const Tensor& x_in, const Tensor& gate, const Tensor& up) {
  const Tensor x = contiguous(x_in);
  const int64_t rows = x.size(0), d_in = x.size(1), d_out = gate.size(0);
  Tensor out = new_empty(x, {rows, d_out});
  with_float_type(x.scalar_type(), [&]<class T>(T*) {
    const Weight gates = matrix<T>(gate, "gate", {d_out, d_in}), ups = matrix<T>(up, "up", {d_out, d_in});
    check_alike(gates, ups, "gate and up");
    const T* from = data<T>(x, "x", {rows, d_in});
    T* to = static_cast<T*>(out.data_ptr());
    share_rows(from, rows, d_in, d_out, gates, [&](Packed packed, int64_t begin, int64_t end) {
      kernels<T>().swiglu({packed, gates, ups, to, d_out, nullptr}, begin, end);
    });
  });
  return out;
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CPU, m) {
  m.impl("linear", TORCH_BOX(&lsk::linear));
  m.impl("swiglu", TORCH_BOX(&lsk::swiglu));
}
