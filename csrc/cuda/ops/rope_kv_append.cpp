// rope_kv_append on CUDA tensors.
#include "cuda/rope_kv_append.h"
#include "cuda/ops/tensors.h"

namespace lsk {
namespace {

Tensor rope_kv_append_op(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cos,
                         const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                         const std::optional<Tensor>& slots) {
  const DeviceScope scope(q_in, {&k_in, &v_in, &cos, &sin, &k_cache, &v_cache, &seq_lens, slots ? &*slots : &seq_lens});
  LSK_REQUIRE(q_in.dim() == 4 && k_in.dim() == 4 && k_cache.dim() == 4, "q, k and the cache must have rank 4");
  const Tensor q = contiguous(q_in), k = contiguous(k_in), v = contiguous(v_in);
  const int64_t batch = q.size(0), rows = q.size(1), num_heads = q.size(2), head_dim = q.size(3),
                num_kv_heads = k.size(2);
  const int64_t positions = cos.size(0);
  check_head_dim(head_dim);
  Tensor out = torch::stable::empty_like(q);
  with_device_type(q.scalar_type(), [&]<class T>(T*) {
    const Cache<T> cache = cache_of<T>(k_cache, v_cache, seq_lens, slots, batch, rows, head_dim);
    LSK_REQUIRE(cache.num_kv_heads == num_kv_heads, "k has ", num_kv_heads, " key/value heads, the cache ",
                cache.num_kv_heads);
    LSK_REQUIRE(positions >= cache.capacity, "cos has ", positions, " positions, the cache's capacity is ",
                cache.capacity);
    RopeArgs<T> args{};
    args.q = {data<T>(q, "q", {batch, rows, num_heads, head_dim}), num_heads * head_dim};
    args.k = {data<T>(k, "k", {batch, rows, num_kv_heads, head_dim}), num_kv_heads * head_dim};
    args.v = {data<T>(v, "v", {batch, rows, num_kv_heads, head_dim}), num_kv_heads * head_dim};
    args.angles = {data<float>(cos, "cos", {positions, head_dim / 2}),
                   data<float>(sin, "sin", {positions, head_dim / 2})};
    args.q_out = {static_cast<T*>(out.data_ptr()), num_heads * head_dim};
    args.num_heads = static_cast<int>(num_heads);
    Chain chain(scope.stream());
    check_launch("rope_kv_append", rope_kv_append<T>(chain, args, cache));
  });
  return out;
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CUDA, m) { m.impl("rope_kv_append", TORCH_BOX(&lsk::rope_kv_append_op)); }
