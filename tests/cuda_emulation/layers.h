// For the files in ops/: layers out of the pointers that a test gives.
#pragma once

#include <vector>

#include "common/layer_weights.h"
#include "cuda_emulation/weights.h"

namespace emu {

// Layers [begin, end); `weights` has all of each layer, null where it has none, and `formats` the codes of their
// formats, `caches` the keys and the values of each layer.
template <class T>
std::vector<lsk::LayerWeights<T>> layers(void** weights, const int64_t* formats, void** caches, int64_t begin,
                                         int64_t end, const lsk::ForwardShape& shape) {
  struct Source {
    const void* data;
    int64_t format;
  };
  using Sizes = std::initializer_list<int64_t>;
  const auto take = [](const Source& source, const char*, Sizes) { return static_cast<const T*>(source.data); };
  const auto take_matrix = [](const Source& source, const char*, Sizes sizes) {
    return weight<T>(source.data, *(sizes.begin() + 1), source.format);
  };
  std::vector<lsk::LayerWeights<T>> out;
  for (int64_t l = begin; l < end; ++l) {
    Source own[lsk::kAllWeights];
    for (int64_t i = 0; i < lsk::kAllWeights; ++i)
      own[i] = {weights[l * lsk::kAllWeights + i], formats[l * lsk::kAllWeights + i]};
    out.push_back(lsk::take_layer<T>(own, lsk::kAllWeights, shape, take, take, take_matrix));
    out.back().k_cache = static_cast<T*>(caches[2 * l]), out.back().v_cache = static_cast<T*>(caches[2 * l + 1]);
  }
  return out;
}

}  // namespace emu
