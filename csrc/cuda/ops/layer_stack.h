// Everything that layers [start, end) take but the states, as tensors: what partial_forward, draft and
// speculative_round share.
#pragma once

#include <vector>

#include "cuda/forward.h"
#include "cuda/ops/tensors.h"

namespace lsk {

constexpr int64_t kRequired = 9, kAll = 14;  // weights of a layer, without and with the optional ones

// The weights of one layer, in the order in which the op takes them.
template <class T>
LayerWeights<T> layer_weights(const Tensor* w, bool optional, const ForwardShape& s) {
  LayerWeights<T> out;
  out.attn_norm = data<T>(w[0], "attn_norm", {s.width});
  out.q = data<T>(w[1], "q", {s.queries(), s.width});
  out.k = data<T>(w[2], "k", {s.keys(), s.width});
  out.v = data<T>(w[3], "v", {s.keys(), s.width});
  out.o = data<T>(w[4], "o", {s.width, s.queries()});
  out.mlp_norm = data<T>(w[5], "mlp_norm", {s.width});
  out.gate = data<T>(w[6], "gate", {s.features, s.width});
  out.up = data<T>(w[7], "up", {s.features, s.width});
  out.down = data<T>(w[8], "down", {s.width, s.features});
  if (!optional) return out;
  const auto maybe = [](const Tensor& tensor, const char* name, int64_t size) -> const T* {
    return tensor.numel() == 0 ? nullptr : data<T>(tensor, name, {size});
  };
  out.q_bias = maybe(w[9], "q_bias", s.queries());
  out.k_bias = maybe(w[10], "k_bias", s.keys());
  out.v_bias = maybe(w[11], "v_bias", s.keys());
  out.q_norm = maybe(w[12], "q_norm", s.size);
  out.k_norm = maybe(w[13], "k_norm", s.size);
  return out;
}

struct LayerStack {
  const std::vector<Tensor>& weights;
  const Tensor &k_cache, &v_cache, &cos, &sin, &seq_lens;
  const std::optional<Tensor>& slots;
  int64_t start, end;
  double eps;

  int64_t tensors_per_layer() const { return static_cast<int64_t>(weights.size()) / (end - start); }

  // The sizes for `rows` rows of `width` for each of `batch` sequences, checked; start < end.
  ForwardShape shape(int64_t batch, int64_t rows, int64_t width) const {
    LSK_REQUIRE(k_cache.dim() == 5 && cos.dim() == 2, "the cache must have rank 5, cos 2");
    const int64_t count = end - start, size = k_cache.size(4);
    LSK_REQUIRE(0 <= start && start < end && end <= k_cache.size(0), "layers [", start, ", ", end, ") of ",
                k_cache.size(0));
    const int64_t each = tensors_per_layer();
    LSK_REQUIRE((each == kRequired || each == kAll) && each * count == static_cast<int64_t>(weights.size()), "got ",
                weights.size(), " weights for ", count, " layers");
    LSK_REQUIRE(eps >= 0, "eps must not be negative, got ", eps);
    check_head_size(size);
    const ForwardShape out{
        batch,           rows,           width, weights[1].size(0) / size, k_cache.size(2), size, weights[6].size(0),
        k_cache.size(3), k_cache.size(1)};
    check_groups(out.heads, out.groups);
    check_planes(batch, out.groups);
    check_sizes({width, out.queries(), out.features, out.capacity, batch, rows});
    LSK_REQUIRE(slots.has_value() || out.slot_count == batch, "the cache has ", out.slot_count, " rows for ", batch,
                " sequences, and no slots are given");
    LSK_REQUIRE(rows <= out.capacity, rows, " rows do not fit a cache of capacity ", out.capacity);
    LSK_REQUIRE(cos.size(0) >= out.capacity, "cos has ", cos.size(0), " positions, the cache's capacity is ",
                out.capacity);
    return out;
  }

  template <class T>
  std::vector<LayerWeights<T>> layers(const ForwardShape& s) const {
    const int64_t depth = k_cache.size(0), stride = s.slot_count * s.groups * s.capacity * s.size;
    T* keys = data<T>(k_cache, "k_cache", {depth, s.slot_count, s.groups, s.capacity, s.size});
    T* values = data<T>(v_cache, "v_cache", {depth, s.slot_count, s.groups, s.capacity, s.size});
    for (const Tensor& weight : weights)
      LSK_REQUIRE(weight.is_cuda() && weight.get_device_index() == k_cache.get_device_index(),
                  "expected all weights on the device of the cache");
    std::vector<LayerWeights<T>> out;
    for (int64_t l = start; l < end; ++l) {
      const int64_t each = tensors_per_layer();
      out.push_back(layer_weights<T>(weights.data() + (l - start) * each, each == kAll, s));
      out.back().k_cache = keys + l * stride;
      out.back().v_cache = values + l * stride;
    }
    return out;
  }

  // All but `in` and `out`.
  template <class T>
  ForwardArgs<T> args(const ForwardShape& s) const {
    ForwardArgs<T> out{};
    out.shape = s;
    out.angles = {data<float>(cos, "cos", {cos.size(0), s.size / 2}),
                  data<float>(sin, "sin", {cos.size(0), s.size / 2})};
    out.seq_lens = data<int64_t>(seq_lens, "seq_lens", {s.batch});
    out.slots = data<int64_t>(slots, "slots", {s.batch});
    out.eps = static_cast<float>(eps);
    return out;
  }
};

}  // namespace lsk
