// rope_kv_append on CUDA tensors.
#include "cuda/rope.h"
#include "cuda/ops/tensors.h"

namespace lsk {
namespace {

Tensor rope_kv_append_op(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cos,
                         const Tensor& sin, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                         const std::optional<Tensor>& slots) {
  const DeviceScope scope(q_in, {&k_in, &v_in, &cos, &sin, &k_cache, &v_cache, &seq_lens, slots ? &*slots : &seq_lens});
  LSK_REQUIRE(q_in.dim() == 4 && k_in.dim() == 4 && k_cache.dim() == 4, "q, k and the cache must have rank 4");
  const Tensor q = contiguous(q_in), k = contiguous(k_in), v = contiguous(v_in);
  const int64_t batch = q.size(0), rows = q.size(1), heads = q.size(2), size = q.size(3), groups = k.size(2);
  const int64_t positions = cos.size(0);
  check_head_size(size);
  Tensor out = torch::stable::empty_like(q);
  with_device_type(q.scalar_type(), [&]<class T>(T*) {
    const Cache<T> cache = cache_of<T>(k_cache, v_cache, seq_lens, slots, batch, rows, size);
    LSK_REQUIRE(cache.groups == groups, "k has ", groups, " key/value heads, the cache ", cache.groups);
    LSK_REQUIRE(positions >= cache.capacity, "cos has ", positions, " positions, the cache's capacity is ",
                cache.capacity);
    RopeArgs<T> args{};
    args.q = {data<T>(q, "q", {batch, rows, heads, size}), heads * size};
    args.k = {data<T>(k, "k", {batch, rows, groups, size}), groups * size};
    args.v = {data<T>(v, "v", {batch, rows, groups, size}), groups * size};
    args.angles = {data<float>(cos, "cos", {positions, size / 2}), data<float>(sin, "sin", {positions, size / 2})};
    args.q_out = {static_cast<T*>(out.data_ptr()), heads * size};
    args.heads = static_cast<int>(heads);
    Chain chain(scope.stream());
    check_launch("rope_kv_append", rope_kv_append<T>(chain, args, cache));
  });
  return out;
}

}  // namespace
}  // namespace lsk

STABLE_TORCH_LIBRARY_IMPL(layerskip_native, CUDA, m) { m.impl("rope_kv_append", TORCH_BOX(&lsk::rope_kv_append_op)); }
