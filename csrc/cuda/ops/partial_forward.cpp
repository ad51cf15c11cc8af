// partial_forward on CUDA tensors.
#include "cuda/partial_forward.h"
#include "cuda/ops/layer_stack.h"

namespace lsk {
namespace {

Tensor partial_forward_op(const Tensor& hidden_in, const std::vector<Tensor>& weights, const Tensor& k_cache,
                          const Tensor& v_cache, const Tensor& cos, const Tensor& sin, const Tensor& seq_lens,
                          int64_t start, int64_t end, double eps, const std::optional<Tensor>& slots) {
  const DeviceScope scope(hidden_in, {&k_cache, &v_cache, &cos, &sin, &seq_lens, slots ? &*slots : &seq_lens});
  LSK_REQUIRE(hidden_in.dim() == 3 && k_cache.dim() == 5, "hidden must have rank 3, the cache 5");
  LSK_REQUIRE(0 <= start && start <= end && end <= k_cache.size(0), "layers [", start, ", ", end, ") of ",
              k_cache.size(0));
  const Tensor hidden = rows_for(hidden_in, true);
  if (start == end || hidden.numel() == 0) return torch::stable::clone(hidden);
  Tensor out = torch::stable::empty_like(hidden);
  const LayerStack stack{weights, k_cache, v_cache, cos, sin, seq_lens, slots, start, end, eps};
  const int64_t hidden_size = hidden.size(2);
  const ForwardShape shape = forward_shape(stack, hidden.size(0), hidden.size(1), hidden_size);
  with_device_type(hidden.scalar_type(), [&]<class T>(T*) {
    const std::vector<LayerWeights<T>> layers = device_layers<T>(stack, shape);
    const Tensor memory = scratch_bytes(hidden, ForwardScratch<T>::bytes(shape));
    const ForwardScratch<T> scratch(shape, memory.data_ptr());
    ForwardArgs<T> args = forward_args<T>(stack, shape);
    args.in = {static_cast<const T*>(hidden.data_ptr()), hidden_size};
    args.out = {static_cast<T*>(out.data_ptr()), hidden_size};
    Chain chain(scope.stream());
    check_launch("partial_forward", clear_tickets(chain, scratch.attention, memory.data_ptr()));
    check_launch("partial_forward", forward<T>(chain, args, layers.data(), end - start, scratch));
  });
  return out;
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CUDA, m) { m.impl("partial_forward", TORCH_BOX(&lsk::partial_forward_op)); }
