// partial_forward on CPU tensors.
#include "cpu/forward.h"
#include "cpu/ops.h"

namespace lsk {

Tensor partial_forward(const Tensor& hidden_in, const std::vector<Tensor>& weights, const Tensor& k_cache,
                       const Tensor& v_cache, const Tensor& cos, const Tensor& sin, const Tensor& seq_lens,
                       int64_t start, int64_t end, double eps, const std::optional<Tensor>& slots) {
  Tensor hidden = torch::stable::clone(contiguous(hidden_in));
  LSK_REQUIRE(hidden.dim() == 3 && k_cache.dim() == 5, "hidden must have rank 3, the cache 5");
  LSK_REQUIRE(0 <= start && start <= end && end <= k_cache.size(0), "layers [", start, ", ", end, ") of ",
              k_cache.size(0));
  if (start == end || hidden.numel() == 0) return hidden;
  const LayerStack stack{weights, k_cache, v_cache, cos, sin, seq_lens, slots, start, end, eps};
  const CheckedShape place(stack, hidden.size(0), hidden.size(1), hidden.size(2));
  with_float_type(hidden.scalar_type(), [&]<class T>(T*) {
    Forward<T>(place.shape, cos, sin, eps)
        .run(layers_of<T>(stack, place.shape), data<int64_t>(seq_lens, "seq_lens", {place.shape.batch}), place.slots,
             static_cast<T*>(hidden.data_ptr()));
  });
  return hidden;
}

}  // namespace lsk

LSK_LIBRARY(CPU, m) { m.impl("partial_forward", TORCH_BOX(&lsk::partial_forward)); }
