// Counter-based noise: seed, position, token and stream determine a number. No state.
//
// Philox4x32-10 (Salmon et al. 2011), key = the seed, counter = (token, position, stream), first word of the output.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace lsk {

enum NoiseStream : uint32_t { kDraftStream = 0, kAcceptStream = 1, kTargetStream = 2 };

struct NoiseKey {
  uint64_t seed, position;
  uint32_t stream;

  __device__ uint32_t word(uint32_t token) const {
    uint32_t c0 = token, c1 = static_cast<uint32_t>(position), c2 = static_cast<uint32_t>(position >> 32), c3 = stream;
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint64_t first = uint64_t{0xD2511F53u} * c0, second = uint64_t{0xCD9E8D57u} * c2;
      c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(second);
      c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(first);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c0;
  }

  // In (0, 1].
  __device__ float uniform(uint32_t token) const { return (static_cast<float>(word(token)) + 0.5f) * 0x1p-32f; }

  // -log E with E exponential; by a series where 1 - u would lose the bits of u.
  __device__ float gumbel(uint32_t token) const {
    const float u = uniform(token);
    const float exponential = u < 0x1p-10f ? u + u * u / 2 : -logf(fmaxf(1 - u, 0x1p-24f));
    return -logf(exponential);
  }
};

}  // namespace lsk
