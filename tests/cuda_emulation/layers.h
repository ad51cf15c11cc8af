// For the files in ops/: layers out of the pointers that a test gives.
#pragma once

#include <vector>

#include "common/layer_weights.h"

namespace emu {

// Layers [begin, end); `weights` has all of each layer, null where it has none, `caches` its keys and its values.
template <class T>
std::vector<lsk::LayerWeights<T>> layers(void** weights, void** caches, int64_t begin, int64_t end,
                                         const lsk::ForwardShape& shape) {
  const auto take = [](void* weight, const char*, std::initializer_list<int64_t>) {
    return static_cast<const T*>(weight);
  };
  std::vector<lsk::LayerWeights<T>> out;
  for (int64_t l = begin; l < end; ++l) {
    out.push_back(
        lsk::take_layer<T, const T*>(weights + l * lsk::kAllWeights, lsk::kAllWeights, shape, take, take, take));
    out.back().k_cache = static_cast<T*>(caches[2 * l]), out.back().v_cache = static_cast<T*>(caches[2 * l + 1]);
  }
  return out;
}

}  // namespace emu
