// rope_kv_append and verify_attention on CPU tensors.
#include "cpu/attention.h"

namespace lsk {
namespace {

Tensor rope_kv_append(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& cos, const Tensor& sin,
                      const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                      const std::optional<Tensor>& slots_in) {
  const Tensor q = contiguous(q_in), k = contiguous(k_in), v = contiguous(v_in);
  const int64_t batch = q.size(0), rows = q.size(1), heads = q.size(2), size = q.size(3);
  const int64_t groups = k.size(2), cached = k_cache.size(0), capacity = k_cache.size(2), positions = cos.size(0);
  check_head_size(size);
  LSK_REQUIRE(positions >= capacity, "cos has ", positions, " positions, the cache's capacity is ", capacity);
  const int64_t* lengths = data<int64_t>(seq_lens, "seq_lens", {batch});
  const int64_t* slots = data<int64_t>(slots_in, "slots", {batch});
  check_capacity(lengths, batch, rows, capacity);
  check_slots(slots, batch, cached);
  Tensor out = torch::stable::empty_like(q);
  with_float_type(q.scalar_type(), [&]<class T>(T*) {
    const RopeStep<T> step{data<T>(q, "q", {batch, rows, heads, size}),
                           data<T>(k, "k", {batch, rows, groups, size}),
                           data<T>(v, "v", {batch, rows, groups, size}),
                           nullptr,
                           nullptr,
                           data<float>(cos, "cos", {positions, size / 2}),
                           data<float>(sin, "sin", {positions, size / 2}),
                           static_cast<T*>(out.data_ptr()),
                           data<T>(k_cache, "k_cache", {cached, groups, capacity, size}),
                           data<T>(v_cache, "v_cache", {cached, groups, capacity, size}),
                           lengths,
                           slots,
                           batch,
                           rows,
                           heads,
                           groups,
                           capacity,
                           size,
                           0.0f};
    run_team(1, [&](const Member& member) { step.run(member); });  // too little work for a second thread
  });
  return out;
}

Tensor verify_attention(const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                        const std::optional<Tensor>& slots_in) {
  const Tensor q = contiguous(q_in);
  const int64_t batch = q.size(0), rows = q.size(1), heads = q.size(2), size = q.size(3);
  const int64_t cached = k_cache.size(0), groups = k_cache.size(1), capacity = k_cache.size(2);
  check_head_size(size);
  check_groups(heads, groups);
  const int64_t* lengths = data<int64_t>(seq_lens, "seq_lens", {batch});
  const int64_t* slots = data<int64_t>(slots_in, "slots", {batch});
  check_capacity(lengths, batch, rows, capacity);
  check_slots(slots, batch, cached);
  Tensor out = torch::stable::empty_like(q);
  with_float_type(q.scalar_type(), [&]<class T>(T*) {
    AttentionStep<T> step{data<T>(q, "q", {batch, rows, heads, size}),
                          data<T>(k_cache, "k_cache", {cached, groups, capacity, size}),
                          data<T>(v_cache, "v_cache", {cached, groups, capacity, size}),
                          lengths,
                          slots,
                          batch,
                          rows,
                          heads,
                          groups,
                          capacity,
                          size,
                          AttentionStep<T>::count_splits(lengths, batch, rows),
                          nullptr};
    Workspace workspace(Workspace::bytes<float>(step.partial_size()));
    step.partial = workspace.take<float>(step.partial_size());
    run_team(num_threads(), [&](const Member& member) {
      step.attend(member);
      member.wait();
      const Range share = member.share(batch * rows * heads);
      step.combine(share.begin, share.end, static_cast<T*>(out.data_ptr()));
    });
  });
  return out;
}

}  // namespace
}  // namespace lsk

STABLE_TORCH_LIBRARY_IMPL(layerskip_native, CPU, m) {
  m.impl("rope_kv_append", TORCH_BOX(&lsk::rope_kv_append));
  m.impl("verify_attention", TORCH_BOX(&lsk::verify_attention));
}
