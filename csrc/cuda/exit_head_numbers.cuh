// 16 bytes of states or weights at a time, as the exit head's products take them.
#pragma once

#include "cuda/common.cuh"

namespace lsk {

__device__ __forceinline__ float to_float(int8_t x) { return static_cast<float>(x); }

// 16 bytes, aligned, as four words.
__device__ __forceinline__ void read_words(const void* from, uint32_t* words) {
  const uint4 v = *static_cast<const uint4*>(from);
  words[0] = v.x;
  words[1] = v.y;
  words[2] = v.z;
  words[3] = v.w;
}

// 16 aligned bytes of W as floats.
template <class W>
__device__ __forceinline__ void read_floats(const void* from, float (&out)[16 / sizeof(W)]) {
  constexpr int kCount = 16 / sizeof(W);
  uint32_t words[4];
  read_words(from, words);
  W values[kCount];
  memcpy(values, words, 16);
#pragma unroll
  for (int i = 0; i < kCount; ++i) out[i] = to_float(values[i]);
}

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  const T both[2] = {from_float<T>(first), from_float<T>(second)};
  uint32_t bits;
  memcpy(&bits, both, 4);
  return bits;
}

// 16 aligned bytes of W as pairs of 16-bit T, which hold every int8 exactly.
template <class T, class W>
__device__ __forceinline__ void read_pairs(const void* from, uint32_t (&out)[8 / sizeof(W)]) {
  if constexpr (std::is_same_v<T, W>) {
    read_words(from, out);
  } else {
    float wide[16 / sizeof(W)];
    read_floats<W>(from, wide);
#pragma unroll
    for (int i = 0; i < 8 / static_cast<int>(sizeof(W)); ++i) out[i] = pack_pair<T>(wide[2 * i], wide[2 * i + 1]);
  }
}

}  // namespace lsk
