// verify_attention on CUDA tensors.
#include "cuda/verify_attention.h"
#include "cuda/ops/tensors.h"

namespace lsk {
namespace {

Tensor verify_attention_op(const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                           const std::optional<Tensor>& slots) {
  const DeviceScope scope(q_in, {&k_cache, &v_cache, &seq_lens, slots ? &*slots : &seq_lens});
  LSK_REQUIRE(q_in.dim() == 4 && k_cache.dim() == 4, "q and the cache must have rank 4");
  const Tensor q = contiguous(q_in);
  const int64_t batch = q.size(0), rows = q.size(1), num_heads = q.size(2), head_dim = q.size(3),
                width = num_heads * head_dim;
  check_head_dim(head_dim);
  check_num_heads(num_heads, k_cache.size(1));
  check_planes(batch, k_cache.size(1));
  Tensor out = torch::stable::empty_like(q);
  if (out.numel() == 0) return out;
  with_device_type(q.scalar_type(), [&]<class T>(T*) {
    const Cache<T> cache = cache_of<T>(k_cache, v_cache, seq_lens, slots, batch, rows, head_dim);
    const AttentionScratch scratch(batch, rows, num_heads, cache.num_kv_heads, cache.capacity, head_dim);
    const Tensor memory = scratch_bytes(q, scratch.bytes(head_dim));
    Chain chain(scope.stream());
    check_launch("verify_attention", clear_tickets(chain, scratch, memory.data_ptr()));
    check_launch("verify_attention",
                 verify_attention<T>(chain, {data<T>(q, "q", {batch, rows, num_heads, head_dim}), width}, cache,
                                     scratch, memory.data_ptr(), {static_cast<T*>(out.data_ptr()), width}));
  });
  return out;
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CUDA, m) { m.impl("verify_attention", TORCH_BOX(&lsk::verify_attention_op)); }
