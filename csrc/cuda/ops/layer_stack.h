// Arguments of the layer kernels from a LayerStack, with the checks that the CUDA kernels need.
#pragma once

#include <vector>

#include "common/layer_stack.h"
#include "cuda/partial_forward.h"
#include "cuda/ops/tensors.h"

namespace lsk {

// As LayerStack::shape, with the size limits of the kernels; no size in ForwardScratch overflows within them.
inline ForwardShape forward_shape(const LayerStack& stack, int64_t batch, int64_t rows, int64_t hidden_size) {
  const ForwardShape out = stack.shape(batch, rows, hidden_size);
  check_planes(batch, out.num_kv_heads);
  check_attention(batch, out.num_heads, out.capacity, out.head_dim);
  check_sizes({hidden_size, out.intermediate_size, product(batch, rows)});
  for (const Tensor& weight : stack.weights)
    LSK_REQUIRE(weight.is_cuda() && weight.get_device_index() == stack.k_cache.get_device_index(),
                "expected all weights on the device of the cache");
  return out;
}

// Everything except `in` and `out`.
template <class T>
ForwardArgs<T> forward_args(const LayerStack& stack, const ForwardShape& s) {
  ForwardArgs<T> out{};
  out.shape = s;
  out.angles = {data<float>(stack.cos, "cos", {stack.cos.size(0), s.head_dim / 2}),
                data<float>(stack.sin, "sin", {stack.cos.size(0), s.head_dim / 2})};
  out.seq_lens = data<int64_t>(stack.seq_lens, "seq_lens", {s.batch});
  out.slots = data<int64_t>(stack.slots, "slots", {s.batch});
  out.eps = static_cast<float>(stack.eps);
  return out;
}

// The layers of a stack. The weights of one launch must have one format.
template <class T>
std::vector<LayerWeights<T>> device_layers(const LayerStack& stack, const ForwardShape& shape) {
  std::vector<LayerWeights<T>> out = stack.layers<T>(shape);
  for (const LayerWeights<T>& layer : out) {
    check_packed(layer.q, "q"), check_packed(layer.k, "k"), check_packed(layer.v, "v"), check_packed(layer.o, "o");
    check_packed(layer.gate, "gate"), check_packed(layer.up, "up"), check_packed(layer.down, "down");
    LSK_REQUIRE(layer.q.format == layer.k.format && layer.q.format == layer.v.format,
                "q, k and v must have one format");
    LSK_REQUIRE(layer.gate.format == layer.up.format, "gate and up must have one format");
    LSK_REQUIRE(layer.q.format == Format::kPlain || begins_aligned(layer.attn_norm),
                "beside packed weights attn_norm must begin at a multiple of 16 bytes");
    LSK_REQUIRE(layer.gate.format == Format::kPlain || begins_aligned(layer.mlp_norm),
                "beside packed weights mlp_norm must begin at a multiple of 16 bytes");
  }
  return out;
}

}  // namespace lsk
