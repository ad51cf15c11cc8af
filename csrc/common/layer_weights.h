// Order and shapes of a decoder layer's weights, for CPU and CUDA. Does not include torch.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "common/weight.h"

namespace lsk {

// Same order as LayerWeights in schemas.py.
namespace layer_weight {
enum : int64_t { kAttnNorm, kQ, kK, kV, kO, kMlpNorm, kGate, kUp, kDown, kQBias, kKBias, kVBias, kQNorm, kKNorm };
}

constexpr int64_t kRequiredWeights = layer_weight::kQBias, kAllWeights = layer_weight::kKNorm + 1;

// Sizes of a forward pass: `batch` sequences of `rows` rows each, in a cache of `num_slots` slots.
struct ForwardShape {
  int64_t batch, rows, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, capacity, num_slots;

  int64_t tokens() const { return batch * rows; }
  int64_t queries() const { return num_heads * head_dim; }
  int64_t keys() const { return num_kv_heads * head_dim; }
};

// Weights of one layer, of which the last five may be null, and its cache.
template <class T>
struct LayerWeights {
  const T *attn_norm, *mlp_norm;
  Weight q, k, v, o, gate, up, down;
  const T *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *q_norm = nullptr, *k_norm = nullptr;
  T *k_cache = nullptr, *v_cache = nullptr;  // [S, G, T, C]
};

// Builds a layer from `num_weights` sources in the order of `layer_weight`. `take(source, name, shape)` returns the
// memory of one; `take_optional` may return null; `take_matrix` returns the weight of a matmul.
template <class T, class Source, class Take, class TakeOptional, class TakeMatrix>
LayerWeights<T> take_layer(const Source* sources, int64_t num_weights, const ForwardShape& s, Take take,
                           TakeOptional take_optional, TakeMatrix take_matrix) {
  using namespace layer_weight;
  LayerWeights<T> out;
  out.attn_norm = take(sources[kAttnNorm], "attn_norm", {s.hidden_size});
  out.q = take_matrix(sources[kQ], "q", {s.queries(), s.hidden_size});
  out.k = take_matrix(sources[kK], "k", {s.keys(), s.hidden_size});
  out.v = take_matrix(sources[kV], "v", {s.keys(), s.hidden_size});
  out.o = take_matrix(sources[kO], "o", {s.hidden_size, s.queries()});
  out.mlp_norm = take(sources[kMlpNorm], "mlp_norm", {s.hidden_size});
  out.gate = take_matrix(sources[kGate], "gate", {s.intermediate_size, s.hidden_size});
  out.up = take_matrix(sources[kUp], "up", {s.intermediate_size, s.hidden_size});
  out.down = take_matrix(sources[kDown], "down", {s.hidden_size, s.intermediate_size});
  if (num_weights == kRequiredWeights) return out;
  out.q_bias = take_optional(sources[kQBias], "q_bias", {s.queries()});
  out.k_bias = take_optional(sources[kKBias], "k_bias", {s.keys()});
  out.v_bias = take_optional(sources[kVBias], "v_bias", {s.keys()});
  out.q_norm = take_optional(sources[kQNorm], "q_norm", {s.head_dim});
  out.k_norm = take_optional(sources[kKNorm], "k_norm", {s.head_dim});
  return out;
}

}  // namespace lsk
