// The weights of a decoder layer, their order and their shapes: for CPU and CUDA alike, and without torch.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace lsk {

constexpr int64_t kRequiredWeights = 9, kAllWeights = 14;  // of a layer, without and with the optional ones

// Sizes of a forward: `batch` sequences of `rows` rows each, in a cache of `cache_rows` rows.
struct ForwardShape {
  int64_t batch, rows, hidden_size, num_heads, num_kv_heads, head_dim, intermediate_size, capacity, cache_rows;

  int64_t tokens() const { return batch * rows; }
  int64_t queries() const { return num_heads * head_dim; }
  int64_t keys() const { return num_kv_heads * head_dim; }
};

// One layer: its weights, of which the last five may be null, and its part of the cache.
template <class T>
struct LayerWeights {
  const T *attn_norm, *q, *k, *v, *o, *mlp_norm, *gate, *up, *down;
  const T *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr, *q_norm = nullptr, *k_norm = nullptr;
  T *k_cache = nullptr, *v_cache = nullptr;  // [S, G, T, C]
};

// Takes the `count` weights of a layer from `sources`, in the order of the schema. `take(source, name, shape)` gives
// the memory of one; `take_optional` does, too, and null where the model does not have it.
template <class T, class Source, class Take, class TakeOptional>
LayerWeights<T> take_layer(const Source* sources, int64_t count, const ForwardShape& s, Take take,
                           TakeOptional take_optional) {
  LayerWeights<T> out;
  out.attn_norm = take(sources[0], "attn_norm", {s.hidden_size});
  out.q = take(sources[1], "q", {s.queries(), s.hidden_size});
  out.k = take(sources[2], "k", {s.keys(), s.hidden_size});
  out.v = take(sources[3], "v", {s.keys(), s.hidden_size});
  out.o = take(sources[4], "o", {s.hidden_size, s.queries()});
  out.mlp_norm = take(sources[5], "mlp_norm", {s.hidden_size});
  out.gate = take(sources[6], "gate", {s.intermediate_size, s.hidden_size});
  out.up = take(sources[7], "up", {s.intermediate_size, s.hidden_size});
  out.down = take(sources[8], "down", {s.hidden_size, s.intermediate_size});
  if (count == kRequiredWeights) return out;
  out.q_bias = take_optional(sources[9], "q_bias", {s.queries()});
  out.k_bias = take_optional(sources[10], "k_bias", {s.keys()});
  out.v_bias = take_optional(sources[11], "v_bias", {s.keys()});
  out.q_norm = take_optional(sources[12], "q_norm", {s.head_dim});
  out.k_norm = take_optional(sources[13], "k_norm", {s.head_dim});
  return out;
}

}  // namespace lsk
