// Layers [start, end) and the draft layers after them, as tensors: weights, caches, positions. Shared by
// partial_forward, draft and speculative_round.
#pragma once

#include <vector>

#include "common/checks.h"
#include "common/layer_weights.h"

namespace lsk {

struct LayerStack {
  const std::vector<Tensor>& weights;
  const Tensor &k_cache, &v_cache, &cos, &sin, &seq_lens;
  const std::optional<Tensor>& slots;
  int64_t start, end;
  double eps;
  int64_t num_draft_layers = 0;  // their weights come last; their keys and values are the cache's last layers

  int64_t total_layers() const { return end - start + num_draft_layers; }
  int64_t weights_per_layer() const { return static_cast<int64_t>(weights.size()) / total_layers(); }

  // Cache layer of the i-th layer; draft layers use the last ones.
  int64_t cache_layer(int64_t i) const { return i < end - start ? start + i : k_cache.size(0) - total_layers() + i; }

  // Checked sizes for `rows` rows of each of `batch` sequences; start < end.
  ForwardShape shape(int64_t batch, int64_t rows, int64_t hidden_size) const {
    LSK_REQUIRE(k_cache.dim() == 5 && cos.dim() == 2, "the cache must have rank 5, cos 2");
    LSK_REQUIRE(0 <= start && start < end && end <= k_cache.size(0), "layers [", start, ", ", end, ") of ",
                k_cache.size(0));
    LSK_REQUIRE(0 <= num_draft_layers && num_draft_layers <= k_cache.size(0) - end, "num_draft_layers must lie in [0, ",
                k_cache.size(0) - end, "], got ", num_draft_layers);
    const int64_t each = weights_per_layer(), head_dim = k_cache.size(4);
    LSK_REQUIRE((each == kRequiredWeights || each == kAllWeights) &&
                    each * total_layers() == static_cast<int64_t>(weights.size()),
                "got ", weights.size(), " weights for ", total_layers(), " layers");
    LSK_REQUIRE(eps >= 0, "eps must not be negative, got ", eps);
    check_head_dim(head_dim);
    const ForwardShape out{batch,
                           rows,
                           hidden_size,
                           weights[layer_weight::kQ].size(0) / head_dim,
                           k_cache.size(2),
                           head_dim,
                           weights[layer_weight::kGate].size(0),
                           k_cache.size(3),
                           k_cache.size(1)};
    check_num_heads(out.num_heads, out.num_kv_heads);
    LSK_REQUIRE(slots.has_value() || out.num_slots == batch, "the cache has ", out.num_slots, " rows for ", batch,
                " sequences, and no slots are given");
    LSK_REQUIRE(rows <= out.capacity, rows, " rows do not fit a cache of capacity ", out.capacity);
    LSK_REQUIRE(cos.size(0) >= out.capacity, "cos has ", cos.size(0), " positions, the cache's capacity is ",
                out.capacity);
    return out;
  }

  template <class T>
  std::vector<LayerWeights<T>> layers(const ForwardShape& s) const {
    using Sizes = std::initializer_list<int64_t>;
    const auto take = [](const Tensor& tensor, const char* name, Sizes sizes) -> const T* {
      return data<T>(tensor, name, sizes);
    };
    const auto take_optional = [](const Tensor& tensor, const char* name, Sizes sizes) -> const T* {
      return tensor.numel() == 0 ? nullptr : data<T>(tensor, name, sizes);
    };
    const int64_t num_layers = k_cache.size(0), stride = s.num_slots * s.num_kv_heads * s.capacity * s.head_dim;
    T* keys = data<T>(k_cache, "k_cache", {num_layers, s.num_slots, s.num_kv_heads, s.capacity, s.head_dim});
    T* values = data<T>(v_cache, "v_cache", {num_layers, s.num_slots, s.num_kv_heads, s.capacity, s.head_dim});
    std::vector<LayerWeights<T>> out;
    out.reserve(total_layers());
    for (int64_t i = 0; i < total_layers(); ++i) {
      const int64_t each = weights_per_layer();
      out.push_back(take_layer<T>(weights.data() + i * each, each, s, take, take_optional, matrix<T>));
      out.back().k_cache = keys + cache_layer(i) * stride;
      out.back().v_cache = values + cache_layer(i) * stride;
    }
    return out;
  }
};

// Splits the weights of L layers and the draft layers after them: `drafting` has layers [0, E) and the draft layers,
// `deep` the layers [E, L) that verify.
struct RoundWeights {
  std::vector<Tensor> drafting, deep;
  int64_t num_layers;  // L

  RoundWeights(const std::vector<Tensor>& weights, const Tensor& k_cache, int64_t exit_layer,
               int64_t num_draft_layers) {
    LSK_REQUIRE(k_cache.dim() == 5, "the cache must have rank 5");
    const int64_t total = k_cache.size(0), each = total > 0 ? static_cast<int64_t>(weights.size()) / total : 0;
    LSK_REQUIRE(0 <= num_draft_layers && num_draft_layers < total, "num_draft_layers must lie in [0, ", total - 1,
                "], got ", num_draft_layers);
    num_layers = total - num_draft_layers;
    LSK_REQUIRE(1 <= exit_layer && exit_layer <= num_layers, "exit_layer must lie in [1, ", num_layers, "], got ",
                exit_layer);
    LSK_REQUIRE(each * total == static_cast<int64_t>(weights.size()), "got ", weights.size(), " weights for ", total,
                " layers");
    const auto exit = weights.begin() + each * exit_layer, draft_layers = weights.begin() + each * num_layers;
    drafting.assign(weights.begin(), exit);
    drafting.insert(drafting.end(), draft_layers, weights.end());
    deep.assign(exit, draft_layers);
  }
};

}  // namespace lsk
