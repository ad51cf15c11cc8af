// rope_kv_append and verify_attention on CPU tensors.
#include "cpu/attention.h"

namespace lsk {
namespace {

Tensor rope_kv_append(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cos, const Tensor& sin,
                      const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                      const std::optional<Tensor>& slots_in) {
  const Tensor q = contiguous(q_in), k = contiguous(k_in), v = contiguous(v_in);
  const int64_t batch = q.size(0), rows = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
  const int64_t num_kv_heads = k.size(2), num_slots = k_cache.size(0), capacity = k_cache.size(2),
                positions = cos.size(0);
  check_head_dim(head_dim);
  LSK_REQUIRE(positions >= capacity, "cos has ", positions, " positions, the cache's capacity is ", capacity);
  const int64_t* lengths = data<int64_t>(seq_lens, "seq_lens", {batch});
  const int64_t* slots = data<int64_t>(slots_in, "slots", {batch});
  check_capacity(lengths, batch, rows, capacity);
  check_slots(slots, batch, num_slots);
  Tensor out = torch::stable::empty_like(q);
  with_float_type(q.scalar_type(), [&]<class T>(T*) {
    const RopeStep<T> step{data<T>(q, "q", {batch, rows, num_heads, head_dim}),
                           data<T>(k, "k", {batch, rows, num_kv_heads, head_dim}),
                           data<T>(v, "v", {batch, rows, num_kv_heads, head_dim}),
                           nullptr,
                           nullptr,
                           data<float>(cos, "cos", {positions, head_dim / 2}),
                           data<float>(sin, "sin", {positions, head_dim / 2}),
                           static_cast<T*>(out.data_ptr()),
                           data<T>(k_cache, "k_cache", {num_slots, num_kv_heads, capacity, head_dim}),
                           data<T>(v_cache, "v_cache", {num_slots, num_kv_heads, capacity, head_dim}),
                           lengths,
                           slots,
                           batch,
                           rows,
                           num_heads,
                           num_kv_heads,
                           capacity,
                           head_dim,
                           0.0f};
    run_team(1, [&](const Member& member) { step.run(member); });  // too little work for a second thread
  });
  return out;
}

Tensor verify_attention(const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                        const std::optional<Tensor>& slots_in) {
  const Tensor q = contiguous(q_in);
  const int64_t batch = q.size(0), rows = q.size(1), num_heads = q.size(2), head_dim = q.size(3);
  const int64_t num_slots = k_cache.size(0), num_kv_heads = k_cache.size(1), capacity = k_cache.size(2);
  check_head_dim(head_dim);
  check_num_heads(num_heads, num_kv_heads);
  const int64_t* lengths = data<int64_t>(seq_lens, "seq_lens", {batch});
  const int64_t* slots = data<int64_t>(slots_in, "slots", {batch});
  check_capacity(lengths, batch, rows, capacity);
  check_slots(slots, batch, num_slots);
  Tensor out = torch::stable::empty_like(q);
  if (out.numel() == 0) return out;
  with_float_type(q.scalar_type(), [&]<class T>(T*) {
    AttentionStep<T> step{data<T>(q, "q", {batch, rows, num_heads, head_dim}),
                          data<T>(k_cache, "k_cache", {num_slots, num_kv_heads, capacity, head_dim}),
                          data<T>(v_cache, "v_cache", {num_slots, num_kv_heads, capacity, head_dim}),
                          lengths,
                          slots,
                          batch,
                          rows,
                          num_heads,
                          num_kv_heads,
                          capacity,
                          head_dim,
                          AttentionStep<T>::count_splits(lengths, batch, rows),
                          nullptr};
    const int threads = num_threads();
    const int64_t partial = AttentionStep<T>::partial_size(step, step.splits, threads);
    Workspace workspace(Workspace::bytes<float>(partial));
    step.partial = workspace.take<float>(partial);
    run_team(threads, [&](const Member& member) {
      step.run(member, member.share(batch * rows * num_heads), static_cast<T*>(out.data_ptr()));
    });
  });
  return out;
}

}  // namespace
}  // namespace lsk

LSK_LIBRARY(CPU, m) {
  m.impl("rope_kv_append", TORCH_BOX(&lsk::rope_kv_append));
  m.impl("verify_attention", TORCH_BOX(&lsk::verify_attention));
}
