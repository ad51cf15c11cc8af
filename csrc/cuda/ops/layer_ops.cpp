// The ops of a decoder layer on CUDA tensors: rms_norm, linear, swiglu, rope_kv_append and verify_attention.
#include "cuda/layer_ops.h"
#include "cuda/ops/tensors.h"

namespace lsk {
namespace {

using torch::stable::new_empty;

Tensor rms_norm_op(const Tensor& x_in, const Tensor& weight, double eps) {
  const DeviceScope scope(x_in, {&weight});
  const Tensor x = contiguous(x_in);
  LSK_REQUIRE(x.dim() >= 1 && eps >= 0, "x needs a dimension, and eps must not be negative");
  const int64_t width = x.size(x.dim() - 1), rows = width == 0 ? 0 : x.numel() / width;
  check_sizes({width});
  Tensor out = torch::stable::empty_like(x);
  with_device_type(x.scalar_type(), [&]<class T>(T*) {
    Chain chain(scope.stream());
    check_launch("rms_norm",
                 rms_norm<T>(chain, {static_cast<const T*>(x.data_ptr()), width}, data<T>(weight, "weight", {width}),
                             static_cast<float>(eps), rows, width, {static_cast<T*>(out.data_ptr()), width}));
  });
  return out;
}

Tensor linear_op(const Tensor& x_in, const Tensor& weight, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& residual_in) {
  const DeviceScope scope(x_in, {&weight, bias ? &*bias : &x_in, residual_in ? &*residual_in : &x_in});
  LSK_REQUIRE(x_in.dim() == 2 && weight.dim() == 2, "x and weight must have rank 2");
  const Tensor x = rows_for(x_in, is_packed(weight));
  const int64_t rows = x.size(0), d_in = x.size(1), d_out = weight.size(0);
  check_sizes({d_in, d_out});
  Tensor out = new_empty(x, {rows, d_out});
  std::optional<Tensor> residual;
  if (residual_in.has_value()) residual = contiguous(*residual_in);
  with_device_type(x.scalar_type(), [&]<class T>(T*) {
    Chain chain(scope.stream());
    check_launch("linear", linear<T>(chain, {data<T>(x, "x", {rows, d_in}), d_in},
                                     device_matrix<T>(weight, "weight", {d_out, d_in}), data<T>(bias, "bias", {d_out}),
                                     {data<T>(residual, "residual", {rows, d_out}), d_out}, rows, d_in, d_out,
                                     {static_cast<T*>(out.data_ptr()), d_out}));
  });
  return out;
}

Tensor swiglu_op(const Tensor& x_in, const Tensor& gate, const Tensor& up) {
  const DeviceScope scope(x_in, {&gate, &up});
  LSK_REQUIRE(x_in.dim() == 2 && gate.dim() == 2, "x and gate must have rank 2");
  const Tensor x = rows_for(x_in, is_packed(gate));
  const int64_t rows = x.size(0), d_in = x.size(1), intermediate_size = gate.size(0);
  check_sizes({d_in, intermediate_size});
  Tensor out = new_empty(x, {rows, intermediate_size});
  with_device_type(x.scalar_type(), [&]<class T>(T*) {
    const Weight first = device_matrix<T>(gate, "gate", {intermediate_size, d_in});
    const Weight second = device_matrix<T>(up, "up", {intermediate_size, d_in});
    LSK_REQUIRE(first.format == second.format, "gate and up must have one format");
    Chain chain(scope.stream());
    check_launch("swiglu", swiglu<T>(chain, {data<T>(x, "x", {rows, d_in}), d_in}, nullptr, 0.0f, first, second, rows,
                                     d_in, intermediate_size, {static_cast<T*>(out.data_ptr()), intermediate_size}));
  });
  return out;
}

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
  check_sizes({product(num_heads, head_dim), product(batch, rows, num_heads + 2 * num_kv_heads)});
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
  check_attention(batch, num_heads, k_cache.size(2), head_dim);
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

LSK_LIBRARY(CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&lsk::rms_norm_op));
  m.impl("linear", TORCH_BOX(&lsk::linear_op));
  m.impl("swiglu", TORCH_BOX(&lsk::swiglu_op));
  m.impl("rope_kv_append", TORCH_BOX(&lsk::rope_kv_append_op));
  m.impl("verify_attention", TORCH_BOX(&lsk::verify_attention_op));
}
